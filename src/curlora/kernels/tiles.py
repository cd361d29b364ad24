"""Common parts of the kernels: reading of tensors by rows, the product with ``U``, and sizes of tiles.

Triton requires block sizes that are powers of two, and at least 16 in a matrix product. So the rank ``r`` is padded to
``R``, and the padding is masked in every load and store. Offsets into tensors of shape ``(tokens, m)`` have 64 bits.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from curlora.kernels.operators import INTERPRETED

__all__ = [
    "Rows",
    "add_along",
    "chunk",
    "mix",
    "multiprocessors",
    "numerics",
    "on",
    "padded",
    "product",
    "rows_of",
    "stages",
]


class Rows(NamedTuple):
    """A tensor as rows: row ``t`` begins at ``t // inner * outer_stride + t % inner * inner_stride``."""

    tensor: Tensor
    inner: int
    outer_stride: int
    inner_stride: int


def rows_of(tensor: Tensor) -> Rows:
    """Return ``tensor``, shape ``(..., m)``, as rows. It is copied only if two strides cannot describe its rows."""
    m = tensor.shape[-1]
    tokens = max(tensor.numel() // max(m, 1), 1)
    if tensor.is_contiguous():
        return Rows(tensor, tokens, 0, m)
    if tensor.ndim == 3 and tensor.stride(2) == 1:
        return Rows(tensor, tensor.shape[1], tensor.stride(0), tensor.stride(1))
    flat = tensor.reshape(-1, m)
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    return Rows(flat, tokens, 0, flat.stride(0))


def padded(r: int) -> int:
    """Return the rank ``R`` of a block: ``r`` rounded up to a power of two, at least 16."""
    return max(16, triton.next_power_of_2(r))


def chunk(R: int) -> int:
    """Return how many ranks of ``U`` are loaded at once: a whole ``U`` of rank 256 does not fit a multiprocessor."""
    return min(R, 32)


def stages(size: int, most: int) -> int:
    """Return the number of pipeline stages: one more than tiles of ``size`` bytes fit in 64 KiB, from 2 to ``most``.

    The rest of the shared memory is left for other blocks.
    """
    return 1 + max(1, min(64 * 1024 // size, most - 1))


def numerics(dtype: torch.dtype, dtype_U: torch.dtype) -> dict[str, object]:
    """Return a kernel's constants: the dtype of sums, and the precision of products of float32 blocks.

    In a float32 layer the products follow PyTorch's setting: full precision unless TF32 is allowed. In a half-precision
    layer ``U`` is float32, while the other factor was rounded to half precision. There the product
    with ``U`` is split into three TF32 products on the tensor cores, which keep all but its last two bits.
    """
    allowed = "tf32" if _tf32_allowed() else "ieee"
    split = dtype in (torch.float16, torch.bfloat16) and dtype_U == torch.float32
    return {
        "PRECISION": allowed,
        "PRECISION_U": "tf32x3" if split else allowed,
        "SUM": tl.float64 if dtype == torch.float64 else tl.float32,
        "UPCAST": INTERPRETED and torch.bfloat16 in (dtype, dtype_U),
    }


def _tf32_allowed() -> bool:
    matmul = torch.backends.cuda.matmul
    # PyTorch has this attribute from 2.9 on. Once it has been set, reading ``allow_tf32`` raises an error.
    precision = getattr(matmul, "fp32_precision", None)
    return bool(matmul.allow_tf32) if precision is None else precision == "tf32"


def multiprocessors(device: torch.device) -> int:
    """Return the device's number of multiprocessors. A kernel should have work for each."""
    return 4 if INTERPRETED else _multiprocessors(device)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def on(device: torch.device) -> torch.cuda.device:
    """Return a context in which kernels are launched on ``device``, which may not be the current device."""
    return torch.cuda.device(-1 if INTERPRETED else device)


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """``acc + a @ b``."""
    if UPCAST:  # the interpreter stores bfloat16 as integers, and would multiply these
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def mix(
    output, begin, present, token, scaled_U, U_out, U_in, index, offset, z, m, keep,
    r: tl.constexpr, HAS_OFFSET: tl.constexpr, KEEP_Z: tl.constexpr,
    R: tl.constexpr, CHUNK: tl.constexpr, BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Return ``z scaled_Uᵀ`` of a tile of tokens, shape ``(BLOCK_T, R)``. ``z`` is gathered, and stored if ``keep``.

    ``begin`` is the offset of a token's row, and ``present`` whether the token exists.
    """
    dtype = scaled_U.dtype.element_ty
    ranks = tl.arange(0, R)
    mixed = tl.zeros((BLOCK_T, R), SUM)
    for start in tl.range(0, R, CHUNK, num_stages=1):
        some = start + tl.arange(0, CHUNK)
        at = tl.load(index + some, mask=some < r, other=0)
        inside = (at >= 0) & (at < m)
        gathered = tl.load(
            output + begin[:, None] + at[None, :], mask=present[:, None] & ((some < r) & inside)[None, :], other=0
        ).to(SUM)
        if HAS_OFFSET:
            gathered -= tl.load(offset + some, mask=some < r, other=0).to(SUM)[None, :]
        # An index out of range would read other memory. It gathers NaN instead, which cannot go unnoticed.
        gathered = tl.where(inside[None, :], gathered, float("nan")).to(dtype)
        if KEEP_Z:
            kept = present[:, None] & (some < r)[None, :] & keep
            tl.store(z + token[:, None].to(tl.int64) * r + some[None, :], gathered, mask=kept)
        mask = (some < r)[:, None] & (ranks < r)[None, :]
        U = tl.load(scaled_U + some[:, None] * U_in + ranks[None, :] * U_out, mask=mask, other=0)
        mixed = product(gathered, U, mixed, PRECISION, UPCAST)
    return mixed.to(dtype)


@triton.jit
def add_along(
    mixed, output, begin, present, factor, result, result_begin, first, count, m,
    r: tl.constexpr, R: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Store ``output + mixed factorᵀ`` of a tile of tokens, for ``count`` tiles of columns, beginning with ``first``.

    Triton must see that a tile begins at a multiple of its width and ends at ``m``. Otherwise it would load and store
    single entries.
    """
    dtype = output.dtype.element_ty
    mixed = mixed.to(dtype)
    ranks = tl.arange(0, R)
    for i in tl.range(0, count, num_stages=STAGES):
        columns = (first + i) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = present[:, None] & (columns < m)[None, :]
        of_factor = (ranks < r)[:, None] & (columns < m)[None, :]
        C = tl.load(factor + ranks[:, None] + columns[None, :] * r, mask=of_factor, other=0).to(dtype)
        y = tl.load(output + begin[:, None] + columns[None, :], mask=mask, other=0).to(SUM)
        y = product(mixed, C, y, PRECISION, UPCAST)
        tl.store(result + result_begin[:, None] + columns[None, :], y.to(dtype), mask=mask)
