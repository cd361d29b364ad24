"""``output + (z scaled_Uᵀ) factorᵀ`` with ``z = output[..., index] - offset``, in one launch: ``curlora::forward``.

A program takes a tile of tokens and a part of the columns: it gathers ``z``, multiplies it by ``U``, and adds along the
factor while it copies its part of the output. Programs of the same tokens gather the same ``z``, which is ``r`` entries
of a token; the first of them stores it. The result is a new tensor: what another program gathers is never written to.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from curlora.kernels.operators import empty_forward
from curlora.kernels.tiles import add_along, chunk, mix, multiprocessors, numerics, on, padded, rows_of

__all__ = ["Blocks", "choose", "launch"]


class Blocks(NamedTuple):
    """Sizes of a program: tokens and columns of a tile, columns in all, warps, loads under way at once."""

    tokens: int
    columns: int
    span: int
    warps: int = 4
    stages: int = 3


def choose(tokens: int, m: int, r: int, dtype: torch.dtype, device: torch.device) -> Blocks:
    """Tiles that fit the shared memory of every GPU from Ampere on, and four programs for each multiprocessor."""
    R = padded(r)
    small = dtype.itemsize <= 2
    columns = (256 if R <= 16 else 128 if R <= 64 else 64) // (1 if small else 2)
    block = 16 if tokens <= 16 else 32
    parts = max(1, min(4 * multiprocessors(device) // triton.cdiv(tokens, block), triton.cdiv(m, columns)))
    span = triton.cdiv(triton.cdiv(m, parts), columns) * columns
    return Blocks(block, columns, span, stages=3 if small and R <= 64 else 2)


@triton.jit(do_not_specialize=["tokens", "inner", "span"])
def _kernel(
    output, scaled_U, factor, index, offset, result, z,
    tokens, m, r, inner, outer_stride, inner_stride, U_out, U_in, span,
    HAS_OFFSET: tl.constexpr, KEEP_Z: tl.constexpr, R: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr, PRECISION_U: tl.constexpr, UPCAST: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    parts = tl.cdiv(m, span)
    tile, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    token = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    present = token < tokens
    begin = (token // inner).to(tl.int64) * outer_stride + (token % inner).to(tl.int64) * inner_stride
    mixed = mix(
        output, begin, present, token, scaled_U, U_out, U_in, index, offset, z, m, r, part == 0,
        HAS_OFFSET, KEEP_Z, R, CHUNK, BLOCK_T, PRECISION_U, UPCAST, SUM,
    )  # fmt: skip
    first = part * span
    add_along(
        mixed, output, begin, present, factor, result, token.to(tl.int64) * m, first, tl.minimum(first + span, m), r,
        R, BLOCK_M, PRECISION, UPCAST, SUM,
    )  # fmt: skip


def launch(
    output: Tensor, scaled_U: Tensor, factor: Tensor, index: Tensor, offset: Tensor | None, keep_z: bool,
    blocks: Blocks | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run the kernel.

    Args:
        output: shape ``(..., m)``.
        scaled_U: shape ``(r, r)``.
        factor: shape ``(m, r)``.
        index: integers, shape ``(r,)``. One outside of ``0..m-1`` gathers NaN.
        offset: shape ``(r,)``, or ``None``.
        keep_z: whether ``z`` is wanted.
        blocks: sizes of tiles, to try others than :func:`choose` gives.

    Returns:
        The result, contiguous, of ``output``'s shape and dtype; and ``z`` in ``scaled_U``'s dtype, shape
        ``(tokens, r)``, or ``(0, r)`` where it is not wanted.
    """
    result, z = empty_forward(output, scaled_U, factor, index, offset, keep_z)
    if result.numel() == 0:
        return result, z
    m, r = factor.shape
    tokens = result.numel() // m
    rows, R = rows_of(output), padded(r)
    blocks = blocks or choose(tokens, m, r, output.dtype, output.device)
    programs = triton.cdiv(tokens, blocks.tokens) * triton.cdiv(m, blocks.span)
    with on(output.device):
        _kernel[(programs,)](
            rows.tensor, scaled_U, factor.contiguous(), index.contiguous(), offset, result, z,
            tokens, m, r, rows.inner, rows.outer_stride, rows.inner_stride, *scaled_U.stride(), blocks.span,
            HAS_OFFSET=offset is not None, KEEP_Z=keep_z, R=R, CHUNK=chunk(R), BLOCK_T=blocks.tokens,
            BLOCK_M=blocks.columns, **numerics(output.dtype, scaled_U.dtype),
            num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip
    return result, z
