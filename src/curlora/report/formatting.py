"""Formatting of figures for the page and the terminal."""

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
    """Format a mean and, if there is one, its deviation: ``0.825 ± 0.010``."""
    mean = format_number(statistic.mean, digits, "+" if signed else "")
    return mean if statistic.deviation is None else f"{mean} ± {format_number(statistic.deviation, digits)}"


def format_percent(statistic: Statistic, digits: int = 1) -> str:
    """Format a fraction as signed per cent: ``+5.9 % ± 0.4 %``."""
    mean, *deviation = format_statistic(per_cent(statistic), signed=True, digits=digits).split(" ± ")
    return " ± ".join(f"{part} %" for part in (mean, *deviation))


def format_time(seconds: float) -> str:
    """Format a time in seconds; as minutes from two minutes on."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def format_size(size: int) -> str:
    """Format a number of bytes in KiB, MiB or GiB; ``none`` for 0."""
    if size == 0:
        return "none"
    if size >= 1024**3:
        return f"{size / 1024**3:.2f} GiB"
    return f"{size / 1024:.1f} KiB" if size < 1024**2 else f"{size / 1024**2:.2f} MiB"


def format_number(value: float, digits: int, sign: str = "") -> str:
    """Format a number with ``digits`` decimal places; ``sign="+"`` always shows the sign."""
    if not math.isfinite(value):
        return str(value)
    return format(value, f"{sign}.{digits}f" if abs(value) < 1e7 else f"{sign}.{digits}e")


def per_cent(statistic: Statistic) -> Statistic:
    """Convert a fraction to per cent."""
    deviation = None if statistic.deviation is None else 100 * statistic.deviation
    return Statistic(mean=100 * statistic.mean, deviation=deviation)


def allowed(record: Mapping[str, Statistic | None]) -> str:
    """Format the limit of :meth:`curlora.continual.results.MethodResult.guarded`: per cent of perplexity, or nats."""
    limit = record["limit"]
    assert limit is not None
    return f"{limit.mean:.4f}" if record["kl"] is not None else f"{100 * limit.mean:.2f} %"


def format_in_train(task: str, count: int, examples: int) -> str:
    """Return a sentence that says how many evaluation examples are also in the training split."""
    return f"Of the {examples:,} evaluation examples of {task}, {count:,} are also in its training split."


def format_missing(results: RunResults) -> str:
    """Return a sentence that names the unfinished runs; empty if all are finished."""
    if not results.missing:
        return ""
    few = "; ".join(results.missing[:6]) + ("; ..." if len(results.missing) > 6 else "")
    return f"{len(results.missing)} of {len(results.missing) + results.runs} runs were not finished yet: {few}."


def format_too_long(task: TaskInfo | Mapping[str, int]) -> str:
    """Say how many examples were cut or left out: ``3 cut in the training split``; empty if none were."""
    counts = task.model_dump() if isinstance(task, TaskInfo) else task
    parts = []
    for split, purpose in (("train", "training"), ("evaluation", "evaluation")):
        done = [(counts.get(f"{split}_cut", 0), "cut"), (counts.get(f"{split}_dropped", 0), "left out")]
        said = " and ".join(f"{count:,} {what}" for count, what in done if count)
        if said:
            parts.append(f"{said} in the {purpose} split")
    return ", ".join(parts)
