"""The table of the demo over seeds, from the ``results.json`` of each ``curlora demo --seed``."""

import statistics
from pathlib import Path

from tables import table

from curlora.continual.results import RunResults

HERE = Path(__file__).parent


def tables():
    return {"demo": over_seeds()}


def over_seeds():
    """Loss on the task, and on each text the rise of perplexity and, in brackets, the divergence: means over seeds."""
    runs = [RunResults.load(path) for path in sorted(HERE.glob("seed-*.json"))]
    texts = list(runs[0].methods[0].seeds[0].heldout)
    rows = []
    for methods in zip(*(run.methods for run in runs), strict=True):
        seeds = [method.seeds[0] for method in methods]
        cells = [spread([seed.scores[-1][0].loss for seed in seeds], 3)]
        for name in texts if methods[0].method != "frozen" else ():
            first_and_last = [(seed.heldout[name][0], seed.heldout[name][-1]) for seed in seeds]
            rises = [100 * (last.perplexity / first.perplexity - 1) for first, last in first_and_last]
            moved = [last.drift for _, last in first_and_last]
            cells.append(f"{spread(rises, 1, '+')} % ({spread(moved, 3)})")
        rows.append([methods[0].label, f"{methods[0].trainable_parameters:,}", *cells])
    header = ["", "parameters", "loss on the task", *texts]
    return table(header, [row + [""] * (len(header) - len(row)) for row in rows])


def spread(values, digits, sign=""):
    deviation = statistics.stdev(values)
    mean = f"{statistics.mean(values):{sign}.{digits}f}"
    return mean if deviation < 0.5 * 10**-digits else f"{mean} ± {deviation:.{digits}f}"
