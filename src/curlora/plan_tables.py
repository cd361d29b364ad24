"""A plan for people: tables that 80 columns are enough for."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from curlora.continual.plan import MethodPlan, Plan
from curlora.formatting import format_too_long

__all__ = ["plan_tables"]


def plan_tables(plan: Plan) -> list[RenderableType]:
    """What to print, in order: the run, its tasks, its methods, the memory they need, and what is not known."""
    return [_heading(plan), _tasks(plan), _methods(plan), _memory(plan), *_notes(plan)]


def _heading(plan: Plan) -> Text:
    processes = "1 process" if plan.processes == 1 else f"{plan.processes} processes"
    seeds = ", ".join(map(str, plan.seeds))
    lines = [
        plan.title,
        f"{plan.base_model}: {plan.base_parameters:,} parameters. {processes} on {plan.device}. "
        f"Seed{'s' if len(plan.seeds) > 1 else ''} {seeds}.",
        *(f"Held out: {text}" for text in plan.heldout.values()),
    ]
    return Text("\n".join(lines))


def _table(title: str, first: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column(first, overflow="fold")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True, vertical="bottom")
    return table


def _tasks(plan: Plan) -> Table:
    headings = ("examples", "tokens\nan epoch", "epochs", "steps", "longest\nrow", "scored\nexamples", "scored\ntokens")
    table = _table("\nTasks", "task", *headings)
    for task in plan.tasks:
        counts = (
            task.examples, task.tokens, task.epochs, task.steps, task.longest, task.evaluation_examples,
            task.evaluation_tokens,
        )  # fmt: skip
        table.add_row(Text(task.name), *(f"{count:,}" for count in counts))
    return table


def _methods(plan: Plan) -> Table:
    seeds = "" if len(plan.seeds) == 1 else f" and {len(plan.seeds)} seeds"
    headings = ("trained\nparameters", "steps", "tokens\ntrained on", "held-out\nwindows")
    table = _table(f"\nMethods, over all tasks{seeds}", "method", *headings)
    table.add_row("base model", "", "", "", f"{plan.base_windows:,}")
    for method in plan.methods:
        counts = (method.steps, method.tokens, method.windows)
        trained = "unknown" if method.trained is None else f"{method.trained:,}"
        last = method is plan.methods[-1]
        table.add_row(Text(method.label), trained, *(f"{count:,}" for count in counts), end_section=last)
    table.add_row("the whole run", "", f"{plan.steps:,}", f"{plan.tokens:,}", f"{plan.windows:,}")
    return table


def _memory(plan: Plan) -> Table:
    headings = ("frozen\nweights", "trained, gra-\ndient, AdamW", "kept for\nbackward", "logits", "in all")
    table = _table("\nMemory of training in each process, estimated", "method", *headings)
    for method in plan.methods:
        memory = method.memory
        parts = (memory.frozen, memory.trained, memory.kept, memory.logits, memory.total)
        table.add_row(Text(method.label), *map(_size, parts))
    return table


def _notes(plan: Plan) -> list[Text]:
    notes = ["Trained parameters are without heads."]
    for task in plan.tasks:
        if said := format_too_long(task.too_long):
            notes.append(f"Examples of {task.name} that are longer than max_length: {said}.")
    if plan.quantized:
        notes.append(
            "The base is quantized: the size of its weights is unknown, and what is kept for backward is that of the "
            "same model unquantized."
        )
    notes += [f"{method.label} {_reason(method)}" for method in plan.methods if method.unknown]
    return [Text("\n" + "\n".join(notes), style="dim")]


def _reason(method: MethodPlan) -> str:
    return method.unknown.removesuffix(".") + "."


def _size(size: int | None) -> str:
    if size is None:
        return "unknown"
    for unit, power in (("GiB", 3), ("MiB", 2), ("KiB", 1)):
        if size >= 1024**power:
            return f"{size / 1024**power:.1f} {unit}"
    return f"{size} B"
