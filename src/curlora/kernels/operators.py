"""The kernels as PyTorch operators: ``curlora::forward``, ``curlora::backward`` and ``curlora::mixed_batch``.

They are defined when curlora is imported, so that exported and cached graphs find them. The first call imports Triton.
For ``torch.compile`` each operator is an opaque node: a graph with the kernels themselves could not be run or tested
without a GPU. The derivatives are in :mod:`curlora.functional`.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

__all__ = ["INTERPRETED", "empty_backward", "empty_forward", "empty_mixed_batch"]

# Whether Triton's interpreter runs the kernels on the CPU, in Python. Triton reads the variable when it is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_DEVICES = ("cuda", "cpu") if INTERPRETED else ("cuda",)

torch.library.define(
    "curlora::forward",
    "(Tensor output, Tensor scaled_U, Tensor factor, Tensor index, Tensor? offset, bool keep_z) -> (Tensor, Tensor)",
)
torch.library.define(
    "curlora::backward",
    "(Tensor grad, Tensor? z, Tensor scaled_U, Tensor factor, Tensor index, bool need_output) -> (Tensor, Tensor)",
)
torch.library.define(
    "curlora::mixed_batch",
    "(Tensor output, Tensor scaled_U, Tensor factor, Tensor index, Tensor? offset) -> Tensor",
)


@torch.library.impl("curlora::forward", _DEVICES)
def _forward(
    output: Tensor, scaled_U: Tensor, factor: Tensor, index: Tensor, offset: Tensor | None, keep_z: bool
) -> tuple[Tensor, Tensor]:
    from curlora.kernels import forward

    return forward.launch(output, scaled_U, factor, index, offset, keep_z)


@torch.library.impl("curlora::backward", _DEVICES)
def _backward(
    grad: Tensor, z: Tensor | None, scaled_U: Tensor, factor: Tensor, index: Tensor, need_output: bool
) -> tuple[Tensor, Tensor]:
    from curlora.kernels import backward

    return backward.launch(grad, z, scaled_U, factor, index, need_output)


@torch.library.impl("curlora::mixed_batch", _DEVICES)
def _mixed_batch(output: Tensor, scaled_U: Tensor, factor: Tensor, index: Tensor, offset: Tensor | None) -> Tensor:
    from curlora.kernels import mixed_batch

    return mixed_batch.launch(output, scaled_U, factor, index, offset)


@torch.library.register_fake("curlora::forward")
def empty_forward(
    output: Tensor, scaled_U: Tensor, factor: Tensor, index: Tensor, offset: Tensor | None, keep_z: bool
) -> tuple[Tensor, Tensor]:
    m, r = factor.shape
    return output.new_empty(output.shape), scaled_U.new_empty(output.numel() // m if keep_z else 0, r)


@torch.library.register_fake("curlora::backward")
def empty_backward(
    grad: Tensor, z: Tensor | None, scaled_U: Tensor, factor: Tensor, index: Tensor, need_output: bool
) -> tuple[Tensor, Tensor]:
    of_output = grad.new_empty(grad.shape if need_output else (0,))
    return of_output, scaled_U.new_empty(scaled_U.shape if z is not None else (0,))


@torch.library.register_fake("curlora::mixed_batch")
def empty_mixed_batch(output: Tensor, scaled_U: Tensor, factor: Tensor, index: Tensor, offset: Tensor | None) -> Tensor:
    return output.new_empty(output.shape)
