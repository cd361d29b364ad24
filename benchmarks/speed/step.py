"""Measure what an adapter adds to a training step and to inference: time, FLOPs, and bytes kept for backward.

The floor is the frozen model without trainable parameters. With every method gradients flow back to the embeddings, so
the difference from the floor is the adapter's cost alone. Each line of ``step.jsonl`` is one setting. All its methods
run alternately in one process, and each setting has its own process.

    python benchmarks/speed/step.py             # every setting
    python benchmarks/speed/step.py --quick     # the first setting, with few rounds
"""

import argparse
import multiprocessing
import shutil
import sys
from functools import partial
from pathlib import Path

import measure
import torch
from torch.utils.flop_counter import FlopCounterMode

from models import TARGETS, adapted, kept_for_backward, smollm2

RESULTS = Path(__file__).with_suffix(".jsonl")
ALL, QKV = "all linear layers", "query, key, value"
EVERY = ["floor", "curlora", "lora", "dora", "reference"]
FEW = ["floor", "curlora", "lora"]
# targets, rank, rows of a batch, tokens per row, layers of the model, methods, rounds; and whether it is compiled
BESIDE_ALL = [(ALL, 16, 4, 128, 4, EVERY, 40), (QKV, 16, 4, 128, 4, EVERY, 40)]
SIZES = [
    *((ALL, 16, batch, length, 4, FEW, rounds) for batch, length, rounds in (
        (1, 1, 200), (1, 32, 100), (4, 128, 60), (2, 512, 30), (4, 512, 24))),
    *((ALL, r, 4, 128, 4, FEW, 30) for r in (8, 64, 256)),
    *((QKV, r, 4, 128, 4, FEW, 60) for r in (8, 16, 64)),
]  # fmt: skip
COMPILED = [(ALL, 16, batch, length, 4, FEW, rounds, True) for batch, length, rounds in ((4, 128, 60), (4, 512, 24))]
ON_ONE = [(ALL, 16, 1, 1, 4, FEW, 200), (ALL, 16, 4, 128, 4, FEW, 40), (ALL, 16, 4, 128, 4, FEW, 40, True)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.quick:
        return measure.add(arguments.out, row(*BESIDE_ALL[0][:-1], rounds=3))
    arguments.out.unlink(missing_ok=True)
    threads = torch.get_num_threads()  # as many as there are cores
    for setting in BESIDE_ALL + SIZES + COMPILED:
        alone(arguments.out, threads, setting)
    for setting in ON_ONE:  # times on one thread vary less
        alone(arguments.out, 1, setting)


def alone(out, threads, setting):
    """Run a setting in its own process: in a shared one, the time of allocations depends on earlier settings."""
    if setting[-1] is True and not shutil.which("g++"):
        return print(f"left out, because g++ is not installed: {setting}", file=sys.stderr)
    process = multiprocessing.get_context("spawn").Process(target=write, args=(out, threads, setting))
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(f"{setting} failed")


def write(out, threads, setting):
    torch.set_num_threads(threads)
    measure.add(out, row(*setting))


def row(targets, r, batch, length, layers, methods, rounds, compiled=False):
    torch.manual_seed(0)
    base = smollm2(layers)
    models = {method: adapted(base, method, r, TARGETS[targets]) for method in methods}
    x = torch.randn(batch, length, base.config.hidden_size)
    result = {"targets": targets, "r": r, "batch": batch, "length": length, "layers": layers, "rounds": rounds,
              "compiled": compiled}  # fmt: skip
    counts = over_floor(models, x)  # counted before compilation
    if compiled:
        for model in models.values():
            model.compile()
    result |= timed(models, x, rounds) | counts
    result["numbers"] = {
        name: sum(p.numel() for p in model.parameters() if p.requires_grad) for name, model in models.items()
    }
    return result


def timed(models, x, rounds):
    return {
        kind: measure.beside_floor({name: partial(run, model, x) for name, model in models.items()}, rounds)
        for kind, run in (("step", train), ("inference", infer))
    }


def over_floor(models, x):
    """Return the counts of each method less those of the floor."""
    counts = {name: counted(model, x) for name, model in models.items()}
    return {
        what: {name: count[i] - counts["floor"][i] for name, count in counts.items() if name != "floor"}
        for i, what in enumerate(("kept", "flops"))
    }


def train(model, x):
    model(
        inputs_embeds=x.clone().requires_grad_(), use_cache=False
    ).last_hidden_state.float().square().mean().backward()
    for parameter in model.parameters():
        parameter.grad = None


@torch.no_grad()
def infer(model, x):
    model(inputs_embeds=x, use_cache=False)


def counted(model, x):
    """Return the bytes kept for backward, without the model's own tensors, and the FLOPs. Both are exact counts."""
    embedded, hidden = x.clone().requires_grad_(), []
    with FlopCounterMode(display=False) as counter:
        kept = kept_for_backward(
            model, lambda: hidden.append(model(inputs_embeds=embedded, use_cache=False).last_hidden_state)
        )
        hidden[0].sum().backward()
    return kept, counter.get_total_flops()


if __name__ == "__main__":
    main()
