"""One learning rate for every rank: SST-2 learned for sixty steps at many rates, guarded and plain.

The task, the model and the cache are ``study.py``'s. The head has been fitted to the frozen model on other examples
than those of the sixty steps, and stays as it is. Each rank's adapter is made and calibrated once, and set back to zero
for every rate. Adds a line to ``sweep.jsonl`` for each; what is there already is not repeated.

    python benchmarks/guard/sweep.py --model DIR --targets all-linear
    python benchmarks/guard/sweep.py --model SMALLER --called smaller --layers 5 --cache smaller_cache
    python benchmarks/guard/sweep.py --table
"""

import argparse
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch
from study import DEFAULTS, Run

from results import add, rows

RESULTS = Path(__file__).parent / "sweep.jsonl"
MODEL = "SmolLM2-135M"
RATES = {
    "guarded": [0.015, 0.03, 0.06, 0.12],
    "curlora": [0.001, 0.002, 0.004, 0.008],
}
RANKS = [8, 16, 32, 64]
FITTED, LEARNED, SCORED = 720, 480, 436  # examples of SST-2


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder, or a hub id")
    parser.add_argument("--called", default=MODEL, help="the model's name in the table; give each its own --cache")
    parser.add_argument("--layers", type=int, default=DEFAULTS["layers"], help="from here on they are adapted")
    parser.add_argument("--cache", type=Path, default=Path("study_cache"))
    parser.add_argument("--methods", nargs="+", default=list(RATES), choices=list(RATES))
    parser.add_argument("--targets", nargs="+", default=["q_proj", "k_proj", "v_proj"], help="or all-linear")
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.table:
        return table()
    for method in options.methods:
        for r in options.ranks:
            sweep(method, " ".join(options.targets), r, options)


def sweep(method, targets, r, options):
    left = [rate for rate in RATES[method] if (options.called, method, targets, r, rate) not in found()]
    if not left:
        return
    # A budget that is wide beside what sixty steps use at a good rate, so that it does not hide a bad one.
    run, before = ready(options, method=method, targets=targets, r=r, rise=0.05, layers=options.layers)
    for rate in left:
        with torch.no_grad():
            for _, U in run.trained:
                U.zero_()
        run.o.lr = rate
        run.learn("sst2", 0, 1)
        row = {
            "model": options.called, "method": method, "targets": targets, "r": r, "lr": rate,
            "numbers": run.numbers, "before": before,
            **run.score("sst2", SCORED), "drift": run.guard.drift() if run.guard else run.lost("articles")["drift"],
        }  # fmt: skip
        add(RESULTS, row)


def ready(options, **given):
    """A run of ``study.py``'s whose task is the examples that its head was not fitted to.

    Returns:
        The run, and the loss of the frozen model with the head.
    """
    given = DEFAULTS | given | dict(stream="sst2", probe=1, head_lr=0.0, examples=FITTED)
    run = Run(SimpleNamespace(**given), options.model, options.cache)
    run.head = run.probe("sst2")
    for kind, examples in run.data["sst2"].items():
        run.data["sst2"][kind] = examples[FITTED : FITTED + LEARNED]
    run.o.examples = LEARNED
    return run, run.score("sst2", SCORED)["loss"]


def found():
    return {(row.get("model", MODEL), row["method"], row["targets"], row["r"], row["lr"]) for row in rows(RESULTS)}


def table():
    """Loss, the least of each row in bold, and in brackets the drift: predicted; of plain ones measured on articles."""
    for method, rates in RATES.items():
        print("| " + " | ".join([method, "numbers", *(f"{rate:g}" for rate in rates)]) + " |")
        print("|---" * (len(rates) + 2) + "|")
        adapters = defaultdict(dict)
        for row in rows(RESULTS):
            if row["method"] == method:
                adapters[row.get("model", MODEL), row["targets"], row["r"], row["numbers"]][row["lr"]] = row
        for (model, targets, r, numbers), mine in sorted(adapters.items()):
            least = min(row["loss"] for row in mine.values())
            name = "" if model == MODEL else f"{model}, "
            cells = [f"{name}{targets.replace('_proj', '')}, r {r}", f"{numbers:,}"]
            for row in map(mine.get, rates):
                bold = "**" if row and row["loss"] == least else ""
                cells.append(f"{bold}{row['loss']:.3f}{bold} ({row['drift']:.3f})" if row else "")
            print("| " + " | ".join(cells) + " |")
        print()


if __name__ == "__main__":
    main()
