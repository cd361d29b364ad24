"""Tokens of a model one after the other: what every way of generating needs, and sampling that is the model's own."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from curlora.guard.errors import GuardError
from curlora.guard.evaluating import evaluating
from curlora.guard.processes import rank_and_count
from curlora.tuner.sharded import reshard

__all__ = ["draw", "generating", "named_ends", "padded", "sample", "uniforms"]


def uniforms(seed: int, number: int, count: int) -> Tensor:
    """What decides the draws of one row: ``count`` numbers in ``[0, 1)``, float64, on the CPU.

    They depend on the seed and on the row's number alone, not on the batch that the row is in.
    """
    generator = torch.Generator("cpu").manual_seed((seed * 1_000_003 + number) % 2**63)
    return torch.rand(count, dtype=torch.float64, device="cpu", generator=generator)


def draw(p: Tensor, uniform: Tensor) -> Tensor:
    """Of each row of probabilities one entry, each as often as it is probable.

    Args:
        p: shape ``(rows, entries)``.
        uniform: what decides, in ``[0, 1)``, shape ``(rows,)``.

    Returns:
        Indices, shape ``(rows,)``.
    """
    wide = torch.float32 if p.device.type == "mps" else torch.float64
    cumulative = p.to(wide).cumsum(-1)
    drawn = torch.searchsorted(cumulative, uniform.to(p.device, wide)[:, None] * cumulative[:, -1:])
    return drawn.squeeze(1).clamp_(max=p.shape[1] - 1)


def sample(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    numbers: Sequence[int],
    ends: frozenset[int],
    pad: int,
    max_new_tokens: int,
    seed: int,
) -> list[list[int]]:
    """Go on from prompts as the model itself would: from its distribution as it is, at temperature 1.

    Nothing of the model's generation configuration counts, and torch's generators stay as they are.

    Args:
        model: a causal language model that can generate, or a PEFT model of one, with whatever adapters are active.
        prompts: tokens of each, at least one. They go through the model together.
        numbers: of the prompts: a row's draws depend on its number and on ``seed``, not on the rows beside it.
        ends: tokens that end a row.
        pad: any token.
        max_new_tokens: where a row is cut off.
        seed: of the draws.

    Returns:
        The new tokens of each row, its end included where it came to one.

    Raises:
        GuardError: if a prediction is not finite.
    """
    base = getattr(model, "get_base_model", lambda: model)()
    drawing = _Drawing(torch.stack([uniforms(seed, number, max_new_tokens) for number in numbers]))
    several = rank_and_count()[1] > 1
    with generating(base, ends, pad, max_new_tokens, do_sample=False), _generate_of(model, base) as generate:
        batch = padded(prompts, pad, next(base.parameters()).device)
        # A model that is in pieces runs in all processes or in none, should one of them be done before another.
        found = generate(**batch, logits_processor=LogitsProcessorList([drawing]), synced_gpus=several)
    new = found[:, batch["input_ids"].shape[1] :].tolist()
    return [row[: next((n + 1 for n, token in enumerate(row) if token in ends), len(row))] for row in new]


class _Drawing(LogitsProcessor):
    """Leaves of each row's predictions one that is drawn, so that greedy decoding takes it."""

    def __init__(self, uniform: Tensor) -> None:
        self.uniform, self.step = uniform, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        p = scores.float().softmax(-1)
        if not bool(torch.isfinite(p).all()):
            raise GuardError(
                "The model's predictions are not finite, so nothing can be sampled. Is the model sound, and its "
                "precision enough? Try float32 or bfloat16."
            )
        column = self.uniform[:, min(self.step, self.uniform.shape[1] - 1)]
        self.step += 1
        drawn = draw(p, column)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn[:, None], 0.0)


@contextlib.contextmanager
def _generate_of(model: Any, base: Any) -> Iterator[Callable[..., Tensor]]:
    """``base.generate``; under FSDP2 with the root's parameters in one piece, as it has them in a forward pass."""
    roots = (module for module in model.modules() if isinstance(module, FSDPModule))
    root: Any = next(roots, None)
    if root is None:
        yield base.generate
        return
    root.curlora_generate = types.MethodType(lambda self, **inputs: base.generate(**inputs), root)
    try:
        register_fsdp_forward_method(root, "curlora_generate")
        yield root.curlora_generate
    finally:
        del root.curlora_generate
        reshard(model)


def padded(prompts: Sequence[Sequence[int]], pad: int, device: Any) -> dict[str, Any]:
    """A batch, padded on the left: an answer begins right behind its prompt."""
    length = max(map(len, prompts))
    input_ids = torch.full((len(prompts), length), pad, device="cpu")
    attention_mask = torch.zeros_like(input_ids)
    for i, prompt in enumerate(prompts):
        input_ids[i, length - len(prompt) :] = torch.tensor(prompt, device="cpu")
        attention_mask[i, length - len(prompt) :] = 1
    return {"input_ids": input_ids.to(device), "attention_mask": attention_mask.to(device)}


def named_ends(model: Any) -> frozenset[int]:
    """The tokens that end an answer by the model's generation configuration."""
    named = model.generation_config.eos_token_id
    return frozenset(named if isinstance(named, list) else [named]) - {None}


@contextlib.contextmanager
def generating(model: Any, ends: frozenset[int], pad: int, max_new_tokens: int, **how: Any) -> Iterator[None]:
    """In evaluation mode, generating as ``how`` says: the model's own generation configuration is set aside."""
    # Of PEFT's models those for a task have one of their own, and give it to the base; others leave the base its own.
    base = getattr(model, "get_base_model", lambda: model)()
    holders = [one for one in (model, base) if "generation_config" in vars(one)]
    own = [one.generation_config for one in holders]
    for holder in holders:
        holder.generation_config = GenerationConfig(
            max_new_tokens=max_new_tokens, use_cache=True, eos_token_id=sorted(ends) or None, pad_token_id=pad, **how
        )
    try:
        with evaluating(model), torch.no_grad():
            yield
    finally:
        for holder, config in zip(holders, own, strict=True):
            holder.generation_config = config
