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
