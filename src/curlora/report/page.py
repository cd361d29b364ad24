"""One self-contained HTML page with the tables and plots of one or several runs; it needs no network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from statistics import fmean
from typing import Any

import jinja2
import yaml
from markupsafe import Markup, escape

from curlora.continual.results import MethodResult, RunResults, Statistic
from curlora.continual.task_measure import TaskMeasure
from curlora.continual.tradeoff import Limit, Point, best_within, limited_text, limits_of, points
from curlora.continual.united_runs import differing, unite
from curlora.report.formatting import (
    allowed,
    format_missing,
    format_number,
    format_percent,
    format_size,
    format_statistic,
    format_time,
    format_too_long,
)
from curlora.report.plots import Style, fills_of, key_of, overview_of, plots_of, styles_of
from curlora.storage import write_whole

__all__ = ["render", "write_report"]


def write_report(runs: Sequence[RunResults], path: Path | str) -> None:
    """Write the page to a file, atomically."""
    write_whole(Path(path), render(runs))


def render(runs: Sequence[RunResults]) -> str:
    """Return the page as a string.

    Runs that differ only in methods and seeds are merged first; see :func:`curlora.continual.united_runs.unite`. Each
    resulting run has its own section.
    """
    runs = unite(runs)
    styles = styles_of(runs)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters.update(measure=TaskMeasure.of, in_two_lines=_in_two_lines)
    template = environment.from_string(
        resources.files("curlora.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    )
    return template.render(
        title=runs[0].title if len(runs) == 1 else f"{len(runs)} runs side by side",
        runs=runs,
        plots=[plots_of(results, styles) for results in runs],
        overview=overview_of(runs, styles) if len(runs) > 1 else None,
        differing=differing(runs),
        keys={key: key_of(style) for key, style in styles.items()},
        run_keys=[key_of(Style("#1f2933", "o", "none"), fill) for fill in fills_of(runs)],
        seeds=_seeds,
        within=_within,
        limited=limited_text,
        points=points,
        number=format_number,
        allowed=allowed,
        text=_text,
        options=_options,
        missing=format_missing,
        too_long=format_too_long,
        figure=_cell,
        rise=partial(_cell, form=format_percent),
        time=format_time,
        size=format_size,
        mean=fmean,
        yaml=partial(yaml.safe_dump, sort_keys=False, allow_unicode=True, width=100),
    )


def _cell(statistic: Statistic | None, form: Callable[..., str] = format_statistic, **options: Any) -> Markup:
    """Format a table cell: the mean, and the deviation in small print."""
    if statistic is None:
        return Markup("–")
    mean, _, deviation = form(statistic, **options).partition(" ± ")
    return escape(mean) + (Markup(" <small>± {}</small>").format(deviation) if deviation else "")


def _in_two_lines(heading: str) -> Markup:
    return Markup("<br>").join(heading.split(" ", 1))


def _seeds(results: RunResults) -> list[int]:
    return list(dict.fromkeys(seed.seed for method in results.methods for seed in method.seeds))


def _text(method: MethodResult, name: str) -> dict[str, Statistic]:
    """Return perplexity, its rise, and drift on a held-out text after the whole stream."""
    return {
        "after": Statistic.of([seed.text(name)[-1].perplexity for seed in method.seeds]),
        "rise": method.lost(name, "rise"),
        "drift": method.lost(name),
    }


def _within(results: RunResults) -> list[tuple[Limit, dict[str, Point | None]]]:
    known = points(results)
    return [(limit, best_within(known, limit)) for limit in limits_of(results)]


def _options(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {_listed(value)}" for key, value in options.items())


def _listed(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
