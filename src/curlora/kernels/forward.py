"""The kernel ``curlora::forward``: ``output + (z scaled_Uᵀ) factorᵀ`` with ``z = output[..., index] - offset``.

It runs in one launch. A program handles a tile of tokens and a part of the columns. It gathers ``z``, multiplies it by
``scaled_U``, and adds the product with the factor while it copies its part of the output. Programs of the same tokens
gather the same ``z``, ``r`` entries per token, and the first of them stores it. The result is a new tensor, so no
program changes values that another one gathers.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from curlora.kernels.operators import empty_forward
from curlora.kernels.tiles import add_along, chunk, mix, multiprocessors, numerics, on, padded, rows_of, stages

__all__ = ["Blocks", "choose", "launch"]

# The sizes of tiles follow what Triton's compiler reports for GPUs from Ampere on. No size spills registers, except for
# a few at rank 256 in float32. Shared memory stays within 99 KiB, the least that these GPUs have. It has not been
# measured which sizes are fastest.


class Blocks(NamedTuple):
    """Sizes of a program: tokens and columns of a tile, number of tiles of columns, warps, and pipeline stages."""

    tokens: int
    columns: int
    tiles: int
    warps: int = 4
    stages: int = 3


@functools.lru_cache(1024)
def choose(tokens: int, m: int, r: int, dtype: torch.dtype, device: torch.device, rows: int = 1) -> Blocks:
    """Return sizes for ``rows * tokens`` tokens, with four programs per multiprocessor if there is enough work."""
    R, half = padded(r), dtype.itemsize <= 2
    block = 16 if tokens <= 16 else 32
    columns = (128 if R <= 64 else 64) // (1 if half else 2)
    tiles = triton.cdiv(m, columns)
    parts = max(1, min(4 * multiprocessors(device) // (rows * triton.cdiv(tokens, block)), tiles))
    warps = 4 if R <= 32 or (R == 64 and block == 16) else 8
    under_way = stages(columns * (block + R) * dtype.itemsize, most=3)
    return Blocks(block, columns, triton.cdiv(tiles, parts), warps, under_way)


@triton.jit(do_not_specialize=["tokens", "inner", "count"])
def _kernel(
    output, scaled_U, factor, index, offset, result, z,
    tokens, m, inner, outer_stride, inner_stride, U_out, U_in, count,
    r: tl.constexpr, HAS_OFFSET: tl.constexpr, KEEP_Z: tl.constexpr, R: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, PRECISION_U: tl.constexpr, UPCAST: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    parts = tl.cdiv(m, count * BLOCK_M)
    tile, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    token = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    present = token < tokens
    begin = (token // inner).to(tl.int64) * outer_stride + (token % inner).to(tl.int64) * inner_stride
    mixed = mix(
        output, begin, present, token, scaled_U, U_out, U_in, index, offset, z, m, part == 0,
        r, HAS_OFFSET, KEEP_Z, R, CHUNK, BLOCK_T, PRECISION_U, UPCAST, SUM,
    )  # fmt: skip
    add_along(
        mixed, output, begin, present, factor, result, token.to(tl.int64) * m, part * count, count, m,
        r, R, BLOCK_M, STAGES, PRECISION, UPCAST, SUM,
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
        index: integers, shape ``(r,)``. An index outside ``0..m-1`` gathers NaN.
        offset: shape ``(r,)``, or ``None``.
        keep_z: whether to return ``z``.
        blocks: sizes of tiles, to try others than :func:`choose` returns.

    Returns:
        The result, contiguous, of ``output``'s shape and dtype; and ``z`` in ``scaled_U``'s dtype, shape
        ``(tokens, r)``, or ``(0, r)`` without ``keep_z``.
    """
    result, z = empty_forward(output, scaled_U, factor, index, offset, keep_z)
    if result.numel() == 0:
        return result, z
    m, r = factor.shape
    tokens = result.numel() // m
    rows, R = rows_of(output), padded(r)
    blocks = blocks or choose(tokens, m, r, output.dtype, output.device)
    programs = triton.cdiv(tokens, blocks.tokens) * triton.cdiv(m, blocks.tiles * blocks.columns)
    with on(output.device):
        _kernel[(programs,)](
            rows.tensor, scaled_U, factor.contiguous(), index.contiguous(),
            None if offset is None else offset.contiguous(), result, z,
            tokens, m, rows.inner, rows.outer_stride, rows.inner_stride, *scaled_U.stride(), blocks.tiles,
            r=r, HAS_OFFSET=offset is not None, KEEP_Z=keep_z, R=R, CHUNK=chunk(R), BLOCK_T=blocks.tokens,
            BLOCK_M=blocks.columns, STAGES=blocks.stages, **numerics(output.dtype, scaled_U.dtype),
            num_warps=blocks.warps,
        )  # fmt: skip
    return result, z
