"""Compare quantized base models with float32: accuracy on SST-2, and memory.

    export CURLORA_DATA_DIR=...    # docs/paper.md describes the folders in it
    python benchmarks/quantized.py --model DIR                  # all runs; each writes a line of JSON
    python benchmarks/quantized.py --model DIR --only nf4 lora  # one base and method

Each run is a separate process, so that its peak memory is measured separately. It trains for one epoch, with a
classification head on the last token.
"""

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
import torchao.quantization as torchao
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torchao.quantization.granularity import PerGroup
from transformers import AutoModel, AutoTokenizer, BitsAndBytesConfig, TorchAoConfig

import curlora

RESULTS = Path(__file__).with_suffix(".jsonl")
RUNS = [("float32", "frozen"), ("float32", "curlora"), ("float32", "lora"),
        ("nf4", "frozen"), ("nf4", "curlora"), ("nf4", "lora"),
        *((base, "curlora") for base in ("int8", "torchao-int8", "torchao-int4", "hqq"))]  # fmt: skip
RATES = {"curlora": 2e-3, "lora": 5e-4}
TARGETS = ["q_proj", "k_proj", "v_proj"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--only", nargs=2, metavar=("BASE", "METHOD"))
    parser.add_argument("--examples", type=int, default=800)
    parser.add_argument("--scored", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--length", type=int, default=64, help="longest example, in tokens")
    arguments = parser.parse_args()
    if arguments.only:
        line = json.dumps(run(arguments, *arguments.only))
        print(line, flush=True)
        with RESULTS.open("a") as file:
            file.write(line + "\n")
        return
    for base, method in RUNS:
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--only", base, method], check=True)


def nbytes(weight):
    """Return a weight's size in bytes. A quantized weight may consist of several tensors."""
    if not is_traceable_wrapper_subclass(weight):
        return weight.nbytes
    return sum(getattr(weight, name).nbytes for name in weight.__tensor_flatten__()[0])


def run(arguments, base, method):
    torch.manual_seed(arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModel.from_pretrained(arguments.model, dtype=torch.float32, quantization_config=by_transformers(base))
    by_hand(base, model)
    model.requires_grad_(False)
    weights = sum(map(nbytes, model.parameters()))
    if method == "curlora":
        model = get_peft_model(model, curlora.CurloraConfig(r=16, target_modules=TARGETS, seed=arguments.seed))
    elif method == "lora":
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules=TARGETS))
    model.eval()
    head = nn.Linear(model.config.hidden_size, 2)
    adapter = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": head.parameters(), "lr": 5e-3}]
    optimizer = torch.optim.AdamW(groups + ([{"params": adapter, "lr": RATES[method]}] if adapter else []))

    def logits(texts):
        batch = tokenizer(
            texts, return_tensors="pt", padding=True, padding_side="right", truncation=True, max_length=arguments.length
        )
        last = batch["attention_mask"].sum(1) - 1
        return head(model(**batch).last_hidden_state[torch.arange(len(texts)), last])

    root = Path(os.environ["CURLORA_DATA_DIR"]) / "sst2"
    train = random.Random(arguments.seed).sample(read(root / "train.tsv"), arguments.examples)
    scored = read(root / "dev.tsv")[: arguments.scored]
    began, losses = time.time(), []
    for begin in range(0, len(train), 8):
        batch = train[begin : begin + 8]
        loss = cross_entropy(logits([text for text, _ in batch]), torch.tensor([label for _, label in batch]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    trained = time.time() - began
    right = 0
    with torch.no_grad():
        for begin in range(0, len(scored), 16):
            batch = scored[begin : begin + 16]
            right += (logits([text for text, _ in batch]).argmax(1) == torch.tensor([y for _, y in batch])).sum().item()
    share = sum(label for _, label in scored) / len(scored)
    return {
        "base": base, "method": method, "seed": arguments.seed, "accuracy": right / len(scored),
        "majority": max(share, 1 - share), "last_loss": sum(losses[-20:]) / len(losses[-20:]),
        "numbers": sum(p.numel() for p in adapter), "weights_mib": round(weights / 2**20, 1),
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, 1),
        "training_seconds": round(trained, 1), "examples": len(train), "scored": len(scored),
        "torch": torch.__version__, "machine": platform.processor() or platform.machine(),
    }  # fmt: skip


def by_transformers(base):
    if base == "nf4":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    if base == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if base == "torchao-int8":
        return TorchAoConfig(torchao.Int8WeightOnlyConfig())
    return None


def by_hand(base, model):
    """Quantize a model in formats that transformers cannot load, or cannot load on a CPU."""
    if base == "torchao-int4":
        torchao.quantize_(model, torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(64)))
    if base == "hqq":
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear):
                parent, _, child = name.rpartition(".")
                layer = HQQLinear(module, BaseQuantizeConfig(nbits=4), compute_dtype=torch.float32, device="cpu")
                setattr(model.get_submodule(parent), child, layer)


def read(path):
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()[1:]]
    return [(text.strip(), int(label)) for text, label in rows]


if __name__ == "__main__":
    main()
