"""The kernel ``curlora::backward``: the gradients of ``curlora::forward``, in two launches and one pass over ``grad``.

With ``g = grad @ factor`` the gradients are

    scaled_U    gᵀ z, summed over tokens
    output      grad, plus g scaled_U added at ``index`` (duplicates accumulate)

A program of the first launch handles a tile of tokens and all columns. It copies ``grad`` while it multiplies it, then
adds ``g scaled_U`` at the gathered columns of its tokens. No other program writes to these tokens.

Sums over tokens have a fixed order and use no atomics, so they have the same bits in every run. Each program stores its
part of ``gᵀ z``, and the second launch adds the parts. Above rank 64 the parts would be larger than ``g``: there the
programs store ``g``, and the second launch computes ``gᵀ z``.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from curlora.kernels.operators import empty_backward
from curlora.kernels.tiles import chunk, multiprocessors, numerics, on, padded, product, rows_of, stages

__all__ = ["Blocks", "choose", "launch"]


class Blocks(NamedTuple):
    """Sizes of a program: tokens and columns of a tile, warps, and pipeline stages (tiles that are loaded ahead)."""

    tokens: int
    columns: int
    warps: int = 4
    stages: int = 3


@functools.lru_cache(1024)
def choose(tokens: int, m: int, r: int, dtype: torch.dtype, device: torch.device) -> Blocks:
    """Return the largest tiles of tokens, at least 16, that still give every multiprocessor a program.

    Every program reads the whole factor, so large tiles read it fewer times. A multiprocessor then often has only one
    program, so the program must load several tiles ahead to hide the latency.
    """
    R, half = padded(r), dtype.itemsize <= 2
    most = {16: 64, 32: 32, 64: 32}.get(R, 16) if half else {16: 32}.get(R, 16)
    block = next((b for b in (64, 32) if b <= most and tokens // b >= multiprocessors(device)), 16)
    columns = (128 if R <= 64 else 64) // (1 if half else 2)
    warps = 4 if R <= 32 or (R == 64 and block == 16 and half) else 8
    return Blocks(block, columns, warps, stages(columns * (block + R) * dtype.itemsize, most=6))


@triton.jit(do_not_specialize=["tokens", "inner"])
def _kernel(
    grad, z, scaled_U, factor, index, result, sums,
    tokens, m, inner, outer_stride, inner_stride, U_out, U_in,
    r: tl.constexpr, NEED_OUTPUT: tl.constexpr, NEED_U: tl.constexpr, PARTS: tl.constexpr,
    R: tl.constexpr, CHUNK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr, PRECISION_U: tl.constexpr, UPCAST: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    dtype = grad.dtype.element_ty
    dtype_U = scaled_U.dtype.element_ty
    tile = tl.program_id(0)
    token = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    present = token < tokens
    begin = (token // inner).to(tl.int64) * outer_stride + (token % inner).to(tl.int64) * inner_stride
    result_begin = token.to(tl.int64) * m
    ranks = tl.arange(0, R)

    g = tl.zeros((BLOCK_T, R), SUM)
    for start in range(0, m, BLOCK_M):
        columns = start + tl.arange(0, BLOCK_M)
        mask = present[:, None] & (columns < m)[None, :]
        dy = tl.load(grad + begin[:, None] + columns[None, :], mask=mask, other=0)
        if NEED_OUTPUT:
            tl.store(result + result_begin[:, None] + columns[None, :], dy, mask=mask)
        of_factor = (columns < m)[:, None] & (ranks < r)[None, :]
        C = tl.load(factor + columns[:, None] * r + ranks[None, :], mask=of_factor, other=0).to(dtype)
        g = product(dy, C, g, PRECISION, UPCAST)
    g = g.to(dtype_U)

    if NEED_U and not PARTS:
        tl.store(
            sums + token[:, None].to(tl.int64) * r + ranks[None, :], g.to(SUM),
            mask=present[:, None] & (ranks < r)[None, :],
        )  # fmt: skip

    for start in tl.range(0, R, CHUNK, num_stages=1):
        some = start + tl.arange(0, CHUNK)
        if NEED_U and PARTS:
            mask = present[:, None] & (some < r)[None, :]
            of_z = tl.load(z + token[:, None].to(tl.int64) * r + some[None, :], mask=mask, other=0)
            part = product(tl.trans(g), of_z, tl.zeros((R, CHUNK), SUM), PRECISION_U, UPCAST)
            at_part = sums + tile.to(tl.int64) * r * r + ranks[:, None] * r + some[None, :]
            tl.store(at_part, part, mask=(ranks < r)[:, None] & (some < r)[None, :])
        if NEED_OUTPUT:
            of_U = (ranks < r)[:, None] & (some < r)[None, :]
            U = tl.load(scaled_U + ranks[:, None] * U_out + some[None, :] * U_in, mask=of_U, other=0)
            through = product(g, U, tl.zeros((BLOCK_T, CHUNK), SUM), PRECISION_U, UPCAST)
            # Ranks with the same column are summed first. Only the first of them adds the sum.
            at = tl.load(index + some, mask=some < r, other=-1)
            same = at[:, None] == at[None, :]
            through = tl.dot(through, same.to(SUM), input_precision="ieee", out_dtype=SUM)
            first = tl.sum((same & (some[:, None] < some[None, :])).to(tl.int32), axis=0) == 0
            adds = present[:, None] & (first & (at >= 0) & (at < m))[None, :]
            # Wait: other threads of this program have written there, in the copy above or for earlier ranks.
            tl.debug_barrier()
            there = result + result_begin[:, None] + at[None, :]
            before = tl.load(there, mask=adds, other=0)
            tl.store(there, (before.to(SUM) + through).to(dtype), mask=adds)


@triton.jit(do_not_specialize=["count"])
def _add_parts(parts, total, count, size, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr, SUM: tl.constexpr):
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    added = tl.zeros((BLOCK,), SUM)
    for start in range(0, count, BLOCK_P):
        which = start + tl.arange(0, BLOCK_P)
        mask = (which < count)[:, None] & (entry < size)[None, :]
        added += tl.sum(
            tl.load(parts + which[:, None].to(tl.int64) * size + entry[None, :], mask=mask, other=0), axis=0
        )
    tl.store(total + entry, added.to(total.dtype.element_ty), mask=entry < size)


@triton.jit(do_not_specialize=["tokens"])
def _add_tokens(
    g, z, total, tokens,
    r: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    dtype = z.dtype.element_ty
    added = tl.zeros((BLOCK, BLOCK), SUM)
    for start in range(0, tokens, BLOCK_T):
        token = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
        left_mask = (row < r)[:, None] & (token < tokens)[None, :]
        left = tl.load(g + row[:, None] + token[None, :] * r, mask=left_mask, other=0).to(dtype)
        right_mask = (token < tokens)[:, None] & (column < r)[None, :]
        right = tl.load(z + token[:, None] * r + column[None, :], mask=right_mask, other=0)
        added = product(left, right, added, PRECISION, UPCAST)
    mask = (row < r)[:, None] & (column < r)[None, :]
    tl.store(total + row[:, None] * r + column[None, :], added.to(total.dtype.element_ty), mask=mask)


def launch(
    grad: Tensor, z: Tensor | None, scaled_U: Tensor, factor: Tensor, index: Tensor, need_output: bool,
    blocks: Blocks | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run both kernels.

    Args:
        grad: gradient of the result, shape ``(..., m)``. It is not modified.
        z: the ``z`` that forward has saved, shape ``(tokens, r)``; ``None`` if ``scaled_U`` needs no gradient.
        scaled_U, factor, index: the arguments of forward.
        need_output: whether to compute the gradient of ``output``.
        blocks: sizes of tiles, to try others than :func:`choose` returns.

    Returns:
        The gradients of ``output``, contiguous, and of ``scaled_U``. A gradient that is not needed is an empty tensor.
    """
    grad_output, grad_U = empty_backward(grad, z, scaled_U, factor, index, need_output)
    if grad.numel() == 0:
        return grad_output, grad_U.zero_()
    m, r = factor.shape
    tokens = grad.numel() // m
    rows, R = rows_of(grad), padded(r)
    blocks = blocks or choose(tokens, m, r, grad.dtype, grad.device)
    programs = triton.cdiv(tokens, blocks.tokens)
    constants = numerics(grad.dtype, scaled_U.dtype)
    parts = R <= 64
    sums = None
    if z is not None:
        z = z.contiguous()
        dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
        sums = grad.new_empty((programs, r, r) if parts else (tokens, r), dtype=dtype)
    with on(grad.device):
        _kernel[(programs,)](
            rows.tensor, z, scaled_U, factor.contiguous(), index.contiguous(), grad_output, sums,
            tokens, m, rows.inner, rows.outer_stride, rows.inner_stride, *scaled_U.stride(),
            r=r, NEED_OUTPUT=need_output, NEED_U=z is not None, PARTS=parts, R=R, CHUNK=chunk(R), BLOCK_T=blocks.tokens,
            BLOCK_M=blocks.columns, **constants, num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip
        if z is None:
            pass
        elif parts:
            _add_parts[(triton.cdiv(r * r, 64),)](
                sums, grad_U, programs, r * r, BLOCK_P=32, BLOCK=64, SUM=constants["SUM"], num_warps=4
            )
        else:
            side = triton.cdiv(r, 32)
            _add_tokens[(side, side)](
                sums, z, grad_U, tokens, r=r, BLOCK_T=64, BLOCK=32, PRECISION=constants["PRECISION_U"],
                UPCAST=constants["UPCAST"], SUM=constants["SUM"], num_warps=4, num_stages=2,
            )  # fmt: skip
    return grad_output, grad_U
