"""Which layers to adapt under the guard: about as many numbers, in some of the projections, at one rate, over seeds.

SST-2 as in ``sweep.py``, columns and rows redrawn for it. Adds a line to ``targets.jsonl`` for each; what is there
already is not repeated.

    python benchmarks/guard/targets.py --model DIR
    python benchmarks/guard/targets.py --table
"""

import argparse
import statistics
from pathlib import Path

from sweep import ready

from results import add, rows

RESULTS = Path(__file__).parent / "targets.jsonl"
# Ranks with which fifteen layers of the model have 11,500 numbers, give or take 500.
RANKS = {
    "q_proj k_proj v_proj": 16,
    "q_proj k_proj v_proj o_proj": 14,
    "q_proj": 28,
    "v_proj": 28,
    "o_proj": 28,
    "v_proj o_proj": 20,
    "gate_proj up_proj": 20,
    "down_proj": 28,
    "o_proj down_proj": 20,
    "v_proj down_proj": 20,
    "all-linear": 10,
}
GIVEN = dict(method="guarded", choose="task", lr=0.12, rise=0.01, slack=4.0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder, or a hub id")
    parser.add_argument("--cache", type=Path, default=Path("study_cache"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.table:
        return table()
    for seed in options.seeds:
        for targets in RANKS:
            if not any((row["targets"], row["seed"]) == (targets, seed) for row in rows(RESULTS)):
                learn(targets, seed, options)


def learn(targets, seed, options):
    run, before = ready(options, **GIVEN, targets=targets, r=RANKS[targets], seed=seed)
    run.learn("sst2", 0, 1)
    row = {
        "targets": targets, "seed": seed, **GIVEN, "r": RANKS[targets], "numbers": run.numbers, "before": before,
        **run.score("sst2"), "predicted": run.guard.drift(),
        "guard": run.lost("guard"), "articles": run.lost("articles"), "code": run.lost("code"),
    }  # fmt: skip
    add(RESULTS, row)


def table():
    print(
        "| | r | numbers | loss, by seed | accuracy | drift predicted | on articles | guard's text |\n"
        + "|---" * 8
        + "|"
    )
    for targets in RANKS:
        mine = [row for row in rows(RESULTS) if row["targets"] == targets]
        if mine:
            mean = lambda of: statistics.mean(of(row) for row in mine)  # noqa: B023, E731
            print(
                f"| {targets.replace('_proj', '')} | {RANKS[targets]} | {mine[0]['numbers']:,} | "
                + ", ".join(f"{row['loss']:.3f}" for row in mine)
                + f" | {mean(lambda row: row['accuracy']):.3f} | {mean(lambda row: row['predicted']):.4f} "
                f"| {mean(lambda row: row['articles']['drift']):.4f} "
                f"| {100 * mean(lambda row: row['guard']['rise']):+.1f} % |"
            )


if __name__ == "__main__":
    main()
