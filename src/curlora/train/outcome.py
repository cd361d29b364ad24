"""The results of a training, as ``training.json`` stores them."""

from __future__ import annotations

import math

from pydantic import BaseModel, ConfigDict

from curlora.guard import TextOutcome

__all__ = ["Budget", "HeldOut", "OtherText", "Reply", "Run", "TrainOutcome"]


class _Record(BaseModel):
    # A perplexity may be infinite, which JSON has no number for.
    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings", extra="ignore")


class HeldOut(_Record):
    """Held-out examples: their number, the number of tokens in their answers, and the loss in nats per token."""

    source: str
    examples: int
    tokens: int
    loss_before: float
    loss_after: float


class Budget(_Record):
    """The forgetting budget, and the forgetting that was predicted and measured.

    ``stated``, ``limits`` (the texts with a limit of their own) and ``lifetime`` are relative rises of perplexity.
    ``predicted`` is in nats per token, and ``None`` for an adapter without a guard. ``kept`` is the share of the
    training's update that was kept to stay within the limits.
    """

    stated: float
    limits: dict[str, float] = {}
    lifetime: float | None
    predicted: float | None
    kept: float
    texts: dict[str, TextOutcome]

    @property
    def worst(self) -> tuple[str, TextOutcome]:
        """The name and outcome of the text that is closest to its limit, or furthest above it."""
        beyond = {name: text.rise - text.limit for name, text in self.texts.items()}
        name = max(beyond, key=lambda name: math.inf if math.isnan(beyond[name]) else beyond[name])
        return name, self.texts[name]

    @property
    def within(self) -> bool:
        """Whether every text is within its limit."""
        return all(text.rise <= text.limit for text in self.texts.values())


class OtherText(_Record):
    """The perplexity of the base model and of the trained model on a text that was only measured."""

    tokens: int
    before: float
    after: float

    @property
    def rise(self) -> float:
        """The relative rise of perplexity: 0.01 for 1 %."""
        return self.after / self.before - 1


class Reply(_Record):
    """The replies to a prompt before and after training; ``data`` is the answer in the data, if there is one."""

    prompt: str
    before: str
    after: str
    data: str | None


class Run(_Record):
    """Facts about the training run; ``log`` is what transformers' Trainer logged."""

    steps: int
    examples: int
    tokens: int
    trained_parameters: int
    learning_rate: float
    seconds: float
    device: str
    log: list[dict[str, float]]


class TrainOutcome(_Record):
    """All results of a finished training."""

    curlora: str
    created: str
    base_model: str
    continue_from: str | None
    quantize: str | None
    data: str
    layout: str
    adapter: str = "CURLoRA"
    rank: int
    layers: int
    run: Run
    held_out: HeldOut
    budget: Budget
    others: dict[str, OtherText] = {}
    replies: list[Reply]
    exported: str | None = None

    @property
    def worst_other(self) -> tuple[str, OtherText] | None:
        """The name and the figures of the text that has lost most of those that were only measured."""
        rises = {name: math.inf if math.isnan(text.rise) else text.rise for name, text in self.others.items()}
        name = max(rises, key=lambda name: rises[name], default=None)
        return None if name is None else (name, self.others[name])
