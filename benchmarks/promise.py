"""Make the table of how far text moves that the guard was not given, from the raw results of other subjects.

Each line is the mean over seeds of one method. Kinds of text that a task teaches are in a column of their own.
"""

import statistics
from pathlib import Path

from tables import lines, table

from curlora.continual.results import RunResults

HERE = Path(__file__).parent
OWN = "the model's own"
REAL = ["articles", "code", "tweets", "reviews", "dialogues"]
GUARDED_BY = {OWN: ["own"], "articles": ["articles"], "a mix of five kinds": REAL}  # kinds of ``own_text.jsonl``
SHORT = {"answers of the base model": "answers", "what it answers": "answers", "tales of the brothers Grimm": "tales",
         "other articles": "articles"}  # fmt: skip
PROOF = [  # a study, an entry of its recipe, and what it trains
    ("gsm8k", "guarded", "query, key and value, rank 64"),
    ("gsm8k", "guarded-all-linear", "all linear layers, rank 32"),
    ("seeds", "guarded-all-linear", "the same, products in bfloat16"),
    ("rivals", "guarded-r16", "all linear layers, rank 16"),
]
TAUGHT = {"mbpp": "code", "dialogsum": "dialogues"}


def tables():
    return {"promise": promise()}


def promise():
    rows = [*by_text(), *of_one_task(), *of_newswires(), *of_stream()]
    header = ["guard's text", "training", "seeds", "on that text", "other kinds: least", "most", "times as far"]
    return table([*header, "kinds that a task teaches"], rows)


def by_text():
    for text, kinds in GUARDED_BY.items():
        name = {OWN: "own", "a mix of five kinds": "mix"}.get(text, text)
        runs = [row["texts"] for row in lines(HERE / "guard" / "own_text.jsonl") if row["text"] == name]
        moved = means(runs)
        own = statistics.mean(moved.pop(kind) for kind in kinds)
        yield row(text, "GSM8K, upper eight layers, predicted budget 0.01", len(runs), own, moved)


def of_one_task():
    for study, entry, layers in PROOF:
        (results,) = RunResults.load(HERE / "proof" / study / "results.json").by_order().values()
        for method in results.methods:
            if method.entry == entry:
                limit = method.grid.get("max_kl", 0.005)
                moved = of_seeds(method.seeds)
                own = moved.pop("own text")
                yield row(OWN, f"GSM8K, {layers}, limit {limit:g}", len(method.seeds), own, moved)


def of_newswires():
    runs = [RunResults.load(path) for path in sorted((HERE / "demo").glob("seed-*.json"))]
    seeds = [method.seeds[0] for run in runs for method in run.methods if method.name == "budget"]
    moved = of_seeds(seeds)
    yield row(OWN, "newswires, limit 1 %", len(seeds), moved.pop("own text"), moved)


def of_stream():
    results = RunResults.load(HERE / "proof" / "stream" / "results.json")
    for order, run in results.by_order().items():
        names = ", ".join({"gsm8k": "GSM8K", "dialogsum": "DialogSum", "mbpp": "MBPP"}[name] for name in order)
        for method in run.methods:
            if method.name not in ("guarded-all-linear", "guarded-anchors"):
                continue
            anchors = "with" if method.name == "guarded-anchors" else "without"
            training = f"{names}, {anchors} anchors, limit 0.01"
            moved = of_seeds(method.seeds)
            own, taught = moved.pop("own text"), {kind: moved.pop(kind) for kind in TAUGHT.values()}
            yield row(OWN, training, len(method.seeds), own, moved, taught)


def of_seeds(seeds):
    return means([{SHORT.get(name, name): seed.lost(name) for name in seed.heldout} for seed in seeds])


def means(runs):
    return {kind: statistics.mean(run[kind] for run in runs) for kind in runs[0]}


def row(text, training, seeds, own, moved, taught=None):
    least, most = min(moved, key=moved.get), max(moved, key=moved.get)
    ends = [f"{kind} {moved[kind]:.4f}" for kind in (least, most)]
    of_tasks = ", ".join(f"{kind} {kl:.4f} ({kl / own:.1f} times)" for kind, kl in (taught or {}).items())
    times = f"{moved[least] / own:.1f} to {moved[most] / own:.1f}"
    return [text, training, seeds, f"{own:.4f}", *ends, times, of_tasks]
