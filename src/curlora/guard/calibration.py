"""The calibration: second moments of each adapted layer over general text, which the guard uses, and their file."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from curlora.errors import GuardError
from curlora.tuner.fingerprint import compare
from curlora.tuner.layer import CurloraLayer
from curlora.tuner.model import adapted_layers
from curlora.tuner.weight import device_of, is_plain

__all__ = ["Calibration", "KroneckerFactors", "adapter_of", "layers_of"]

_VERSION = "1"
_PARTS = ("indices", "fingerprint", "start", "inputs", "output", "left", "right")


@dataclass(frozen=True)
class KroneckerFactors:
    """Second moments of one layer and one adapter over the tokens of a text.

    ``y0`` is the base layer's output without its bias, and ``z`` are the ``r`` entries of ``y0`` that the adapter
    reads. ``factor`` is the matrix that the adapter's update is multiplied by; in an ``nn.Linear`` it is ``C``. The
    layer's output without its bias is ``y0 + factor @ M @ z`` with ``M = alpha U``.

    For one row of text, answers are drawn from the model's own predictions. ``G`` is the gradient of their
    log-probability with respect to ``M``. ``left`` and ``right`` are ``E[G G^T]`` and ``E[G^T G]`` per predicted token:
    sums over rows, divided by the number of predicted tokens. The Fisher information of the layer is about
    ``left (x) right / trace(left)``. This is the square of Shampoo's preconditioner and, up to one step of power
    iteration, the nearest Kronecker product (https://arxiv.org/abs/2406.17748). K-FAC takes tokens one by one; this
    approximation includes that a change of ``M`` moves all tokens of a row together.

    Args:
        indices: the adapter's columns (first row) and rows (second row), int32, shape ``(2, r)``. For a parameter of
            ``E`` experts the shape is ``(E, 2, r)``, and each ``(r, r)`` below is ``(E, r, r)``.
        fingerprint: fingerprint of the base weight at these indices.
        start: ``U`` at calibration, from which forgetting is counted; shape ``(r, r)``.
        inputs: ``E[z z^T]``, float64, shape ``(r, r)``.
        output: ``E ||y0||^2``.
        left: ``E[G G^T]``, float64, shape ``(r, r)``; ``None`` if only the forward pass was run.
        right: ``E[G^T G]``, like ``left``.
    """

    indices: Tensor
    fingerprint: Tensor
    start: Tensor
    inputs: Tensor
    output: float
    left: Tensor | None = None
    right: Tensor | None = None

    def of_experts(self) -> list[KroneckerFactors]:
        """Return one ``KroneckerFactors`` for each expert; for a layer without experts, a list of itself."""
        if self.start.ndim == 2:
            return [self]
        parts = [getattr(self, name) for name in ("indices", "start", "inputs", "left", "right")]
        return [
            KroneckerFactors(indices, self.fingerprint, start, inputs, self.output, left, right)
            for indices, start, inputs, left, right in zip(
                *(itertools.repeat(None) if part is None else part for part in parts), strict=False
            )
        ]


@dataclass(frozen=True)
class Calibration:
    """The moments of every adapted layer over one text. The text itself is not stored.

    Args:
        layers: the moments by the layers' names in the base model.
        tokens: the number of tokens that the moments were taken over.
        rows: the number of rows of text that held these tokens. Each row is one sample of ``G``.
    """

    layers: Mapping[str, KroneckerFactors]
    tokens: int
    rows: int

    @property
    def base(self) -> str:
        """SHA-256 of the fingerprints of the base model's adapted weights (:mod:`curlora.tuner.fingerprint`)."""
        digest = hashlib.sha256()
        for name, moments in sorted(self.layers.items()):
            digest.update(name.encode() + moments.fingerprint.cpu().numpy().tobytes())
        return digest.hexdigest()

    def state_dict(self) -> dict[str, Tensor]:
        """Return all moments and counts as tensors by name."""
        state = {name: torch.tensor(getattr(self, name), device="cpu") for name in ("tokens", "rows")}
        for name, moments in self.layers.items():
            for part in _PARTS:
                value = getattr(moments, part)
                if value is not None:
                    state[f"{name}:{part}"] = _tensor(value)
        return state

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> Calibration:
        """Make a calibration from a :meth:`state_dict`.

        Raises:
            GuardError: if a part is missing or damaged.
        """
        parts: dict[str, dict[str, Any]] = {}
        for key, tensor in state.items():
            name, colon, part = key.rpartition(":")
            if colon:
                parts.setdefault(name, {})[part] = tensor
        try:
            layers = {
                name: KroneckerFactors(**{**of, "output": float(of["output"])}) for name, of in sorted(parts.items())
            }
            calibration = cls(layers, int(state["tokens"]), int(state["rows"]))
        except (KeyError, TypeError, ValueError) as error:
            raise GuardError(f"the calibration is incomplete ({error}): calibrate again.") from error
        for name, moments in layers.items():
            _check_whole(name, moments)
        return calibration

    def save(self, path: Path | str) -> None:
        """Write the calibration to a safetensors file."""
        save_file(self.state_dict(), path, {"curlora_calibration": _VERSION})

    @classmethod
    def load(cls, path: Path | str) -> Calibration:
        """Read a file that :meth:`save` wrote.

        Raises:
            GuardError: if the file is not a calibration, or is damaged.
        """
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a mapping
        except (OSError, SafetensorError) as error:
            raise GuardError(f"{path} cannot be read as a calibration: {error}") from error
        if about.get("curlora_calibration") != _VERSION:
            raise GuardError(
                f"{path} is not a calibration, or was written by another version of curlora: expected version "
                f"{_VERSION!r}, found {about.get('curlora_calibration')!r}. Calibrate again."
            )
        try:
            return cls.from_state_dict(tensors)
        except GuardError as error:
            raise GuardError(f"{path}: {error}") from error

    def check(self, model: nn.Module, adapter: str | None = None) -> dict[str, CurloraLayer]:
        """Check that the calibration belongs to ``model`` and its adapter, and return the adapted layers by name.

        Args:
            model: a model with a CURLoRA adapter.
            adapter: the adapter's name; the active one if ``None``.

        Raises:
            GuardError: if the calibration was made on another base model, other layers, or other columns and rows; if
                the base model has been trained since; or if adapters are merged.
        """
        adapter = adapter_of(model, adapter)
        layers = layers_of(model, adapter)
        apart = sorted(set(layers) ^ set(self.layers))
        if apart:
            raise GuardError(
                f"The calibration covers other layers than adapter {adapter!r}: {len(apart)} layers are in only one of "
                f"the two, such as {apart[0]!r}. Calibrate this model."
            )
        for name, layer in layers.items():
            moments = self.layers[name]
            if layer.merged:
                raise GuardError(f"Layer {name!r} has merged adapters. Unmerge them first.")
            if not torch.equal(layer.basis(adapter).indices.cpu(), moments.indices):
                raise GuardError(
                    f"The calibration was made for other columns and rows than adapter {adapter!r} has in layer "
                    f"{name!r}: the seed, the rank or the draw differs. Calibrate this model."
                )
            now = _fingerprint(layer, adapter)
            if compare(layer.basis(adapter).fingerprint, now) == "other":
                raise GuardError(
                    f"The base model has been trained since adapter {adapter!r} was added to it: the weight of layer "
                    f"{name!r} is not the one that its columns and rows are from. Add a new adapter to the trained "
                    "model, and calibrate that."
                )
            if compare(moments.fingerprint, now) == "other":
                raise GuardError(
                    f"The calibration was made on another base model: the weight of layer {name!r} differs. Calibrate "
                    "this model."
                )
        return layers


def _fingerprint(layer: CurloraLayer, adapter: str) -> Tensor:
    """Return the fingerprint of the weight as it is now; where reading that takes long, as it was read last.

    It takes long, or was not tried, where weights are quantized, sharded, offloaded or those of experts.
    """
    known, base = layer.basis(adapter), layer.get_base_layer()
    if not is_plain(base) or isinstance(base.weight, DTensor) or device_of(base).type == "meta":
        return known.fingerprint
    return layer.read_basis(known.indices).fingerprint


def adapter_of(model: nn.Module, adapter: str | None) -> str:
    """Return the adapter's name: the given one, or the active one.

    Raises:
        GuardError: if the model has no such active CURLoRA adapter, or none is named and not exactly one is active.
    """
    present = [module for module in model.modules() if isinstance(module, CurloraLayer)]
    if not present:
        raise GuardError("The model has no CURLoRA adapter. Add one first: get_peft_model(model, CurloraConfig(...)).")
    active: set[str] = set()
    for layer in present:
        names: Any = layer.active_adapters
        active.update(name for name in names if name in layer.curlora_U)
    if adapter is None:
        if len(active) != 1:
            raise GuardError(
                f"Of the CURLoRA adapters {sorted(active)} are active, and the guard needs exactly one: name it with "
                "adapter=..."
            )
        return active.pop()
    if adapter not in active:
        raise GuardError(
            f"{adapter!r} is not an active CURLoRA adapter of this model; {sorted(active)} are active. Name one of "
            "these, or activate it with set_adapter."
        )
    return adapter


def layers_of(model: nn.Module, adapter: str) -> dict[str, CurloraLayer]:
    """Return an adapter's layers by their names in the base model.

    Raises:
        GuardError: if ``U`` of a layer has no values, such as one that Accelerate has offloaded, or no effect.
    """
    layers = {layer.name: layer for layer in adapted_layers(model, adapter).values()}
    for name, layer in layers.items():
        if not layer.scaling[adapter]:
            raise GuardError(
                f"Layer {name!r} has a scaling of 0, so U of adapter {adapter!r} has no effect there: there is nothing "
                "to measure or to train. Set its alpha (alpha_pattern, set_scale), or leave the layer out."
            )
        if layer.matrices[adapter].weight.is_meta:
            raise GuardError(
                f"U of layer {name!r} is on the meta device: Accelerate has offloaded the adapter {adapter!r}, or it "
                "was never loaded. Add or load the adapter after the base model was offloaded, so that it stays in "
                "memory."
            )
    return layers


def _tensor(value: Tensor | float) -> Tensor:
    if isinstance(value, Tensor):
        return value.contiguous()
    return torch.tensor(value, dtype=torch.float64, device="cpu")


def _check_whole(name: str, moments: KroneckerFactors) -> None:
    r = moments.indices.shape[-1]
    shape = (*moments.indices.shape[:-2], r, r)
    for part in ("start", "inputs", "left", "right"):
        moment = getattr(moments, part)
        if moment is None:
            continue
        if moment.shape != shape or not torch.isfinite(moment).all():
            raise GuardError(
                f"layer {name!r}: {part} is damaged: expected finite values of shape {shape}, found shape "
                f"{tuple(moment.shape)}. Calibrate again."
            )
