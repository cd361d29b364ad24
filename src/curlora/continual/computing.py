"""Number of CPU threads, and precision of float32 matrix products."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from curlora.continual.errors import RunError

__all__ = ["computing", "fp32_products"]

_PRECISIONS = {"float32": "ieee", "bfloat16": "bf16"}


@contextlib.contextmanager
def computing(cpus: int | None, products: str) -> Iterator[None]:
    """Context manager that sets the number of threads and the precision of matrix products.

    Args:
        cpus: number of threads; unchanged if ``None``.
        products: how float32 matrix products are computed on a CPU: ``"float32"``, or ``"bfloat16"``, which rounds the
            factors and accumulates in float32. The latter is faster on processors with AMX or AVX512-BF16.

    Raises:
        RunError: if this version of PyTorch has no such setting.
    """
    before = torch.get_num_threads()
    matmul: Any = getattr(torch.backends.mkldnn, "matmul", None)
    if products != "float32" and not hasattr(matmul, "fp32_precision"):
        raise RunError(f"fp32_products: {products} needs PyTorch 2.9 or newer, but this is {torch.__version__}.")
    precision = getattr(matmul, "fp32_precision", None)
    try:
        if cpus is not None:
            torch.set_num_threads(cpus)
        if products != "float32":
            matmul.fp32_precision = _PRECISIONS[products]
        yield
    finally:
        torch.set_num_threads(before)
        if products != "float32":
            matmul.fp32_precision = precision


def fp32_products() -> str:
    """Return how float32 matrix products are computed on the CPU now."""
    precision = getattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision", "")
    return next((name for name, of_torch in _PRECISIONS.items() if of_torch == precision), "float32")
