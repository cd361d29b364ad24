"""The adapter's forward and backward as pure torch: a gather, two skinny products and an add.

For a frozen linear map ``y0 = x Wᵀ + b`` the product with the selected rows of ``W`` is already
in its output, ``x W[rows]ᵀ = (y0 - b)[..., rows]``, so CURLoRA's update (eq. 8 of
https://arxiv.org/abs/2408.14572) needs neither the layer's input nor a matrix of its size::

    z  = (y0 - b)[..., rows]                    gather, r numbers per token
    y  = y0 + (z Uᵀ) Cᵀ                         forward

    g  = dy C                                   backward, r numbers per token
    dU = gᵀ z                                   summed over tokens
    dy0 = dy, plus g U added at ``rows``        duplicates accumulate

Only ``z`` is saved for backward. What is left is to read and write memory: ``dy`` is changed in place where nothing
else can see it (:mod:`curlora.alone`), and ``y0`` where the caller says so.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from curlora.alone import look_once, told_if_alone

__all__ = ["gather_update", "gather_update_", "gather_update_by_row"]


def gather_update(
    output: Tensor,
    mixing: Tensor,
    factor: Tensor,
    index: Tensor,
    offset: Tensor | None = None,
) -> Tensor:
    """Add a CUR update to the output of a frozen linear layer.

    Computes ``output + (z mixingᵀ) factorᵀ`` with ``z = output[..., index] - offset``. With
    ``mixing = alpha * U``, ``factor = C`` and ``index = rows`` this is the layer with weight
    ``W + alpha C U R``.

    Args:
        output: output of the base layer, bias included, shape ``(..., m)``.
        mixing: the trained matrix, shape ``(r, r)``; its products are taken in its own dtype.
        factor: shape ``(m, r)``; used in the dtype of ``output``. Taken as a constant.
        index: integer positions on the last axis of ``output``, shape ``(r,)``; may repeat.
        offset: the layer's bias at ``index``, shape ``(r,)``, or ``None`` for a layer without.

    Returns:
        A new tensor of ``output``'s shape and dtype. ``output`` is left alone.

    Raises:
        ValueError: if the shapes do not fit together.
    """
    return _update(output, mixing, factor, index, offset, in_place=False)


def gather_update_(
    output: Tensor,
    mixing: Tensor,
    factor: Tensor,
    index: Tensor,
    offset: Tensor | None = None,
) -> Tensor:
    """As :func:`gather_update`, in the memory of ``output``, whose values are gone after it.

    Args:
        output: contiguous, and nobody else's (see :func:`curlora.alone.alone`).
        mixing, factor, index, offset: as for :func:`gather_update`.

    Returns:
        The result, of ``output``'s shape and dtype. As a rule autograd would refuse to change what ``output`` is in a
        graph; the result is a tensor of its own to it.

    Raises:
        ValueError: if the shapes do not fit together.
    """
    return _update(output, mixing, factor, index, offset, in_place=True)


def gather_update_by_row(
    output: Tensor,
    mixing: Tensor,
    factor: Tensor,
    index: Tensor,
    offset: Tensor | None = None,
) -> Tensor:
    """As :func:`gather_update`, with a mixing matrix of its own for each row of a batch.

    For inference: what backward would need is kept by autograd, not by the method's own rule.

    Args:
        output: output of the base layer, bias included, shape ``(rows, ..., m)``.
        mixing: shape ``(rows, r, r)``; its products are taken in its own dtype.
        factor, index, offset: as for :func:`gather_update`, shared by the rows.

    Returns:
        A new tensor of ``output``'s shape and dtype.
    """
    with _autocast_off(output.device.type):
        rows = output.reshape(output.shape[0], -1, output.shape[-1])
        z = rows.index_select(-1, index)
        if offset is not None:
            z = z - offset.to(z.dtype)
        mixed = torch.bmm(z.to(mixing.dtype), mixing.mT).to(output.dtype)
        result = torch.addmm(rows.flatten(0, 1), mixed.flatten(0, 1), factor.to(output.dtype).T)
    return result.view(output.shape)


def _update(
    output: Tensor, mixing: Tensor, factor: Tensor, index: Tensor, offset: Tensor | None, in_place: bool
) -> Tensor:
    r = index.shape[0]
    if mixing.shape != (r, r) or factor.shape != (output.shape[-1], r):
        raise ValueError(
            f"gather_update: an output of shape {tuple(output.shape)} and an index of length {r} need "
            f"mixing of shape {(r, r)} and factor of shape {(output.shape[-1], r)}, but got "
            f"{tuple(mixing.shape)} and {tuple(factor.shape)}"
        )
    # The dtypes are chosen here, product by product; autocast must not choose again.
    with _autocast_off(output.device.type):
        # Reshaped out here: an output of the Function that is a view could not be changed in place.
        flat = output.reshape(-1, output.shape[-1])
        needs_graph = output.requires_grad or mixing.requires_grad or (offset is not None and offset.requires_grad)
        if needs_graph and torch.is_grad_enabled():
            look_once()
            result, _ = _GatherUpdate.apply(flat, mixing, factor, index, offset, in_place)
        else:
            result, _ = _add(flat, mixing, factor.detach(), index, offset, in_place)
    return result.view(output.shape)


def _autocast_off(device_type: str) -> contextlib.AbstractContextManager[object]:
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def _add(
    flat: Tensor, mixing: Tensor, factor: Tensor, index: Tensor, offset: Tensor | None, in_place: bool
) -> tuple[Tensor, Tensor]:
    """``flat``, shape ``(tokens, m)``, with the update, and ``z``."""
    z = flat.index_select(-1, index)
    if offset is not None:
        z = z - _as(offset, z.dtype)
    # To autograd another tensor than ``flat``, in its memory. A version they have in common: had ``flat`` been saved by
    # some backward, that would notice.
    into = flat.detach() if in_place else None
    mixed = _as(linear(_as(z, mixing.dtype), mixing), flat.dtype)
    # addmm adds while it multiplies: the update itself never exists as a tensor.
    result = torch.addmm(flat, mixed, _as(factor, flat.dtype).T, out=into)
    return result, z


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``; to ask first is quicker, which tells where a step is many small products."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _onto(grad: Tensor, factor: Tensor) -> Tensor:
    """``grad @ factor``, shape ``(tokens, r)``."""
    if grad.device.type == "cpu" and grad.dtype in (torch.float32, torch.float64) and len(grad) >= 32:
        # The long side first: the other way round MKL takes three to five times as long at a rank below 16, and longer
        # at any that is no multiple of it.
        return (factor.T @ grad.T).T
    return grad @ factor


class _GatherUpdate(torch.autograd.Function):
    """Returns ``(result, z)``: what is saved is an output, so that second derivatives are right.

    ``output`` has shape ``(tokens, m)``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        mixing: Tensor,
        factor: Tensor,
        index: Tensor,
        offset: Tensor | None,
        in_place: bool,
    ) -> tuple[Tensor, Tensor]:
        result, z = _add(output, mixing, factor, index, offset, in_place)
        ctx.shape = output.shape
        ctx.offset_dtype = None if offset is None else offset.dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(z if ctx.needs_input_grad[1] else None, mixing, factor, index)
        return result, z

    @staticmethod
    @told_if_alone
    def backward(ctx: Any, alone: bool, grad: Tensor | None, grad_z: Tensor | None) -> tuple[Tensor | None, ...]:
        z, mixing, factor, index = ctx.saved_tensors
        need_output, need_mixing, _, _, need_offset, _ = ctx.needs_input_grad
        if grad is None:  # in second derivatives z may be used where the result is not
            if grad_z is None:
                return (None,) * 6
            grad = grad_z.new_zeros(ctx.shape)

        g = _as(_onto(grad, _as(factor, grad.dtype)), mixing.dtype)
        grad_output = grad_mixing = grad_offset = None
        if need_mixing:
            grad_mixing = g.T @ _as(z, mixing.dtype)
        if need_output or need_offset:
            through = _as(g @ mixing, grad.dtype)
            if grad_z is not None:
                through = through + grad_z
            if need_output:
                if grad.device.type == "cpu" and not torch.compiler.is_compiling():
                    index = index.long()  # with int32 the addition takes up to six times as long, if rows are long
                grad_output = (grad.index_add_ if alone else grad.index_add)(-1, index, through)
            if need_offset:
                grad_offset = -through.sum(0).to(ctx.offset_dtype)
        return grad_output, grad_mixing, None, None, grad_offset, None
