"""A penalty on moving away from the base model on a general text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from peft import PeftModel
from torch import Tensor, nn

from curlora.callbacks.penalty import PenaltyCallback
from curlora.guard.evaluating import evaluating, without_adapters
from curlora.guard.texts import Rows

__all__ = ["KLToBaseCallback", "kl_to_base", "pieces_of"]


class KLToBaseCallback(PenaltyCallback):
    """Adds ``strength * KL(base || model)`` on a row of general text to every step; the rows are taken in turn.

    As in learning without forgetting (Li and Hoiem 2016, https://arxiv.org/abs/1606.09282), with the general text in
    the place of the new task's. It costs two more forward passes and a backward at every step.

    Args:
        rows: tokens of general text, each of shape ``(length,)``; a hundred or two a row are enough. Of
            :class:`curlora.guard.texts.Rows`, such as :func:`curlora.guard.own_text` gives, the tokens that count do.
        strength: of the penalty, nats per token, beside the loss.
        base: the base model; ``None`` where the model with its adapter switched off is it. Full fine-tuning, and
            adapters that change the base model's weights, as PiSSA does, need a second copy.

    Raises:
        ValueError: if ``strength`` is not positive, or there is no row of two tokens.
    """

    logged_as: ClassVar[str] = "kl_to_base"

    def __init__(self, rows: Sequence[Tensor], strength: float, base: nn.Module | None = None) -> None:
        super().__init__()
        if not (strength > 0 and math.isfinite(strength)):
            raise ValueError(f"strength must be positive, got {strength}")
        self.pieces = pieces_of(rows)
        if not self.pieces:
            raise ValueError("There is no row of two tokens or more, and so nothing to predict")
        self.strength = strength
        self.base = None if base is None else base.eval().requires_grad_(False)

    def penalty(self, model: nn.Module, step: int) -> Tensor:
        if self.base is None and not isinstance(model, PeftModel):
            raise ValueError("The model has no adapter that could be switched off: pass the base model too (base=...)")

        def base_logits(ids: Tensor, kept: int) -> Tensor:
            if self.base is not None:
                base: Any = self.base.to(ids.device)
                return base(input_ids=ids, logits_to_keep=kept, use_cache=False).logits
            with without_adapters(model):
                return model(input_ids=ids, logits_to_keep=kept, use_cache=False).logits

        return self.strength * kl_to_base(model, *self.pieces[step % len(self.pieces)], base_logits)


def pieces_of(rows: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Rows of tokens, each with which of them count; those alone of which one is foretold and counts."""
    known = rows if isinstance(rows, Rows) else Rows(rows)
    return [both for both in zip(known, known.counted, strict=True) if bool(both[1][1:].any())]


def kl_to_base(model: nn.Module, row: Tensor, counted: Tensor, base_logits: Callable[[Tensor, int], Tensor]) -> Tensor:
    """``KL(base || model)`` of the predictions of the next token, the mean in nats over the tokens that count.

    Args:
        model: a causal language model, in the mode that it is trained in; its base is run in evaluation mode.
        row: tokens, shape ``(length,)``, on any device.
        counted: which of them count, bool, of that shape; one of those behind the first at least.
        base_logits: given ``input_ids`` of shape ``(1, length)`` and a number, the base model's logits at that many
            last positions, shape ``(1, number, vocabulary)``.
    """
    device = next(model.parameters()).device
    ids, foretold = row.to(device)[None], counted[1:].to(device)
    with evaluating(model), torch.no_grad():
        base = base_logits(ids, ids.shape[1])[0, :-1][foretold].float().log_softmax(-1)
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1][foretold]
    return nn.functional.kl_div(logits.float().log_softmax(-1), base, reduction="batchmean", log_target=True)
