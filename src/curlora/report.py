"""One self-contained HTML page that shows a run: table and plots, no network needed."""

from __future__ import annotations

import io
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import jinja2
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from curlora.continual.results import RunResults, write_whole

__all__ = ["format_size", "format_time", "render", "write_report"]

# Okabe and Ito's colours, which colour-blind readers can tell apart; with a marker each.
_COLOURS = ["#6b7280", "#e69f00", "#0072b2", "#009e73", "#cc79a7", "#d55e00"]
_MARKERS = ["s", "^", "o", "D", "v", "P"]
_STYLE = {"font.size": 11, "svg.fonttype": "none", "svg.hashsalt": "curlora", "font.family": "sans-serif"}


def write_report(results: RunResults, path: Path) -> None:
    """Write the page; the file appears whole or not at all."""
    write_whole(path, render(results))


def render(results: RunResults) -> str:
    """The page as a string."""
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        resources.files("curlora").joinpath("report.html.j2").read_text(encoding="utf-8")
    )
    plots = [
        (
            "What is remembered",
            "Accuracy on each task after every stage of the stream, from the moment it was learned. A falling line is "
            "forgetting. Dotted: always answering the most frequent class.",
            _plot(results, _accuracy_over_stream, columns=len(results.tasks)),
        ),
        (
            "Learning against forgetting",
            "Final average accuracy against the rise of perplexity on held-out text. Up and to the left is better.",
            _plot(results, _learning_against_forgetting),
        ),
        (
            "What it costs",
            "Trained numbers, heads not counted, on a logarithmic scale.",
            _plot(results, _trainable),
        ),
        (
            "Training",
            "Training loss over the stream, smoothed; each task starts with a fresh head.",
            _plot(results, _losses),
        ),
    ]
    return template.render(results=results, plots=plots, colours=_COLOURS, time=format_time, size=format_size)


def _plot(results: RunResults, draw: Callable[[RunResults, list[Axes]], None], columns: int = 1) -> Markup:
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(max(9.6, 3.2 * columns), 3.8), layout="constrained")  # one width: one size of text
        FigureCanvasSVG(figure)
        grid = figure.subplots(1, columns, squeeze=False, sharey=columns > 1)
        axes = list(grid[0])
        for axis in axes:
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(alpha=0.25)
        draw(results, axes)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
    svg = stream.getvalue()
    return Markup(svg[svg.index("<svg") :])


def _accuracy_over_stream(results: RunResults, axes: list[Axes]) -> None:
    stages = range(len(results.tasks))
    for j, (axis, task) in enumerate(zip(axes, results.tasks, strict=True)):
        for m, method in enumerate(results.methods):
            axis.plot(
                [i for i in stages if i >= j],
                [method.accuracy[i][j] for i in stages if i >= j],
                color=_COLOURS[m % len(_COLOURS)],
                marker=_MARKERS[m % len(_MARKERS)],
                label=method.label,
            )
        axis.axhline(task.majority_rate, color="black", linestyle=":", linewidth=1)
        axis.set_title(task.name, fontsize=11)
        axis.set_xticks(list(stages), [f"after\n{t.name}" for t in results.tasks], fontsize=9)
        axis.set_xlim(-0.3, len(results.tasks) - 0.7)
    axes[0].set_ylabel("accuracy")
    figure = axes[0].figure
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=6, frameon=False)


def _learning_against_forgetting(results: RunResults, axes: list[Axes]) -> None:
    (axis,) = axes
    for m, method in enumerate(results.methods):
        x, y = 100 * method.perplexity_rise, method.average_accuracy
        axis.scatter([x], [y], s=90, color=_COLOURS[m % len(_COLOURS)], marker=_MARKERS[m % len(_MARKERS)], zorder=3)
        axis.annotate(method.label, (x, y), textcoords="offset points", xytext=(8, 6))
    axis.axvline(0, color="black", linewidth=0.8)
    axis.margins(x=0.25, y=0.25)
    axis.set_xlabel("rise of perplexity (%)")
    axis.set_ylabel("average accuracy")


def _trainable(results: RunResults, axes: list[Axes]) -> None:
    (axis,) = axes
    trained = [(m, method) for m, method in enumerate(results.methods) if method.trainable_parameters]
    for row, (m, method) in enumerate(trained):
        axis.barh(row, method.trainable_parameters, height=0.5, color=_COLOURS[m % len(_COLOURS)])
        axis.annotate(
            f"{method.trainable_parameters:,}",
            (method.trainable_parameters, row),
            textcoords="offset points",
            xytext=(6, 0),
            va="center",
        )
    axis.set_yticks(range(len(trained)), [method.label for _, method in trained])
    if trained:
        axis.set_xscale("log")
        axis.set_xlim(
            10 ** (len(str(min(t.trainable_parameters for _, t in trained))) - 2),
            max(t.trainable_parameters for _, t in trained) * 20,
        )
    axis.set_xlabel("trained numbers")
    axis.invert_yaxis()


def _losses(results: RunResults, axes: list[Axes]) -> None:
    (axis,) = axes
    for m, method in enumerate(results.methods):
        if method.losses:
            steps, losses = zip(*method.losses, strict=True)
            axis.plot(steps, _smooth(losses), color=_COLOURS[m % len(_COLOURS)], label=method.label, linewidth=1.5)
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("cross-entropy")
    if any(method.losses for method in results.methods):
        axis.legend(frameon=False, fontsize=9)


def _smooth(values: tuple[float, ...], weight: float = 0.6) -> list[float]:
    smoothed = [values[0]]
    for value in values[1:]:
        smoothed.append(weight * smoothed[-1] + (1 - weight) * value)
    return smoothed


def format_time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def format_size(size: int) -> str:
    if size == 0:
        return "none"
    return f"{size / 1024:.1f} KiB" if size < 1024**2 else f"{size / 1024**2:.2f} MiB"
