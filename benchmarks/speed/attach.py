"""Measure attaching an adapter, loading one, and holding many.

python benchmarks/speed/attach.py           # all three; each result is a line of attach.jsonl
python benchmarks/speed/attach.py --only many
"""

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path

import measure
import torch
from peft import LoraConfig, OSFConfig, get_peft_model
from torch import nn

import curlora
from curlora.tuner.layer import CurloraLayer
from curlora.tuner.weight import read
from models import ALL, QKV, held, smollm2

RESULTS = Path(__file__).with_suffix(".jsonl")
# Layers of a model with 7 B parameters (Mistral-7B): outputs, inputs.
SHAPES = {"key": (1024, 4096), "query": (4096, 4096), "gate": (14336, 4096), "down": (4096, 14336)}
# A singular value decomposition of the larger layers takes minutes.
DECOMPOSED = ("key",)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["attach", "load", "many"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.only is None:
        arguments.out.unlink(missing_ok=True)
    for name, rows in (("attach", attach), ("load", load), ("many", many)):
        if arguments.only in (None, name):
            for row in rows():
                measure.add(arguments.out, {"kind": name, **row})


def attach(r=16, rounds=5):
    """Measure attaching to one bfloat16 layer at a time.

    The unit is a pass: reading the weight once, in pieces, into a sum of squares in float64.
    """
    configs = {
        "curlora": lambda: curlora.CurloraConfig(r=r, target_modules=["layer"]),
        "lora": lambda: LoraConfig(r=r, target_modules=["layer"]),
        "pissa": lambda: LoraConfig(r=r, target_modules=["layer"], init_lora_weights="pissa"),
        "osf": lambda: OSFConfig(target_modules=["layer"], effective_rank=0.5),
    }
    for name, (m, n) in SHAPES.items():
        torch.manual_seed(0)
        weight = torch.randn(m, n, dtype=torch.bfloat16)
        seconds, memory = {"one pass": []}, {}
        piece = torch.empty(2**18 // n, n, dtype=torch.float64)
        for number in range(rounds):
            began = time.perf_counter()
            sum(piece[: len(chunk)].copy_(chunk).square_().sum() for chunk in weight.split(len(piece)))
            seconds["one pass"].append(time.perf_counter() - began)
            for method, config in configs.items():
                decomposes = method in ("pissa", "osf")
                if decomposes and (name not in DECOMPOSED or number):
                    continue
                # PiSSA and OSF change the weight, and either refuse half precision or compute in it. They get float32.
                model = Alone(weight.float() if decomposes else weight)
                before = reset_peak()
                began = time.perf_counter()
                get_peft_model(model, config())
                seconds.setdefault(method, []).append(time.perf_counter() - began)
                memory[method] = max(memory.get(method, 0), peak() - before)
        yield {
            "layer": name, "shape": [m, n], "r": r, "rounds": rounds, "weight_bytes": weight.nbytes,
            "seconds": {method: round(statistics.median(times), 5) for method, times in seconds.items()},
            "peak_bytes": memory,
        }  # fmt: skip


class Alone(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.layer = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
        self.layer.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x):
        return self.layer(x)


def load(r=16, rounds=7, present=(1, 30)):
    """Measure loading an adapter onto a model that already has some, and reading only the columns that it needs."""
    base = smollm2()
    with tempfile.TemporaryDirectory() as folder:
        models = {}
        for method, config in (
            ("curlora", curlora.CurloraConfig(r=r, target_modules=ALL)),
            ("lora", LoraConfig(r=r, target_modules=ALL)),
        ):
            models[method] = get_peft_model(base if method == "curlora" else smollm2(), config)
            models[method].save_pretrained(f"{folder}/{method}")

        def once(method):
            models[method].load_adapter(f"{folder}/{method}", adapter_name="loaded")
            models[method].delete_adapter("loaded")

        layers = [module for module in models["curlora"].modules() if isinstance(module, CurloraLayer)]
        sizes = {m: (Path(folder) / m / "adapter_model.safetensors").stat().st_size for m in models}
        for count in present:
            for method, model in models.items():
                for i in range(len(model.peft_config), count):
                    model.load_adapter(f"{folder}/{method}", adapter_name=f"a{i}")
            seconds = measure.in_turn(
                {
                    "curlora": lambda: once("curlora"),
                    "lora": lambda: once("lora"),
                    "columns": lambda: [columns(layer) for layer in layers],
                },
                rounds,
            )
            yield {
                "layers": len(layers), "r": r, "rounds": rounds, "bytes": sizes, "present": count,
                "seconds": {name: round(statistics.median(times), 4) for name, times in seconds.items()},
            }  # fmt: skip


def columns(layer):
    with read(layer.get_base_layer()) as weight:
        return weight.columns(layer.basis("default").indices[0])


def many(r=16, rounds=7, batch=32, length=32):
    """Measure many adapters with the same draw on one model: memory, switching, and a different adapter for each row.

    A thousand LoRA adapters would take 5 GB of memory, and an hour to add.
    """
    for method, count in (("curlora", 100), ("lora", 100), ("curlora", 1000)):
        yield holding(method, count, r, rounds, batch, length)


def holding(method, count, r, rounds, batch, length):
    config = {
        "curlora": lambda: curlora.CurloraConfig(r=r, target_modules=QKV, init_weights=False),
        "lora": lambda: LoraConfig(r=r, target_modules=QKV, init_lora_weights=False),
    }[method]
    model = get_peft_model(smollm2(), config(), adapter_name="a0").eval()
    before = size(model)
    began = time.perf_counter()
    for i in range(1, count):
        model.add_adapter(f"a{i}", config())
    adding = (time.perf_counter() - began) / (count - 1)
    names = [f"a{i * count // batch}" for i in range(batch)]
    x = torch.randn(batch, length, 576)

    @torch.no_grad()
    def run(**extra):
        model(inputs_embeds=x, use_cache=False, **extra)

    def bare():
        with model.disable_adapter():
            run()

    turn = itertools.count()
    seconds = measure.in_turn(
        {
            "floor": bare,
            "one adapter": run,
            "an adapter for each row": lambda: run(adapter_names=names),
            "switch": lambda: model.set_adapter(f"a{next(turn) % count}"),
        },
        rounds,
    )
    return {
        "method": method, "count": count, "r": r, "batch": batch, "length": length,
        "bytes_of_one": round((size(model) - before) / (count - 1)),
        "seconds": {"add": round(adding, 5), **{n: round(statistics.median(t), 5) for n, t in seconds.items()}},
    }  # fmt: skip


def size(model):
    """Return the bytes of a model's tensors. Shared memory counts once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held(model)}.values())


def reset_peak():
    """Reset the peak of resident memory, and return the current value in bytes (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak("VmRSS")


def peak(which="VmHWM"):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
