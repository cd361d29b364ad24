"""Calibration: one pass over general text that collects the moments of each adapted layer."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from curlora.errors import GuardError
from curlora.functional import autocast_off
from curlora.guard.calibration import Calibration, KroneckerFactors, adapter_of, layers_of
from curlora.text.model_pass import Counts, pass_over
from curlora.text.processes import sum_over_processes
from curlora.text.progress import Shown
from curlora.tuner.layer import CurloraLayer
from curlora.tuner.param_wrapper import ParamWrapper
from curlora.tuner.sharded import whole
from curlora.tuner.weight import bias_of, running_device

__all__ = ["calibrate"]

# With fewer tokens for each unit of rank, or fewer rows of text, the moments are mostly noise.
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
    """Collect the ``r x r`` moments of a CURLoRA adapter's layers over general text.

    This runs one forward and one backward pass over the text. The backward pass needs answers; they are drawn from the
    model's own predictions, as the Fisher information is defined. Each draw depends only on ``seed`` and on the token's
    place in the text, so the batch size changes the result only by rounding. Padding is ignored. The model and the
    gradients in its parameters are left unchanged.

    With ``torch.distributed``, texts and rows are divided among the processes, and every process gets the moments of
    all of them. Batches are expected to be divided already. For a sharded model every process must have the same number
    of batches.

    Args:
        model: a causal language model with a CURLoRA adapter. Forgetting is counted from the current state of the
            model, so what an adapter has learned before is kept.
        data: texts; or rows of tokens, each of shape ``(length,)``; or batches, for example of a ``DataLoader``. A
            batch holds ``input_ids`` of shape ``(batch, length)`` and, if there is padding, an ``attention_mask`` of
            that shape. Its ``position_ids`` are used if present; otherwise positions are counted from each row's first
            token. If it has ``labels``, only tokens whose label is not -100 count as predicted.
        tokenizer: the model's tokenizer; needed for texts only.
        adapter: the adapter's name; the active one if ``None``.
        max_length: the largest number of tokens in a row. Longer texts and rows are cut into several, and no token is
            dropped. Each row is one sample of the gradient, so many short rows give better moments than a few long
            ones.
        batch_size: the number of rows in a forward pass.
        gradients: whether to run the backward pass. Without it calibration takes half the time. The guard then knows
            only the shift of each layer's output, and cannot predict the KL divergence in nats.
        seed: the seed of the drawn answers.
        progress: whether to show a progress bar, or a function that shows it, see
            :data:`curlora.text.progress.Shown`.

    Returns:
        The moments, float64 on the CPU.

    Raises:
        GuardError: if the model is not a causal language model with an adapter, if adapters are merged, if a layer's
            scaling is 0, if the text has no two consecutive tokens, if a row is longer than the model's maximum length,
            or if an output or a gradient is not finite.
    """
    adapter = adapter_of(model, adapter)
    layers = layers_of(model, adapter)
    merged = [name for name, layer in layers.items() if layer.merged]
    if merged:
        raise GuardError(
            f"Layer {merged[0]!r} has merged adapters, so the output of its base cannot be observed. Unmerge first."
        )
    blind = [name for name, layer in layers.items() if isinstance(layer, ParamWrapper)]
    if blind and not gradients:
        raise GuardError(
            f"{blind[0]!r} is a parameter, and only the gradient of a parameter can be observed: calibrate with "
            "gradients=True."
        )
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
    packed = sum_over_processes([s.packed() for s in sums.values()], running_device(model))
    moments = {}
    for (name, layer), total in zip(layers.items(), packed, strict=True):
        moments[name] = sums[name].moments(layer, adapter, total, counts, gradients)
    _check(moments, counts)
    return Calibration(moments, counts.tokens, counts.rows)


class _Sums:
    """The sums of one layer's moments over all batches so far."""

    def __init__(self, layer: CurloraLayer, adapter: str) -> None:
        basis = layer.basis(adapter)
        self.index, self.factor, self.reader = basis.gathered, basis.factor, basis.reader
        shape, device = (*self.factor.shape[:-2], layer.r[adapter], layer.r[adapter]), self.factor.device
        # float64 where the device supports it: in float32 the rounding errors of a million tokens would add up.
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
        """Add the gradient of an updated parameter over a batch of one row."""
        assert self.reader is not None
        with autocast_off(gradient):
            g = self.factor.mT.float() @ gradient.float() @ self.reader.mT.float()
            self.gradients.append(g[None])

    def end_batch(self) -> None:
        """Add the batch's gradients to the sums.

        A layer may run more than once in a forward pass; its gradient of a row is then the sum over its calls.
        """
        if self.gradients:
            G = torch.stack(self.gradients).sum(0).to(self.left.dtype)
            self.left += (G @ G.mT).sum(0)
            self.right += (G.mT @ G).sum(0)
            self.gradients = []

    def packed(self) -> Tensor:
        return torch.cat([*(moment.flatten() for moment in (self.inputs, self.left, self.right)), self.output[None]])

    def moments(
        self, layer: CurloraLayer, adapter: str, total: Tensor, counts: Counts, gradients: bool
    ) -> KroneckerFactors:
        inputs, left, right = total[:-1].cpu().double().view(3, *self.left.shape)
        return KroneckerFactors(
            indices=layer.basis(adapter).indices.cpu().clone(),
            fingerprint=layer.basis(adapter).fingerprint.cpu().clone(),
            start=whole(layer.matrices[adapter].weight.detach()).cpu().clone(),
            inputs=inputs / counts.tokens,
            output=float(total[-1]) / counts.tokens,
            left=left / counts.predicted if gradients else None,
            right=right / counts.predicted if gradients else None,
        )


def _rows(values: Tensor, mask: Tensor) -> Tensor:
    """Reshape ``values`` to ``(batch, length, width)`` and set padding to zero.

    If a layer receives only some tokens of a batch of one row, as an expert does, the shape is ``(1, tokens, width)``.
    """
    width = values.shape[-1]
    if values.numel() == mask.numel() * width:
        return values.reshape(*mask.shape, width).masked_fill(~mask[..., None], 0)
    if len(mask) == 1 and bool(mask.all()):
        return values.reshape(1, -1, width)
    raise GuardError(
        f"A layer's output has shape {tuple(values.shape)} for a batch of shape {tuple(mask.shape)}, so its entries "
        "cannot be assigned to rows. Calibrate with batch_size=1."
    )


@contextlib.contextmanager
def _listening(
    sums: dict[str, _Sums], layers: dict[str, CurloraLayer], adapter: str, gradients: bool
) -> Iterator[Callable[[Tensor], None]]:
    """Hook the layers so that they add to ``sums``, and yield a function to call with each batch's mask."""
    current: list[Tensor] = []

    def base_hook(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if current:
                sums[name].add_output(output, bias_of(module), current[0].to(output.device))

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
        # The hooks ignore a batch whose mask is empty.
        yield lambda mask: current.__setitem__(slice(None), [mask] if mask.any() else [])


def _check(moments: Mapping[str, KroneckerFactors], counts: Counts) -> None:
    # Outputs first: a value that is not finite in one layer's output makes the gradients of all layers not finite.
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
            f"moments are noisy, so the guard damps more. Give at least {_TOKENS_PER_RANK * r:,} tokens in {_ROWS} "
            "rows.",
            stacklevel=3,
        )
