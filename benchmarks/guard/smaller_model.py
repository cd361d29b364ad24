"""Make a smaller language model for experiments: a few layers of a larger one, trained further.

The first and the last layers are kept and those between are removed (https://arxiv.org/abs/2403.03853). The smaller
model is then trained for some minutes on articles of WikiText-2 that the recipes in this folder do not use.

    python benchmarks/guard/smaller_model.py --model DIR --out SMALLER
"""

import argparse
import os
import time
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder, or a hub id")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--first", type=int, default=6, help="number of layers to keep at the beginning")
    parser.add_argument("--last", type=int, default=4, help="number of layers to keep at the end")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--rate", type=float, default=3e-4)
    options = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    layers = list(model.model.layers)
    kept = [*layers[: options.first], *layers[-options.last :]]
    for number, layer in enumerate(kept):
        layer.self_attn.layer_idx = number
    model.model.layers = nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)
    model.config.layer_types = None

    path = Path(os.environ["CURLORA_DATA_DIR"]) / "wikitext-2-raw" / "wiki.test.raw"
    tokens = torch.tensor(tokenizer(path.read_text(encoding="utf-8"))["input_ids"])[8192:196_608]
    rows = tokens[: len(tokens) // 512 * 512].view(-1, 128)
    batches = [batch for _ in range(options.epochs) for batch in torch.randperm(len(rows)).view(-1, 4)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate)
    schedule = get_cosine_schedule_with_warmup(optimizer, len(batches) // 20, len(batches))
    began = time.time()
    for step, chosen in enumerate(batches):
        loss = model(input_ids=rows[chosen], labels=rows[chosen], use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"{step}: loss {loss.item():.3f}, {time.time() - began:.0f} s", flush=True)
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)


if __name__ == "__main__":
    main()
