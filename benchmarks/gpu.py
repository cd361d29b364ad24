"""A training step on a GPU: time and peak memory over the frozen model, CURLoRA beside LoRA.

Models of Llama-3.2-3B's and Mistral-7B's shapes with random bfloat16 weights (nothing is downloaded), adapters on all
linear layers, eager and compiled, with and without gradient checkpointing. All methods share the frozen weights and
take their steps in turn; gradients flow to the embeddings in each.

    python benchmarks/gpu.py                    # a line of JSON for each setting into gpu.jsonl; stops after --minutes
    python benchmarks/gpu.py --tiny --out FILE  # small shapes, on whatever device there is, to see that it runs
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel

sys.path.insert(0, str(Path(__file__).parent / "speed"))
import measure
from step import timed, train

from models import ALL, adapted

RESULTS = Path(__file__).with_suffix(".jsonl")
SHAPES = {
    "Llama-3.2-3B": dict(
        model_type="llama", hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
        num_key_value_heads=8, head_dim=128),
    "Mistral-7B": dict(
        model_type="mistral", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, sliding_window=None),
}  # fmt: skip
TINY = dict(hidden_size=96, intermediate_size=256, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=3,
            head_dim=32)  # fmt: skip
# The ones that matter most first: tokens, gradient checkpointing, compiled.
SETTINGS = [
    (2048, False, False), (2048, True, False), (512, False, False), (4096, True, False),
    (512, True, False), (2048, False, True), (2048, True, True),
]  # fmt: skip
METHODS = ["floor", "curlora", "lora"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--eager", action="store_true", help="leave out what is compiled")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16])
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not arguments.tiny:
        sys.exit("No GPU here. --tiny runs small shapes on the CPU.")
    began = time.perf_counter()
    for name, shape in SHAPES.items():
        shape = {**shape, **(TINY if arguments.tiny else {})}
        config = AutoConfig.for_model(shape.pop("model_type"), vocab_size=8, **shape)
        with torch.device(device):
            base = AutoModel.from_config(config, dtype=torch.bfloat16).requires_grad_(False)
        for r in arguments.ranks:
            models = {method: adapted(base, method, r, ALL) for method in METHODS}
            for tokens, checkpointing, compiled in SETTINGS:
                if compiled and arguments.eager:
                    continue
                if time.perf_counter() - began > 60 * arguments.minutes:
                    print(f"left out: {name}, r {r}, {tokens} tokens, {checkpointing=}, {compiled=}", file=sys.stderr)
                    continue
                tokens = tokens // 32 if arguments.tiny else tokens
                measured = row(models, tokens, checkpointing, compiled, arguments.rounds)
                setting = {"model": name, "tiny": arguments.tiny, "r": r, "tokens": tokens,
                           "checkpointing": checkpointing, "compiled": compiled}  # fmt: skip
                measure.add(arguments.out, {**setting, **measured})


def row(models, tokens, checkpointing, compiled, rounds):
    base = models["floor"]
    x = torch.randn(1, tokens, base.config.hidden_size, dtype=torch.bfloat16, device=base.device)
    runs = {}
    for method, model in models.items():
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            model.gradient_checkpointing_disable()
        runs[method] = torch.compile(model) if compiled else model
    memory = {method: peak(partial(train, run, x)) for method, run in runs.items()}
    result = {"memory": memory, "rounds": rounds, **timed(runs, x, rounds)}
    torch.compiler.reset()
    return result


def peak(step):
    """Bytes of a step at most, over what is held before it."""
    if not torch.cuda.is_available():
        step()
        return None
    step()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


if __name__ == "__main__":
    main()
