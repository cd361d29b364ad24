"""The plan of a run as tables that fit into 80 columns."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from curlora.continual.plan import Plan, tokens_of
from curlora.continual.processes import process_state
from curlora.continual.trainer import steps_of
from curlora.report.formatting import format_in_train, format_too_long

__all__ = ["plan_tables"]


def plan_tables(plan: Plan) -> list[RenderableType]:
    """Return what to print, in order: the run, its tasks, its methods, the memory they need, and notes."""
    stream, state = plan.stream, process_state()
    methods = [m for m in plan.methods if m.steps]  # without heads, the frozen method is the base model
    processes = "1 process" if state.num_processes == 1 else f"{state.num_processes} processes"
    heading = [
        stream.title,
        f"{stream.base_model}: {plan.base_parameters:,} parameters. {processes} on {state.device}. "
        f"Seed{'s' if len(stream.seeds) > 1 else ''} {', '.join(map(str, stream.seeds))}.",
        f"{plan.threads} CPU thread{'s' if plan.threads > 1 else ''} for each method and seed; float32 products in "
        f"{stream.settings.fp32_products}.",
        *(f"Held out: {text.describe()}" for text in stream.heldout),
        *(f"To be written by the base model: {text.name} ({text.rows} pieces)" for text in stream.unwritten),
        *(["Orders of the tasks: " + str(1 + len(stream.orders)) + "."] if stream.orders else []),
    ]

    figures = ("examples", "tokens\nan epoch", "epochs", "steps", "longest\nrow", "scored\nexamples", "scored\ntokens")
    tasks = _table("Tasks", "task", *figures)
    for part in plan.tasks:
        longest = max(len(row["input_ids"]) for row in part.train)
        steps = steps_of(len(part.train), part.settings)
        trained = (len(part.train), tokens_of(part.train), part.settings.epochs, steps, longest)
        tasks.add_row(Text(part.task.name), *_counts(*trained, len(part.evaluation), tokens_of(part.evaluation)))

    over = "" if len(stream.seeds) == 1 else f" and {len(stream.seeds)} seeds"
    title = f"Methods, over all tasks{over}"
    counts = _table(title, "method", "trained\nparameters", "steps", "tokens\ntrained on", "held-out\nwindows")
    counts.add_row("base model", "", "", "", *_counts(plan.base_windows), end_section=not methods)
    for m in methods:
        row = _counts(m.trained, m.steps, m.tokens, m.windows)
        counts.add_row(Text(m.label), *row, end_section=m is methods[-1])
    sums = [sum(getattr(m, key) for m in methods) for key in ("steps", "tokens", "windows")]
    counts.add_row("the whole run", "", *_counts(*sums[:2], plan.base_windows + sums[2]))

    title = "Memory of training in each process, estimated"
    memory = _table(title, "method", "weights", "trained, gra-\ndient, AdamW", "kept for\nbackward", "logits", "in all")
    for m in methods:
        parts = (m.memory.weights, m.memory.trained, m.memory.kept, m.memory.logits, m.memory.total)
        memory.add_row(Text(m.label), *map(_size, parts))

    unknown = [f"{m.label}: {m.memory.unknown}" for m in methods if m.memory.unknown]
    too_long = [
        f"Examples of {part.task.name} that are longer than max_length: {counted}."
        for part in plan.tasks
        if (counted := format_too_long(part.too_long))
    ]
    in_train = [
        format_in_train(part.task.name, count, len(part.task.evaluation))
        for part in plan.tasks
        if (count := part.task.evaluation_in_train)
    ]
    cache = [f"The cache of frozen layers takes at least {_size(plan.cache)} on disk."] if plan.cache else []
    said = ["Trained parameters are without heads.", *cache, *too_long, *in_train, *unknown]
    notes = Text("\n" + "\n".join(said), style="dim")
    return [Text("\n".join(heading)), tasks, counts, memory, notes]


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=f"\n{title}", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column(first, overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True, vertical="bottom")
    return table


def _counts(*counts: int | None) -> list[str]:
    return ["unknown" if count is None else f"{count:,}" for count in counts]


def _size(size: int | None) -> str:
    if size is None:
        return "unknown"
    for unit, power in (("GiB", 3), ("MiB", 2), ("KiB", 1)):
        if size >= 1024**power:
            return f"{size / 1024**power:.1f} {unit}"
    return f"{size} B"
