"""How the cost of an adapter grows with rank, width, depth and tokens: measured beside what the formulas say.

The formulas are in docs/complexity.md. A line of ``growth.jsonl`` for each point; one thing varies at a time.

    python benchmarks/speed/growth.py
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path

import measure
import torch
from safetensors.torch import save_file
from step import counted, infer, train

from curlora.tuner.layer import CurloraLayer
from models import ALL, adapted, smollm2

RESULTS = Path(__file__).with_suffix(".jsonl")
START = {"rank": 16, "width": 576, "depth": 4, "tokens": 512}
POINTS = {
    "rank": [8, 16, 32, 64, 128],
    "width": [288, 576, 1152, 2304],
    "depth": [2, 4, 8],
    "tokens": [64, 128, 512, 2048],
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    arguments.out.unlink(missing_ok=True)
    for what, values in POINTS.items():
        for value in values:
            measure.add(arguments.out, {"grows": what, **row(arguments.rounds, **{**START, what: value})})


def row(rounds, rank, width, depth, tokens):
    torch.manual_seed(0)
    heads = width // 64 if width % 192 == 0 else width // 96
    shape = dict(hidden_size=width, intermediate_size=width * 8 // 3)
    base = smollm2(depth, **shape, num_attention_heads=heads, num_key_value_heads=heads // 3)
    models = {method: adapted(base, method, rank, ALL) for method in ("floor", "curlora", "lora")}
    x = torch.randn(max(1, tokens // 128), min(tokens, 128), width)
    result = {"rank": rank, "width": width, "depth": depth, "tokens": tokens, "rounds": rounds}
    for kind, run in (("step", train), ("inference", infer)):
        functions = {name: partial(run, model, x) for name, model in models.items()}
        seconds = measure.in_turn(functions, rounds)
        over = measure.over_floor(seconds)
        result[kind] = {"floor": round(sorted(seconds["floor"])[rounds // 2], 5),
                        **{name: round(over[name], 5) for name in ("curlora", "lora")}}  # fmt: skip
    counts = {name: counted(model, x) for name, model in models.items()}
    for i, what in enumerate(("kept", "flops")):
        result[what] = {name: counts[name][i] - counts["floor"][i] for name in ("curlora", "lora")}
    result["file"] = size_on_disk(models["curlora"])
    result["formula"] = by_formula(models["curlora"], tokens)
    return result


def size_on_disk(model):
    """Of what PEFT saves of an adapter, with the names that it gives."""
    parts = ("curlora_U", "curlora_indices", "curlora_fingerprint")
    state = {
        f"base_model.model.{name}".replace(".default", ""): tensor
        for name, tensor in model.state_dict().items()
        if any(part in name for part in parts)
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter_model.safetensors"
        save_file(state, path)
        return path.stat().st_size


def by_formula(model, tokens):
    """Of docs/complexity.md, summed over the adapted layers."""
    layers = [module for module in model.modules() if isinstance(module, CurloraLayer)]
    flops = kept = file = 0
    for layer in layers:
        r, m = layer.r["default"], layer.out_features
        flops += 2 * tokens * (2 * m * r + 3 * r * r)
        kept += 4 * tokens * r
        file += 4 * r * r + 8 * r + 32
    return {"flops": flops, "kept": kept, "file": file}


if __name__ == "__main__":
    main()
