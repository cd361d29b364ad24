"""Tables of runs for the command line."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean
from string import ascii_uppercase

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from curlora.continual.results import MethodResult, RunResults, Statistic
from curlora.continual.task_measure import TaskMeasure
from curlora.continual.tradeoff import best_within, limited_text, limits_of, points
from curlora.continual.united_runs import definition, differing
from curlora.report.formatting import (
    allowed,
    format_in_train,
    format_missing,
    format_percent,
    format_size,
    format_statistic,
    format_time,
    format_too_long,
)

__all__ = ["comparison", "results_tables", "within_limits"]


def results_tables(results: RunResults) -> list[RenderableType]:
    """Return the tables of a run: scores after every stage, a summary, limits, costs, and notes on the figures."""
    orders = list(results.by_order().values())
    measure = TaskMeasure.of(results)
    parts: list[RenderableType | None] = [*(_matrix(one, measure) for one in orders), _summary(results, measure)]
    parts += [_texts(results), *map(_guarded, orders), *within_limits(results), _cost(results), *_notes(results)]
    return [part for part in parts if part is not None]


def comparison(runs: Sequence[RunResults], names: Sequence[str]) -> Table:
    """Return a table of runs side by side with a row for each method, and a note if the runs cannot be compared.

    Args:
        runs: one or several runs.
        names: the runs' names in the table.
    """
    letters = [f"{ascii_uppercase[n % 26]}{n // 26 or ''}" for n in range(len(runs))]
    measures = [TaskMeasure.of(run) for run in runs]
    alike_measured = len({measure.figure for measure in measures}) == 1
    learned = " or ".join(dict.fromkeys(measure.learned_name for measure in measures))
    table = _plain(f"{learned.capitalize()}, forgetting and rise of perplexity after the last task")
    headings = {"accuracy": " accu-\nracy", "loss": " fall\nof loss"}
    for letter, measure in zip(letters, measures, strict=True):
        _columns(table, [f"{letter}{heading}" for heading in (headings[measure.figure], " for-\ngetting", "\nrise")])
    subtracted = len(runs) == 2 and alike_measured
    if subtracted:
        _columns(table, ["B - A\n" + headings[measures[0].figure].split("\n")[-1]])
    if any(measure.figure == "accuracy" for measure in measures):
        table.add_row("majority class", *(cell for measure in measures for cell in (_floor(measure), "", "")))
    unlike: list[str] = []  # different methods with the same name
    for name, label in _labels(runs).items():
        methods = [next((method for method in run.methods if method.name == name), None) for run in runs]
        cells = [cell for method, measure in zip(methods, measures, strict=True) for cell in _compared(method, measure)]
        there = [method for method in methods if method is not None]
        alike = all(definition(method) == definition(there[0]) for method in there)
        if not alike:
            unlike.append(name)
        table.add_row(label, *cells, *([_difference(methods, measures[0]) if alike else ""] if subtracted else []))
    lines = [
        f"{letter}: {name}. {format_missing(run)}".removesuffix(". ")
        for letter, name, run in zip(letters, names, runs, strict=True)
    ]
    reasons = differing(runs)
    if reasons:
        lines.append(f"The runs differ in {', '.join(reasons)}: their figures cannot be compared directly.")
    if unlike:
        lines.append(f"These names stand for different methods in the runs: {', '.join(unlike)}.")
    table.caption, table.caption_justify = Text("\n".join(lines)), "left"
    return table


def within_limits(results: RunResults, of: str = "") -> list[Table]:
    """Return a table for each limit of the recipe: the best of each method within it, and its forgetting elsewhere.

    Args:
        results: the run.
        of: what to name in the titles, if there are tables of other runs beside it.
    """
    known = points(results)
    tables = []
    for limit in limits_of(results):
        run = f"{of}: the" if of else "The"
        table = _plain(f"\n{run} best of each method within {limit} on {limited_text(results)}")
        table.add_column("its best")
        learned = TaskMeasure.of(results).learned_name
        _columns(table, [_in_two_lines(learned), "rise\nthere", "KL there", "KL, other\ntexts", "worst", "runs"])
        for entry, point in best_within(known, limit).items():
            if point is None:
                table.add_row(entry, "none is within")
                continue
            chosen = ", ".join(f"{key} {value}" for key, value in point.method.grid.items())
            figures = (point.limited, point.mean, point.worst)
            table.add_row(
                entry,
                Text(chosen or "the only one"),
                _stacked(point.learned, digits=3),
                _percent(point.rise),
                *(_stacked(figure, digits=4) for figure in figures),
                str(len(point.method.seeds)),
            )
        tables.append(table)
    return tables


def _matrix(results: RunResults, measure: TaskMeasure) -> Table:
    shown = "accuracy" if measure.figure == "accuracy" else "loss on the answers, nats per token"
    table = Table(title=Text(f"{results.title}: {shown}"), title_justify="left", box=SIMPLE_HEAD)
    for heading in ("method", "after"):
        table.add_column(heading)
    _columns(table, [task.name for task in results.tasks])
    floor = [f"{measure.floor[task.name]:.3f}" for task in results.tasks]
    table.add_row(measure.floor_name.removeprefix("always the "), "", *floor, end_section=True)
    last = len(results.tasks) - 1
    for method in results.methods:
        for i, task in enumerate(results.tasks):
            cells = [format_statistic(measure.at(method, i, j)) for j in range(i + 1)] + [""] * (last - i)
            table.add_row(Text(method.label if i == 0 else ""), task.name, *cells, end_section=i == last)
    return table


def _summary(results: RunResults, measure: TaskMeasure) -> Table:
    transfers = [measure.forward_transfer(method) for method in results.methods]
    forward = any(transfer is not None for transfer in transfers)
    matched = measure.figure == "loss" and any(method.average_accuracy.mean > 0 for method in results.methods)
    table = _plain("\nAfter the last task")
    headings = [_in_two_lines(name) for name in (measure.learned_name, measure.when_learned_name)]
    _columns(table, [*headings, "for-\ngetting", *(["exact\nmatch"] if matched else []), "perplexity", "rise", "drift"])
    _columns(table, ["forward\ntransfer"] if forward else [])
    if measure.figure == "accuracy":
        table.add_row("majority class", _floor(measure))
    first = results.methods[0].seeds[0].text()[0]
    blank = [""] * (4 if matched else 3)
    table.add_row("base model", *blank, format_statistic(Statistic.of([first.perplexity]), digits=2))
    for method, transfer in zip(results.methods, transfers, strict=True):
        table.add_row(
            Text(method.label),
            _stacked(measure.learned(method)),
            _stacked(measure.when_learned(method)),
            _stacked(measure.forgetting(method), signed=True),
            *([_stacked(method.average_accuracy)] if matched else []),
            _stacked(method.perplexity, digits=2),
            _below(format_percent(method.perplexity_rise)),
            _stacked(method.drift, digits=4),
            *([_stacked(transfer, signed=True)] if forward else []),
        )
    return table


def _texts(results: RunResults) -> Table | None:
    """Return the forgetting on the texts that no method uses, if there are several."""
    if len(results.unseen) < 2:
        return None
    table = _plain(f"\nForgetting on the {len(results.unseen)} texts that no method uses")
    _columns(table, ["KL, nats:\nmean", "\nworst", "rise of perplexity:\nmean", "\nworst"])
    for point in points(results):
        table.add_row(
            Text(point.method.label),
            *(_stacked(figure, digits=4) for figure in (point.mean, point.worst)),
            *(_percent(figure) for figure in (point.mean_rise, point.worst_rise)),
        )
    return table


def _guarded(results: RunResults) -> Table | None:
    table = _plain("\nThe limit on forgetting, on the guard's own text")
    table.add_column("after")
    _columns(table, ["predicted,\nnats", "perplexity\nrose by", "KL,\nnats", "allowed", "change\nkept"])
    for method in results.methods:
        for i, task in enumerate(results.tasks):
            record = method.guarded(i)
            if record is not None:
                table.add_row(
                    Text(method.label if i == 0 else ""),
                    task.name,
                    _stacked(record["predicted"], digits=4),
                    _percent(record["perplexity_rise"]),
                    _stacked(record["kl"], digits=4),
                    allowed(record),
                    _stacked(record["scale"], digits=2),
                )
    return table if table.rows else None


def _cost(results: RunResults) -> Table:
    table = _plain("\nCost")
    _columns(table, ["trained\nparameters", "adapter\nfile", "time of\na seed", "tokens a\nsecond"])
    for method in results.methods:
        speed = method.tokens_per_second
        table.add_row(
            Text(method.label),
            f"{method.trainable_parameters:,}",
            format_size(method.adapter_bytes),
            format_time(method.seconds),
            "-" if speed is None else f"{speed:,.0f}",
        )
    return table


def _notes(results: RunResults) -> list[Text]:
    text = next(iter(results.heldout.values()))
    lines = [f"Perplexity and drift (nats per token) on {text}. Trained parameters and adapter file without heads."]
    counts = sorted({len(method.seeds) for method in results.methods})
    if counts != [1]:
        lines[0] += (
            f" Mean and standard deviation of {' to '.join(map(str, dict.fromkeys(counts[:1] + counts[-1:])))} "
            f"{'runs, over seeds and orders' if results.in_orders else 'seeds'}."
        )
    if results.missing:
        lines.insert(0, format_missing(results))
    for task in results.tasks:
        if said := format_too_long(task):
            lines.append(f"Examples of {task.name} that are longer than max_length: {said}.")
        if task.evaluation_in_train:
            lines.append(format_in_train(task.name, task.evaluation_in_train, task.evaluation_examples))
    for j, task in enumerate(results.tasks):
        unfinished = results.unfinished(j)
        if unfinished:
            lines.append(f"Up to {unfinished:.0%} of the answers generated for {task.name} were cut off unfinished.")
    if results.protocol:
        lines.append(f"These switches follow the paper's reference code: {', '.join(results.protocol)}.")
    return [Text(line, style="dim") for line in lines]


def _plain(title: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    table.add_column("method", overflow="fold")
    return table


def _columns(table: Table, headings: Iterable[str]) -> None:
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)


def _in_two_lines(heading: str) -> str:
    return "\n".join(heading.split(" ", 1))


def _stacked(statistic: Statistic | None, signed: bool = False, digits: int = 3) -> str:
    return "-" if statistic is None else _below(format_statistic(statistic, signed, digits))


def _percent(statistic: Statistic | None) -> str:
    return "-" if statistic is None else _below(format_percent(statistic, digits=2))


def _below(figure: str) -> str:
    """Put the deviation below the mean to keep the row narrow."""
    return figure.replace(" ±", "\n±")


def _labels(runs: Sequence[RunResults]) -> dict[str, Text]:
    """Return the labels of all methods of the runs, by name."""
    labels: dict[str, Text] = {}
    for method in (method for run in runs for method in run.methods):
        labels.setdefault(method.name, Text(method.label))
    return labels


def _compared(method: MethodResult | None, measure: TaskMeasure) -> list[str]:
    if method is None:
        return ["", "", ""]
    return [
        _stacked(measure.learned(method)),
        _stacked(measure.forgetting(method), signed=True),
        _below(format_percent(method.perplexity_rise)),
    ]


def _difference(methods: Sequence[MethodResult | None], measure: TaskMeasure) -> str:
    first, last = methods[0], methods[-1]
    if first is None or last is None:
        return ""
    return f"{measure.learned(last).mean - measure.learned(first).mean:+.3f}"


def _floor(measure: TaskMeasure) -> str:
    """Format the mean accuracy of always answering the most frequent class; nothing if the loss is shown."""
    return f"{fmean(measure.floor.values()):.3f}" if measure.figure == "accuracy" else ""
