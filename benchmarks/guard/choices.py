"""Columns and rows under the guard: the paper's draw and others, at equal numbers and an equal budget, over seeds.

One rank, one rate, SST-2 as in ``sweep.py``. A seed is of the draw and of the order of the examples. Adds a line to
``choices.jsonl`` for each; what is there already is not repeated.

    python benchmarks/guard/choices.py --model DIR
    python benchmarks/guard/choices.py --table
"""

import argparse
import statistics
from pathlib import Path

from sweep import ready

from results import add, rows

RESULTS = Path(__file__).parent / "choices.jsonl"
CHOICES = {name: {"choose": name} for name in ("inverse", "uniform", "norm", "leverage", "task")}
# As far as the task's own choice moves the model where it is measured, on other articles.
CHOICES["inverse, 1.8 x the budget"] = {"choose": "inverse", "slack": 1.8}
GIVEN = dict(method="guarded", targets="q_proj k_proj v_proj", r=16, lr=0.03, rise=0.01)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder, or a hub id")
    parser.add_argument("--cache", type=Path, default=Path("study_cache"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.table:
        return table()
    for seed in options.seeds:
        for choice in CHOICES:
            if not any((row["choose"], row["seed"]) == (choice, seed) for row in rows(RESULTS)):
                learn(choice, seed, options)


def learn(choice, seed, options):
    run, before = ready(options, **GIVEN, **CHOICES[choice], seed=seed)
    run.learn("sst2", 0, 1)
    row = {
        "choose": choice, "seed": seed, **GIVEN, "numbers": run.numbers, "before": before, **run.score("sst2"),
        "predicted": run.guard.drift(), "articles": run.lost("articles"), "code": run.lost("code"),
    }  # fmt: skip
    add(RESULTS, row)


def table():
    print(
        "| | seeds | accuracy | loss, by seed | mean loss | drift predicted | on articles | on code |\n"
        + "|---" * 8
        + "|"
    )
    for choice in CHOICES:
        mine = [row for row in rows(RESULTS) if row["choose"] == choice]
        if mine:
            mean = lambda of: statistics.mean(of(row) for row in mine)  # noqa: B023, E731
            print(
                f"| {choice} | {len(mine)} | {mean(lambda row: row['accuracy']):.3f} | "
                + ", ".join(f"{row['loss']:.3f}" for row in mine)
                + f" | {mean(lambda row: row['loss']):.4f} | {mean(lambda row: row['predicted']):.4f} "
                f"| {mean(lambda row: row['articles']['drift']):.4f} | {mean(lambda row: row['code']['drift']):.4f} |"
            )


if __name__ == "__main__":
    main()
