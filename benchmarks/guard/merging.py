"""What it costs to hold earlier tasks by one anchor for all of them, instead of one for each.

One adapter learns the stream of ``study.py`` under anchors. Then the penalty of the tasks that are held, a sum of
Kronecker products ``sum_j L_j (x) R_j``, is compared with one product in its place: on what the last task moved ``U``
by, and on random directions. Adds a line to ``merging.jsonl``.

    python benchmarks/guard/merging.py --model DIR seed=1
"""

import argparse
import itertools
import statistics
from pathlib import Path
from types import SimpleNamespace

import torch
from study import DEFAULTS, Run, changed

from results import add

RESULTS = Path(__file__).parent / "merging.jsonl"
GIVEN = dict(method="guarded", choose="task", lr=0.12, slack=4.0, anchors=10.0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder, or a hub id")
    parser.add_argument("--cache", type=Path, default=Path("study_cache"))
    parser.add_argument("options", nargs="*", metavar="option=value", help="see study.py")
    arguments = parser.parse_args()
    options = changed(DEFAULTS | GIVEN, arguments.options)
    run = Run(SimpleNamespace(**options), arguments.model, arguments.cache)
    ends = []
    remember = run.remember

    def noting(task, number):
        remember(task, number)
        ends.append({name: U.detach().double() for name, U in run.trained})

    run.remember = noting
    result = run.result()
    tasks = [{name: [side.double() for side in sides] for name, sides in task.items()} for task in run.anchors._tasks]
    movements = [{name: end[name] - begin[name] for name in end} for begin, end in itertools.pairwise(ends)]
    line = {**options, **{key: result[key] for key in ("average", "loss", "forgetting")}}
    for held in range(2, len(tasks) + 1):
        some = tasks[:held]
        for kind, merge in (("summed", summed), ("nearest", nearest)):
            merged = {name: merge([task[name] for task in some]) for name in some[0]}
            line[f"{held} held, {kind}"] = {
                "movements": [round(cost(move, [merged]) / cost(move, some), 4) for move in movements],
                "random": spread(merged, some),
            }
    add(RESULTS, line)


def cost(movement, tasks):
    """``1/2 sum of tr(D^T L D R)`` over tasks and layers: nats for each answer."""
    return 0.5 * sum(
        ((left @ movement[name] @ right) * movement[name]).sum().item()
        for task in tasks
        for name, (left, right) in task.items()
    )


def summed(sides):
    """``sum L_j (x) sum w_j R_j`` with ``w_j`` the share of ``tr L_j``; the trace stays. The sums can be kept up."""
    shares = torch.stack([left.trace() for left, _ in sides])
    shares = shares / shares.sum()
    left = sum(left for left, _ in sides)
    return left, sum(share * right for share, (_, right) in zip(shares, sides, strict=True))


def nearest(sides, steps=20):
    """The Kronecker product that is nearest to the sum, by the power method."""
    left, right = summed(sides)
    for _ in range(steps):
        left = sum(L * (R * right).sum() for L, R in sides) / right.square().sum()
        right = sum(R * (L * left).sum() for L, R in sides) / left.square().sum()
    return left, right


def spread(merged, tasks, count=200):
    """Of the ratio over random directions: the least, the median and the greatest.

    Each of one layer, and in one of the directions that the layer's tasks tell apart best would be worse still.
    """
    generator = torch.Generator().manual_seed(0)
    found = []
    names = list(merged)
    for number in range(count):
        name = names[number % len(names)]
        direction = {name: torch.randn(merged[name][0].shape, dtype=torch.float64, generator=generator)}
        only = [{name: task[name]} for task in tasks]
        found.append(cost(direction, [{name: merged[name]}]) / cost(direction, only))
    return [round(value, 4) for value in (min(found), statistics.median(found), max(found))]


if __name__ == "__main__":
    main()
