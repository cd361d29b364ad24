"""Texts that a training is only measured on: files of the user's, and another sample of what the base model writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch

from curlora.budget.limited_texts import OWN_TEXT
from curlora.errors import GuardError
from curlora.text.evaluating import evaluating
from curlora.text.own_text import own_text
from curlora.text.perplexity import perplexity
from curlora.text.rows import Rows, rows_of
from curlora.train.errors import TrainError
from curlora.train.model import Base
from curlora.train.options import TrainOptions
from curlora.train.plan import guard_row

__all__ = ["OWN_SAMPLE", "perplexities", "read_files", "write_sample"]

OWN_SAMPLE = "another sample of own text"


def read_files(options: TrainOptions, base: Base) -> dict[str, Rows]:
    """Return the rows of the files in ``options.other_texts``.

    Raises:
        TrainError: if a file has no token to predict, or its name is taken.
    """
    found = {}
    for name, path in options.other_texts.items():
        if name in (*options.guard_texts, OWN_TEXT, OWN_SAMPLE):
            raise TrainError(f"--other-text {path}: another text is called {name!r} too. Give it a name: NAME=PATH.")
        try:
            found[name] = rows_of(name, path, base.tokenizer, tokens=options.GUARD_TOKENS, max_length=guard_row(base))
        except GuardError as error:
            raise TrainError(f"--other-text {path}: {error}") from error
    return found


def write_sample(options: TrainOptions, base: Base, model: Any) -> Rows:
    """Let the base model write text that no training has used: the seeds of trainings are below ``2**32``."""
    return own_text(
        model, base.tokenizer, tokens=options.OTHER_TOKENS, max_length=guard_row(base), seed=options.seed + 2**32,
        progress=False,
    )  # fmt: skip


def perplexities(
    model: Any, texts: Mapping[str, Rows], autocast: Callable[[], AbstractContextManager[Any]]
) -> dict[str, float]:
    """Return the model's perplexity on each text."""
    length, batch = TrainOptions.GUARD_ROW, TrainOptions.GUARD_BATCH
    with evaluating(model), torch.no_grad(), autocast():
        return {
            name: perplexity(model, rows, max_length=length, batch_size=batch, progress=False)
            for name, rows in texts.items()
        }
