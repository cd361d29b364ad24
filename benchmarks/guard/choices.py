"""Choices under the guard, at about as many numbers, one rate and one budget: columns and rows, and projections.

SST-2 as in ``sweep.py``. A seed is of the draw and of the order of the examples. Adds a line to ``choices.jsonl`` or
``targets.jsonl`` for each; what is there already is not repeated.

    python benchmarks/guard/choices.py --model DIR
    python benchmarks/guard/choices.py --model DIR --of targets --seeds 0
    python benchmarks/guard/choices.py --of targets --table
"""

import argparse
import statistics
from pathlib import Path

from sweep import SCORED, ready

from results import add, rows

DRAWS = {name: {"choose": name} for name in ("inverse", "uniform", "norm", "leverage", "task")}
# As far as the task's own choice moves the model where it is measured, on other articles.
DRAWS["inverse, 1.8 x the budget"] = {"choose": "inverse", "slack": 1.8}
# Ranks with which fifteen layers of the model have 11,500 numbers, give or take a thousand.
TARGETS = {
    "q_proj k_proj v_proj": 16, "q_proj k_proj v_proj o_proj": 14, "q_proj": 28, "v_proj": 28, "o_proj": 28,
    "v_proj o_proj": 20, "gate_proj up_proj": 20, "down_proj": 28, "o_proj down_proj": 20, "v_proj down_proj": 20,
    "all-linear": 10,
}  # fmt: skip
# By what a choice is called in its file: the file, what is the same for all, and each choice's own.
CHOICES = {
    "choose": ("choices.jsonl", dict(targets="q_proj k_proj v_proj", r=16, lr=0.03, rise=0.01), DRAWS),
    "targets": (
        "targets.jsonl",
        dict(choose="task", lr=0.12, rise=0.01, slack=4.0),
        {targets: {"targets": targets, "r": r} for targets, r in TARGETS.items()},
    ),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder, or a hub id")
    parser.add_argument("--cache", type=Path, default=Path("study_cache"))
    parser.add_argument("--of", choices=list(CHOICES), default="choose")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    file, given, choices = CHOICES[options.of]
    path = Path(__file__).parent / file
    if options.table:
        return table(choices, {choice: [row for row in rows(path) if row[options.of] == choice] for choice in choices})
    for seed in options.seeds:
        for choice, own in choices.items():
            if not any((row[options.of], row["seed"]) == (choice, seed) for row in rows(path)):
                add(path, learned({"method": "guarded", **given, **own}, seed, options) | {options.of: choice})


def learned(given, seed, options):
    run, before = ready(options, **given, seed=seed)
    run.learn("sst2", 0, 1)
    return {
        **given, "seed": seed, "numbers": run.numbers, "before": before, **run.score("sst2", SCORED),
        "predicted": run.guard.drift(), **{text: run.lost(text) for text in ("guard", "articles", "code")},
    }  # fmt: skip


def table(choices, found):
    heads = ["", "numbers", "accuracy", "loss, by seed", "mean loss", "drift predicted", "on articles", "on code"]
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    for choice in filter(found.get, choices):
        mine = found[choice]
        mean = lambda of: statistics.mean(map(of, mine))  # noqa: B023, E731
        cells = [
            choice, f"{mine[0]['numbers']:,}", f"{mean(lambda row: row['accuracy']):.3f}",
            ", ".join(f"{row['loss']:.3f}" for row in mine), f"{mean(lambda row: row['loss']):.4f}",
            f"{mean(lambda row: row['predicted']):.4f}", f"{mean(lambda row: row['articles']['drift']):.4f}",
            f"{mean(lambda row: row['code']['drift']):.4f}",
        ]  # fmt: skip
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
