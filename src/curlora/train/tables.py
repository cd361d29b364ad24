"""Tables for the terminal: the plan of a training and its outcome."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from curlora.guard import TextOutcome
from curlora.report.formatting import format_size, format_time
from curlora.train.data import Split
from curlora.train.outcome import OtherText, TrainOutcome
from curlora.train.plan import with_checkpointing

if TYPE_CHECKING:
    from curlora.train.run import Prepared

__all__ = ["budget_rows", "loss_row", "outcome_tables", "percent", "plan_tables", "text_rows"]


def percent(share: float, signed: bool = False) -> str:
    """Format a share in per cent: ``0.0123`` becomes ``1.23 %``."""
    if not math.isfinite(share):
        return str(share)
    return f"{100 * share:{'+' if signed else ''}.{3 if abs(share) < 0.0005 else 2}f} %"


def plan_tables(prepared: Prepared) -> list[RenderableType]:
    """Return the tables to print before training."""
    options, base, examples, plan, _ = prepared
    train, held_out, memory = examples.train, examples.held_out, plan.memory
    texts = ", ".join(f"{name} ({path})" for name, path in options.guard_texts.items())
    history = base.history
    lifetime = ""
    if history.lifetime is not None and history.left is not None:
        lifetime = f", and by {percent(history.lifetime)} over all its trainings"
        lifetime += f", of which {percent(history.left)} are left" if base.continue_from else ""
    sizes = f"{format_size(memory.weights)} of frozen weights, {format_size(memory.trained)} for what is trained"
    kept = "" if memory.kept is None else f", {format_size(memory.kept)} kept for the backward pass"
    more = f", {format_size(memory.logits)} for logits"
    if memory.guard is not None:
        what = "the guard, before training, takes" if base.guarded else "the penalty takes"
        more += f"; {what} {format_size(memory.guard)} beside the weights"
    rows = [
        ("base model", ", ".join([base.name, f"{plan.parameters:,} parameters", *filter(None, [base.quantize])])),
        (
            "adapter",
            f"{base.kind}, {'continues ' + base.continue_from + ', ' if base.continue_from else ''}rank {plan.rank} on "
            f"{plan.layers} layers: {plan.trained:,} trained parameters",
        ),
        ("trained on", f"{_split(train, f' of {options.data}')}; laid out {examples.layout}"),
        ("held out", f"{_split(held_out)}; {examples.held_out_from}"),
        (
            "steps",
            f"{plan.steps:,}: {_count(options.epochs, 'epoch')} in batches of "
            f"{options.batch_size * options.gradient_accumulation}; a checkpoint every "
            f"{_count(plan.save_steps, 'step')}",
        ),
        ("forgetting limit", _stated(options.max_forgetting, options.limits, options.guard_texts) + lifetime),
        ("measured on", texts or "text that the model itself writes"),
        ("learning rate", _rate(options.learning_rate, plan.learning_rate)),
        (
            "memory",
            ("unknown: " if memory.total is None else f"about {format_size(memory.total)}: ") + sizes + kept
            + (" (with gradient checkpointing)" if with_checkpointing(options) else "") + more,
        ),
        ("written to", str(options.out)),
    ]  # fmt: skip
    return [_facts(rows)]


def loss_row(outcome: TrainOutcome) -> tuple[str, str, str, str]:
    """Return the row of the held-out examples: label, loss before, loss after, change (nats per token of answers)."""
    held_out = outcome.held_out
    change = held_out.loss_after - held_out.loss_before
    name = f"loss on {_count(held_out.examples, 'held-out example')} ({held_out.tokens:,} tokens of answers)"
    return name, f"{held_out.loss_before:.4f}", f"{held_out.loss_after:.4f}", f"{change:+.4f}"


def text_rows(outcome: TrainOutcome) -> list[tuple[str, str, str, str, str]]:
    """Return a row for each text: label, perplexity before, perplexity after, relative rise, limit.

    Texts that were only measured follow the guard's, and have no limit.
    """
    limits = {name: percent(text.limit) for name, text in outcome.budget.texts.items()}
    texts: list[tuple[str, TextOutcome | OtherText]] = [*outcome.budget.texts.items(), *outcome.others.items()]
    return [
        (
            f"perplexity of {name}",
            f"{text.before:.3f}",
            f"{text.after:.3f}",
            percent(text.rise, True),
            limits.get(name, ""),
        )
        for name, text in texts
    ]


def budget_rows(outcome: TrainOutcome) -> list[tuple[str, str]]:
    """Return label and value of each figure of the budget: stated, predicted, measured, and the share kept."""
    budget = outcome.budget
    name, worst = budget.worst
    rows = [
        ("stated", _stated(budget.stated, budget.limits, budget.texts)),
        (
            "measured",
            f"{percent(worst.rise, True)}" + (f" on {name}, the worst" if len(budget.texts) > 1 else f" on {name}"),
        ),
        *(
            []
            if (other := outcome.worst_other) is None
            else [("worst of the other texts", f"{percent(other[1].rise, True)} on {other[0]}")]
        ),
        ("share of the change kept", percent(budget.kept)),
        ("learning rate", f"{outcome.run.learning_rate:.3g}"),
        ("time", format_time(outcome.run.seconds)),
    ]
    if budget.predicted is not None:
        rise = percent(math.expm1(budget.predicted), True)
        rows.insert(1, ("predicted", f"{rise} ({budget.predicted:.5f} nats per token)"))
    if budget.lifetime is not None:
        rows.insert(1, ("over all trainings", percent(budget.lifetime) + " of perplexity"))
    return rows


def outcome_tables(outcome: TrainOutcome) -> list[RenderableType]:
    """Return the tables to print after training."""
    figures = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    figures.add_column("", overflow="fold")
    for column in ("before", "after", "change", "allowed"):
        figures.add_column(column, justify="right", no_wrap=True)
    figures.add_row(*map(Text, loss_row(outcome)), Text(""))
    for row in text_rows(outcome):
        figures.add_row(*map(Text, row))

    parts: list[RenderableType] = [Text(""), figures]
    if outcome.continue_from is not None:
        parts.append(
            Text("The perplexity before is that of the base model, before the adapter's first training.", style="dim")
        )
    parts += [Text("\nForgetting", style="bold"), _facts(budget_rows(outcome))]
    if not outcome.budget.within:
        parts.append(Text("The budget was NOT kept.", style="bold red"))
    if outcome.replies:
        parts += [Text("\nReplies", style="bold"), _replies(outcome)]
    return parts


def _replies(outcome: TrainOutcome) -> RenderableType:
    parts: list[RenderableType] = []
    for reply in outcome.replies:
        beside = Table(box=None, padding=(0, 2, 0, 0), show_edge=False, expand=True)
        beside.add_column("before", ratio=1, overflow="fold", style="dim")
        beside.add_column("after", ratio=1, overflow="fold")
        beside.add_row(Text(reply.before or "(nothing)"), Text(reply.after or "(nothing)"))
        parts += [Text(f"> {reply.prompt.strip()}", style="bold"), beside, Text("")]
    return Group(*parts)


def _facts(rows: Sequence[tuple[str, str]]) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    return table


def _rate(given: float | None, rule: float | None) -> str:
    """Format the learning rate: the one that was given, beside that of the rule."""
    if given is None:
        return "the Trainer's default" if rule is None else f"about {rule:.2g}, set by rule"
    return f"{given:g}" if rule is None else f"{given:g}; the rule gives about {rule:.2g}"


def _stated(stated: float, limits: Mapping[str, float], texts: Iterable[str]) -> str:
    """Format the budget, with the limits of single texts."""
    parts = [f"by {percent(limit)} on {name}" for name, limit in limits.items()]
    if not limits or set(texts) - set(limits):
        parts.insert(0, f"by {percent(stated)}")
    return f"perplexity may rise {', '.join(parts)}"


def _split(split: Split, of: str = "") -> str:
    said = [
        f"{count:,} {what}"
        for count, what in ((split.cut, "cut short"), (split.left_out, "left out as too long"))
        if count
    ]
    more = f" ({', '.join(said)})" if said else ""
    examples = _count(len(split.rows), "example")
    return f"{examples}{of}: {split.tokens:,} tokens, {split.trained_tokens:,} in answers{more}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
