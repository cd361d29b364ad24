"""The base model of a run: its scores, measured once, and whether it is still the same."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from torch import nn

from curlora.continual.answers import ANSWERS, Answers
from curlora.continual.checks import check_texts
from curlora.continual.encoding import Encoded
from curlora.continual.errors import RunError
from curlora.continual.frozen_layers import FOLDER
from curlora.continual.heldout import HeldOut, measure
from curlora.continual.model_digest import model_digest
from curlora.continual.processes import process_state
from curlora.continual.results import Score, TextScore
from curlora.continual.stream import Stream
from curlora.continual.task_model import TaskModel
from curlora.continual.trainer import TaskTrainer
from curlora.storage import write_whole

__all__ = ["Base", "measured_base", "same_model"]

_BASE = "base.json"


class Base(BaseModel):
    """The base model's scores, saved so that a resumed run does not measure them again."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")

    data: str
    model: str
    parameters: int
    heldout: dict[str, TextScore]
    tasks: list[Score]


def measured_base(stream: Stream, encoded: Sequence[Encoded], directory: Path) -> Base:
    """Return the base model's scores: read from the run directory, or measured now and saved.

    Raises:
        RunError: if the data differ from those of the run in the directory, or a text is too long for the model.
    """
    path = directory / _BASE
    data = _data_digest(encoded, stream.texts)
    if path.exists():
        try:
            known = Base.model_validate_json(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RunError(f"{path} cannot be read. Remove it: the base model is then measured again.") from error
        if known.data == data:
            return known
        if any(directory.glob("*/seed-*")):  # else nothing was trained on the other data
            raise RunError(
                f"The data or the tokenizer have changed since the run in {directory} began, so earlier and later "
                "results could not be compared. Choose another folder, or undo the change."
            )
    wanted = [part for part in encoded if part.settings.forward_transfer]
    language_model: Any = stream.load_model().to(process_state().device).requires_grad_(False)
    digest = model_digest(language_model)
    for text in stream.texts:
        if isinstance(text, Answers) and text.model not in ("", digest):
            raise RunError(
                f"The text {text.name!r} in {directory} was written by another model than this one. Choose another "
                f"folder, or remove {directory / ANSWERS}*.json: this model then writes it."
            )
    model = TaskModel(language_model)
    check_texts(language_model.config, stream.texts, encoded)
    scores = []
    for part in wanted:
        model.begin(part.number, part.task.classes)
        trainer = TaskTrainer(model, 0.0, [], stream.tokenizer, part.settings, stream.seeds[0], directory / ".base")
        generated = directory / "generated" / f"{part.task.name}.jsonl"
        scores.append(trainer.score(part.evaluation, part.generation, generated))
    if process_state().is_main_process:
        shutil.rmtree(directory / ".base", ignore_errors=True)  # created by the Trainer and left empty
    base = Base(
        data=data,
        model=digest,
        parameters=language_model.num_parameters(),  # also correct for packed quantized weights
        heldout={text.name: measure(language_model, text) for text in stream.texts},
        tasks=scores,
    )
    if process_state().is_main_process:
        write_whole(path, base.model_dump_json(indent=2))
    return base


def _data_digest(encoded: Sequence[Encoded], texts: Sequence[HeldOut]) -> str:
    """Return the SHA-256 of all tokens that are trained on, scored or used by plug-ins."""
    digest = hashlib.sha256()
    for part in encoded:
        digest.update(json.dumps([part.task.name, part.train, part.evaluation]).encode())
        if part.generation is not None:
            digest.update(json.dumps([part.generation.prompts.ids, part.generation.prompts.answers]).encode())
    for text in texts:
        digest.update(json.dumps([text.name, text.window, text.stride, text.tokens.tolist()]).encode())
        # Where tokens that do not count stand among those that do, as a chat template's; files of earlier versions have
        # no such rows.
        if among := [mask.tolist() for mask in text.as_rows().counted if bool((~mask[1:] & mask[:-1]).any())]:
            digest.update(json.dumps(among).encode())
    return digest.hexdigest()


def forget_base(directory: Path) -> None:
    """Remove what the base model has written in a run directory, and what was measured on it."""
    for path in (directory / _BASE, *directory.glob(f"{ANSWERS}*.json")):
        path.unlink(missing_ok=True)
    shutil.rmtree(directory / FOLDER, ignore_errors=True)


def same_model(model: nn.Module, digest: str, directory: Path) -> nn.Module:
    """Return a model that was loaded again.

    Args:
        model: the model.
        digest: the digest of the model that the run began with, :attr:`Base.model`.
        directory: the run directory.

    Raises:
        RunError: if it is another model.
    """
    if model_digest(model) != digest:
        raise RunError(
            f"The base model is not the one that the run in {directory} began with. Choose another folder, or use that "
            "model."
        )
    return model
