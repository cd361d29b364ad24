"""The figures of a training, as ``training.json`` has them."""

from __future__ import annotations

import math

from pydantic import BaseModel, ConfigDict

from curlora.guard import TextOutcome

__all__ = ["Budget", "HeldOut", "Reply", "Run", "TrainOutcome"]


class _Part(BaseModel):
    # A perplexity may be infinite.
    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings", extra="ignore")


class HeldOut(_Part):
    """Examples that were not trained on: how many, the tokens of their answers, and the loss in nats per token."""

    source: str
    examples: int
    tokens: int
    loss_before: float
    loss_after: float


class Budget(_Part):
    """What may be forgotten and what was.

    ``stated``, the ``limits`` of texts that have one of their own, and ``lifetime`` are relative rises of perplexity,
    ``predicted`` is in nats per token, and ``kept`` is the share of the training's change that was kept to stay within
    the limits.
    """

    stated: float
    limits: dict[str, float] = {}
    lifetime: float | None
    predicted: float
    kept: float
    texts: dict[str, TextOutcome]

    @property
    def predicted_rise(self) -> float:
        """The rise of perplexity that goes with ``predicted``, if all of it is lost."""
        return math.expm1(self.predicted)

    @property
    def worst(self) -> tuple[str, TextOutcome]:
        """The text that is nearest to its limit, or furthest beyond it."""
        return max(self.texts.items(), key=lambda pair: pair[1].rise - pair[1].limit)

    @property
    def within(self) -> bool:
        """Whether every text keeps its limit."""
        return all(text.rise <= text.limit for text in self.texts.values())


class Reply(_Part):
    """To a prompt, before and after; ``data`` is what the data has there, if anything."""

    prompt: str
    before: str
    after: str
    data: str | None


class Run(_Part):
    """How it was trained; ``log`` is what transformers' Trainer logged."""

    steps: int
    examples: int
    tokens: int
    trained_parameters: int
    learning_rate: float
    seconds: float
    device: str
    log: list[dict[str, float]]


class TrainOutcome(_Part):
    """All figures of a finished training."""

    curlora: str
    created: str
    base_model: str
    continue_from: str | None
    quantize: str | None
    data: str
    layout: str
    rank: int
    layers: int
    run: Run
    held_out: HeldOut
    budget: Budget
    replies: list[Reply]
    exported: str | None = None
