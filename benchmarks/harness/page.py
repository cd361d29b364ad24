"""The table of lm-eval's accuracies, from the results that it writes."""

import json
from pathlib import Path

from tables import table

HERE = Path(__file__).parent
RUNS = {"base": "the base model", "budget": "with the adapter within 1 %", "lora": "with LoRA"}


def tables():
    return {"lm_eval": accuracies()}


def accuracies():
    rows = []
    for name, shown in RUNS.items():
        found = json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))["results"]["reviews"]
        rows.append([shown, f"{found['acc,none']:.3f} ± {found['acc_stderr,none']:.3f}"])
    return table(["", "accuracy"], rows)
