"""Fixtures of tests of whole runs."""

import json

import pytest
import yaml

from tests.models import WORDS, llama, word_examples, word_tokenizer


@pytest.fixture
def recipe_path(tmp_path):
    """A recipe on a small local model, with a data file of each local kind."""
    llama().save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(" ".join(WORDS[i % 90] for i in range(60)))
    (tmp_path / "guard.txt").write_text(" ".join(WORDS[7 * i % 90] for i in range(60)))
    train, evaluation = word_examples(2)
    lines = ["text\tlabel", *(f"{text}\t{label}" for text, label in train)]
    (tmp_path / "train.tsv").write_text("\ufeff" + "\n".join(lines) + "\n", encoding="utf-8")
    (tmp_path / "eval.csv").write_text("\n".join(["label,text", *(f"{y},{x}" for x, y in evaluation)]) + "\n")
    for name, rows in zip(("train", "eval"), word_examples(8), strict=True):
        with (tmp_path / f"second-{name}.jsonl").open("w") as stream:
            for text, label in rows:
                stream.write(json.dumps({"sentence": text, "sign": ["no", "yes"][label]}) + "\n")
    content = {
        "title": "Two small tasks",
        "model": {"name": "model"},
        "tasks": [
            {
                "name": "first",
                "labels": ["a", "b"],
                "train": {"path": "train.tsv", "text": "text", "label": "label"},
                "evaluation": {"path": "eval.csv", "text": "text", "label": "label"},
            },
            {
                "name": "second",
                "labels": ["yes", "no"],
                "train": {"path": "second-train.jsonl", "text": "sentence", "label": "sign"},
                "evaluation": {"path": "second-eval.jsonl", "text": "sentence", "label": "sign"},
            },
        ],
        "methods": [
            {"name": "frozen", "method": "frozen"},
            {"name": "lora", "label": "LoRA", "method": "lora", "learning_rate": 0.01,
             "options": {"r": 4, "target_modules": ["q_proj"]}},
            {"name": "cur", "label": "CURLoRA", "method": "curlora", "learning_rate": 0.3, "options": {"r": 4}},
        ],
        "heldout": {"name": "words", "path": "text.txt", "tokens": 50, "window": 16},
        "training": {"epochs": 3, "batch_size": 4, "head_learning_rate": 0.05},
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path
