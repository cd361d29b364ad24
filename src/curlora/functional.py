"""The adapter's forward and backward: a gather, two skinny products and an add.

The output of a frozen linear map ``y0 = x Wᵀ + b`` already contains the product with the selected rows of ``W``:
``x W[rows]ᵀ = (y0 - b)[..., rows]``. So CURLoRA's update (eq. 8 of https://arxiv.org/abs/2408.14572) needs neither the
layer's input nor a matrix of the weight's size::

    z  = (y0 - b)[..., rows]                    gather, r entries per token
    y  = y0 + (z Mᵀ) Cᵀ                         forward, M = alpha U

    g  = dy C                                   backward, r entries per token
    dM = gᵀ z                                   summed over tokens
    dy0 = dy, plus g M added at ``rows``        duplicates accumulate

Of the activations, only ``z`` is saved for backward. No input tensor is modified in place.

This module uses PyTorch's operators. It is the reference for the kernels, and it runs wherever
:func:`curlora.kernels.chosen` does not choose a kernel.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from curlora import kernels
from curlora._compat import transformed_by_torch_func

__all__ = ["autocast_off", "check_values", "gather", "gather_update", "gather_update_by_row", "linear_update"]


def gather_update(
    output: Tensor, scaled_U: Tensor, factor: Tensor, index: Tensor, offset: Tensor | None = None
) -> Tensor:
    """Add a CUR update to the output of a frozen linear layer.

    Computes ``output + (z scaled_Uᵀ) factorᵀ`` with ``z = output[..., index] - offset``. With ``scaled_U = alpha U``,
    ``factor = C`` and ``index = rows`` this is the layer with weight ``W + alpha C U R``.

    Args:
        output: output of the base layer, bias included, shape ``(..., m)``.
        scaled_U: the trained matrix, shape ``(r, r)``; its products are computed in its own dtype.
        factor: shape ``(m, r)``; used in the dtype of ``output``. It gets no gradient.
        index: integer positions on the last axis of ``output``, shape ``(r,)``; may repeat.
        offset: the layer's bias at ``index``, shape ``(r,)``; ``None`` for a layer without bias.

    Returns:
        A new tensor of ``output``'s shape and dtype.

    Raises:
        ValueError: if the shapes do not fit together.
        RuntimeError: if some of the tensors are on the meta device and others are not.
    """
    _check(output, scaled_U, factor, index)
    check_values(output, scaled_U, factor)
    differentiated = _is_differentiated(output, scaled_U, offset)
    factor = factor if differentiated else factor.detach()
    with autocast_off(output):
        if kernels.chosen(output, scaled_U, factor, index, offset):
            keep_z = differentiated and scaled_U.requires_grad
            return torch.ops.curlora.forward.default(output, scaled_U, factor, index, offset, keep_z)[0]
        if not differentiated:
            return _add(output, scaled_U, factor, index, offset)[0]
        function = _GatherUpdate if torch.compiler.is_compiling() or transformed_by_torch_func() else _PlainGatherUpdate
        return function.apply(output, scaled_U, factor, index, offset)[0]


def gather_update_by_row(
    output: Tensor, scaled_U: Tensor, factor: Tensor, index: Tensor, offset: Tensor | None = None
) -> Tensor:
    """Like :func:`gather_update`, but each row of the batch has its own ``scaled_U``.

    Args:
        output: output of the base layer, bias included, shape ``(rows, ..., m)``.
        scaled_U: shape ``(rows, r, r)``; its products are computed in its own dtype.
        factor, index, offset: as for :func:`gather_update`; all rows share them.

    Returns:
        A new tensor of ``output``'s shape and dtype.

    Raises:
        RuntimeError: if some of the tensors are on the meta device and others are not.
    """
    check_values(output, scaled_U, factor)
    with autocast_off(output):
        chosen = kernels.chosen(output, scaled_U, factor, index, offset)
        if chosen and not _is_differentiated(output, scaled_U, factor, offset):
            return torch.ops.curlora.mixed_batch.default(output, scaled_U, factor, index, offset)
        rows = output.reshape(output.shape[0], -1, output.shape[-1])
        z = gather(rows, index, offset)
        mixed = torch.bmm(z.to(scaled_U.dtype), scaled_U.mT).to(output.dtype)
        return _plus(output, rows.flatten(0, 1), mixed.flatten(0, 1), factor.to(output.dtype).T)


def linear_update(output: Tensor, z: Tensor, scaled_U: Tensor, factor: Tensor) -> Tensor:
    """Return ``output + (z scaled_Uᵀ) factorᵀ`` for a given ``z``, differentiated by autograd.

    It is used if dropout acts on ``z``, or if ``z`` cannot be gathered from ``output``.

    Args:
        output: shape ``(..., m)``.
        z: shape ``(..., r)``.
        scaled_U, factor: as for :func:`gather_update`.

    Returns:
        A new tensor of ``output``'s shape and dtype.

    Raises:
        RuntimeError: if some of the tensors are on the meta device and others are not.
    """
    check_values(output, scaled_U, factor)
    with autocast_off(output):
        mixed = linear(z.to(scaled_U.dtype), scaled_U).to(output.dtype)
        return output + linear(mixed, factor.to(output.dtype))


def autocast_off(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Return a context that turns autocast off on the tensor's device, so that products keep their factors' dtype."""
    kind = "cpu" if tensor.is_cpu else "cuda" if tensor.is_cuda else tensor.device.type  # device.type is slower
    known = kind in ("cpu", "cuda") or torch.amp.is_autocast_available(kind)
    if not (known and torch.is_autocast_enabled(kind)):
        return contextlib.nullcontext()
    return torch.autocast(kind, enabled=False)


def _is_differentiated(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _check(output: Tensor, scaled_U: Tensor, factor: Tensor, index: Tensor) -> None:
    r = index.shape[0]
    if scaled_U.shape != (r, r) or factor.shape != (output.shape[-1], r):
        raise ValueError(
            f"gather_update: an output of shape {tuple(output.shape)} and an index of length {r} need "
            f"scaled_U of shape {(r, r)} and factor of shape {(output.shape[-1], r)}, but got "
            f"{tuple(scaled_U.shape)} and {tuple(factor.shape)}"
        )


def check_values(output: Tensor, scaled_U: Tensor, factor: Tensor) -> None:
    """Raise ``RuntimeError`` if some of the tensors are on the meta device and others are not.

    Some products with a meta tensor return arbitrary values instead of raising an error.
    """
    if not output.is_meta == scaled_U.is_meta == factor.is_meta:
        without = "output" if output.is_meta else "U" if scaled_U.is_meta else "factor"
        raise RuntimeError(
            f"gather_update: {without} is on the meta device and has no values. Load the adapter's weights first. "
            "Offloaded weights need Accelerate's hook."
        )


def gather(output: Tensor, index: Tensor, offset: Tensor | None) -> Tensor:
    """Return ``R x`` as ``output[..., index] - offset``, shape ``(..., r)``."""
    z = output.index_select(-1, index)
    return z if offset is None else z - _as(offset, z.dtype)


def _add(
    output: Tensor, scaled_U: Tensor, factor: Tensor, index: Tensor, offset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return ``output`` plus the update, and ``z``, shape ``(tokens, r)``, in the dtype of ``scaled_U``."""
    flat = output.reshape(-1, factor.shape[0])
    z = _as(gather(flat, index, offset), scaled_U.dtype)
    mixed = _as(linear(z, scaled_U), output.dtype)
    return _plus(output, flat, mixed, _as(factor, output.dtype).T), z


def _plus(output: Tensor, flat: Tensor, mixed: Tensor, directions: Tensor) -> Tensor:
    """Return ``output + mixed @ directions``. ``flat`` is ``output`` with shape ``(tokens, m)``."""
    if torch.compiler.is_compiling():
        # The compiler fuses this sum with the operations that follow. An addmm would copy ``output`` first and would
        # not be fused; the compiler would also turn a sum of two-dimensional tensors into one. In half precision the
        # product is therefore rounded before the sum, as LoRA's is.
        return output + (mixed @ directions).view_as(output)
    # addmm adds while it multiplies, so the update is never stored as a tensor of its own.
    return torch.addmm(flat, mixed, directions).view_as(output)


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``tensor.to(dtype)``. The check first is faster, which matters for steps of many small products."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _onto(grad: Tensor, factor: Tensor) -> Tensor:
    """Return ``grad @ factor``, shape ``(tokens, r)``."""
    r = factor.shape[1]
    # If the rank is not a multiple of 16, MKL takes up to five times as long on some CPUs (AMD's).
    # PyTorch 2.6 cannot compile ``is_cpu`` of a gradient.
    slow = r % 16 and grad.device.type == "cpu" and grad.dtype in (torch.float32, torch.float64)
    # A compiled graph must not depend on the number of tokens, so it does not look at ``len(grad)``.
    if slow and (torch.compiler.is_compiling() or len(grad) >= 32):
        return (grad @ pad(factor, (0, -r % 16)))[:, :r]
    return grad @ factor


class _GatherUpdate(torch.autograd.Function):
    """Return ``(result, z)``. ``z`` is an output because it is saved for backward and second derivatives need it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        output: Tensor, scaled_U: Tensor, factor: Tensor, index: Tensor, offset: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        result, z = _add(output, scaled_U, factor, index, offset)
        return result.detach(), z  # not a view: autograd forbids in-place changes of views that a function returns

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        base, scaled_U, factor, index, offset = inputs[:5]
        ctx.shape, ctx.dtype = base.shape, base.dtype
        ctx.offset_dtype = None if offset is None else offset.dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[1] if ctx.needs_input_grad[1] else None, scaled_U, factor, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_z: Tensor | None) -> tuple[Tensor | None, ...]:
        z, scaled_U, factor, index = ctx.saved_tensors
        need_output, need_U, _, _, need_offset = ctx.needs_input_grad[:5]
        if grad is None:  # in second derivatives z may be used while the result is not
            if grad_z is None:
                return (None,) * 5
            grad = grad_z.new_zeros(ctx.shape, dtype=ctx.dtype)

        flat = grad.reshape(-1, factor.shape[0])
        g = _as(_onto(flat, _as(factor, grad.dtype)), scaled_U.dtype)
        grad_output = grad_offset = None
        grad_U = g.T @ z if need_U else None
        if need_output or need_offset:
            through = g @ scaled_U if grad_z is None else grad_z.addmm(g, scaled_U)
            through = _as(through, grad.dtype)
            if need_output:
                grad_output = flat.index_add(-1, index, through).view_as(grad)
            if need_offset:
                grad_offset = -through.sum(0).to(ctx.offset_dtype)
        return grad_output, grad_U, None, None, grad_offset


class _PlainGatherUpdate(torch.autograd.Function):
    """:class:`_GatherUpdate` without ``setup_context``, for calls that are neither compiled nor transformed.

    For functions with ``setup_context`` PyTorch inspects the signature in every call. For a few tokens that takes
    longer than the computation.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        outputs = _GatherUpdate.forward(*inputs)
        _GatherUpdate.setup_context(ctx, inputs, outputs)
        return outputs

    backward = _GatherUpdate.backward


def _kernel_backward(ctx: Any, grad: Tensor | None, grad_z: Tensor | None) -> tuple[Tensor | None, ...]:
    """Backward of ``curlora::forward``. It uses the kernel, unless the gradients are themselves differentiated."""
    need_output, need_U, _, _, need_offset, _ = ctx.needs_input_grad
    if grad is None or grad_z is not None or need_offset or torch.is_grad_enabled():
        return (*_GatherUpdate.backward(ctx, grad, grad_z), None)
    z, scaled_U, factor, index = ctx.saved_tensors
    grad_output, grad_U = torch.ops.curlora.backward.default(grad, z, scaled_U, factor, index, need_output)
    return grad_output if need_output else None, grad_U if need_U else None, None, None, None, None


torch.library.register_autograd("curlora::forward", _kernel_backward, setup_context=_GatherUpdate.setup_context)
