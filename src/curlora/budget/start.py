"""What a training under a budget begins from, which a resumed training reads again."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from curlora.guard.errors import GuardError
from curlora.guard.ledger import pack, unpack

__all__ = ["UNKNOWN", "Start"]

UNKNOWN = "unknown"


@dataclasses.dataclass
class Start:
    """The state that is fixed when training begins, and that a resumed training needs.

    Args:
        before: the trained parameters' values, in the order of the restraint.
        base: the texts' measurements of the base model.
        limits: the texts' limits, as relative rises since before the first training.
        restraint: the restraint's state.
        kept: the share of the change that was kept, if the training has come to its last step; else 1.
        stated: what the user has stated of each text: its limit, and the digest of its rows. A training that resumes
            must state the same.
        lifetime: the lifetime that the user has stated, if any; ``UNKNOWN`` in a state of an earlier version.
    """

    before: list[Tensor]
    base: dict[str, float]
    limits: dict[str, float]
    restraint: dict[str, Tensor]
    kept: float = 1.0
    stated: dict[str, Any] = dataclasses.field(default_factory=dict)
    lifetime: float | str | None = None

    def to_bytes(self) -> bytes:
        tensors = {f"restraint.{name}": value for name, value in self.restraint.items()}
        tensors |= {f"before.{number}": value for number, value in enumerate(self.before)}
        about = {"base": self.base, "limits": self.limits, "kept": self.kept, "stated": self.stated}
        about |= {"lifetime": self.lifetime}
        return pack(tensors, {**about, "parameters": len(self.before)})

    @classmethod
    def from_bytes(cls, content: bytes, where: str) -> Start:
        tensors, about = unpack(content, where)
        if "parameters" not in about:
            raise GuardError(f"{where} was written by an earlier version of curlora. Start this training anew.")
        before = [tensors.pop(f"before.{number}") for number in range(about["parameters"])]
        restraint = {name.removeprefix("restraint."): value for name, value in tensors.items()}
        return cls(
            before, about["base"], about["limits"], restraint, about.get("kept", 1.0), about.get("stated", {}),
            about.get("lifetime", UNKNOWN),
        )  # fmt: skip
