"""One pass over a general text that collects what each adapted layer is used for."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

from curlora.guard.calibration import Calibration, Moments, adapter_of, layers_of
from curlora.guard.errors import GuardError
from curlora.tuner.layer import CurloraLayer

__all__ = ["calibrate"]

# Fewer tokens than this many for each rank, or fewer rows of text, and the moments are mostly noise.
_TOKENS_PER_RANK = 64
_ROWS = 32


def calibrate(
    model: nn.Module,
    data: Iterable[str] | Iterable[Tensor] | Iterable[Mapping[str, Tensor]],
    tokenizer: Any = None,
    *,
    adapter: str | None = None,
    max_length: int = 128,
    batch_size: int = 8,
    gradients: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> Calibration:
    """Collect the ``r x r`` moments of a CURLoRA adapter's layers over a general text.

    One forward and one backward pass. The answers whose gradients are taken are drawn from the model's own predictions,
    as the Fisher information has it, by one random number for each token, which depends on ``seed`` and on the place of
    the token alone: how rows are put into batches does not matter, but for rounding. Padding counts for nothing.
    The model is as it was afterwards; gradients that it holds stay.

    Where ``torch.distributed`` runs, texts and rows are shared out over the processes, each of which gets the moments
    of all of them. Batches that are given are taken to be shared out already.

    Args:
        model: a causal language model with a CURLoRA adapter. Forgetting counts from the model as it is now: an adapter
            that has learned something before keeps it.
        data: texts; or rows of tokens, each of shape ``(length,)``; or batches that hold ``input_ids`` and, where there
            is padding, ``attention_mask``, of shape ``(batch, length)``, such as a ``DataLoader`` gives. A batch's
            ``position_ids`` are used where it has them, and counted from each row's first token where it does not.
        tokenizer: of the model; for texts.
        adapter: the adapter's name; the active one if ``None``.
        max_length: longer texts and rows are cut into rows of so many tokens, of which none is left out. Each row is
            one sample of what a change of the model does, so many short rows tell more than a few long ones.
        batch_size: rows that go through the model together.
        gradients: whether to run backward. Without, a guard knows the shift of each layer's output, and not what the
            model would say: half the time, and no forgetting in nats.
        seed: of the drawn answers.
        progress: whether to show a bar.

    Returns:
        The moments, float64 on the CPU.

    Raises:
        GuardError: if the model is not a causal language model with an adapter, if the text has no two tokens in a row,
            if a row is longer than the model's positions, or if an activation is not finite.
    """
    adapter = adapter_of(model, adapter)
    layers = layers_of(model, adapter)
    merged = [name for name, layer in layers.items() if layer.merged]
    if merged:
        raise GuardError(f"Layer {merged[0]!r} has merged adapters, and no output of its base any more. Unmerge first.")
    rank, processes = _distributed()
    batches, count = _batches(data, tokenizer, max_length, batch_size, rank, processes)

    device = next(model.parameters()).device
    sums = {name: _Sums(layer, adapter) for name, layer in layers.items()}
    predicted = tokens = rows = 0
    with _ready(model, layers, adapter, gradients), _listening(sums, layers, adapter, gradients) as batch_of:
        shown = track(batches, "Calibrating", total=count, transient=True) if progress and rank == 0 else batches
        for numbers, batch in shown:
            inputs = _inputs(model, batch, device)
            ids, mask = inputs["input_ids"], inputs["attention_mask"]
            batch_of(mask.bool())
            output = model(**inputs, use_cache=False)
            logits = _logits_of(output, ids)
            answered = mask[:, :-1].bool() & mask[:, 1:].bool()
            if gradients:
                trained = [layer.curlora_U[adapter] for layer in layers.values()]
                at_logits = _drawn_gradient(logits.detach(), answered, numbers, seed)
                torch.autograd.grad(logits, trained, at_logits, allow_unused=True)
                for of_layer in sums.values():
                    of_layer.end_batch()
            predicted += int(answered.sum())
            tokens += int(mask.sum())
            rows += int(answered.any(1).sum())
    counted = torch.tensor([predicted, tokens, rows])
    *packed, counts = _sum_over_processes([*(s.packed() for s in sums.values()), counted], device)
    predicted, tokens, rows = (int(number) for number in counts)
    if not predicted:
        raise GuardError(
            "The text has no two tokens in a row, so there is nothing to predict: is it empty, or does the tokenizer "
            "turn it into nothing?"
        )
    moments = {}
    for (name, layer), total in zip(layers.items(), packed, strict=True):
        moments[name] = sums[name].moments(layer, adapter, total, tokens, predicted, gradients)
    _check(moments, tokens, rows)
    return Calibration(moments, tokens, rows)


class _Sums:
    """Of one layer, over all batches so far."""

    def __init__(self, layer: CurloraLayer, adapter: str) -> None:
        self.index, self.factor = layer.sides(adapter)
        r, device = len(self.index), self.factor.device
        # float64, where the device has it: sums over a million tokens of which each adds its last digit.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.inputs, self.left, self.right = torch.zeros(3, r, r, dtype=dtype, device=device)
        self.output = torch.zeros((), dtype=dtype, device=device)
        self.z = torch.zeros(0, 0, r, device=device)
        self.gradients: list[Tensor] = []

    def add_output(self, output: Tensor, bias: Tensor | None, mask: Tensor) -> None:
        rows = _rows(output if bias is None else output - bias.to(output.dtype), mask).detach()
        self.output += rows.to(self.output.dtype).square().sum()
        self.z = rows.index_select(-1, self.index)
        z = self.z.flatten(0, 1).to(self.inputs.dtype)
        self.inputs += z.T @ z

    def add_gradient(self, gradient: Tensor, z: Tensor, mask: Tensor) -> None:
        g = _rows(gradient, mask) @ self.factor.to(gradient.dtype)
        self.gradients.append(g.mT.float() @ z.float())

    def end_batch(self) -> None:
        """A layer that is used more than once moves every time: the gradient of a row is the sum."""
        if self.gradients:
            G = torch.stack(self.gradients).sum(0).to(self.left.dtype)
            self.left += (G @ G.mT).sum(0)
            self.right += (G.mT @ G).sum(0)
            self.gradients = []

    def packed(self) -> Tensor:
        return torch.cat([*(moment.flatten() for moment in (self.inputs, self.left, self.right)), self.output[None]])

    def moments(
        self, layer: CurloraLayer, adapter: str, total: Tensor, tokens: int, predicted: int, gradients: bool
    ) -> Moments:
        r = len(self.index)
        inputs, left, right = total[:-1].cpu().double().view(3, r, r)
        return Moments(
            indices=layer.curlora_indices[adapter].cpu().clone(),
            fingerprint=layer.curlora_fingerprint[adapter].cpu().clone(),
            start=layer.curlora_U[adapter].detach().cpu().clone(),
            inputs=inputs / tokens,
            output=float(total[-1]) / tokens,
            left=left / predicted if gradients else None,
            right=right / predicted if gradients else None,
        )


def _rows(values: Tensor, mask: Tensor) -> Tensor:
    """``values`` by rows of the batch, shape ``(batch, length, width)``, zero where there is padding."""
    width = values.shape[-1]
    if values.numel() == mask.numel() * width:
        return values.reshape(*mask.shape, width).masked_fill(~mask[..., None], 0)
    if len(mask) == 1 and bool(mask.all()):  # a layer that some tokens go through, such as an expert
        return values.reshape(1, -1, width)
    raise GuardError(
        f"A layer puts out {tuple(values.shape)} for a batch of {tuple(mask.shape)}: which of it is of which row "
        "cannot be told. Calibrate with batch_size=1."
    )


@contextlib.contextmanager
def _listening(
    sums: dict[str, _Sums], layers: dict[str, CurloraLayer], adapter: str, gradients: bool
) -> Iterator[Callable[[Tensor], None]]:
    """While it lasts the layers add to ``sums``; what it gives is to be told each batch's mask."""
    current: list[Tensor] = []

    def base_hook(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            sums[name].add_output(output, getattr(module, "bias", None), current[0].to(output.device))

        return hook

    def layer_hook(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            mask, z = current[0], sums[name].z
            output.register_hook(lambda gradient: sums[name].add_gradient(gradient, z, mask.to(gradient.device)))

        return hook

    with contextlib.ExitStack() as stack:
        for name, layer in layers.items():
            handles = [layer.base_layer.register_forward_hook(base_hook(name))]
            if gradients:
                handles.append(layer.register_forward_hook(layer_hook(name)))
            for handle in handles:
                stack.callback(handle.remove)
        yield lambda mask: current.__setitem__(slice(None), [mask])


@contextlib.contextmanager
def _ready(model: nn.Module, layers: dict[str, CurloraLayer], adapter: str, gradients: bool) -> Iterator[None]:
    """In evaluation mode, with gradients that reach the lowest adapted layer and go no further."""
    modes = {module: module.training for module in model.modules()}
    trained = {layer.curlora_U[adapter]: layer.curlora_U[adapter].requires_grad for layer in layers.values()}
    try:
        model.eval()
        for U in trained:
            U.requires_grad_(gradients)
        with torch.set_grad_enabled(gradients):
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        for U, requires_grad in trained.items():
            U.requires_grad_(requires_grad)


def _inputs(model: nn.Module, batch: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    """What the model is given; positions are counted from each row's first token, as in training and generation."""
    ids = batch["input_ids"].to(device)
    mask = torch.as_tensor(batch["attention_mask"]).to(device) if "attention_mask" in batch else torch.ones_like(ids)
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
    elif not bool(mask[:, 0].all()) and "position_ids" in inspect.signature(base.forward).parameters:
        inputs["position_ids"] = (mask.long().cumsum(1) - 1).clamp_min(0)
    return inputs


def _logits_of(output: Any, ids: Tensor) -> Tensor:
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.shape[:-1] != ids.shape:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else "none"
        raise GuardError(
            f"Calibration needs a causal language model, with logits of shape (batch, length, vocabulary) for "
            f"input_ids of shape {tuple(ids.shape)}; found {found}."
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
        generator = torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)
        uniform = torch.rand(answered.shape[1], generator=generator, dtype=torch.float64).to(logits.device)
        for begin in range(0, answered.shape[1], _CHUNK):
            part = slice(begin, min(begin + _CHUNK, answered.shape[1]))
            p = logits[row, part].float().softmax(-1)
            cumulative = p.double().cumsum(-1)
            drawn = torch.searchsorted(cumulative, uniform[part, None] * cumulative[:, -1:])
            p.scatter_add_(1, drawn.clamp_(max=p.shape[1] - 1), p.new_full((len(p), 1), -1.0))
            gradient[row, part] = (p * answered[row, part, None]).to(gradient.dtype)
    return gradient


def _batches(
    data: Any, tokenizer: Any, max_length: int, batch_size: int, rank: int, processes: int
) -> tuple[Iterator[tuple[Sequence[int], Mapping[str, Tensor]]], int | None]:
    """Batches with the numbers of their rows, and how many there will be."""
    if max_length < 2 or batch_size < 1:
        raise GuardError(f"max_length must be at least 2 and batch_size 1, got {max_length} and {batch_size}")
    if isinstance(data, Mapping):
        raise GuardError("One batch was given where several are expected: calibrate(model, [batch]).")
    length = len(data) if hasattr(data, "__len__") and not isinstance(data, str) else None
    items = iter([data] if isinstance(data, str) else data)
    first = list(itertools.islice(items, 1))
    if first and isinstance(first[0], str):
        if tokenizer is None:
            raise GuardError("Texts need the model's tokenizer: calibrate(model, texts, tokenizer).")
        texts = tokenizer([*first, *items])["input_ids"]
    elif first and isinstance(first[0], Tensor) and first[0].ndim == 1:
        texts = [row.tolist() for row in (*first, *items)]
    else:
        return _numbered(itertools.chain(first, items)), length
    rows = [ids[i : i + max_length] for ids in texts for i in range(0, len(ids), max_length)]
    mine = [(number, row) for number, row in enumerate(rows) if len(row) > 1][rank::processes]
    mine.sort(key=lambda numbered: len(numbered[1]))  # little padding
    groups = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
    return (([number for number, _ in group], _padded([row for _, row in group])) for group in groups), len(groups)


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


def _padded(rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Padded on the right, where a causal model's tokens do not see it; with what does not matter, being masked."""
    length = max(map(len, rows))
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def _distributed() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _sum_over_processes(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    if _distributed()[1] == 1:
        return tensors
    flat = torch.cat([tensor.to(device=device, dtype=torch.float64).flatten() for tensor in tensors])
    torch.distributed.all_reduce(flat)
    return list(flat.split([tensor.numel() for tensor in tensors]))


def _check(moments: Mapping[str, Moments], tokens: int, rows: int) -> None:
    # Outputs first: what goes wrong in one layer forward goes wrong in all of them backward.
    outputs = {name: of.inputs.sum() + of.output for name, of in moments.items()}
    gradients = {name: of.left.sum() for name, of in moments.items() if of.left is not None}
    for kind, sums in (("outputs", outputs), ("gradients", gradients)):
        for name, total in sums.items():
            if not torch.isfinite(total):
                raise GuardError(
                    f"Layer {name!r} has {kind} on this text that are not finite. Is the model sound, and its "
                    "precision enough? Try float32 or bfloat16."
                )
    r = max(of.inputs.shape[0] for of in moments.values())
    if tokens < _TOKENS_PER_RANK * r or rows < _ROWS:
        warnings.warn(
            f"The guard's text has {tokens:,} tokens in {rows:,} rows, few for a rank of {r}: its moments are rough. "
            f"Give at least {_TOKENS_PER_RANK * r:,} in {_ROWS}; until then a guard damps more.",
            stacklevel=3,
        )
