"""The model card of a trained adapter."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import jinja2
from huggingface_hub import ModelCardData

from curlora.storage import write_whole
from curlora.train.outcome import TrainOutcome
from curlora.train.tables import budget_rows, loss_row, text_rows

__all__ = ["write_card"]


def write_card(outcome: TrainOutcome, path: Path) -> None:
    """Write the card in the Hugging Face Hub's format."""
    local = Path(outcome.base_model).expanduser().is_dir()
    base = None if local else outcome.base_model  # the hub rejects a local path as base_model
    about = ModelCardData(
        base_model=base,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=[
            outcome.adapter.lower(),
            "trl",
            "sft",
            *([] if base is None else [f"base_model:adapter:{base}"]),
        ],
    )
    template = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    template.filters["line"] = _line
    text = template.from_string(
        resources.files("curlora.train").joinpath("card.md.j2").read_text(encoding="utf-8")
    ).render(
        about=about.to_yaml(),
        outcome=outcome,
        base=outcome.base_model,
        name=Path(outcome.base_model).name if local else outcome.base_model,
        data=Path(outcome.data).name,
        loss=loss_row(outcome),
        texts=text_rows(outcome),
        budget=budget_rows(outcome),
    )
    write_whole(path, text)


def _line(text: str) -> str:
    """Return ``text`` on one line, escaped for a cell of a Markdown table."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
