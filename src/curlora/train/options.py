"""What a user states about a training, with every default."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from curlora.train.errors import TrainError

__all__ = [
    "TrainOptions",
    "parse_columns",
    "parse_limits",
    "parse_share",
    "parse_targets",
    "parse_texts",
    "read_prompts",
]


@dataclass(frozen=True)
class TrainOptions:
    """Options of ``curlora train``.

    Args:
        data: a ``.jsonl``, ``.json``, ``.csv``, ``.tsv`` or ``.parquet`` file, or the id of a data set on the hub.
        out: the folder to write.
        model: the base model's folder or hub id; what ``continue_from`` names if ``None``.
        max_forgetting: by how much the perplexity of the guard's texts may rise, relatively: 0.01 for 1 %.
        continue_from: a saved CURLoRA adapter to go on from; a new adapter is trained if ``None``.
        guard_texts: files by name, none of which may be forgotten; the model's own writing if there are none.
        limits: of some of these texts, in the place of ``max_forgetting``.
        lifetime: what all trainings of this adapter together may cost, as ``max_forgetting``.
        split, subset: of a data set on the hub.
        columns: of prompts and of completions, where they are called otherwise.
        turns: which of the assistant's messages are trained, ``"all"`` or the ``"last"`` of each conversation.
        evaluation: a file of examples that are scored and not trained on; a share of ``data`` if ``None``.
        quantize: ``"4bit"`` or ``"8bit"``, by bitsandbytes.
        export: ``"lora"`` or ``"merged"``, written beside the adapter.
        epochs, batch_size, gradient_accumulation: of training; a step takes the product of the last two.
        max_length: tokens of an example; what is behind them is cut off.
        rank, target_modules: of a new adapter, see :class:`curlora.CurloraConfig`.
        learning_rate: set by the budget if ``None``.
        seed: of the held-out share, of the order of examples, and of the adapter's columns and rows.
        prompts: to show replies to; those of the first held-out examples if there are none.
        report_to: trackers of transformers' Trainer, such as ``tensorboard``.
        bf16: compute in bfloat16; where a GPU has it if ``None``.
        gradient_checkpointing: as of transformers' Trainer; on an accelerator if ``None``.

    Raises:
        TrainError: on an option that cannot be.
    """

    data: str
    out: Path
    model: str | None = None
    max_forgetting: float = 0.01
    continue_from: str | None = None
    guard_texts: Mapping[str, Path] = field(default_factory=dict)
    limits: Mapping[str, float] = field(default_factory=dict)
    lifetime: float | None = None
    split: str = "train"
    subset: str | None = None
    columns: tuple[str, str] | None = None
    turns: str = "all"
    evaluation: str | None = None
    quantize: str | None = None
    export: str | None = None
    epochs: int = 3
    batch_size: int = 8
    gradient_accumulation: int = 1
    max_length: int = 1024
    rank: int | None = None
    target_modules: str | Sequence[str] | None = None
    learning_rate: float | None = None
    seed: int = 0
    prompts: Sequence[str] = ()
    report_to: Sequence[str] = ()
    bf16: bool | None = None
    gradient_checkpointing: bool | None = None

    RANK = 32
    TARGET_MODULES = "all-linear"
    # Held out where no file is given: a share of the data, within these numbers of examples.
    HELD_OUT_SHARE = 0.05
    HELD_OUT_LEAST = 20
    HELD_OUT_MOST = 200
    # Of each of the guard's texts, in rows of so many, so many together.
    GUARD_TOKENS = 8192
    GUARD_ROW = 128
    GUARD_BATCH = 8
    REPLIES = 3
    REPLY_TOKENS = 96

    def __post_init__(self) -> None:
        if self.model is None and self.continue_from is None:
            raise TrainError("Which model is trained? Give --model, a folder or a hub id.")
        if self.continue_from is not None and (self.rank is not None or self.target_modules is not None):
            raise TrainError(
                "--rank and --target-modules are of a new adapter, and --continue-from takes those that the adapter "
                "has: leave them out."
            )
        for name in ("epochs", "batch_size", "gradient_accumulation", "max_length"):
            if getattr(self, name) < 1:
                raise TrainError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}.")
        if self.max_length < 2:
            raise TrainError("--max-length must be at least 2: a prompt and an answer.")
        if self.learning_rate is not None and not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise TrainError(f"--learning-rate must be a positive number, got {self.learning_rate}.")
        if unknown := sorted(set(self.limits) - set(self.guard_texts)):
            known = f"known are {', '.join(sorted(self.guard_texts))}" if self.guard_texts else "none is given"
            raise TrainError(
                f"--limit {unknown[0]}=...: no text has this name, {known}. Name the text: --guard-text "
                f"{unknown[0]}=PATH."
            )
        stated = {f"--limit {name}": limit for name, limit in self.limits.items()}
        if not self.guard_texts or set(self.guard_texts) - set(self.limits):
            stated["--max-forgetting"] = self.max_forgetting
        option, most = max(stated.items(), key=lambda pair: pair[1])
        if self.lifetime is not None and self.lifetime < most:
            raise TrainError(
                f"--lifetime {self.lifetime:.3g} is less than {option} {most:.3g}, which is of this training alone: "
                "raise the one or lower the other."
            )

    def identity(self) -> dict[str, Any]:
        """What decides which adapter comes out, but for what the files hold, as JSON has it."""
        return {
            "model": self.model,
            "max_forgetting": self.max_forgetting,
            "limits": dict(self.limits) or None,
            "lifetime": self.lifetime,
            "continue_from": self.continue_from,
            "quantize": self.quantize,
            "turns": self.turns,
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "gradient_accumulation": self.gradient_accumulation,
            "max_length": self.max_length,
            "rank": self.rank,
            "target_modules": _listed(self.target_modules),
            "learning_rate": self.learning_rate,
            "seed": self.seed,
            "bf16": self.bf16,
            "gradient_checkpointing": self.gradient_checkpointing,
            "prompts": list(self.prompts),
        }


def parse_share(given: str, option: str = "--max-forgetting") -> float:
    """A budget as people write it: ``1%``, ``1 %`` or ``0.01``.

    >>> parse_share("1.5%"), parse_share("0.015")
    (0.015, 0.015)

    Raises:
        TrainError: on what is no number, not positive, or 1 and more, of which nobody can tell what is meant.
    """
    found = re.fullmatch(r"\s*([+-]?[0-9.,eE+-]+)\s*(%?)\s*", given)
    try:
        value = float(found.group(1)) / (100 if found.group(2) else 1) if found else math.nan
    except ValueError:
        value = math.nan
    if math.isnan(value):
        raise TrainError(f"{option} {given!r} is no budget: write 1% or 0.01.")
    if not value > 0:
        raise TrainError(f"{option} {given!r} leaves nothing to learn with: give a positive budget, such as 1%.")
    if value >= 1:
        meant = "" if "%" in given else f" For {given.strip()} % write {given.strip()}%."
        raise TrainError(
            f"{option} {given!r} is 100 % or more of the perplexity.{meant} Give less than 100%, such as 1%."
        )
    return value


def parse_texts(given: Sequence[str]) -> dict[str, Path]:
    """Files by name, of ``NAME=PATH`` or ``PATH``, each checked to hold text.

    Raises:
        TrainError: if a file is missing, is empty or is no text, or two have one name.
    """
    texts: dict[str, Path] = {}
    for one in given:
        name, equals, rest = one.partition("=")
        path = Path(rest if equals else one)
        name = name if equals else path.stem
        if not name:
            raise TrainError(f"--guard-text {one!r} has no name before the equals sign: write NAME=PATH or PATH.")
        if name in texts:
            raise TrainError(f"--guard-text: two texts are called {name!r}: name one of them otherwise, NAME=PATH.")
        _check_text(path)
        texts[name] = path
    return texts


def parse_limits(given: Sequence[str]) -> dict[str, float]:
    """Budgets of texts by name, of ``NAME=1%``.

    >>> parse_limits(["code=0.5%"])
    {'code': 0.005}

    Raises:
        TrainError: if there is no name, or two of one name, or what is stated is no budget.
    """
    limits: dict[str, float] = {}
    for one in given:
        name, equals, share = one.rpartition("=")
        if not equals or not name:
            raise TrainError(f"--limit {one!r} does not say of which text: write NAME=1%, by the name of --guard-text.")
        if name in limits:
            raise TrainError(f"--limit: {name!r} has two limits: leave one of them out.")
        limits[name] = parse_share(share, f"--limit {name}")
    return limits


def parse_columns(given: str | None) -> tuple[str, str] | None:
    """The columns of prompts and completions, of ``PROMPT,COMPLETION``.

    Raises:
        TrainError: if there are not two.
    """
    if given is None:
        return None
    parts = [part.strip() for part in given.split(",")]
    if len(parts) != 2 or not all(parts):
        raise TrainError(f"--columns {given!r} does not name two columns: write PROMPT,COMPLETION.")
    return parts[0], parts[1]


def parse_targets(given: str | None) -> str | list[str] | None:
    """Layers by name, of ``a,b``; a regular expression or ``all-linear`` as it is."""
    if given is None or given == "all-linear" or not re.fullmatch(r"[\w.,\s-]+", given):
        return given
    return [name.strip() for name in given.split(",") if name.strip()]


def read_prompts(given: Sequence[str], path: Path | None) -> list[str]:
    """Prompts of the command line, and those of a file, one a line.

    Raises:
        TrainError: if the file cannot be read or holds none.
    """
    if path is None:
        return list(given)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TrainError(f"--prompts {path} cannot be read as text: {error}.") from error
    found = [line for line in lines if line.strip()]
    if not found:
        raise TrainError(f"--prompts {path} holds no prompt; one a line is expected.")
    return [*given, *found]


def _check_text(path: Path) -> None:
    if not path.exists():
        raise TrainError(f"--guard-text {path}: there is no such file.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise TrainError(f"--guard-text {path} cannot be read as text in UTF-8: {error}.") from error
    if not text.strip():
        raise TrainError(f"--guard-text {path} is empty: give a text of some thousand words.")


def _listed(value: str | Sequence[str] | None) -> str | list[str] | None:
    return value if value is None or isinstance(value, str) else list(value)
