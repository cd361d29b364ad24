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
else can see it and it is large enough to ask (:mod:`curlora.alone`), and ``y0`` where the caller says so.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from curlora.alone import look_once, told_if_alone

__all__ = ["autocast_off", "gather_update", "gather_update_", "gather_update_by_row"]


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
        The result, of ``output``'s shape and dtype: ``output`` itself where there is no graph. As a rule autograd would
        refuse to change what ``output`` is in one; the result is then a tensor of its own to it.

    Raises:
        ValueError: if the shapes do not fit together.
        RuntimeError: if ``output`` is not contiguous.
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
    if _autocast_is_on(output):
        with torch.autocast(output.device.type, enabled=False):
            return gather_update_by_row(output, mixing, factor, index, offset)
    rows = output.reshape(output.shape[0], -1, output.shape[-1])
    z = rows.index_select(-1, index)
    if offset is not None:
        z = z - offset.to(z.dtype)
    mixed = torch.bmm(z.to(mixing.dtype), mixing.mT).to(output.dtype)
    return _plus(output, rows.flatten(0, 1), mixed.flatten(0, 1), factor.to(output.dtype).T)


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
    if _autocast_is_on(output):
        with torch.autocast(output.device.type, enabled=False):
            return _update(output, mixing, factor, index, offset, in_place)
    needs_graph = output.requires_grad or mixing.requires_grad or (offset is not None and offset.requires_grad)
    if needs_graph and torch.is_grad_enabled():
        look_once()
        result, _ = _GatherUpdate.apply(output, mixing, factor, index, offset, in_place)
    else:
        result, _ = _add(output, mixing, factor.detach(), index, offset, in_place)
        # Of an ``output`` that is in a graph, gradients being off: to autograd the result is another tensor.
        result = result.detach() if result.requires_grad else result
    return result


def autocast_off(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """While it lasts products on the tensor's device have their factors' precision, whatever the caller's autocast."""
    if not _autocast_is_on(tensor):
        return contextlib.nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)


def _autocast_is_on(tensor: Tensor) -> bool:
    """For the tensor's device. The dtypes are chosen here, product by product, and it would choose again."""
    if tensor.is_cpu:  # to ask for a device's name takes longer than to look whether it is this one
        return torch.is_autocast_enabled("cpu")
    if tensor.is_cuda:
        return torch.is_autocast_enabled("cuda")
    kind = tensor.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def _add(
    output: Tensor, mixing: Tensor, factor: Tensor, index: Tensor, offset: Tensor | None, in_place: bool
) -> tuple[Tensor, Tensor]:
    """``output``, shape ``(..., m)``, with the update, and ``z``, shape ``(tokens, r)``, in the dtype of ``mixing``."""
    m = factor.shape[0]
    flat = output.view(-1, m) if in_place else output.reshape(-1, m)  # which may be a copy
    z = flat.index_select(-1, index)
    if offset is not None:
        z = z - _as(offset, z.dtype)
    z = _as(z, mixing.dtype)
    mixed = _as(linear(z, mixing), output.dtype)
    directions = _as(factor, output.dtype).T
    if in_place:
        # ``flat`` is a view, and no part of a graph: one is recorded neither here nor where gradients are off. The two
        # have a version in common: had ``output`` been saved by some backward, that would notice.
        torch.addmm(flat, mixed, directions, out=flat)
        return output, z
    return _plus(output, flat, mixed, directions), z


def _plus(output: Tensor, flat: Tensor, mixed: Tensor, directions: Tensor) -> Tensor:
    """``output`` plus ``mixed @ directions``, shape ``(tokens, m)``, as which ``flat`` has the same numbers."""
    if torch.compiler.is_compiling():
        # The compiler makes one pass of the sum and of what follows. An addmm, which it would also make of a sum of two
        # dimensions, copies ``output`` first and is a pass of its own. In half precision the product is then rounded by
        # itself, as LoRA's is.
        return output + (mixed @ directions).view_as(output)
    # It adds while it multiplies: the update itself never exists as a tensor.
    return torch.addmm(flat, mixed, directions).view_as(output)


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``; to ask first is quicker, which tells where a step is many small products."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _onto(grad: Tensor, factor: Tensor) -> Tensor:
    """``grad @ factor``, shape ``(tokens, r)``."""
    r = factor.shape[1]
    # At any rank that is no multiple of 16 MKL takes up to five times as long on some processors (AMD's).
    # PyTorch 2.6 does not compile a gradient's ``is_cpu``.
    slow = r % 16 and grad.device.type == "cpu" and grad.dtype in (torch.float32, torch.float64)
    # What is compiled asks for no size: it would be a graph for some tokens only.
    if slow and (torch.compiler.is_compiling() or len(grad) >= 32):
        return (grad @ pad(factor, (0, -r % 16)))[:, :r]
    return grad @ factor


class _GatherUpdate(torch.autograd.Function):
    """Returns ``(result, z)``: what is saved is an output, so that second derivatives are right."""

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
        # To autograd neither ``output`` nor a view: that could not be changed in place by whoever gets it.
        result = result.detach()
        ctx.shape, ctx.dtype = output.shape, output.dtype
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
            grad = grad_z.new_zeros(ctx.shape, dtype=ctx.dtype)

        flat = grad.reshape(-1, factor.shape[0])
        g = _as(_onto(flat, _as(factor, grad.dtype)), mixing.dtype)
        grad_output = grad_mixing = grad_offset = None
        if need_mixing:
            grad_mixing = g.T @ z
        if need_output or need_offset:
            through = g @ mixing if grad_z is None else grad_z.addmm(g, mixing)
            through = _as(through, grad.dtype)
            if need_output:
                if index.dtype != torch.int64 and not torch.compiler.is_compiling() and grad.is_cpu:
                    index = index.long()  # with int32 the addition takes up to six times as long, if rows are long
                if alone:
                    flat.index_add_(-1, index, through)  # into ``grad``, of which it is a view
                    grad_output = grad
                else:
                    grad_output = flat.index_add(-1, index, through).view_as(grad)
            if need_offset:
                grad_offset = -through.sum(0).to(ctx.offset_dtype)
        return grad_output, grad_mixing, None, None, grad_offset, None
