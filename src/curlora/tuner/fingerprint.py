"""Fingerprints: a few bytes per layer that tell whether an adapter is on the base weights it was made on.

An adapter file holds indices into the base weights, not the columns themselves. On another base model it would load and
compute nonsense. The fingerprint is seven sums of the selected columns with random signs. The sums are equal on the
same weights, close on the same weights in another precision or quantization, and unrelated on other weights.
"""

import functools
import statistics
from collections.abc import Mapping

import torch
from torch import Tensor

_SUMS = 7
# Two fingerprints of the same dtype must agree more closely than two of different dtypes. 0 stands for quantized
# layers and other dtypes. The codes are saved in files: never renumber them.
_DTYPE_CODES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3, torch.float64: 4}

LENGTH = 1 + _SUMS

# Limits of ||difference|| / ||sums||. Rounding to bfloat16 gives 0.002 and 8-bit quantization 0.01. 4-bit quantization
# usually gives 0.1, but 0.4 in single layers, where columns of low norm share their scales with larger ones. Two
# unrelated matrices usually give 1.2; one layer in 150 is below 0.6 and one in 8,000 below 0.35. So the limit for a
# single layer is higher than the limit for the median of the layers.
_SAME = 1e-5
_ONE_LAYER = 0.6
_MEDIAN = 0.35


def fingerprint(factor: Tensor, exact: bool = True) -> Tensor:
    """Return the fingerprint of the selected columns of a base weight.

    Args:
        factor: the columns, shape ``(m, r)``.
        exact: whether these are stored values; ``False`` for the dequantized values of a quantized weight.

    Returns:
        int32 on the CPU, shape ``(8,)``: a code of the dtype, then the bits of seven float32 sums ``a @ factor @ b``
        with fixed sign vectors ``a`` and ``b``. They are stored as integers, so that ``model.half()`` and the like
        cannot round them.
    """
    wide = factor.detach().to(device="cpu", dtype=torch.float64)
    left = _signs(_SUMS, wide.shape[0], salt=1)
    right = _signs(_SUMS, wide.shape[1], salt=2)
    sums = ((left @ wide) * right).sum(1).to(torch.float32)
    code = torch.tensor([_DTYPE_CODES.get(factor.dtype, 0) if exact else 0], dtype=torch.int32, device="cpu")
    return torch.cat([code, sums.view(torch.int32)])


def compare(saved: Tensor, current: Tensor) -> str:
    """Compare two fingerprints.

    Returns:
        ``"same"``; ``"precision"`` if another precision or quantization of the same weights explains the difference;
        ``"other"`` if nothing does.
    """
    difference = _difference(saved, current)
    if difference <= _SAME:
        return "same"
    same_exact_dtype = saved[0].item() == current[0].item() != 0
    if difference <= _ONE_LAYER and not same_exact_dtype:
        return "precision"
    return "other"


def compare_layers(pairs: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, str]:
    """Compare the fingerprints of all layers of an adapter.

    Args:
        pairs: ``(saved, current)`` by the layer's name.

    Returns:
        By layer, the result of :func:`compare`. If the median difference of the changed layers is larger than precision
        or quantization explains, every changed layer is ``"other"``.
    """
    verdicts = {name: compare(*pair) for name, pair in pairs.items()}
    changed = [name for name, verdict in verdicts.items() if verdict != "same"]
    if changed and statistics.median(_difference(*pairs[name]) for name in changed) > _MEDIAN:
        verdicts.update(dict.fromkeys(changed, "other"))
    return verdicts


def _difference(saved: Tensor, current: Tensor) -> float:
    if torch.equal(saved[1:].cpu(), current[1:].cpu()):  # the usual case, and faster than computing the norms
        return 0.0
    a, b = (f[1:].cpu().contiguous().view(torch.float32).double() for f in (saved, current))
    scale = torch.maximum(a.norm(), b.norm())
    return float((a - b).norm() / scale) if scale != 0 else 0.0  # NaN counts as over the limit


@functools.lru_cache(maxsize=32)  # a model has few shapes and many layers
def _signs(rows: int, columns: int, salt: int) -> Tensor:
    """Return a fixed float64 matrix of +-1, shape ``(rows, columns)``: a hash of the position, equal in every torch."""
    x = torch.arange(rows * columns, dtype=torch.int64, device="cpu") * 16 + salt
    for _ in range(3):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return (1 - 2 * ((x >> 16) & 1)).to(torch.float64).view(rows, columns)
