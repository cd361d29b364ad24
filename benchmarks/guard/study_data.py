"""The data of ``study.py``: three tasks, and texts of four kinds, from ``CURLORA_DATA_DIR``."""

import argparse
import os
import random
from pathlib import Path

import torch
from lower_layers import kept

TRAIN = {"mrpc": 400, "sst2": 1200, "s140": 800}
SCORED = {"mrpc": 408, "sst2": 872, "s140": 500}
TOKENS = {"guard": 8192, "articles": 4096, "code": 2048, "tweets": 2048}


def prepared(model, tokenizer, layers, cache, times=1):
    """Texts as numbers of states, with their labels or tokens; ``times`` as many examples of each task to learn."""
    path = cache / f"study-{layers}{longer(times)}.pt"
    if path.exists():
        return torch.load(path)
    root = Path(os.environ["CURLORA_DATA_DIR"])
    data = {}
    for task in TRAIN:
        for split, limit in (("", times * TRAIN[task]), ("-dev", SCORED[task])):
            examples = shuffled(read(root, task, split))[:limit]
            data[task + split] = {
                # Without the space at the end of SST-2's sentences, which would be a token of its own and the last one.
                "rows": [tokenizer(text.strip())["input_ids"][:128] for text, _ in examples],
                "labels": torch.tensor([label for _, label in examples]),
            }
    wiki = articles(tokenizer)
    texts = {
        "articles": wiki,
        "guard": wiki[200_000:],
        "code": tokenizer(Path(argparse.__file__).read_text())["input_ids"],
        # Other tweets than the task's own.
        "tweets": tokenizer("\n".join(text for text, _ in shuffled(read(root, "s140", "-dev"))[500:]))["input_ids"],
    }
    for name, tokens in texts.items():
        tokens = tokens[: TOKENS[name]]
        data[name] = {"rows": [tokens[i : i + 512] for i in range(0, len(tokens), 512)]}
        data[name]["tokens"] = [torch.tensor(row) for row in data[name]["rows"]]
    return kept(model, layers, data, path)


def articles(tokenizer):
    """WikiText-2's test split, as tokens."""
    path = Path(os.environ["CURLORA_DATA_DIR"]) / "wikitext-2-raw" / "wiki.test.raw"
    return tokenizer(path.read_text(encoding="utf-8"))["input_ids"]


def longer(times):
    """What tells the files of a longer stream from those of the usual one."""
    return f"-{times}" if times > 1 else ""


def read(root, task, split):
    dev = split == "-dev"
    if task == "mrpc":
        rows = lines(root / "mrpc" / f"{'dev' if dev else 'train'}.tsv", "utf-8-sig")
        return [(f"{row[3]}\n{row[4]}", int(row[0])) for row in rows]
    if task == "sst2":
        return [(row[0], int(row[1])) for row in lines(root / "sst2" / f"{'dev' if dev else 'train'}.tsv")]
    rows = lines(root / "sentiment140" / f"train_sample_{'eval' if dev else 'fit'}.tsv")
    return [(row[1], int(row[0])) for row in rows]


def shuffled(examples):
    return random.Random(0).sample(examples, len(examples))


def lines(path, encoding="utf-8"):
    return [line.split("\t") for line in path.read_text(encoding=encoding).splitlines()[1:]]
