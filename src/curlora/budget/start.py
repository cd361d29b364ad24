"""What a training under a budget begins from, which a resumed training reads again."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import TrainerState, TrainingArguments

from curlora.errors import GuardError
from curlora.guard.ledger import pack, unpack
from curlora.storage import write_whole
from curlora.text.processes import of_first

__all__ = ["STATE_NAME", "UNKNOWN", "Start"]

UNKNOWN = "unknown"
STATE_NAME = "forgetting_budget.safetensors"  # in the Trainer's output folder and in its checkpoints


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

    def write(self, folder: Path, state: TrainerState) -> None:
        """Write the state into a folder, from the first process."""
        if state.is_world_process_zero:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / STATE_NAME, self.to_bytes())

    @classmethod
    def find(cls, args: TrainingArguments, state: TrainerState) -> Start:
        """Read the state of a training that resumes, from its checkpoint or its output folder.

        Raises:
            GuardError: if it is in neither.
        """
        folders = [Path(args.output_dir) / f"checkpoint-{state.global_step}", Path(args.output_dir)]
        if isinstance(args.resume_from_checkpoint, str):
            folders.insert(0, Path(args.resume_from_checkpoint))
        there = (folder / STATE_NAME for folder in folders if (folder / STATE_NAME).exists())
        path = next(there, None) if state.is_world_process_zero else None
        content: bytes | None = of_first(None if path is None else path.read_bytes())
        if content is None:
            raise GuardError(
                f"The training resumes at step {state.global_step}, and the state of its budget was not found: "
                f"{STATE_NAME} is in none of {', '.join(map(str, folders))}. Set output_dir to the folder that the "
                "training began with."
            )
        return cls.from_bytes(content, STATE_NAME)
