"""Measure how an adapter's cost grows with rank, width, depth and tokens, beside the formulas of docs/complexity.md.

Each point is a line of ``growth.jsonl``. One quantity varies at a time.

    python benchmarks/speed/growth.py
"""

import argparse
from pathlib import Path

import measure
import torch
from peft import get_peft_model
from step import over_floor, timed
from storage import size_on_disk

import curlora
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
    shape = dict(
        hidden_size=width, intermediate_size=width * 8 // 3, num_attention_heads=heads, num_key_value_heads=heads // 3
    )
    base = smollm2(depth, **shape)
    models = {method: adapted(base, method, rank, ALL) for method in ("floor", "curlora", "lora")}
    x = torch.randn(max(1, tokens // 128), min(tokens, 128), width)
    result = {"rank": rank, "width": width, "depth": depth, "tokens": tokens, "rounds": rounds}
    result |= timed(models, x, rounds) | over_floor(models, x)
    with torch.device("meta"):
        unread = get_peft_model(smollm2(depth, **shape), curlora.CurloraConfig(r=rank, target_modules=ALL))
    result["file"] = size_on_disk(unread)
    result["formula"] = by_formula(models["curlora"], tokens)
    return result


def by_formula(model, tokens):
    """Return the costs by the formulas of docs/complexity.md, summed over the adapted layers."""
    layers = [module for module in model.modules() if isinstance(module, CurloraLayer)]
    flops = kept = file = 0
    for layer in layers:
        r, m = layer.r["default"], layer.out_features
        flops += 2 * tokens * (m * r + m * (r + -r % 16) + 3 * r * r)
        kept += 4 * tokens * r
        file += 4 * r * r + 8 * r + 32
    return {"flops": flops, "kept": kept, "file": file}


if __name__ == "__main__":
    main()
