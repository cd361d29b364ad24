"""What an adapter on disk says about its columns and rows, for whoever attaches it."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from curlora.tuner.fingerprint import LENGTH

_PREFIX = "base_model.model."  # of every name that PEFT saves


@dataclass(frozen=True)
class SavedDraws:
    """The draws of a saved adapter.

    To draw again what is about to be loaded would read every weight in full, twice.

    Args:
        path: the adapter's safetensors file.
        drawn_by: the settings that the adapter was drawn by.
    """

    path: str
    drawn_by: tuple[object, ...]

    def of(self, layer: str) -> tuple[Tensor, Tensor] | None:
        """Indices, shape ``(2, r)``, and fingerprint of a layer; ``None`` if the file does not have them."""
        return self._all.get(layer)

    @functools.cached_property
    def _all(self) -> dict[str, tuple[Tensor, Tensor]]:
        draws = {}
        with contextlib.suppress(OSError, SafetensorError), safe_open(self.path, framework="pt") as file:  # gone since
            keys = set(file.keys())
            for key in keys:
                layer, found, _ = key.partition(".curlora_indices")
                if found and (other := f"{layer}.curlora_fingerprint") in keys:
                    indices, fingerprint = file.get_tensor(key), file.get_tensor(other)
                    if fingerprint.shape == (LENGTH,) and fingerprint.dtype == torch.int32:
                        draws[layer.removeprefix(_PREFIX)] = indices, fingerprint
        return draws


def problem_of_indices(indices: Tensor, r: int, weight_shape: tuple[int, int]) -> str | None:
    """What is wrong with columns above rows that a file has for a weight, as it is stored; ``None`` if nothing."""
    if indices.shape != (2, r) or indices.dtype != torch.int32:
        return f"the indices are {indices.dtype} of shape {tuple(indices.shape)} instead of int32 of shape (2, {r})"
    height, width = weight_shape
    for axis, index, size in (("column", indices[0], width), ("row", indices[1], height)):
        if index.min() < 0 or index.max() >= size:
            return f"{axis} index {int(index.min() if index.min() < 0 else index.max())} is outside 0..{size - 1}"
    return None
