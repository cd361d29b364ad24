"""The kernel ``curlora::mixed_batch``: ``curlora::forward`` with a separate ``scaled_U`` for each row of a batch.

It runs in one launch. A program handles a tile of tokens of one row, and a part of the columns. The kernel is for
inference only, so ``z`` is not stored.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from curlora.kernels.forward import Blocks, choose
from curlora.kernels.operators import empty_mixed_batch
from curlora.kernels.tiles import add_along, chunk, mix, numerics, on, padded

__all__ = ["launch"]


@triton.jit(do_not_specialize=["length", "tiles", "count"])
def _kernel(
    output, scaled_U, factor, index, offset, result,
    length, tiles, m, row_stride, token_stride, U_row, U_out, U_in, count,
    r: tl.constexpr, HAS_OFFSET: tl.constexpr, R: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, PRECISION_U: tl.constexpr, UPCAST: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    parts = tl.cdiv(m, count * BLOCK_M)
    part, tile = tl.program_id(0) % parts, tl.program_id(0) // parts
    row = (tile // tiles).to(tl.int64)
    token = tile % tiles * BLOCK_T + tl.arange(0, BLOCK_T)
    present = token < length
    begin = row * row_stride + token.to(tl.int64) * token_stride
    mixed = mix(
        output, begin, present, token, scaled_U + row * U_row, U_out, U_in, index, offset, None, m, False,
        r, HAS_OFFSET, False, R, CHUNK, BLOCK_T, PRECISION_U, UPCAST, SUM,
    )  # fmt: skip
    add_along(
        mixed, output, begin, present, factor, result, (row * length + token) * m, part * count, count, m,
        r, R, BLOCK_M, STAGES, PRECISION, UPCAST, SUM,
    )  # fmt: skip


def launch(
    output: Tensor, scaled_U: Tensor, factor: Tensor, index: Tensor, offset: Tensor | None, blocks: Blocks | None = None
) -> Tensor:
    """Run the kernel.

    Args:
        output: shape ``(rows, ..., m)``.
        scaled_U: shape ``(rows, r, r)``.
        factor, index, offset: as for :func:`curlora.kernels.forward.launch`; all rows share them.
        blocks: sizes of tiles, to try others than :func:`curlora.kernels.forward.choose` returns.

    Returns:
        The result, contiguous, of ``output``'s shape and dtype.
    """
    result = empty_mixed_batch(output, scaled_U, factor, index, offset)
    if result.numel() == 0:
        return result
    m, r = factor.shape
    rows = output.shape[0]
    by_row = output.reshape(rows, -1, m)
    by_row = by_row if by_row.stride(2) == 1 else by_row.contiguous()
    length, R = by_row.shape[1], padded(r)
    blocks = blocks or choose(length, m, r, output.dtype, output.device, rows)
    tiles = triton.cdiv(length, blocks.tokens)
    with on(output.device):
        _kernel[(rows * tiles * triton.cdiv(m, blocks.tiles * blocks.columns),)](
            by_row, scaled_U, factor.contiguous(), index.contiguous(),
            None if offset is None else offset.contiguous(), result,
            length, tiles, m, *by_row.stride()[:2], *scaled_U.stride(), blocks.tiles,
            r=r, HAS_OFFSET=offset is not None, R=R, CHUNK=chunk(R), BLOCK_T=blocks.tokens, BLOCK_M=blocks.columns,
            STAGES=blocks.stages, **numerics(output.dtype, scaled_U.dtype), num_warps=blocks.warps,
        )  # fmt: skip
    return result
