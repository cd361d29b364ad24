"""The ledger: an adapter's trainings, their limits and what was forgotten, saved in the adapter's folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from curlora.errors import GuardError
from curlora.guard.anchors import Anchors
from curlora.guard.calibration import Calibration
from curlora.tuner.config import LEDGER_NAME, CurloraConfig
from curlora.tuner.format import saved_indices, saved_U
from curlora.tuner.layer import CurloraLayer
from curlora.tuner.sharded import whole

__all__ = ["OTHER_LEDGER", "Ledger", "TextOutcome", "TrainingRecord", "belongs_to", "digest_of", "pack", "unpack"]

OTHER_LEDGER = (
    f"The adapter does not match its ledger ({LEDGER_NAME}): its last training with a budget did not come to its end, "
    "it has been trained since without a budget, or the ledger belongs to another adapter. Resume that training, or "
    "begin again with a new adapter or the one that the last finished training saved, or delete the ledger: "
    "forgetting still counts from the base model then, but earlier tasks are no longer held."
)
"""What is said of a ledger that was written for another adapter."""

_VERSION = 2
_READ = (1, 2)


@dataclass(frozen=True)
class TextOutcome:
    """The rise of a text's perplexity since before the adapter's first training, or that of a user's own measurement.

    Args:
        before: the perplexity of the base model, or the value of the user's measurement.
        after: the same after training.
        rise: ``after / before - 1``.
        limit: the largest allowed rise.
        tokens: the number of tokens of the text; 0 for a user's measurement.
        sha256: the SHA-256 of its tokens; ``None`` for a user's measurement.
    """

    before: float
    after: float
    rise: float
    limit: float
    tokens: int = 0
    sha256: str | None = None


@dataclass(frozen=True)
class TrainingRecord:
    """The record of one training under a budget.

    Args:
        steps: the number of optimizer steps.
        learning_rate: the adapter's learning rate, in square roots of nats.
        allowed: the limit of the predicted forgetting, in nats per token over all trainings so far.
        predicted: the predicted forgetting at the end, in nats per token over all trainings so far.
        kept: the share of the training's change that remained after scaling back, 0 to 1.
        texts: the measured texts by name.
    """

    steps: int
    learning_rate: float
    allowed: float
    predicted: float
    kept: float
    texts: dict[str, TextOutcome]

    @property
    def worst(self) -> float:
        """The largest rise among the texts."""
        return float(numpy.max([text.rise for text in self.texts.values()]))  # NaN if any is


@dataclass(frozen=True)
class Ledger:
    """The history of an adapter and the state that its next training needs.

    Args:
        calibration: the calibration from before the first training.
        anchors: the anchors of the learned tasks, by the names of the adapted layers.
        trainings: the trainings so far, in order.
        lifetime: the largest allowed relative rise of any text over all trainings; ``None`` for no limit.
        adapter: the digest of the adapter after the last training, see :func:`digest_of`.
    """

    calibration: Calibration
    anchors: Anchors
    trainings: tuple[TrainingRecord, ...] = ()
    lifetime: float | None = None
    adapter: str = ""

    @property
    def left(self) -> float | None:
        """The rest of the lifetime's budget, as a relative rise; ``None`` if there is no such budget."""
        if self.lifetime is None:
            return None
        return self.lifetime - float(numpy.max([0.0, *(text.rise for text in self.last_measured.values())]))

    @property
    def last_measured(self) -> dict[str, TextOutcome]:
        """The last outcome of each text that any of the trainings has measured, by name."""
        return {name: text for training in self.trainings for name, text in training.texts.items()}

    def after(self, training: TrainingRecord, adapter: str) -> Ledger:
        """Return this ledger with one more training.

        Args:
            training: the record of the training.
            adapter: the digest of the adapter after it.
        """
        return replace(self, trainings=(*self.trainings, training), adapter=adapter)

    def to_bytes(self) -> bytes:
        """Return the content of a safetensors file."""
        tensors = {f"calibration.{name}": value for name, value in self.calibration.state_dict().items()}
        tensors |= {f"anchors.{name}": value for name, value in self.anchors.state_dict().items()}
        about = {
            "version": _VERSION,
            "lifetime": self.lifetime,
            "adapter": self.adapter,
            "trainings": [asdict(training) for training in self.trainings],
        }
        return pack(tensors, about)

    @classmethod
    def from_bytes(cls, content: bytes, where: str = "The ledger") -> Ledger:
        """Read the result of :meth:`to_bytes`.

        Args:
            content: the content of the file.
            where: the name of the file for error messages, as the subject of a sentence.

        Raises:
            GuardError: if the content is damaged, or of an unknown version.
        """
        tensors, about = unpack(content, where)
        if about.get("version") not in _READ:
            raise GuardError(
                f"{where} has version {about.get('version')!r}, and this curlora reads versions "
                f"{' and '.join(map(str, _READ))}: update curlora."
            )
        anchors = Anchors()
        anchors.load_state_dict(_under("anchors.", tensors))
        return cls(
            Calibration.from_state_dict(_under("calibration.", tensors)),
            anchors,
            tuple(_training(one) for one in about["trainings"]),
            about["lifetime"],
            about["adapter"],
        )

    @classmethod
    def of(cls, config: CurloraConfig) -> Ledger | None:
        """Return the ledger that an adapter carries, or ``None``.

        Raises:
            GuardError: if the ledger is damaged or of an unknown version.
        """
        content = config.beside.get(LEDGER_NAME)
        return None if content is None else cls.from_bytes(content)

    @classmethod
    def load(cls, folder: Path | str) -> Ledger | None:
        """Read the ledger in an adapter's folder; return ``None`` if there is none.

        Raises:
            GuardError: if the ledger is damaged or of an unknown version.
        """
        path = Path(folder) / LEDGER_NAME
        return cls.from_bytes(path.read_bytes(), f"The ledger {path}") if path.exists() else None

    def put_beside(self, config: CurloraConfig) -> None:
        """Attach the ledger to the adapter's configuration, so that it is saved with the adapter."""
        config.beside[LEDGER_NAME] = self.to_bytes()


def belongs_to(ledger: Ledger, weights: Path) -> bool:
    """Return whether a ledger was written for the adapter in a weights file, as far as can be told without the model.

    Args:
        ledger: the ledger.
        weights: the adapter's weights file.
    """
    U, drawn = saved_U(weights), saved_indices(weights)
    if U.keys() != ledger.calibration.layers.keys() or U.keys() != drawn.keys():
        # Files name the modules of experts, and the calibration their parameters.
        modules = [name.removesuffix(".base_layer") for name in U]
        return any(layer.startswith(module) for module in modules for layer in ledger.calibration.layers)
    return ledger.adapter == _digest_of({name: (U[name], drawn[name][0]) for name in U})


def digest_of(layers: Mapping[str, CurloraLayer], adapter: str) -> str:
    """Return the SHA-256 of an adapter: ``U`` as float32, columns and rows, in the order of the layers' names."""
    matrices = {name: layer.matrices[adapter].weight for name, layer in layers.items()}
    return _digest_of({name: (whole(U.detach()), layers[name].basis(adapter).indices) for name, U in matrices.items()})


def _digest_of(tensors: Mapping[str, tuple[Tensor, Tensor]]) -> str:
    found = hashlib.sha256()
    for name, (U, indices) in sorted(tensors.items()):
        for tensor in (U.float(), indices):
            found.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def pack(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> bytes:
    """Return the content of a safetensors file of tensors and JSON values, with a digest over both."""
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    text = json.dumps(about, sort_keys=True)
    return save(tensors, {"about": text, "digest": _digest(tensors, text)})


def unpack(content: bytes, where: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and values that :func:`pack` was given.

    Args:
        content: the content of the file.
        where: the name of the file for error messages, as the subject of a sentence.

    Raises:
        GuardError: if the content is damaged.
    """
    try:
        tensors = load(content)
        length = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + length])["__metadata__"]
        about = json.loads(metadata["about"])
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise GuardError(f"{where} is damaged ({error}): copy it again.") from error
    if metadata.get("digest") != _digest(tensors, metadata["about"]):
        raise GuardError(f"{where} is damaged (its digest differs): copy it again.")
    return tensors, about


def _digest(tensors: Mapping[str, Tensor], about: str) -> str:
    found = hashlib.sha256(about.encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _training(values: Mapping[str, Any]) -> TrainingRecord:
    texts = {}
    for name, text in values["texts"].items():
        if "allowed" in text:  # the name of limit in version 1
            text = {**text, "limit": text["allowed"]}
            del text["allowed"]
        texts[name] = TextOutcome(**text)
    return TrainingRecord(**{**values, "texts": texts})
