"""How figures are written, on the page and in the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping

from curlora.continual.results import RunResults, Statistic, TaskInfo

__all__ = [
    "allowed",
    "format_in_train",
    "format_missing",
    "format_number",
    "format_percent",
    "format_size",
    "format_statistic",
    "format_time",
    "format_too_long",
    "per_cent",
]


def format_statistic(statistic: Statistic, signed: bool = False, digits: int = 3) -> str:
    """Mean, and deviation where there is one: ``0.825 ± 0.010``."""
    mean = format_number(statistic.mean, digits, "+" if signed else "")
    return mean if statistic.deviation is None else f"{mean} ± {format_number(statistic.deviation, digits)}"


def format_percent(statistic: Statistic, digits: int = 1) -> str:
    """A share as per cent with its sign: ``+5.9 % ± 0.4 %``."""
    mean, *deviation = format_statistic(per_cent(statistic), signed=True, digits=digits).split(" ± ")
    return " ± ".join(f"{part} %" for part in (mean, *deviation))


def format_time(seconds: float) -> str:
    """Seconds up to two minutes, minutes from there on."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def format_size(size: int) -> str:
    """Of bytes, in KiB, MiB or GiB."""
    if size == 0:
        return "none"
    if size >= 1024**3:
        return f"{size / 1024**3:.2f} GiB"
    return f"{size / 1024:.1f} KiB" if size < 1024**2 else f"{size / 1024**2:.2f} MiB"


def format_number(value: float, digits: int, sign: str = "") -> str:
    """With so many digits after the point; ``sign`` is ``"+"`` to have it always."""
    if not math.isfinite(value):
        return str(value)
    return format(value, f"{sign}.{digits}f" if abs(value) < 1e7 else f"{sign}.{digits}e")


def per_cent(statistic: Statistic) -> Statistic:
    """A share, a hundred times."""
    deviation = None if statistic.deviation is None else 100 * statistic.deviation
    return Statistic(mean=100 * statistic.mean, deviation=deviation)


def allowed(record: Mapping[str, Statistic | None]) -> str:
    """The limit of :meth:`curlora.continual.results.MethodResult.guarded`: per cent of perplexity, or nats of KL."""
    limit = record["limit"]
    assert limit is not None
    return f"{limit.mean:.4f}" if record["kl"] is not None else f"{100 * limit.mean:.2f} %"


def format_in_train(task: str, count: int, examples: int) -> str:
    """How many examples are scored on that are learned from too, as a sentence."""
    return f"Of the {examples:,} examples of {task} to be scored on, {count:,} are learned from too."


def format_missing(results: RunResults) -> str:
    """What had not been run yet, as a sentence; empty where all had been."""
    if not results.missing:
        return ""
    few = "; ".join(results.missing[:6]) + ("; ..." if len(results.missing) > 6 else "")
    return f"{len(results.missing)} of {len(results.missing) + results.runs} runs were not finished yet: {few}."


def format_too_long(task: TaskInfo | Mapping[str, int]) -> str:
    """How many examples were cut or left out, as a clause: ``3 cut of those to learn from``; empty if none were."""
    counts = task.model_dump() if isinstance(task, TaskInfo) else task
    parts = []
    for split, purpose in (("train", "to learn from"), ("evaluation", "to be scored on")):
        done = [(counts.get(f"{split}_cut", 0), "cut"), (counts.get(f"{split}_dropped", 0), "left out")]
        said = " and ".join(f"{count:,} {what}" for count, what in done if count)
        if said:
            parts.append(f"{said} of those {purpose}")
    return ", ".join(parts)
