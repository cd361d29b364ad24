"""Measure the engine's overhead: a continual run beside a bare loop over the same batches.

    python benchmarks/engine/overhead.py [--rounds 3] [--examples 96]

Both train CURLoRA on the demo's first task with the demo's settings, alternately, in one process and one thread. Then
both score. Adds a line to ``overhead.jsonl`` with the medians in seconds of CPU time, which other work on the machine
hardly changes, and with their ratio. It also holds the share of padding in batches grouped by length, and in batches
that are not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from curlora.continual.batches import Collator, LengthGrouped
from curlora.continual.encoding import encode
from curlora.continual.launch import build
from curlora.continual.results import environment
from curlora.continual.task_model import TaskModel
from curlora.continual.trainer import TaskTrainer
from curlora.demo import demo_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--examples", type=int, default=96)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    stream = build(demo_recipe())
    (part, *_) = encode(stream.tasks, stream.tokenizer, stream.settings)
    rows, scored = part.train[: arguments.examples], part.evaluation[: arguments.examples]
    settings, collate = part.settings, Collator(stream.tokenizer)
    method = stream.methods[-1]
    model = TaskModel(method.apply(stream.load_model(), seed=0))
    model.begin(0, part.task.classes)

    lengths = [len(row["input_ids"]) for row in rows]
    orders = {"grouped": list(LengthGrouped(lengths, settings.batch_size, seed=0)), "as given": range(len(rows))}
    batches = [[rows[i] for i in chunk] for chunk in chunks(list(orders["grouped"]), settings.batch_size)]

    def engine() -> None:
        with tempfile.TemporaryDirectory() as folder:
            trainer = TaskTrainer(model, method.learning_rate, rows, stream.tokenizer, settings, 0, Path(folder))
            trainer.train()

    def bare() -> None:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-3)
        model.train()
        for batch in batches:
            model(**collate(batch))["loss"].backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    def engine_scores() -> None:
        with tempfile.TemporaryDirectory() as folder:
            TaskTrainer(model, 0.0, [], stream.tokenizer, settings, 0, Path(folder)).score(scored)

    @torch.no_grad()
    def bare_scores() -> None:
        model.eval()
        for batch in chunks(list(scored), settings.evaluation_batch_size):
            model(**collate(batch))

    result = {
        "training": side_by_side(engine, bare, arguments.rounds),
        "scoring": side_by_side(engine_scores, bare_scores, arguments.rounds),
        "padding": {name: padding([lengths[i] for i in order], settings.batch_size) for name, order in orders.items()},
        "examples": len(rows),
        "tokens": sum(lengths),
        "environment": environment(),
    }
    print(json.dumps(result, indent=2))
    with (Path(__file__).parent / "overhead.jsonl").open("a") as file:
        file.write(json.dumps(result) + "\n")


def side_by_side(engine: Callable[[], None], bare: Callable[[], None], rounds: int) -> dict[str, float]:
    engine()  # warm-up
    bare()
    times: dict[str, list[float]] = {"engine": [], "bare": []}
    for _ in range(rounds):
        for name, run in (("engine", engine), ("bare", bare)):
            began = time.process_time()
            run()
            times[name].append(time.process_time() - began)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {**medians, "ratio": medians["engine"] / medians["bare"]}


def padding(lengths: list[int], batch_size: int) -> float:
    """Return the share of padding among the tokens of all batches."""
    padded = sum(len(chunk) * max(chunk) for chunk in chunks(lengths, batch_size))
    return 1 - sum(lengths) / padded


def chunks(values: list, size: int) -> list[list]:  # type: ignore[type-arg]
    return [values[i : i + size] for i in range(0, len(values), size)]


if __name__ == "__main__":
    main()
