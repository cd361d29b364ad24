"""Make the guard's tables and curve from the JSON Lines files in this folder."""

import itertools
import math
import statistics
from pathlib import Path

import matplotlib
from tables import lines as read
from tables import table

from curlora.guard import learning_rate

matplotlib.use("svg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
MODEL = "SmolLM2-135M"
TEXTS = ("guard", "articles", "code", "tweets")

# Defaults of a run's settings, for keys that its line leaves out.
STUDY = {"lr": 0.03, "r": 16, "rise": 0.01, "slack": 1.0, "choose": "inverse", "penalty": 0.0, "ewc": 0.0, "probe": 0,
         "times": 1, "targets": "q_proj k_proj v_proj"}  # fmt: skip
FORWARD, REVERSE = "mrpc sst2 s140", "s140 sst2 mrpc"
# The orders and seeds for comparisons of methods: on the usual stream, and on one with three times as many examples.
PAIRS = {
    1: [(FORWARD, 0), (FORWARD, 1), (FORWARD, 2), (REVERSE, 0)],
    3: [(FORWARD, 0), (FORWARD, 1), (REVERSE, 0)],
}
EACH = {"method": "guarded", "choose": "each", "r": 9}
PAIRED = {
    "heads only": {"method": "frozen"},
    "LoRA, 2.5e-4": {"method": "lora", "lr": 2.5e-4},
    "LoRA, 5e-4": {"method": "lora", "lr": 5e-4},
    "LoRA, 1e-3": {"method": "lora", "lr": 1e-3},
    "LoRA, 1e-3, penalty 1.0 on the guard's text": {"method": "lora", "lr": 1e-3, "penalty": 1.0},
    "LoRA, 1e-3, EWC of strength 1,000": {"method": "lora", "lr": 1e-3, "ewc": 1000.0},
    "OSF, 1e-4": {"method": "osf", "lr": 1e-4},
    "CURLoRA, 2e-3": {"method": "curlora", "lr": 2e-3},
    "**guarded at 1 %**": {**EACH, "lr": 0.12, "slack": 4.0},
    "**guarded at 4 %**": {**EACH, "lr": 0.12, "slack": 4.0, "rise": 0.04},
}
LONG = {
    "LoRA, 1e-4": {"method": "lora", "lr": 1e-4},
    "LoRA, 2.5e-4": {"method": "lora", "lr": 2.5e-4},
    "LoRA, 5e-4": {"method": "lora", "lr": 5e-4},
    "LoRA, 1e-3": {"method": "lora", "lr": 1e-3},
    "LoRA, 1e-3, penalty 1.0 on the guard's text": {"method": "lora", "lr": 1e-3, "penalty": 1.0},
    "guarded at 1 %, slack 4, a rate of 0.12": {**EACH, "lr": 0.12, "slack": 4.0},
    "guarded at 1 %, slack 2, a rate of 0.04": {**EACH, "lr": 0.04, "slack": 2.0},
    "guarded at 10 %, slack 4, a rate of 0.12": {**EACH, "lr": 0.12, "slack": 4.0, "rise": 0.1},
    "**guarded at 10 %, slack 2, a rate of 0.04**": {**EACH, "lr": 0.04, "slack": 2.0, "rise": 0.1},
}
DRAWS = {
    "the paper's draw": "inverse", "uniform": "uniform", "by norm": "norm", "by leverage score": "leverage",
    "**redrawn for the task**": "task", "the paper's draw, 1.8 times the budget": "inverse, 1.8 x the budget",
}  # fmt: skip
SETTING = ("task", "steps", "budget", "r", "targets", "clip", "choose")  # the keys that runs at several rates share
FIXED = 0.06  # a fixed rate, to compare with the rule's
KINDS = ["articles", "code", "tweets", "reviews", "dialogues", "answers"]  # kinds of text that no guard has seen
GUARDED_BY = {"own": "what the base writes", "articles": "articles", "mix": "a mix of the five kinds"}
PREDICTORS = {
    "own": "measured on these rows", "own, 512": "measured, the same text in rows of 512",
    "articles": "measured, other articles in rows of 512", "guard": "**predicted by the guard**",
    "undamped": "the same moments, not damped", "rows, each layer": "by rows, each layer by itself",
    "rows, across layers": "by rows, all layers together",
}  # fmt: skip
PROJECTIONS = {"q": "query", "k": "key", "v": "value", "o": "output", "gate": "gate", "up": "up", "down": "down"}


def tables():
    return {
        "paired": paired(), "paired_short": paired_short(), "long": long(), "draws": draws(), "choice": choice(),
        "projections": projections(), "rates": rates(), "plain_rates": plain_rates(), "rule": rule(),
        "own_text": own_text(), "five_trainings": five_trainings(), "predictors": predictors(), "scales": scales(),
        "across": across(), "merging": merging(), "directions": directions(), "fixed_basis": fixed_basis(),
        "train_adapters": train_adapters(),
    }  # fmt: skip


def figures(docs):
    curve(docs / "study.svg")


def lines(name):
    return read(HERE / f"{name}.jsonl")


def means(given, times):
    """Return means over the orders and seeds of ``PAIRS``, and the standard error of the average accuracy."""
    wanted = {**STUDY, **given, "times": times}
    if given["method"] == "frozen":
        wanted.pop("lr")
    runs = [
        run
        for run in ({**STUDY, **line} for line in lines("study"))
        if all(run[name] == value for name, value in wanted.items()) and (run["stream"], run["seed"]) in PAIRS[times]
    ]
    averages = [run["average"] for run in runs]
    return {
        "runs": len(runs),
        "parameters": runs[0]["numbers"],
        "average": statistics.mean(averages),
        "error": statistics.stdev(averages) / math.sqrt(len(runs)) if len(runs) > 1 else math.nan,
        "loss": statistics.mean(run["loss"] for run in runs),
        "forgetting": statistics.mean(run["forgetting"] for run in runs),
        "drift": statistics.mean(run["texts"]["articles"]["drift"] for run in runs),
        **{text: 100 * statistics.mean(run["texts"][text]["rise"] for run in runs) for text in TEXTS},
    }


HEADER = ["parameters", "average accuracy", "mean loss", "forgetting", "guard's text", "other articles", "code",
           "tweets", "drift, articles"]  # fmt: skip


def cells(found):
    error = "" if math.isnan(found["error"]) else f" ± {found['error']:.3f}"
    return [
        f"{found['parameters']:,}", f"{found['average']:.3f}{error}", f"{found['loss']:.3f}",
        signed(found["forgetting"], 3), *(share(found[text]) for text in TEXTS), drift(found["drift"]),
    ]  # fmt: skip


def signed(value, digits):
    return f"{value:+.{digits}f}" if value else "0"


def share(percent):
    if not percent:
        return "0"
    shown = f"{percent:+,.{0 if abs(percent) >= 50 else 1}f}"
    return ("0.0" if shown in ("+0.0", "-0.0") else shown) + " %"


def drift(nats):
    return "0" if not nats else f"{nats:.2f}" if nats >= 1 else f"{nats:.3f}"


def paired():
    return table(["", *HEADER], [[name, *cells(means(given, 1))] for name, given in PAIRED.items()])


def paired_short():
    wanted = ["parameters", "average accuracy", "guard's text", "other articles", "drift, articles"]
    found = {name: dict(zip(HEADER, cells(means(given, 1)), strict=True)) for name, given in PAIRED.items()}
    return table(["", *wanted], [[name, *(of[one] for one in wanted)] for name, of in found.items()])


def long():
    found = {name: means(given, 3) for name, given in LONG.items()}
    return table(["", "runs", *HEADER], [[name, one["runs"], *cells(one)] for name, one in found.items()])


def draws():
    found = {name: [row for row in lines("choices") if row["choose"] == draw] for name, draw in DRAWS.items()}
    least = min(statistics.mean(row["loss"] for row in rows) for rows in found.values())
    shown = []
    for name, rows in found.items():
        mean = lambda of, rows=rows: statistics.mean(map(of, rows))  # noqa: E731
        loss = mean(lambda row: row["loss"])
        shown.append([
            name, f"{mean(lambda row: row['accuracy']):.3f}", ", ".join(f"{row['loss']:.3f}" for row in rows),
            bold(f"{loss:.3f}", loss == least), f"{mean(lambda row: row['predicted']):.4f}",
            f"{mean(lambda row: row['articles']['drift']):.4f}", f"{mean(lambda row: row['code']['drift']):.4f}",
        ])  # fmt: skip
    header = ["columns and rows", "accuracy", "loss, by seed", "mean loss", "drift predicted", "on articles", "on code"]
    return table(header, shown)


def projections():
    rows = sorted(lines("targets"), key=lambda row: row["loss"])
    shown = [
        [
            bold(", ".join(PROJECTIONS[one.removesuffix("_proj")] for one in row["targets"].split()), row is rows[0]),
            row["r"], f"{row['numbers']:,}", bold(f"{row['loss']:.3f}", row is rows[0]), f"{row['accuracy']:.3f}",
            f"{row['articles']['drift']:.3f}", share(100 * row["guard"]["rise"]),
        ]
        for row in rows
    ]  # fmt: skip
    return table(["", "r", "parameters", "loss", "accuracy", "drift, articles", "guard's text"], shown)


def rates():
    """Return a table of the loss, with the lowest of each row in bold, and in brackets the predicted drift."""
    return by_rate("guarded", "", lambda row, least: bold(f"{row['loss']:.3f}", least) + f" ({row['drift']:.3f})")


def plain_rates():
    """Return a table of the loss, and in brackets the drift measured on articles."""
    return by_rate(
        "curlora", "plain, ", lambda row, _: f"{row['loss']:.3f} ({row['drift']:.{4 if row['drift'] < 1e-3 else 3}f})"
    )


def by_rate(method, prefix, cell):
    adapters = {}
    for row in lines("sweep"):
        if row["method"] == method and row.get("model", MODEL) == MODEL:
            adapters.setdefault((row["targets"], row["r"], row["numbers"]), {})[row["lr"]] = row
    columns = sorted({rate for mine in adapters.values() for rate in mine})
    shown = []
    for (targets, r, count), mine in sorted(adapters.items()):
        least = min(row["loss"] for row in mine.values())
        name = f"{prefix}{targets.replace('_proj', '')}, r {r}"
        shown.append([name, f"{count:,}", *(cell(mine[rate], mine[rate]["loss"] == least) for rate in columns)])
    return table(["learning rate", "parameters", *(f"{rate:g}" for rate in columns)], shown)


def rule():
    """Return a table of the loss on held-out answers by rate, and of the excess loss of the rule and of a fixed rate.

    The lowest loss of each row is in bold.
    """
    settings = {}
    for row in lines("learning_rate"):
        settings.setdefault(tuple(row[name] for name in SETTING), {})[row["multiple"]] = row
    multiples = sorted({row["multiple"] for runs in settings.values() for row in runs.values()})
    shown, lost = [], []
    for setting, runs in settings.items():
        if len(runs) < 2:
            continue
        of = dict(zip(SETTING, setting, strict=True))
        best = min(row["loss"] for row in runs.values())
        rate = learning_rate(of["budget"], of["steps"], of["r"])
        lost.append([loss_at(runs, one) - best for one in (rate, FIXED)])
        losses = [bold(f"{runs[m]['loss']:.3f}", runs[m]["loss"] == best) if m in runs else "" for m in multiples]
        more = [f"{rate:.2g}", *(f"{value:.3f}" for value in lost[-1])]
        shown.append([named(of), f"{of['budget']:g}", of["steps"], *losses, *more])
    shown.sort(key=lambda row: (", redrawn" not in row[0], row[0], float(row[1]), row[2]))
    for name, fold in (("on average", statistics.mean), ("at most", max)):
        shown.append(
            [name, *[""] * (len(shown[0]) - 3), *(f"{fold(values):.3f}" for values in zip(*lost, strict=True))]
        )
    header = ["", "budget", "steps", *(f"{one:g}" for one in multiples), "rule", "its loss over the least"]
    return table([*header, f"that of {FIXED}"], shown)


def named(setting):
    task = {"gsm8k": "GSM8K", "dialogsum": "DialogSum"}[setting["task"]]
    targets = setting["targets"].replace("_proj", "")
    more = [", redrawn"] * (setting["choose"] == "task") + [f", clipped to {setting['clip']:g}"] * bool(setting["clip"])
    return f"{task}, {targets}, r {setting['r']}{''.join(more)}"


def loss_at(runs, rate):
    """Return the loss at a rate, interpolated linearly over the logarithm of the rate, and constant beyond the ends."""
    points = sorted((math.log(row["rate"]), row["loss"]) for row in runs.values())
    place = min(max(math.log(rate), points[0][0]), points[-1][0])
    for (x, loss), (y, next_loss) in itertools.pairwise(points):
        if place <= y:
            return loss + (next_loss - loss) * (place - x) / (y - x)
    return points[-1][1]


def own_text():
    """Return a table of means over seeds, with minimum and maximum in brackets if there are several seeds."""
    shown = []
    for text, name in GUARDED_BY.items():
        runs = [row for row in lines("own_text") if row["text"] == text]
        not_shown = [[run["texts"][kind] for kind in KINDS] for run in runs]
        measured = [[run["loss"] for run in runs], *([run["texts"][kind] for run in runs] for kind in [*KINDS, "own"])]
        measured += [[statistics.mean(one) for one in not_shown], [max(one) for one in not_shown]]
        shown.append([name, *map(spread, measured)])
    header = ["guard's text", "loss, held-out answers", *KINDS, "own", "mean of the first six", "worst"]
    return table(header, shown)


def spread(values):
    digits = 3 if min(values) > 0.1 else 4
    ends = f" ({min(values):.{digits}f} to {max(values):.{digits}f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{ends}"


def five_trainings():
    """Return a table of the losses of all tasks after each training, and of the rise of perplexity on the texts."""
    rows = lines("five_trainings")
    names, texts = list(rows[0]["losses"]), list(rows[0]["held out"])
    shown = []
    for row in sorted(rows, key=lambda row: (not row["anchors"], row["number"])):
        lost = [row["rise"], row["allowed"], row["left"], *(row["held out"][text] for text in texts)]
        signs = ["+", "", "", *"+" * len(texts)]
        shown.append([
            row["task"], "with" if row["anchors"] else "without", *(f"{row['losses'][name]:.3f}" for name in names),
            *(f"{100 * value:{sign}.2f} %" for value, sign in zip(lost, signs, strict=True)),
        ])  # fmt: skip
    return table(["after", "anchors", *names, "own text", "allowed", "left", *texts], shown)


def choice():
    """Return a table of one task with several ways to choose columns and rows."""
    ways = {"inverse": "the paper's draw", "ratio": "by ratio", "energy": "by energy"}
    shown = []
    for row in sorted(lines("one_task"), key=lambda row: (row["method"], row["choose"] != "inverse", row["choose"])):
        name = f"LoRA, {row['lr']:g}" if row["method"] == "lora" else f"guarded, {ways[row['choose']]}"
        more = [", other examples"] * row["choice"] + [f", penalty {row['penalty']:g}"] * bool(row["penalty"])
        budget = row["budget"] if row["method"] == "guarded" and row["budget"] else ""
        figures = f"{row['accuracy']:.3f}", f"{row['loss']:.3f}", f"{row['perplexity']:.2f}", f"{row['drift']:.4f}"
        shown.append([name + "".join(more), f"{row['numbers']:,}", budget, *figures])
    return table(["", "parameters", "budget", "accuracy", "loss", "perplexity", "drift"], shown)


def predictors():
    """Return a table of measured and predicted drift of two adapters, scaled down and up, in nats per token."""
    adapters = [row["scales"] for row in lines("predictors")]
    header = [""]
    for name, scales in zip(("the paper's draw, ", "redrawn for the task, "), adapters, strict=True):
        header += [f"{name * (one is scales[0])}x {one['scale']:g}" for one in scales]
    values = {key: [one[key] for scales in adapters for one in scales] for key in PREDICTORS}
    return table(header, [[PREDICTORS[key], *(f"{value:.2g}" for value in found)] for key, found in values.items()])


def scales():
    """Return a table of predicted and measured drift of one adapter, scaled down and up, in nats per token."""
    shown = []
    for row in lines("prediction"):
        own, other = row["the calibration's"], row["another part"]
        figures = [f"{value:.2g}" for value in (row["predicted"], own["drift"], other["drift"])]
        shown.append([f"{row['scale']:g}", *figures, share(100 * other["perplexity_rise"])])
    header = ["scale", "predicted", "measured, the calibration's text", "measured, other tales"]
    return table([*header, "rise of perplexity, other tales"], shown)


def across():
    """Return a table of a trained adapter's second-order drift: each layer alone, and all together (nats per token)."""
    keys = ["predicted", "undamped", "each layer", "all layers", "measured"]
    rows = [[row["data"], row["rows"], *(f"{row[key]:.3g}" for key in keys)] for row in lines("across_layers")]
    header = ["", "rows of text", "predicted by the guard", "not damped", "by rows, each layer by itself"]
    return table([*header, "by rows, all layers together", "measured"], rows)


def directions():
    """Return a table of the share of the natural gradient that each basis captures, by its rank."""
    shares = {}
    for row in lines("directions"):
        shares.setdefault(row["basis"], {})[row["r"]] = f"{row['share']:.1%}"
    ranks = [*next(iter(shares.values()))]
    return table(["", *(f"r = {r}" for r in ranks)], [[basis, *(of[r] for r in ranks)] for basis, of in shares.items()])


def fixed_basis():
    """Return a table of trainings in several bases: learned, and the KL divergence (nats per token)."""
    texts = ("code", "tweets", "articles", "dialogues")
    rows = []
    for row in lines("fixed_basis"):
        scaled = "" if row["scaled"] == 1 else f", x {row['scaled']:g}"
        limit = "" if row["limit"] is None else f", limit {row['limit']:g}"
        mean = sum(row[text] for text in texts) / len(texts)
        figures = [f"{row['learned']:.3f}", *(f"{kl:.4f}" for kl in (row["own"], mean, row["code"]))]
        rows.append([row["basis"] + limit + scaled, f"{row['parameters']:,}", *figures])
    return table(["", "parameters", "learned", "KL, own text", "KL, four texts: mean", "code"], rows)


def train_adapters():
    """Return a table of `curlora train` with both kinds of adapter: the held-out loss and the measured rise."""
    rows = [
        [
            row["adapter"], "" if row["rows_per_step"] is None else row["rows_per_step"], f"{row['parameters']:,}",
            f"{row['learning_rate']:.2g}", f"{row['loss_before']:.3f} to {row['loss_after']:.3f}",
            f"{row['rise']:+.2%}", f"{row['kept']:.0%}",
        ]
        for row in lines("train_adapters")
    ]  # fmt: skip
    header = ["", "rows of text in a step", "parameters", "learning rate", "held-out loss", "own text", "kept"]
    return table(header, rows)


def merging():
    """Return a table of the penalty with one Kronecker product, divided by the penalty with one product per task."""
    (row,) = lines("merging")
    shown = []
    for held, way in itertools.product((2, 3), ("summed", "nearest")):
        found = row[f"{held} held, {way}"]
        random = ", ".join(f"{value:.2f}" for value in found["random"])
        shown.append([held, way, *(f"{value:.2f}" for value in found["movements"]), random])
    header = ["tasks held", "one product, both sides", "on what the second task moved", "on what the third moved"]
    return table([*header, "random directions of a layer: least, median, most"], shown)


def bold(text, wanted):
    return f"**{text}**" if wanted else text


def curve(path):
    """Plot accuracy against the rise of perplexity, and against forgetting, with a line for each method."""
    methods = {}
    for name, given in PAIRED.items():
        label = {"frozen": "heads only", "osf": "OSF", "curlora": "CURLoRA"}.get(given["method"]) or (
            "guarded, an adapter a task" if given["method"] == "guarded"
            else "LoRA + penalty" if given.get("penalty") else "LoRA + EWC" if given.get("ewc") else "LoRA"
        )  # fmt: skip
        methods.setdefault(label, []).append(means(PAIRED[name], 1))
    matplotlib.rcParams["svg.hashsalt"] = "study"
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for number, (method, found) in enumerate(sorted(methods.items())):
        found.sort(key=lambda one: one["articles"])
        style = {"marker": "osD^vPX*"[number % 8], "color": f"C{number % 10}", "label": method, "capsize": 2}
        averages, errors = [one["average"] for one in found], [one["error"] for one in found]
        left.errorbar([one["articles"] for one in found], averages, errors, **style)
        right.errorbar([one["forgetting"] for one in found], averages, errors, **{**style, "linestyle": "none"})
    left.set_xscale("symlog", linthresh=1.0)
    left.axvline(1.0, color="0.8", linestyle=":")
    left.set_xlabel("rise of perplexity on other articles, %")
    left.set_ylabel("final average accuracy")
    right.set_xlabel("forgetting")
    right.locator_params("x", nbins=5)
    right.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.savefig(path, metadata={"Date": None})
