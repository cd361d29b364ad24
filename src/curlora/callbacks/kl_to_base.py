"""A penalty on the KL divergence from the base model on general text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from curlora.callbacks.penalty import PenaltyCallback, check_strength
from curlora.text.evaluating import changes_the_base, evaluating, without_adapters
from curlora.text.rows import Rows
from curlora.tuner.weight import running_device

__all__ = ["KLToBaseCallback", "kl_to_base", "pieces_at", "pieces_of"]


class KLToBaseCallback(PenaltyCallback):
    """Adds ``strength * KL(base || model)`` on rows of general text to the loss of every step.

    The steps use the rows in turn, in a random order. This is learning without forgetting (Li and Hoiem 2016,
    https://arxiv.org/abs/1606.09282) on general text in place of the new task's inputs. Every step runs two more
    forward passes and one more backward pass, each on these rows.

    Args:
        rows: rows of general text, int64 tokens, each of shape ``(length,)``; 100 to 200 tokens in a row are enough.
            The penalty is the mean over the tokens that count (:class:`curlora.text.rows.Rows`, which
            :func:`curlora.guard.own_text` returns); in rows without a mask all tokens count.
        strength: the factor of the KL divergence, which is in nats per token. 3 is a good start (docs/proof.md).
        rows_per_step: the number of rows in a step.
        base: the base model. ``None`` if the base model is the trained model with its adapter disabled. Full
            fine-tuning, and adapters that change the base model's weights (PiSSA) or biases, need a second copy.

    Raises:
        ValueError: if ``strength`` or ``rows_per_step`` is not positive, or there is no row with a predicted token that
            counts.
    """

    logged_as: ClassVar[str] = "kl_to_base"

    def __init__(
        self, rows: Sequence[Tensor], strength: float, base: nn.Module | None = None, *, rows_per_step: int = 1
    ) -> None:
        super().__init__()
        if not isinstance(rows_per_step, int) or rows_per_step < 1:
            raise ValueError(f"rows_per_step must be a whole number of 1 or more, got {rows_per_step!r}.")
        self.rows_per_step = rows_per_step
        check_strength(strength)
        self.strength = strength
        if wrong := [row for row in rows if not isinstance(row, Tensor) or row.ndim != 1]:
            raise ValueError(f"Each of rows must be a tensor of tokens of shape (length,), got {wrong[0]!r:.80}.")
        self.pieces = pieces_of(rows)
        if not self.pieces:
            raise ValueError(
                f"There is no row of two tokens or more among the {len(rows)} rows, so there is nothing to predict. "
                "Give longer rows."
            )
        self.base = None if base is None else base.eval().requires_grad_(False)

    def penalty(self, model: nn.Module, step: int) -> Tensor:
        if self.base is None:
            _check_base_is_there(model)

        def base_logits(ids: Tensor) -> Tensor:
            if self.base is not None:
                base: Any = self.base.to(ids.device)
                return base(input_ids=ids, use_cache=False).logits
            with without_adapters(model):
                return model(input_ids=ids, use_cache=False).logits

        ids, counted = pieces_at(self.pieces, step, self.rows_per_step)
        return self.strength * kl_to_base(model, ids, counted, base_logits)


def _check_base_is_there(model: nn.Module) -> None:
    """Check that the model without its adapters is the base model."""
    if not isinstance(model, PeftModel):
        raise ValueError("The model has no adapter that can be disabled: pass the base model too (base=...).")
    for name, config in model.peft_config.items():
        options: Any = config
        begun = getattr(options, "init_lora_weights", None)
        biases = getattr(options, "bias", "none")
        if changes_the_base(begun) or biases != "none":
            said = f"bias={biases!r}" if biases != "none" else f"init_lora_weights={begun!r}"
            raise ValueError(
                f"The adapter {name!r} changes the base model itself ({said}), so the base model does not come back "
                "when it is disabled: pass the base model too (base=...)."
            )


def pieces_of(rows: Sequence[Tensor], seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Return pairs of a row of tokens and the mask of tokens that count, in a random order.

    In their own order a short training would see the first rows only, and so perhaps only one kind of text. Rows in
    which no predicted token counts are left out.
    """
    known = rows if isinstance(rows, Rows) else Rows(rows)
    pairs = [both for both in zip(known, known.counted, strict=True) if bool(both[1][1:].any())]
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))
    return [pairs[i] for i in order.tolist()]


def pieces_at(pieces: Sequence[tuple[Tensor, Tensor]], step: int, rows: int) -> tuple[Tensor, Tensor]:
    """Return the next pieces for a step, with their masks, each of shape ``(rows, length)`` and padded at the end."""
    chosen = [pieces[number % len(pieces)] for number in range(step * rows, (step + 1) * rows)]
    ids, counted = (pad_sequence(list(parts), batch_first=True) for parts in zip(*chosen, strict=True))
    return ids, counted


def kl_to_base(model: nn.Module, ids: Tensor, counted: Tensor, base_logits: Callable[[Tensor], Tensor]) -> Tensor:
    """Return ``KL(base || model)`` of the next-token predictions: the mean over the tokens that count, in nats.

    Both models run in evaluation mode, without dropout: its noise is no divergence.

    Args:
        model: a causal language model.
        ids: rows of tokens, shape ``(rows, length)``, on any device. Shorter rows are padded with any token at the end,
            which no earlier token sees.
        counted: the mask of tokens that count, bool, shape ``(rows, length)``. A token after a row's first must count.
        base_logits: called with ``ids``. Returns the base model's logits, shape ``(rows, length, vocabulary)``.

    Returns:
        The divergence, a scalar tensor with a gradient.
    """
    device = running_device(model)
    ids, foretold = ids.to(device), counted[:, 1:].to(device)
    with evaluating(model):
        with torch.no_grad():
            base = base_logits(ids)[:, :-1][foretold].float().log_softmax(-1)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1][foretold]
    return nn.functional.kl_div(logits.float().log_softmax(-1), base, reduction="batchmean", log_target=True)
