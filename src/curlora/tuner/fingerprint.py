"""A few bytes per layer that tell whether an adapter meets the base weights it was made on.

An adapter file holds indices into the base weights, not the columns themselves, so on another base
it would load and give nonsense. The fingerprint is a handful of random signed sums of the selected
columns: equal on the same weights, close on the same weights in another precision or quantization,
and unrelated on any other.
"""

import functools
import statistics
from collections.abc import Mapping

import torch
from torch import Tensor

_SUMS = 7
# The dtype of the weights decides how close is close enough. 0 stands for everything else
# (quantized layers). Saved in files: never renumber.
_DTYPE_CODES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3, torch.float64: 4}

LENGTH = 1 + _SUMS

# ||difference|| / ||sums||. Rounding to bfloat16 gives 0.002, 8-bit quantization 0.01, 4-bit 0.1 as a rule and 0.4 in
# single layers: columns of low norm share their scales with larger ones. Two unrelated matrices give 1.2 as a rule,
# below 0.6 in one of 150 layers, below 0.35 in one of 8,000. So one layer may differ by more than their median may.
_SAME = 1e-5
_ONE_LAYER = 0.6
_MEDIAN = 0.35


def fingerprint(factor: Tensor, exact: bool = True) -> Tensor:
    """Fingerprint of the selected columns of a base weight.

    Args:
        factor: shape ``(m, r)``.
        exact: whether these are the stored numbers, and not those that a quantized weight stands for.

    Returns:
        int32, CPU, shape ``(8,)``: a code of the dtype, then the bits of seven float32 sums
        ``a @ factor @ b`` over fixed vectors of signs. Integers, so that ``model.half()`` and the
        like cannot round them.
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
        ``"same"``; ``"precision"`` for what another precision or quantization of the same weights
        explains; or ``"other"``.
    """
    difference = _difference(saved, current)
    if difference <= _SAME:
        return "same"
    same_exact_dtype = saved[0].item() == current[0].item() != 0
    if difference <= _ONE_LAYER and not same_exact_dtype:
        return "precision"
    return "other"


def compare_layers(pairs: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, str]:
    """Compare a whole adapter's fingerprints, each saved one with the current one, by layer.

    Returns:
        By layer as :func:`compare`; ``"other"`` for all that are not the same, if most of them differ by more than
        precision or quantization explains.
    """
    verdicts = {name: compare(*pair) for name, pair in pairs.items()}
    changed = [name for name, verdict in verdicts.items() if verdict != "same"]
    if changed and statistics.median(_difference(*pairs[name]) for name in changed) > _MEDIAN:
        verdicts.update(dict.fromkeys(changed, "other"))
    return verdicts


def _difference(saved: Tensor, current: Tensor) -> float:
    if torch.equal(saved[1:].cpu(), current[1:].cpu()):  # as a rule, and quicker than to compute
        return 0.0
    a, b = (f[1:].cpu().contiguous().view(torch.float32).double() for f in (saved, current))
    scale = torch.maximum(a.norm(), b.norm())
    return float((a - b).norm() / scale) if scale != 0 else 0.0  # not a number is like nothing


@functools.lru_cache(maxsize=32)  # a model has few shapes and many layers
def _signs(rows: int, columns: int, salt: int) -> Tensor:
    """A fixed ``(rows, columns)`` matrix of +-1: a hash of the position, the same in every torch version."""
    x = torch.arange(rows * columns, dtype=torch.int64, device="cpu") * 16 + salt
    for _ in range(3):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return (1 - 2 * ((x >> 16) & 1)).to(torch.float64).view(rows, columns)
