"""One pass over a general text that collects what each adapted layer is used for."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from curlora.functional import autocast_off
from curlora.guard.calibration import Calibration, Moments, adapter_of, layers_of
from curlora.guard.errors import GuardError
from curlora.guard.model_pass import Counts, pass_over
from curlora.guard.processes import sum_over_processes
from curlora.guard.progress import Shown
from curlora.tuner.layer import CurloraLayer
from curlora.tuner.param_wrapper import ParamWrapper
from curlora.tuner.sharded import whole

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
    progress: Shown = True,
) -> Calibration:
    """Collect the ``r x r`` moments of a CURLoRA adapter's layers over a general text.

    One forward and one backward pass. The answers whose gradients are taken are drawn from the model's own predictions,
    as the Fisher information has it, by one random number for each token, which depends on ``seed`` and on the place of
    the token alone: how rows are put into batches does not matter, but for rounding. Padding counts for nothing.
    The model is as it was afterwards; gradients that it holds stay.

    Where ``torch.distributed`` runs, texts and rows are shared out over the processes, each of which gets the moments
    of all of them. Batches that are given are taken to be shared out already, and to be as many in each where the model
    is in pieces.

    Args:
        model: a causal language model with a CURLoRA adapter. Forgetting counts from the model as it is now: an adapter
            that has learned something before keeps it.
        data: texts; or rows of tokens, each of shape ``(length,)``; or batches that hold ``input_ids`` and, where there
            is padding, ``attention_mask``, of shape ``(batch, length)``, such as a ``DataLoader`` gives. A batch's
            ``position_ids`` are used where it has them, and counted from each row's first token where it does not. Of a
            batch with ``labels`` only the tokens that they do not mask (-100) are counted as predicted.
        tokenizer: of the model; for texts.
        adapter: the adapter's name; the active one if ``None``.
        max_length: longer texts and rows are cut into rows of so many tokens, of which none is left out. Each row is
            one sample of what a change of the model does, so many short rows tell more than a few long ones.
        batch_size: rows that go through the model together.
        gradients: whether to run backward. Without, a guard knows the shift of each layer's output, and not what the
            model would say: half the time, and no forgetting in nats.
        seed: of the drawn answers.
        progress: whether to show a bar; or what shows it, see :data:`curlora.guard.progress.Shown`.

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
    blind = [name for name, layer in layers.items() if isinstance(layer, ParamWrapper)]
    if blind and not gradients:
        raise GuardError(f"{blind[0]!r} is a parameter, of which gradients alone are seen: calibrate with gradients.")
    sums = {name: _Sums(layer, adapter) for name, layer in layers.items()}

    def end() -> None:
        for of_layer in sums.values():
            of_layer.end_batch()

    with _listening(sums, layers, adapter, gradients) as begin:
        counts = pass_over(
            model, layers, data, tokenizer, max_length=max_length, batch_size=batch_size, gradients=gradients,
            seed=seed, progress=progress, doing=f"calibrating {len(layers)} layer{'s'[: len(layers) > 1]}", begin=begin,
            end=end,
        )  # fmt: skip
    packed = sum_over_processes([s.packed() for s in sums.values()], next(model.parameters()).device)
    moments = {}
    for (name, layer), total in zip(layers.items(), packed, strict=True):
        moments[name] = sums[name].moments(layer, adapter, total, counts, gradients)
    _check(moments, counts)
    return Calibration(moments, counts.tokens, counts.rows)


class _Sums:
    """Of one layer, over all batches so far."""

    def __init__(self, layer: CurloraLayer, adapter: str) -> None:
        basis = layer.basis(adapter)
        self.index, self.factor, self.reader = basis.gathered, basis.factor, basis.reader
        shape, device = (*self.factor.shape[:-2], layer.r[adapter], layer.r[adapter]), self.factor.device
        # float64, where the device has it: sums over a million tokens of which each adds its last digit.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.inputs, self.left, self.right = torch.zeros(3, *shape, dtype=dtype, device=device)
        self.output = torch.zeros((), dtype=dtype, device=device)
        self.z = torch.zeros(0, 0, shape[-1], device=device)
        self.gradients: list[Tensor] = []

    def add_output(self, output: Tensor, bias: Tensor | None, mask: Tensor) -> None:
        rows = _rows(output if bias is None else output - bias.to(output.dtype), mask).detach()
        self.output += rows.to(self.output.dtype).square().sum()
        self.z = rows.index_select(-1, self.index)
        z = self.z.flatten(0, 1).to(self.inputs.dtype)
        self.inputs += z.T @ z

    def add_gradient(self, gradient: Tensor, z: Tensor, mask: Tensor) -> None:
        with autocast_off(gradient):
            g = _rows(gradient, mask) @ self.factor.to(gradient.dtype)
            self.gradients.append(g.mT.float() @ z.float())

    def add_parameter_gradient(self, gradient: Tensor) -> None:
        """Of an updated parameter, over a batch of one row."""
        assert self.reader is not None
        with autocast_off(gradient):
            g = self.factor.mT.float() @ gradient.float() @ self.reader.mT.float()
            self.gradients.append(g[None])

    def end_batch(self) -> None:
        """A layer that is used more than once moves every time: the gradient of a row is the sum."""
        if self.gradients:
            G = torch.stack(self.gradients).sum(0).to(self.left.dtype)
            self.left += (G @ G.mT).sum(0)
            self.right += (G.mT @ G).sum(0)
            self.gradients = []

    def packed(self) -> Tensor:
        return torch.cat([*(moment.flatten() for moment in (self.inputs, self.left, self.right)), self.output[None]])

    def moments(self, layer: CurloraLayer, adapter: str, total: Tensor, counts: Counts, gradients: bool) -> Moments:
        inputs, left, right = total[:-1].cpu().double().view(3, *self.left.shape)
        return Moments(
            indices=layer.basis(adapter).indices.cpu().clone(),
            fingerprint=layer.basis(adapter).fingerprint.cpu().clone(),
            start=whole(layer.matrices[adapter].weight.detach()).cpu().clone(),
            inputs=inputs / counts.tokens,
            output=float(total[-1]) / counts.tokens,
            left=left / counts.predicted if gradients else None,
            right=right / counts.predicted if gradients else None,
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
            if current:
                sums[name].add_output(output, getattr(module, "bias", None), current[0].to(output.device))

        return hook

    def layer_hook(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if current:
                mask, z = current[0], sums[name].z
                output.register_hook(lambda gradient: sums[name].add_gradient(gradient, z, mask.to(gradient.device)))

        return hook

    def parameter_hook(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if current and output.requires_grad:
                output.register_hook(lambda gradient: sums[name].add_parameter_gradient(gradient))

        return hook

    with contextlib.ExitStack() as stack:
        for name, layer in layers.items():
            if isinstance(layer, ParamWrapper):
                U = layer.matrices[adapter]
                stack.callback(U.register_forward_hook(parameter_hook(name)).remove)
                continue
            handles = [layer.base_layer.register_forward_hook(base_hook(name))]
            if gradients:
                handles.append(layer.register_forward_hook(layer_hook(name)))
            for handle in handles:
                stack.callback(handle.remove)
        # Nothing is listened to in a batch of which nothing counts.
        yield lambda mask: current.__setitem__(slice(None), [mask] if mask.any() else [])


def _check(moments: Mapping[str, Moments], counts: Counts) -> None:
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
    r = max(of.inputs.shape[-1] for of in moments.values())
    if counts.tokens < _TOKENS_PER_RANK * r or counts.rows < _ROWS:
        warnings.warn(
            f"The guard's text has {counts.tokens:,} tokens in {counts.rows:,} rows, few for a rank of {r}: its "
            f"moments are rough. Give at least {_TOKENS_PER_RANK * r:,} in {_ROWS}; until then a guard damps more.",
            stacklevel=3,
        )
