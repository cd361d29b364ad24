"""Generation: sampling from a model's unchanged distribution, and helpers for every kind of decoding."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from curlora.errors import GuardError
from curlora.text.evaluating import evaluating
from curlora.text.processes import rank_and_count
from curlora.tuner.sharded import reshard
from curlora.tuner.weight import running_device

__all__ = ["draw", "generating", "named_ends", "padded", "sample", "uniforms"]


def uniforms(seed: int, number: int, count: int) -> Tensor:
    """Return ``count`` uniform random numbers in ``[0, 1)`` for the draws of one row, float64, on the CPU.

    They depend only on the seed and the row's number, not on the batch that contains the row.
    """
    generator = torch.Generator("cpu").manual_seed((seed * 1_000_003 + number) % 2**63)
    return torch.rand(count, dtype=torch.float64, device="cpu", generator=generator)


def draw(p: Tensor, uniform: Tensor) -> Tensor:
    """Draw one index from each row of probabilities by inverse transform sampling.

    Args:
        p: probabilities, shape ``(rows, entries)``.
        uniform: uniform random numbers in ``[0, 1)``, shape ``(rows,)``.

    Returns:
        The drawn indices, shape ``(rows,)``.
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
    """Sample continuations of prompts from the model's unchanged distribution, at temperature 1.

    The model's generation configuration is ignored, and torch's random generators are not used.

    Args:
        model: a causal language model that can generate, or a PEFT model of one. Active adapters stay active.
        prompts: the tokens of each prompt, at least one. All prompts form one batch.
        numbers: the number of each prompt. A row's draws depend only on its number and on ``seed``.
        ends: tokens that end a row.
        pad: the token to pad with; any token will do.
        max_new_tokens: the largest number of new tokens in a row.
        seed: the seed of the draws.

    Returns:
        The new tokens of each row, including the token that ended it, if any.

    Raises:
        GuardError: if a prediction is not finite.
    """
    base = getattr(model, "get_base_model", lambda: model)()
    drawing = _Drawing(torch.stack([uniforms(seed, number, max_new_tokens) for number in numbers]))
    several = rank_and_count()[1] > 1
    with generating(base, ends, pad, max_new_tokens, do_sample=False), _generate_of(model, base) as generate:
        batch = padded(prompts, pad, running_device(base))
        # A sharded model has to run in all processes, even if the rows of one of them end earlier.
        found = generate(**batch, logits_processor=LogitsProcessorList([drawing]), synced_gpus=several)
    new = found[:, batch["input_ids"].shape[1] :].tolist()
    return [row[: next((n + 1 for n, token in enumerate(row) if token in ends), len(row))] for row in new]


class _Drawing(LogitsProcessor):
    """Draws one token for each row and masks the logits of all others, so that greedy decoding selects it."""

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
    """Yield ``base.generate``; with FSDP2, one that gathers the root's parameters first, as a forward pass does."""
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
    """Return a batch of prompts, padded on the left so that each answer directly follows its prompt."""
    length = max(map(len, prompts))
    input_ids = torch.full((len(prompts), length), pad, device="cpu")
    attention_mask = torch.zeros_like(input_ids)
    for i, prompt in enumerate(prompts):
        input_ids[i, length - len(prompt) :] = torch.tensor(prompt, device="cpu")
        attention_mask[i, length - len(prompt) :] = 1
    return {"input_ids": input_ids.to(device), "attention_mask": attention_mask.to(device)}


def named_ends(model: Any) -> frozenset[int]:
    """Return the end tokens (``eos_token_id``) of the model's generation configuration."""
    named = model.generation_config.eos_token_id
    return frozenset(named if isinstance(named, list) else [named]) - {None}


@contextlib.contextmanager
def generating(model: Any, ends: frozenset[int], pad: int, max_new_tokens: int, **how: Any) -> Iterator[None]:
    """Put the model into evaluation mode and replace its generation configuration by one made from ``how``."""
    # PeftModelForCausalLM has its own configuration and passes it to the base model; a plain PeftModel does not.
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
