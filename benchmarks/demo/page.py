"""The tables of the demo: over seeds, from the ``results.json`` of each ``curlora demo --seed``, and its time."""

from pathlib import Path

from tables import lines, table

from curlora.continual.results import RunResults, Statistic
from curlora.report.formatting import format_percent, format_statistic

HERE = Path(__file__).parent


def tables():
    return {"demo": over_seeds(), "demo_time": times()}


def times():
    """How long the command took where nothing else ran and everything was downloaded."""
    rows = [
        [run["processor"], run["threads"], f"{run['seconds'] // 60} min {run['seconds'] % 60} s"]
        for run in lines(HERE / "seconds.jsonl")
    ]
    return table(["processor", "threads", "`curlora demo`"], rows)


def over_seeds():
    """Loss on the task, and on each text the rise of perplexity and, in brackets, the divergence: means over seeds."""
    runs = [RunResults.load(path) for path in sorted(HERE.glob("seed-*.json"))]
    texts = list(runs[0].methods[0].seeds[0].heldout)
    rows = []
    for methods in zip(*(run.methods for run in runs), strict=True):
        seeds = [method.seeds[0] for method in methods]
        cells = [format_statistic(Statistic.of([seed.scores[-1][0].loss for seed in seeds]))]
        for name in texts if methods[0].method != "frozen" else ():
            first_and_last = [(seed.heldout[name][0], seed.heldout[name][-1]) for seed in seeds]
            rise = Statistic.of([last.perplexity / first.perplexity - 1 for first, last in first_and_last])
            moved = Statistic.of([last.drift for _, last in first_and_last])
            cells.append(f"{format_percent(rise)} ({format_statistic(moved)})")
        rows.append([methods[0].label, f"{methods[0].trainable_parameters:,}", *cells])
    header = ["", "parameters", "loss on the task", *texts]
    return table(header, [row + [""] * (len(header) - len(row)) for row in rows])
