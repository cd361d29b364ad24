"""What general text uses of each adapted layer: the numbers the guard goes by, and their file."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from curlora.guard.errors import GuardError
from curlora.tuner.fingerprint import compare
from curlora.tuner.layer import CurloraLayer
from curlora.tuner.model import adapted_layers

__all__ = ["Calibration", "Moments", "adapter_of", "layers_of"]

_VERSION = "1"
_PARTS = ("indices", "fingerprint", "start", "inputs", "output", "left", "right")


@dataclass(frozen=True)
class Moments:
    """What a text uses of one adapter in one layer: second moments over its tokens.

    With ``y0`` the base layer's output, bias taken off, ``z`` its ``r`` gathered entries and ``factor`` (``C`` in an
    ``nn.Linear``) what the adapter adds along, the layer's output is ``y0 + factor @ M @ z``, ``M = alpha U``.

    ``left`` and ``right`` are of ``G``, the gradient with respect to ``M`` of the log-probability of answers to one row
    of text, drawn from the model's own predictions: ``E[G G^T]`` and ``E[G^T G]`` for each token. The Fisher
    information of the layer is then about ``left (x) right / trace(left)``: the square of Shampoo's preconditioner, and
    to one step of a power iteration the nearest Kronecker product (https://arxiv.org/abs/2406.17748). Unlike K-FAC's,
    which takes tokens one by one, it sees that a change moves all tokens of a text together.

    Args:
        indices: the adapter's columns above its rows, int32, shape ``(2, r)``. Of a parameter of ``E`` experts this is
            ``(E, 2, r)``, and all that is ``(r, r)`` is ``(E, r, r)``.
        fingerprint: of the base weight at these indices.
        start: ``U`` as it was, from which forgetting counts; shape ``(r, r)``.
        inputs: ``E[z z^T]``, float64, shape ``(r, r)``, as all of the following.
        output: ``E ||y0||^2``.
        left: ``E[G G^T]``; ``None`` where only the forward pass was run.
        right: ``E[G^T G]``, likewise.
    """

    indices: Tensor
    fingerprint: Tensor
    start: Tensor
    inputs: Tensor
    output: float
    left: Tensor | None = None
    right: Tensor | None = None

    def of_experts(self) -> list[Moments]:
        """Of a parameter of experts those of each; of a layer its own alone."""
        if self.start.ndim == 2:
            return [self]
        parts = [getattr(self, name) for name in ("indices", "start", "inputs", "left", "right")]
        return [
            Moments(indices, self.fingerprint, start, inputs, self.output, left, right)
            for indices, start, inputs, left, right in zip(
                *(itertools.repeat(None) if part is None else part for part in parts), strict=False
            )
        ]


@dataclass(frozen=True)
class Calibration:
    """The moments of every layer that an adapter is in, over one text. Nothing of the text is kept.

    Args:
        layers: by the layers' names in the base model.
        tokens: how many they were taken over.
        rows: how many pieces of text these were in. What a change does to one of them is one sample.
    """

    layers: Mapping[str, Moments]
    tokens: int
    rows: int

    def state_dict(self) -> dict[str, Tensor]:
        """All of it as tensors."""
        state = {name: torch.tensor(getattr(self, name), device="cpu") for name in ("tokens", "rows")}
        for name, moments in self.layers.items():
            for part in _PARTS:
                value = getattr(moments, part)
                if value is not None:
                    state[f"{name}:{part}"] = _tensor(value)
        return state

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> Calibration:
        """What :meth:`state_dict` gave.

        Raises:
            GuardError: if it is not whole.
        """
        parts: dict[str, dict[str, Any]] = {}
        for key, tensor in state.items():
            name, colon, part = key.rpartition(":")
            if colon:
                parts.setdefault(name, {})[part] = tensor
        try:
            layers = {name: Moments(**{**of, "output": float(of["output"])}) for name, of in sorted(parts.items())}
            calibration = cls(layers, int(state["tokens"]), int(state["rows"]))
        except (KeyError, TypeError, ValueError) as error:
            raise GuardError(f"the calibration is incomplete: {error}") from error
        for name, moments in layers.items():
            _check_whole(name, moments)
        return calibration

    def save(self, path: Path | str) -> None:
        """Write a safetensors file."""
        save_file(self.state_dict(), path, {"curlora_calibration": _VERSION})

    @classmethod
    def load(cls, path: Path | str) -> Calibration:
        """Read what :meth:`save` wrote.

        Raises:
            GuardError: if the file is none, or damaged.
        """
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a mapping
        except (OSError, SafetensorError) as error:
            raise GuardError(f"{path} cannot be read as a calibration: {error}") from error
        if about.get("curlora_calibration") != _VERSION:
            raise GuardError(f"{path} is not a calibration, or one of another version of curlora")
        try:
            return cls.from_state_dict(tensors)
        except GuardError as error:
            raise GuardError(f"{path}: {error}") from error

    def check(self, model: nn.Module, adapter: str | None = None) -> dict[str, CurloraLayer]:
        """The adapted layers of ``model``, if it is they that were calibrated.

        Args:
            model: with a CURLoRA adapter.
            adapter: its name; the active one if ``None``.

        Raises:
            GuardError: if it is another model, or another adapter with other columns and rows.
        """
        adapter = adapter_of(model, adapter)
        layers = layers_of(model, adapter)
        apart = sorted(set(layers) ^ set(self.layers))
        if apart:
            raise GuardError(
                f"The calibration is of other layers than adapter {adapter!r} is in: {apart[0]!r} is in one of them "
                f"alone ({len(apart)} such). Calibrate this model."
            )
        for name, layer in layers.items():
            moments = self.layers[name]
            if not torch.equal(layer.basis(adapter).indices.cpu(), moments.indices):
                raise GuardError(
                    f"The calibration is of other columns and rows than adapter {adapter!r} has in layer {name!r}: it "
                    "was made with another seed or rank, or by another draw. Calibrate this model."
                )
            if compare(moments.fingerprint, layer.basis(adapter).fingerprint) == "other":
                raise GuardError(
                    f"The calibration was made on another base model: the weight of layer {name!r} differs. Calibrate "
                    "this one."
                )
        return layers


def adapter_of(model: nn.Module, adapter: str | None) -> str:
    """The adapter's name: as given, or the one that is active.

    Raises:
        GuardError: if there is no such CURLoRA adapter, or several are active and none is named.
    """
    present = [module for module in model.modules() if isinstance(module, CurloraLayer)]
    if not present:
        raise GuardError(
            "The model has no CURLoRA adapter. Put one on it first: get_peft_model(model, CurloraConfig(...))."
        )
    active: set[str] = set()
    for layer in present:
        names: Any = layer.active_adapters
        active.update(name for name in names if name in layer.curlora_U)
    if adapter is None:
        if len(active) != 1:
            raise GuardError(
                f"Of the CURLoRA adapters {sorted(active)} are active: say which one is meant, by adapter=..."
            )
        return active.pop()
    if adapter not in active:
        raise GuardError(f"{adapter!r} is not an active CURLoRA adapter of this model: {sorted(active)}")
    return adapter


def layers_of(model: nn.Module, adapter: str) -> dict[str, CurloraLayer]:
    """The layers that an adapter is in, by their names in the base model."""
    return {layer.name: layer for layer in adapted_layers(model, adapter).values()}


def _tensor(value: Tensor | float) -> Tensor:
    if isinstance(value, Tensor):
        return value.contiguous()
    return torch.tensor(value, dtype=torch.float64, device="cpu")


def _check_whole(name: str, moments: Moments) -> None:
    r = moments.indices.shape[-1]
    shape = (*moments.indices.shape[:-2], r, r)
    for part in ("start", "inputs", "left", "right"):
        moment = getattr(moments, part)
        if moment is None:
            continue
        if moment.shape != shape or not torch.isfinite(moment).all():
            raise GuardError(f"layer {name!r}: {part} is damaged: {r} x {r} finite numbers are expected")
