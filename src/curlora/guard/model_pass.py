"""A model's pass over a general text, forward and backward, with the answers that the model itself would give."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from curlora.guard.decoding import draw, uniforms
from curlora.guard.errors import GuardError
from curlora.guard.evaluating import evaluating
from curlora.guard.processes import rank_and_count, sum_over_processes
from curlora.guard.progress import Shown, stage
from curlora.guard.texts import Rows
from curlora.tuner.layer import CurloraLayer
from curlora.tuner.param_wrapper import ParamWrapper
from curlora.tuner.sharded import reshard

__all__ = ["Counts", "backward", "pass_over", "perplexity", "ready"]


_IGNORED = -100
_NOTHING = (
    "The text has no two tokens in a row, so there is nothing to predict: is it empty, or does the tokenizer turn it "
    "into nothing?"
)


@dataclass(frozen=True)
class Counts:
    """What a pass went through: ``tokens`` in ``rows`` pieces of text, of which ``predicted`` have one before them."""

    predicted: int
    tokens: int
    rows: int


def pass_over(
    model: nn.Module,
    layers: Mapping[str, CurloraLayer],
    data: Any,
    tokenizer: Any,
    *,
    max_length: int,
    batch_size: int,
    gradients: bool,
    seed: int,
    progress: Shown,
    doing: str,
    begin: Callable[[Tensor], None],
    end: Callable[[], None],
) -> Counts:
    """Run a model over texts, rows of tokens or batches, see :func:`curlora.guard.collect.calibrate`.

    Args:
        model: a causal language model.
        layers: the adapted layers, whose outputs gradients are taken of.
        data, tokenizer, max_length, batch_size, gradients, seed: as ``calibrate`` has them.
        progress: how it is shown.
        doing: what is shown then.
        begin: called with each batch's mask, of shape ``(batch, length)``, before the batch is run.
        end: called after each batch.

    Raises:
        GuardError: as ``calibrate``.
    """
    rank, processes = rank_and_count()
    # The gradient of a parameter is summed over a batch: of one row it is that row's.
    one_by_one = any(isinstance(layer, ParamWrapper) for layer in layers.values())
    batches, count = _batches(data, tokenizer, max_length, 1 if one_by_one else batch_size, rank, processes)
    if one_by_one:
        batches, count = _in_rows(batches), None
    device = next(model.parameters()).device
    predicted = tokens = rows = 0
    with ready(model, layers, gradients) as reached, stage(progress, doing, count) as advance:
        for numbers, _, mask, answered, logits in _run(model, batches, device, begin):
            if gradients:
                backward(logits, reached, _drawn_gradient(logits.detach(), answered, numbers, seed))
            end()
            advance(1)
            predicted += int(answered.sum())
            tokens += int(mask.sum())
            rows += int(answered.any(1).sum())
    (counted,) = sum_over_processes([torch.tensor([predicted, tokens, rows], device="cpu")], device)
    counts = Counts(*(int(number) for number in counted))
    if not counts.predicted:
        raise GuardError(_NOTHING)
    return counts


def perplexity(
    model: nn.Module,
    data: Iterable[str] | Iterable[Tensor] | Iterable[Mapping[str, Tensor]],
    tokenizer: Any = None,
    *,
    max_length: int = 128,
    batch_size: int = 8,
    progress: Shown = False,
) -> float:
    """``exp`` of the mean negative log-likelihood of a token, given those before it in its row.

    Of the same rows that :func:`curlora.calibrate` makes of the same text. The model is as it was afterwards. Where
    ``torch.distributed`` runs, texts and rows are shared out over the processes, each of which gets the perplexity
    of all of them.

    Args:
        model: a causal language model.
        data, tokenizer, max_length, batch_size, progress: as for :func:`curlora.calibrate`.

    Returns:
        Infinity where it is too large for a float; NaN where a prediction is.

    Raises:
        GuardError: if the model is not a causal language model, if the text has no two tokens in a row, or if a row is
            longer than the model's positions.
    """
    rank, processes = rank_and_count()
    batches, count = _batches(data, tokenizer, max_length, batch_size, rank, processes)
    device = next(model.parameters()).device
    loss = torch.zeros(2, dtype=torch.float64, device="cpu")
    with ready(model, {}, gradients=False), stage(progress, "measuring perplexity", count) as advance:
        for _, ids, _, answered, logits in _run(model, batches, device):
            answers = ids[:, 1:].masked_fill(~answered, _IGNORED)
            for of_row, answer in zip(logits[:, :-1], answers, strict=True):  # one by one: the vocabulary is large
                lost = cross_entropy(of_row.float(), answer, ignore_index=_IGNORED, reduction="sum")
                loss += torch.stack([lost, (answer != _IGNORED).sum()]).cpu()
            advance(1)
    (loss,) = sum_over_processes([loss], device)
    total, count = loss.tolist()
    if not count:
        raise GuardError(_NOTHING)
    try:
        return math.exp(total / count)
    except OverflowError:
        return math.inf


def _run(
    model: nn.Module,
    batches: Iterable[tuple[Sequence[int], Mapping[str, Any]]],
    device: torch.device,
    begin: Callable[[Tensor], None] = lambda mask: None,
) -> Iterator[tuple[Sequence[int], Tensor, Tensor, Tensor, Tensor]]:
    """Of each batch the numbers of its rows, ``input_ids``, which of them count, which predict one, and the logits."""
    for numbers, batch in batches:
        inputs, mask = _inputs(model, batch, numbers, device)
        begin(mask)
        answered = mask[:, :-1] & mask[:, 1:]  # shape (batch, length - 1)
        if (labels := batch.get("labels")) is not None:
            answered &= torch.as_tensor(labels, device=device)[:, 1:] != _IGNORED
        yield numbers, inputs["input_ids"], mask, answered, _logits_of(model(**inputs, use_cache=False), mask)


@contextlib.contextmanager
def ready(model: nn.Module, layers: Mapping[str, CurloraLayer], gradients: bool) -> Iterator[Tensor]:
    """In evaluation mode, with gradients that reach the lowest adapted layers and go no further.

    What it gives is for :func:`backward`: a number that every adapted layer seems to depend on. (``U`` would not do:
    FSDP2 has other parameters in the graph than those in the model.)
    """
    reached = torch.zeros((), device=next(model.parameters()).device, requires_grad=True)

    def from_here(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return _Reaches.apply(output, reached)

    reaching = [] if not gradients else [
        *(layer.base_layer for layer in layers.values()),
        # Before the hooks of whoever wants the gradient of the updated parameter.
        *(U for layer in layers.values() if isinstance(layer, ParamWrapper) for U in layer.curlora_U.values()),
    ]  # fmt: skip
    handles = [module.register_forward_hook(from_here, prepend=True) for module in reaching]
    try:
        with evaluating(model), torch.set_grad_enabled(gradients):
            yield reached
    finally:
        reshard(model)
        for handle in handles:
            handle.remove()


def backward(value: Tensor, reached: Tensor, gradient: Tensor | None = None) -> None:
    """Run backward for the hooks of adapted layers' outputs alone; ``reached`` is as :func:`ready` gives it."""
    if value.requires_grad:  # not where none of the layers was used
        torch.autograd.grad(value, reached, gradient, allow_unused=True)


class _Reaches(torch.autograd.Function):
    """``output``, as if it depended on another tensor as well, of which there is no gradient."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, reached: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _inputs(
    model: nn.Module, batch: Mapping[str, Any], numbers: Sequence[int], device: torch.device
) -> tuple[dict[str, Tensor], Tensor]:
    """What the model is given, and which tokens of it count.

    Positions are counted from each row's first token, as in training and generation. Nothing counts of a batch that
    has no numbers.
    """
    ids = batch["input_ids"].to(device)
    given = batch.get("attention_mask")
    mask = torch.ones_like(ids) if given is None else torch.as_tensor(given, device=device)
    if ids.ndim != 2 or mask.shape != ids.shape:
        raise GuardError(
            f"input_ids and attention_mask are expected of shape (batch, length), found {tuple(ids.shape)} and "
            f"{tuple(mask.shape)}"
        )
    base = getattr(model, "get_base_model", lambda: model)()
    most = getattr(getattr(base, "config", None), "max_position_embeddings", None)
    if most is not None and ids.shape[1] > most:
        raise GuardError(
            f"A row of the text has {ids.shape[1]:,} tokens; the model has {most:,} positions. Give shorter rows, or "
            "texts and a lower max_length."
        )
    inputs = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in batch:
        inputs["position_ids"] = batch["position_ids"].to(device)
        if given is None:  # examples in one row, which transformers tells apart where there is no mask
            del inputs["attention_mask"]
    elif not bool(mask[:, 0].all()) and "position_ids" in inspect.signature(base.forward).parameters:
        inputs["position_ids"] = (mask.long().cumsum(1) - 1).clamp_min(0)
    return inputs, mask.bool() if len(numbers) else torch.zeros_like(mask, dtype=torch.bool)


def _logits_of(output: Any, mask: Tensor) -> Tensor:
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.shape[:-1] != mask.shape:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else "none"
        raise GuardError(
            f"A causal language model is needed, with logits of shape (batch, length, vocabulary) for "
            f"input_ids of shape {tuple(mask.shape)}; found {found}."
        )
    return logits


# Positions whose probabilities are summed up together in float64: the vocabulary is large.
_CHUNK = 128


def _drawn_gradient(logits: Tensor, answered: Tensor, numbers: Sequence[int], seed: int) -> Tensor:
    """Gradient of the summed cross-entropy of drawn answers with respect to the logits; zero where there is none.

    Args:
        logits: shape ``(batch, length, vocabulary)``.
        answered: which positions predict a token, shape ``(batch, length - 1)``.
        numbers: of the rows in the whole text; the draws of a row depend on it.
        seed: of the draws.
    """
    gradient = torch.zeros_like(logits)
    for row, number in enumerate(numbers):
        uniform = uniforms(seed, number, answered.shape[1])
        for begin in range(0, answered.shape[1], _CHUNK):
            part = slice(begin, min(begin + _CHUNK, answered.shape[1]))
            p = logits[row, part].float().softmax(-1)
            drawn = draw(p, uniform[part])
            p.scatter_add_(1, drawn[:, None], p.new_full((len(p), 1), -1.0))
            gradient[row, part] = (p * answered[row, part, None]).to(gradient.dtype)
    return gradient


def _batches(
    data: Any, tokenizer: Any, max_length: int, batch_size: int, rank: int, processes: int
) -> tuple[Iterator[tuple[Sequence[int], Mapping[str, Tensor]]], int | None]:
    """Batches with the numbers of their rows, and how many there will be.

    Every process gets as many: a model that is in pieces runs in all of them or in none. What has no numbers is there
    for that alone.
    """
    if max_length < 2 or batch_size < 1:
        raise GuardError(f"max_length must be at least 2 and batch_size 1, got {max_length} and {batch_size}")
    if isinstance(data, Mapping):
        raise GuardError("One batch was given where several are expected: calibrate(model, [batch]).")
    if isinstance(data, str):
        raise GuardError(
            f"A string, {data[:40]!r}, was given where several texts are expected. Give a list of texts; of a file, "
            "what is in it."
        )
    length = len(data) if hasattr(data, "__len__") else None
    items = iter(data)
    first = list(itertools.islice(items, 1))
    if first and isinstance(first[0], str):
        if tokenizer is None:
            raise GuardError("Texts need the model's tokenizer: calibrate(model, texts, tokenizer).")
        texts = tokenizer([*first, *items])["input_ids"]
    elif first and isinstance(first[0], Tensor) and first[0].ndim == 1:
        texts = [row.tolist() for row in (*first, *items)]
    else:
        return _numbered(itertools.chain(first, items)), length
    counted: Sequence[Any] = data.counted if isinstance(data, Rows) else [[True] * len(ids) for ids in texts]
    rows = [
        (ids[i : i + max_length], mask[i : i + max_length])
        for ids, mask in zip(texts, counted, strict=True)
        for i in range(0, len(ids), max_length)
    ]
    useful = [(number, row) for number, row in enumerate(rows) if len(row[0]) > 1]
    mine = sorted(useful[rank::processes], key=lambda numbered: len(numbered[1][0]))  # little padding
    groups = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
    shares = [([number for number, _ in group], [row for _, row in group]) for group in groups]
    count = -(-len(useful[::processes]) // batch_size)  # the first process has the most
    if len(shares) < count:
        shares.append(([], [useful[0][1]]))
    batches = ((numbers, _padded(of_batch)) for numbers, of_batch in shares)
    return batches, count


def _in_rows(
    batches: Iterable[tuple[Sequence[int], Mapping[str, Tensor]]],
) -> Iterator[tuple[Sequence[int], Mapping[str, Tensor]]]:
    for numbers, batch in batches:
        rows = len(batch["input_ids"])
        for row in range(rows):
            yield (
                numbers[row : row + 1],
                {
                    key: value[row : row + 1] if isinstance(value, Tensor) and len(value) == rows else value
                    for key, value in batch.items()
                },
            )


def _numbered(batches: Iterable[Any]) -> Iterator[tuple[Sequence[int], Mapping[str, Tensor]]]:
    seen = 0
    for batch in batches:
        if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
            raise GuardError(
                f"Texts are expected, rows of tokens, or batches with a tensor input_ids; found {type(batch).__name__}"
            )
        rows = len(batch["input_ids"])
        yield range(seen, seen + rows), batch
        seen += rows


def _padded(rows: Sequence[tuple[Sequence[int], Any]]) -> dict[str, Tensor]:
    """Rows of tokens and which of them count as a batch.

    Padded on the right, where a causal model's tokens do not see it; with what does not matter, being masked.
    """
    length = max(len(row) for row, _ in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long, device="cpu")
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, _IGNORED)
    for i, (row, counted) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, device="cpu")
        mask[i, : len(row)] = 1
        labels[i, : len(row)] = ids[i, : len(row)].masked_fill(~torch.as_tensor(counted, device="cpu"), _IGNORED)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
