"""The options of a training, with their defaults and checks."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from curlora.errors import GuardError
from curlora.guard.share import as_share
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
        out: the output folder.
        model: the base model's folder or hub id. ``None``: the base model that ``continue_from`` names.
        max_forgetting: the largest relative rise of perplexity on each guard text: 0.01 for 1 %.
        adapter: the kind of a new adapter, ``"curlora"`` or ``"lora"``. ``None``: CURLoRA.
        continue_from: a saved CURLoRA or LoRA adapter whose training is continued. ``None``: train a new adapter.
        guard_texts: names and text files on which forgetting is limited. Empty: text that the model itself writes.
        limits: limits of single guard texts by name, which replace ``max_forgetting``.
        lifetime: the largest relative rise of perplexity over all trainings of this adapter together.
        other_texts: names and text files that are only measured, beside another sample of what the model itself writes.
        split, subset: the split and the subset of a data set on the hub.
        columns: the columns of prompts and completions, if they have other names than these.
        turns: which messages of the assistant are trained: ``"all"``, or the ``"last"`` of each conversation.
        evaluation: a file of held-out examples. ``None``: hold out a share of ``data``.
        quantize: ``"4bit"`` or ``"8bit"``: quantize the base model with bitsandbytes during training.
        export: ``"lora"`` (of a CURLoRA adapter) or ``"merged"``: also export into the output folder.
        epochs: number of passes over the training examples.
        batch_size: examples per forward pass.
        gradient_accumulation: batches per optimizer step.
        max_length: longest example, in tokens. Longer examples are truncated.
        rank, target_modules: options of a new adapter, see :class:`curlora.CurloraConfig` or
            :class:`peft.LoraConfig`.
        learning_rate: ``None``: set by the rule for the adapter, see :class:`curlora.ForgettingBudget`.
        seed: seed of the held-out share, the order of examples, and the choice of the adapter's columns and rows.
        prompts: prompts whose replies are shown. Empty: those of the first held-out examples.
        report_to: trackers of transformers' Trainer, such as ``tensorboard``.
        bf16: compute in bfloat16. ``None``: on a GPU that supports it.
        gradient_checkpointing: as in transformers' Trainer. ``None``: on an accelerator.

    Raises:
        TrainError: if an option is out of range, or contradicts another one.
    """

    data: str
    out: Path
    model: str | None = None
    max_forgetting: float = 0.01
    adapter: str | None = None
    continue_from: str | None = None
    guard_texts: Mapping[str, Path] = field(default_factory=dict)
    limits: Mapping[str, float] = field(default_factory=dict)
    lifetime: float | None = None
    other_texts: Mapping[str, Path] = field(default_factory=dict)
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

    RANKS: ClassVar[Mapping[str, int]] = {"curlora": 32, "lora": 16}
    TARGET_MODULES = "all-linear"
    # Without a file of held-out examples, this share of the data is held out, between these numbers of examples.
    HELD_OUT_SHARE = 0.05
    HELD_OUT_LEAST = 20
    HELD_OUT_MOST = 200
    # The tokens taken of each guard text, the tokens of a row, the rows of a batch, and those of a penalty in a step.
    GUARD_TOKENS = 8192
    GUARD_ROW = 128
    GUARD_BATCH = 8
    PENALTY_ROWS = 4
    OTHER_TOKENS = 2048  # of the sample of the model's own text that is only measured
    REPLIES = 3
    REPLY_TOKENS = 96

    def __post_init__(self) -> None:
        if self.model is None and self.continue_from is None:
            raise TrainError("Which model is trained? Give --model, a folder or a hub id.")
        if self.adapter not in (None, *self.RANKS):
            raise TrainError(f"--adapter must be {' or '.join(self.RANKS)}, got {self.adapter!r}.")
        if self.continue_from is not None and (self.adapter, self.rank, self.target_modules) != (None, None, None):
            raise TrainError(
                "--adapter, --rank and --target-modules apply to a new adapter only. With --continue-from the "
                "adapter's own are used: leave these options out."
            )
        if self.adapter == "lora" and self.export == "lora":
            raise TrainError("--export lora is for CURLoRA adapters: with --adapter lora, --out is a LoRA adapter.")
        for name in ("epochs", "batch_size", "gradient_accumulation", "max_length"):
            if getattr(self, name) < 1:
                raise TrainError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}.")
        if self.target_modules is not None and not self.target_modules:
            raise TrainError("--target-modules names no layer: give names separated by commas, or all-linear.")
        if isinstance(self.target_modules, str):
            try:
                re.compile(self.target_modules)
            except re.error as error:
                raise TrainError(
                    f"--target-modules {self.target_modules!r} is not a valid regular expression: {error}."
                ) from error
        if not 0 <= self.seed < 2**32:
            raise TrainError(f"--seed must be between 0 and {2**32 - 1}, got {self.seed}.")
        if self.max_length < 2:
            raise TrainError("--max-length must be at least 2, a token of the prompt and one of the answer, got 1.")
        if self.learning_rate is not None and not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise TrainError(f"--learning-rate must be a positive number, got {self.learning_rate}.")
        if unknown := sorted(set(self.limits) - set(self.guard_texts)):
            known = f"the names are {', '.join(sorted(self.guard_texts))}" if self.guard_texts else "none is given"
            raise TrainError(
                f"--limit {unknown[0]}=...: no --guard-text has this name; {known}. Name the text: --guard-text "
                f"{unknown[0]}=PATH."
            )
        stated = {f"--limit {name}": limit for name, limit in self.limits.items()}
        if not self.guard_texts or set(self.guard_texts) - set(self.limits):
            stated["--max-forgetting"] = self.max_forgetting
        option, most = max(stated.items(), key=lambda pair: pair[1])
        if self.lifetime is not None and self.lifetime < most:
            raise TrainError(
                f"--lifetime {self.lifetime:.3g} is less than {option} {most:.3g}, but it covers this training and all "
                f"others of the adapter: raise --lifetime, or lower {option}."
            )

    def identity(self) -> dict[str, Any]:
        """Return the options that determine the trained adapter, as JSON values, without the contents of files."""
        return {
            "model": self.model,
            "max_forgetting": self.max_forgetting,
            "limits": dict(self.limits) or None,
            "lifetime": self.lifetime,
            "adapter": None if self.adapter == "curlora" else self.adapter,
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
    """Parse a limit, written as ``1%``, ``1 %`` or ``0.01``.

    >>> parse_share("1.5%"), parse_share("0.015")
    (0.015, 0.015)

    Raises:
        TrainError: as :func:`curlora.guard.share.as_share`.
    """
    value: str | float = given
    with contextlib.suppress(ValueError):  # refused below, unless it is a percentage
        value = float(given)
    try:
        return as_share(option, value)
    except GuardError as error:
        raise TrainError(str(error)) from None


def parse_texts(given: Sequence[str], option: str = "--guard-text") -> dict[str, Path]:
    """Parse values such as ``NAME=PATH`` or ``PATH`` into paths by name, and check that each file holds text.

    Raises:
        TrainError: if a file is missing, empty or not text, or if two texts have the same name.
    """
    texts: dict[str, Path] = {}
    for one in given:
        name, equals, rest = one.partition("=")
        path = Path(rest if equals else one)
        name = name if equals else path.stem
        if not name:
            raise TrainError(f"{option} {one!r} has no name before the equals sign: write NAME=PATH or PATH.")
        if name in texts:
            raise TrainError(f"{option}: two texts are called {name!r}. Rename one of them with NAME=PATH.")
        _check_text(path, option)
        texts[name] = path
    return texts


def parse_limits(given: Sequence[str]) -> dict[str, float]:
    """Parse values such as ``NAME=1%`` into limits by the name of the text.

    >>> parse_limits(["code=0.5%"])
    {'code': 0.005}

    Raises:
        TrainError: if a value has no name, if a name occurs twice, or if a limit is not a valid budget.
    """
    limits: dict[str, float] = {}
    for one in given:
        name, equals, share = one.rpartition("=")
        if not equals or not name:
            raise TrainError(f"--limit {one!r} does not name a text: write NAME=1%, with the name of a --guard-text.")
        if name in limits:
            raise TrainError(f"--limit: {name!r} has two limits. Remove one of them.")
        limits[name] = parse_share(share, f"--limit {name}")
    return limits


def parse_columns(given: str | None) -> tuple[str, str] | None:
    """Parse ``PROMPT,COMPLETION`` into the names of the two columns.

    Raises:
        TrainError: if the value does not name exactly two columns.
    """
    if given is None:
        return None
    parts = [part.strip() for part in given.split(",")]
    if len(parts) != 2 or not all(parts):
        raise TrainError(f"--columns {given!r} does not name two columns: write PROMPT,COMPLETION.")
    return parts[0], parts[1]


def parse_targets(given: str | None) -> str | list[str] | None:
    """Parse ``a,b`` into a list of names. A regular expression and ``all-linear`` are returned unchanged."""
    if given is None or given == "all-linear" or not re.fullmatch(r"[\w.,\s-]+", given):
        return given
    return [name.strip() for name in given.split(",") if name.strip()]


def read_prompts(given: Sequence[str], path: Path | None) -> list[str]:
    """Return the prompts of the command line, followed by those of a file with one prompt per line.

    Raises:
        TrainError: if the file cannot be read or holds no prompt.
    """
    if path is None:
        return list(given)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TrainError(f"--prompts {path} cannot be read as text: {error}.") from error
    found = [line for line in lines if line.strip()]
    if not found:
        raise TrainError(f"--prompts {path} holds no prompt: write one prompt per line.")
    return [*given, *found]


def _check_text(path: Path, option: str) -> None:
    if not path.exists():
        raise TrainError(f"{option} {path}: there is no such file.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise TrainError(f"{option} {path} cannot be read as text in UTF-8: {error}.") from error
    if not text.strip():
        raise TrainError(f"{option} {path} is empty: give a text of a few thousand words.")


def _listed(value: str | Sequence[str] | None) -> str | list[str] | None:
    return value if value is None or isinstance(value, str) else list(value)
