"""The model's replies before and after training, with the demo's methods side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import RenderableType
from rich.table import Column, Table
from rich.text import Text
from transformers import AutoModelForCausalLM, AutoTokenizer

from curlora.continual.generation import generate
from curlora.continual.results import RunResults

__all__ = ["PROMPTS", "replies", "replies_table"]

PROMPTS = (
    "What is the capital of Australia?",
    "How do I cook rice?",
    "Give me three tips for better sleep.",
)


def replies(results: RunResults, directory: Path, model: str, max_new_tokens: int = 40) -> dict[str, list[str]]:
    """Generate greedy replies to :data:`PROMPTS` with the base model and with each method's adapter.

    Args:
        results: the results of the run.
        directory: the run's folder, which holds the adapters.
        model: the base model's folder.
        max_new_tokens: maximum length of a reply, in tokens.

    Returns:
        The replies by the methods' labels, in the order of the prompts. The first entry, ``"before"``, is the base
        model's.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    base: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    asked = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for prompt in PROMPTS
    ]

    def reply(language_model: Any) -> list[str]:
        answers = generate(language_model, tokenizer, asked, max_new_tokens=max_new_tokens)
        return [" ".join(answer.text.split()) for answer in answers]

    found = {"before": reply(base)}
    seed = results.seeds[0]
    for method in results.methods:
        folder = directory / method.name / f"seed-{seed}" / "adapter"
        if folder.is_dir():
            adapted = PeftModel.from_pretrained(base, folder)
            found[method.label] = reply(adapted)
            base = adapted.unload()
    return found


def replies_table(found: dict[str, list[str]]) -> RenderableType:
    """Return a table of the replies with a row for each prompt."""
    columns = [Column(Text(label)) for label in found]
    table = Table("prompt", *columns, title="Replies, before and after", show_lines=True)
    for number, prompt in enumerate(PROMPTS):
        table.add_row(Text(prompt, style="bold"), *(Text(of_one[number]) for of_one in found.values()))
    return table
