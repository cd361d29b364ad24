"""What a run consists of: tasks, methods, texts and settings."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from curlora.continual.answers import OwnText, PromptList, kept_answers
from curlora.continual.checks import Adapted, check_stream
from curlora.continual.encoding import Encoded
from curlora.continual.errors import RunError
from curlora.continual.frozen_layers import keep_frozen_layers
from curlora.continual.heldout import HeldOut
from curlora.continual.methods import Method
from curlora.continual.model_digest import model_digest
from curlora.continual.processes import process_state
from curlora.continual.settings import Settings
from curlora.continual.tasks import Task

__all__ = ["Stream"]


@dataclass(frozen=True)
class Stream:
    """A stream of tasks with the methods, texts and settings of a run.

    Args:
        title: title of the report.
        base_model: the model's name in reports.
        load_model: returns a fresh causal language model each time it is called.
        tokenizer: the model's tokenizer.
        tasks: the tasks in order.
        methods: the methods, with distinct names; each starts from a fresh model.
        heldout: texts whose perplexity is measured; summaries show the first.
        settings: how to train and score.
        seeds: each method is run once with each seed.
        protocol: the protocol's switches, for the report.
        recipe: the recipe, for the report.
        sampled: further held-out texts, which the base model must write first.
        guard_text: a general text for plug-ins; the base model may have to write it first. Its perplexity is measured
            too.
        orders: further orders of the tasks, each a list of all their names; every method is run in each.
        limits: limits on forgetting, for the report; see :class:`curlora.continual.recipe.Recipe`.
        load_empty: returns the model on the meta device, with which all methods are checked before any is run. If
            ``None``, an error of a method shows only when the method starts.
    """

    title: str
    base_model: str
    load_model: Callable[[], nn.Module]
    tokenizer: PreTrainedTokenizerBase
    tasks: Sequence[Task]
    methods: Sequence[Method]
    heldout: Sequence[HeldOut]
    settings: Settings = field(default_factory=Settings)
    seeds: Sequence[int] = (0,)
    protocol: Mapping[str, str] = field(default_factory=dict)
    recipe: dict[str, Any] | None = None
    sampled: Sequence[PromptList | OwnText] = ()
    guard_text: HeldOut | PromptList | OwnText | None = None
    orders: Sequence[Sequence[str]] = ()
    limits: Mapping[str, list[float]] = field(default_factory=dict)
    load_empty: Callable[[], nn.Module] | None = None

    @property
    def texts(self) -> list[HeldOut]:
        """The texts that exist already: the held-out texts, then the guard's."""
        return [*self.heldout, *([self.guard_text] if isinstance(self.guard_text, HeldOut) else [])]

    @property
    def unwritten(self) -> list[PromptList | OwnText]:
        """The texts that the base model must write first; the guard's comes last."""
        guard = self.guard_text
        return [*self.sampled, *([] if guard is None or isinstance(guard, HeldOut) else [guard])]

    def with_answers(self, directory: Path) -> Stream:
        """Return the stream with the base model's texts among its texts.

        Args:
            directory: the run directory, in which they are saved.
        """
        if not self.unwritten:
            return self
        digest_of = functools.cache(model_digest)  # asked for before the model has written anything
        load = functools.cache(lambda: self.load_model().to(process_state().device))
        if process_state().is_main_process:
            for text in self.unwritten:
                kept_answers(text, self.tokenizer, directory, load, digest_of)
        process_state().wait_for_everyone()
        written: list[HeldOut] = [kept_answers(text, self.tokenizer, directory, load) for text in self.unwritten]
        guard = self.guard_text
        if guard is not None and not isinstance(guard, HeldOut):
            guard = dataclasses.replace(written.pop(), shown=True)
        return dataclasses.replace(self, heldout=[*self.heldout, *written], sampled=(), guard_text=guard)

    def checked(self, encoded: Sequence[Encoded]) -> dict[str, Adapted]:
        """Check the methods on the model without weights; see :func:`curlora.continual.checks.check_stream`.

        Args:
            encoded: the encoded tasks.
        """
        if self.load_empty is None:
            return {}
        keeping = self.settings.cache_frozen_layers
        texts, seed = self.texts, self.seeds[0]
        return check_stream(
            self.methods, texts, encoded, self.load_empty, seed, unwritten=self.unwritten, frozen_layers=keeping
        )

    def keeping_frozen_layers(self, adapted: Mapping[str, Adapted], directory: Path) -> Stream:
        """Return the stream with models that cache the outputs of layers that no method trains, if so configured.

        Args:
            adapted: the result of :meth:`checked`.
            directory: the run directory.

        Raises:
            RunError: if ``adapted`` is empty, so the number of these layers is unknown.
        """
        if not self.settings.cache_frozen_layers:
            return self
        if not adapted:
            raise RunError(
                "cache_frozen_layers needs the model on the meta device. Pass load_empty, a function that returns it."
            )
        below = min(of.below for of in adapted.values())
        load = self.load_model
        return dataclasses.replace(self, load_model=lambda: keep_frozen_layers(load(), below, directory))
