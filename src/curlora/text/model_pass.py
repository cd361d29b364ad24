"""A model's forward and backward pass over general text, with answers drawn from the model's own predictions."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curlora.errors import GuardError
from curlora.text.decoding import draw, uniforms
from curlora.text.evaluating import evaluating
from curlora.text.processes import rank_and_count, sum_over_processes
from curlora.text.progress import Shown, stage
from curlora.text.rows import IGNORED, Rows, longest_row
from curlora.tuner.layer import CurloraLayer
from curlora.tuner.param_wrapper import ParamWrapper
from curlora.tuner.sharded import reshard
from curlora.tuner.weight import running_device

__all__ = ["NOTHING", "Counts", "backward", "batches_of", "pass_over", "ready", "run_batches"]

_EXPECTED = "Expected texts, rows of tokens (one-dimensional tensors), or batches (mappings) with a tensor input_ids"
NOTHING = (
    "The text has no two tokens in a row, so there is nothing to predict. Is the text empty, or does the tokenizer "
    "drop it?"
)


@dataclass(frozen=True)
class Counts:
    """The size of a pass.

    Args:
        predicted: the number of predicted tokens that count.
        tokens: the number of tokens, without padding.
        rows: the number of rows in which at least one predicted token counts.
    """

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
    """Run a model over texts, rows of tokens or batches, as :func:`curlora.guard.collect.calibrate` takes them.

    Args:
        model: a causal language model.
        layers: the adapted layers by name; the backward pass reaches their outputs.
        data, tokenizer, max_length, batch_size, gradients, seed: see ``calibrate``.
        progress: whether to show a progress bar, or a function that shows it.
        doing: the text of the progress bar.
        begin: called with each batch's mask, of shape ``(batch, length)``, before the batch is run.
        end: called after each batch.

    Returns:
        The size of the pass, summed over all processes.

    Raises:
        GuardError: if the model is not a causal language model, or the text does not fit it; see ``calibrate``.
    """
    rank, processes = rank_and_count()
    # torch sums the gradient of a parameter over a batch, so the gradient of each row needs batches of one row.
    one_by_one = any(isinstance(layer, ParamWrapper) for layer in layers.values())
    batches, count = batches_of(model, data, tokenizer, max_length, 1 if one_by_one else batch_size, rank, processes)
    if one_by_one:
        batches, count = _in_rows(batches), None
    device = running_device(model)
    predicted = tokens = rows = 0
    with ready(model, layers, gradients) as reached, stage(progress, doing, count) as advance:
        for numbers, _, mask, answered, logits in run_batches(model, batches, device, begin):
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
        raise GuardError(NOTHING)
    return counts


def run_batches(
    model: nn.Module,
    batches: Iterable[tuple[Sequence[int], Mapping[str, Any]]],
    device: torch.device,
    begin: Callable[[Tensor], None] = lambda mask: None,
    from_first_answered: bool = False,
) -> Iterator[tuple[Sequence[int], Tensor, Tensor, Tensor, Tensor]]:
    """Run each batch through the model.

    Args:
        model, batches, device: the model, its batches, and where they go.
        begin: called with the mask of tokens before the batch is run.
        from_first_answered: compute logits only from the first position whose next token counts. They take much memory,
            and those of a prompt, or of tokens that an earlier window has scored, are not needed. An adapted output
            layer does not see the other positions then.

    Yields:
        The numbers of the batch's rows; ``input_ids``, shape ``(batch, length)``; the mask of tokens, of that shape;
        then, of the last ``kept`` positions, the mask of those whose next token counts, shape ``(batch, kept - 1)``,
        and the logits, shape ``(batch, kept, vocabulary)``. ``kept`` is ``length`` unless ``from_first_answered``.
    """
    for numbers, batch in batches:
        inputs, mask = _inputs(model, batch, numbers, device)
        begin(mask)
        answered = mask[:, :-1] & mask[:, 1:]  # shape (batch, length - 1)
        if (labels := batch.get("labels")) is not None:
            answered &= torch.as_tensor(labels, device=device)[:, 1:] != IGNORED
        first = _first_of(answered) if from_first_answered else 0
        kept = mask.shape[1] - first
        if first and "logits_to_keep" in inspect.signature(_base(model).forward).parameters:
            inputs["logits_to_keep"] = kept
        logits = _logits_of(model(**inputs, use_cache=False), mask, kept)
        yield numbers, inputs["input_ids"], mask, answered[:, first:], logits


def _first_of(answered: Tensor) -> int:
    """Return the first position whose next token counts in any row, or the last but one position if there is none."""
    positions = answered.any(0).nonzero()
    return int(positions[0]) if len(positions) else max(0, answered.shape[1] - 1)


@contextlib.contextmanager
def ready(model: nn.Module, layers: Mapping[str, CurloraLayer], gradients: bool) -> Iterator[Tensor]:
    """Put the model into evaluation mode, with a backward pass that ends at the lowest adapted layer.

    Yields:
        A scalar tensor for :func:`backward`. In the autograd graph the output of every adapted layer depends on it.
        ``U`` cannot take its place, because FSDP2 uses other parameters in the graph than in the model.
    """
    reached = torch.zeros((), device=running_device(model), requires_grad=True)

    def from_here(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return _Reaches.apply(output, reached)

    reaching = [] if not gradients else [
        *(layer.base_layer for layer in layers.values()),
        # Runs before the hooks that observe the gradient of the updated parameter.
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
    """Run the backward pass from ``value`` to the adapted layers, so that their hooks see the gradients.

    Args:
        value: the tensor to differentiate.
        reached: the tensor that :func:`ready` yields.
        gradient: the gradient with respect to ``value``, of its shape; 1 if ``None``.
    """
    if value.requires_grad:  # False if no adapted layer was used
        torch.autograd.grad(value, reached, gradient, allow_unused=True)


class _Reaches(torch.autograd.Function):
    """The identity on ``output``, which makes it depend on a second tensor in the graph. That one gets no gradient."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, reached: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _inputs(
    model: nn.Module, batch: Mapping[str, Any], numbers: Sequence[int], device: torch.device
) -> tuple[dict[str, Any], Tensor]:
    """Return the model's inputs, and the mask of tokens, bool, shape ``(batch, length)``.

    Positions are counted from each row's first token, as in training and generation. If a batch has no row numbers, it
    only keeps the processes in step, and its mask is empty.
    """
    ids = batch["input_ids"].to(device)
    given = batch.get("attention_mask")
    mask = torch.ones_like(ids) if given is None else torch.as_tensor(given, device=device)
    if ids.ndim != 2 or mask.shape != ids.shape:
        raise GuardError(
            f"input_ids and attention_mask must both have shape (batch, length), found {tuple(ids.shape)} and "
            f"{tuple(mask.shape)}."
        )
    if "labels" not in batch:  # else it is a batch of a training, which rotary positions let run beyond the number
        _check_length(model, ids.shape[1])
    # Without a mask of its own a batch gets none. Transformers separates packed examples by their positions only then.
    inputs = {"input_ids": ids} if given is None else {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in batch:
        inputs["position_ids"] = batch["position_ids"].to(device)
    elif not bool(mask[:, 0].all()) and "position_ids" in inspect.signature(_base(model).forward).parameters:
        inputs["position_ids"] = (mask.long().cumsum(1) - 1).clamp_min(0)
    return inputs, mask.bool() if len(numbers) else torch.zeros_like(mask, dtype=torch.bool)


def _base(model: Any) -> Any:
    return getattr(model, "get_base_model", lambda: model)()


def _check_length(model: nn.Module, length: int) -> None:
    most = longest_row(getattr(_base(model), "config", None))
    if most is not None and length > most:
        raise GuardError(
            f"A row of the text has {length:,} tokens; the model has {most:,} positions. Give shorter rows, or lower "
            "max_length."
        )


def _logits_of(output: Any, mask: Tensor, kept: int) -> Tensor:
    """Return the logits at the last ``kept`` positions; a model may return those of all positions."""
    logits = getattr(output, "logits", None)
    rows, length = mask.shape
    if not isinstance(logits, Tensor) or logits.shape[:-1] not in ((rows, length), (rows, kept)):
        found = tuple(logits.shape) if isinstance(logits, Tensor) else "none"
        raise GuardError(
            f"A causal language model must return logits of shape (batch, length, vocabulary) for input_ids of shape "
            f"{tuple(mask.shape)}; found {found}. Give a causal language model."
        )
    return logits[:, -kept:]


# Positions whose cumulative probabilities are computed together in float64. The vocabulary is large, so all positions
# at once would take much memory.
_CHUNK = 128


def _drawn_gradient(logits: Tensor, answered: Tensor, numbers: Sequence[int], seed: int) -> Tensor:
    """Return the gradient of the summed cross-entropy of drawn answers with respect to the logits.

    Args:
        logits: shape ``(batch, length, vocabulary)``.
        answered: the mask of positions whose next token counts, bool, shape ``(batch, length - 1)``.
        numbers: the number of each row in the whole text, which determines its draws together with ``seed``.
        seed: the seed of the draws.

    Returns:
        The gradient, of the shape of ``logits``; zero at all other positions.
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


def batches_of(
    model: nn.Module, data: Any, tokenizer: Any, max_length: int, batch_size: int, rank: int, processes: int
) -> tuple[Iterator[tuple[Sequence[int], Mapping[str, Tensor]]], int | None]:
    """Return this process's batches with the numbers of their rows, and the number of batches if it is known.

    Every process gets the same number of batches, because a sharded model has to run in all of them. A batch without
    row numbers is added where one is missing.
    """
    if max_length < 2 or batch_size < 1:
        raise GuardError(f"max_length must be at least 2 and batch_size at least 1, got {max_length} and {batch_size}.")
    if isinstance(data, Mapping):
        raise GuardError("One batch was given, and an iterable of batches is expected: calibrate(model, [batch]).")
    if isinstance(data, (str, os.PathLike)):
        raise GuardError(
            f"{'A string' if isinstance(data, str) else 'A path'}, {str(data)[:40]!r}, was given where several texts "
            "are expected. Give a list of texts. If this is the path of a file, read the file first."
        )
    if not isinstance(data, Iterable):
        raise GuardError(f"{_EXPECTED}; found {type(data).__name__}.")
    length = len(data) if isinstance(data, Sized) else None
    items = iter(data)
    first = list(itertools.islice(items, 1))
    if first and isinstance(first[0], str):
        if tokenizer is None:
            raise GuardError("Texts need the model's tokenizer: calibrate(model, texts, tokenizer).")
        written = [*first, *items]
        if others := [type(text).__name__ for text in written if not isinstance(text, str)]:
            raise GuardError(f"{_EXPECTED}; found {others[0]} among texts.")
        texts = tokenizer(written)["input_ids"]
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
    _check_length(model, max((len(ids) for ids, _ in rows), default=0))
    useful = [(number, row) for number, row in enumerate(rows) if len(row[0]) > 1]
    mine = sorted(useful[rank::processes], key=lambda numbered: len(numbered[1][0]))  # by length: less padding
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
            raise GuardError(f"{_EXPECTED}; found {type(batch).__name__}.")
        rows = len(batch["input_ids"])
        yield range(seen, seen + rows), batch
        seen += rows


def _padded(rows: Sequence[tuple[Sequence[int], Any]]) -> dict[str, Tensor]:
    """Return a batch of rows, each given as its tokens and the mask of tokens that count.

    Rows are padded on the right, where no token of a causal model attends to the padding. The mask becomes ``labels``.
    """
    length = max(len(row) for row, _ in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long, device="cpu")
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for i, (row, counted) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, device="cpu")
        mask[i, : len(row)] = 1
        labels[i, : len(row)] = ids[i, : len(row)].masked_fill(~torch.as_tensor(counted, device="cpu"), IGNORED)
    padded = {} if bool(mask.all()) else {"attention_mask": mask}
    return {"input_ids": ids, **padded, "labels": labels}
