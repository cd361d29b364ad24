"""What an adapter's trainings were allowed to forget and what they did, kept in the adapter's folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from curlora.guard.anchors import Anchors
from curlora.guard.calibration import Calibration
from curlora.guard.errors import GuardError
from curlora.tuner.config import LEDGER_NAME, CurloraConfig
from curlora.tuner.layer import CurloraLayer
from curlora.tuner.sharded import whole

__all__ = ["Ledger", "TextOutcome", "TrainingRecord", "digest_of", "pack", "unpack"]

_VERSION = 2
_READ = (1, 2)


@dataclass(frozen=True)
class TextOutcome:
    """What a text has lost since before the adapter's first training.

    Args:
        before: perplexity of the base model; of a measurement of the user's own, what it gave.
        after: the same after training.
        rise: ``after / before - 1``.
        limit: the most that the rise was allowed to be.
        tokens: of the text; 0 of a measurement of the user's own.
        sha256: of its tokens; ``None`` of a measurement of the user's own.
    """

    before: float
    after: float
    rise: float
    limit: float
    tokens: int = 0
    sha256: str | None = None


@dataclass(frozen=True)
class TrainingRecord:
    """One training under a budget.

    Args:
        steps: of the optimizer.
        learning_rate: in square roots of nats.
        allowed: nats per token, over all trainings so far, that training was kept within.
        predicted: nats per token, over all trainings so far, at its end.
        kept: the share of its change that the measurement at the end let stand.
        texts: by name.
    """

    steps: int
    learning_rate: float
    allowed: float
    predicted: float
    kept: float
    texts: dict[str, TextOutcome]

    @property
    def worst(self) -> float:
        """The largest rise of a text."""
        return max(text.rise for text in self.texts.values())


@dataclass(frozen=True)
class Ledger:
    """The history of an adapter, with what its next training needs.

    Args:
        calibration: of the base model as it was before the first training.
        anchors: of the tasks that were learned; names are those of the adapted layers.
        trainings: in order.
        lifetime: the most that any text may lose over all trainings, as a relative rise; ``None`` if that is open.
        adapter: digest of the adapter as the last training left it, see :func:`digest_of`.
    """

    calibration: Calibration
    anchors: Anchors
    trainings: tuple[TrainingRecord, ...] = ()
    lifetime: float | None = None
    adapter: str = ""

    @property
    def left(self) -> float | None:
        """What is left of the lifetime's budget, as a relative rise."""
        if self.lifetime is None:
            return None
        return self.lifetime - max(0.0, self.trainings[-1].worst) if self.trainings else self.lifetime

    def after(self, training: TrainingRecord, adapter: str) -> Ledger:
        """With one more training."""
        return replace(self, trainings=(*self.trainings, training), adapter=adapter)

    def to_bytes(self) -> bytes:
        """A safetensors file."""
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
        """What :meth:`to_bytes` gave.

        Raises:
            GuardError: if it is damaged, or of a later version.
        """
        tensors, about = unpack(content, where)
        if about.get("version") not in _READ:
            raise GuardError(
                f"{where} has version {about.get('version')!r}, and this curlora reads "
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
        """The ledger of an adapter, if it has one.

        Raises:
            GuardError: if it is damaged.
        """
        content = config.beside.get(LEDGER_NAME)
        return None if content is None else cls.from_bytes(content)

    @classmethod
    def load(cls, folder: Path | str) -> Ledger | None:
        """The ledger in an adapter's folder; ``None`` where there is none.

        Raises:
            GuardError: if it is damaged.
        """
        path = Path(folder) / LEDGER_NAME
        return cls.from_bytes(path.read_bytes(), f"The ledger {path}") if path.exists() else None

    def put_beside(self, config: CurloraConfig) -> None:
        """Let the adapter carry it: from now on it is saved with it."""
        config.beside[LEDGER_NAME] = self.to_bytes()


def digest_of(layers: Mapping[str, CurloraLayer], adapter: str) -> str:
    """SHA-256 of an adapter's ``U``, columns and rows, as float32, by the names of its layers."""
    found = hashlib.sha256()
    for name, layer in sorted(layers.items()):
        matrix = layer.matrices[adapter]
        for tensor in (whole(matrix.weight.detach()).float(), layer.basis(adapter).indices):
            found.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def pack(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> bytes:
    """Tensors and what JSON can say, in one safetensors file with a digest over all of it."""
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    text = json.dumps(about, sort_keys=True)
    return save(tensors, {"about": text, "digest": _digest(tensors, text)})


def unpack(content: bytes, where: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What :func:`pack` was given.

    Raises:
        GuardError: if it is damaged.
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
        if "allowed" in text:  # as version 1 calls it
            text = {**text, "limit": text["allowed"]}
            del text["allowed"]
        texts[name] = TextOutcome(**text)
    return TrainingRecord(**{**values, "texts": texts})
