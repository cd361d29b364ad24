"""The plots of the page as SVG: accuracy over the stream, learning against forgetting, costs and losses."""

from __future__ import annotations

import html
import io
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import Any, NamedTuple

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from curlora.continual.results import MethodResult, RunResults, Statistic
from curlora.continual.task_measure import TaskMeasure
from curlora.continual.tradeoff import Point, front, limited_text, points
from curlora.report.formatting import per_cent

__all__ = [
    "Plot",
    "Style",
    "Styles",
    "fills_of",
    "fronts_of",
    "key_of",
    "overview_of",
    "plots_of",
    "styles_of",
    "svg_panel",
]

# Okabe and Ito's colours, which colour-blind readers can distinguish. If colours repeat, markers and lines differ.
_COLOURS = ["#6b7280", "#e69f00", "#0072b2", "#009e73", "#cc79a7", "#d55e00"]
_MARKERS = ["s", "^", "o", "D", "v", "P", "X", "<", ">", "p", "*"]
_LINES = ["-", "--", "-.", ":"]
_FILLS = ["full", "none", "left", "right", "bottom", "top"]  # one for each run of a page
_RC = {"font.size": 10, "svg.fonttype": "none", "svg.hashsalt": "curlora", "font.family": "sans-serif"}
_WIDTH = 3.7  # inches: the width of a phone, and a third of the page
_FAR = 1e6  # per cent: larger rises of perplexity are not plotted


class Style(NamedTuple):
    """A method's colour, marker and line style, as matplotlib names them."""

    colour: str
    marker: str
    line: str


Styles = Mapping[tuple[str, str], Style]


class Plot(NamedTuple):
    """Panels under one title, with a legend of the methods unless each panel has its own labels."""

    title: str
    text: str
    panels: list[Markup]
    legend: bool = True


class _Point(NamedTuple):
    x: Statistic
    y: Statistic
    style: Style
    fill: str


def _identity(method: MethodResult) -> tuple[str, str]:
    return method.name, method.label


def styles_of(runs: Sequence[RunResults]) -> Styles:
    """Return a style for each method of the page, the same in every run and plot."""
    identities = dict.fromkeys(_identity(method) for run in runs for method in run.methods)
    turns = len(_COLOURS)
    return {
        identity: Style(_COLOURS[n % turns], _MARKERS[n % len(_MARKERS)], _LINES[n // turns % len(_LINES)])
        for n, identity in enumerate(identities)
    }


def fills_of(runs: Sequence[RunResults]) -> list[str]:
    """Return the fill style of each run's markers, for plots of several runs."""
    return [_FILLS[number % len(_FILLS)] for number in range(len(runs))]


def plots_of(results: RunResults, styles: Styles) -> list[Plot]:
    """Return all plots of one run, in the order of the page."""
    measure = TaskMeasure.of(results)
    results, whole = next(iter(results.by_order().values())), results  # plots of a single order show the first
    few = len(results.tasks) <= 6
    by_loss = measure.figure == "loss"
    name = measure.figure.capitalize()
    fall = "rising" if by_loss else "falling"
    plots = [
        Plot(
            f"{name} over the stream",
            f"{name} on each task after every stage of the stream, starting when it was learned. A {fall} line means "
            f"forgetting. Dotted: {measure.floor_name}." + _bars_text(results),
            [
                svg_panel(task.name, partial(_over_stream, results, measure, styles, j), height=2.8 if few else 3.4)
                for j, task in enumerate(results.tasks)
            ],
        )
    ]
    if len(results.tasks) > 1:
        plots.append(
            Plot(
                f"{name} matrices",
                "Rows: after which task. Columns: on which task. The diagonal shows what was learned, and below it "
                "what is left of that." + (" In per cent." if _in_per_cent(results, measure) else ""),
                [
                    svg_panel(
                        method.label, partial(_matrix, results, measure, method), *_matrix_size(len(results.tasks))
                    )
                    for method in results.methods
                ],
                legend=False,
            )
        )
    plots += [
        Plot(
            "Learning against perplexity and earlier tasks",
            f"{measure.learned_name.capitalize()} against the rise of perplexity on held-out text, and "
            f"{measure.when_learned_name} against forgetting of earlier tasks. Up and to the left is better."
            + _bars_text(results)
            + _unplotted(results),
            _trade_offs([whole], styles, ["full"]),
        ),
        Plot(
            "Training",
            "Smoothed training loss over the stream. Each classification task starts with a new head.",
            [svg_panel("training loss", partial(_losses, results, styles))],
        ),
    ]
    if (fronts := fronts_of(whole)) is not None:
        plots.insert(0, fronts)
    if any(method.trainable_parameters for method in results.methods):
        height = 0.9 + 0.36 * len(results.methods)
        panel = svg_panel("trained parameters", partial(_trainable, results, styles), height=height)
        plots.insert(-1, Plot("Trained parameters", "Without heads, on a logarithmic scale.", [panel], legend=False))
    return plots


def fronts_of(results: RunResults) -> Plot | None:
    """Plot learning against the divergence on texts, with one colour per entry of the recipe.

    Returns:
        The plot; ``None`` for a single text and no grid, where the rise of its perplexity says the same.
    """
    known = points(results)
    gridded = any(point.method.grid for point in known)
    entries = dict.fromkeys(point.method.entry for point in known)
    if not gridded and len(results.heldout) == 1:
        return None
    shown = [point for point in known if point.mean.mean < _FAR]
    colours = {entry: _COLOURS[n % len(_COLOURS)] for n, entry in enumerate(entries)}
    markers = {entry: _MARKERS[n % len(_MARKERS)] for n, entry in enumerate(entries)}
    figures: dict[str, Callable[[Point], Statistic]] = {f"KL on {limited_text(results)}": lambda point: point.limited}
    hidden = [name for name in results.heldout if name not in results.shown]
    if len(hidden) > 1:
        figures["KL on texts not shown, mean"] = lambda point: point.mean
        figures["KL on texts not shown, worst"] = lambda point: point.worst
    elif hidden and hidden != [limited_text(results)]:
        figures[f"KL on {hidden[0]}"] = lambda point: point.mean
    text = (
        (
            "One point for each value of the grid. A line joins the points of a method that none of its other points "
            "beats in both."
            if gridded
            else "One point for each method."
        )
        + " Up and to the left is better. KL: divergence of the predictions from the base model's, in nats per token."
        + _bars_text(results)
    )

    def draw(figure: Callable[[Point], Statistic], label: str, axis: Axes) -> None:
        for entry in entries:
            own = [point for point in shown if point.method.entry == entry]
            look: dict[str, Any] = {"color": colours[entry], "marker": markers[entry], "markersize": 6}
            for point in own:
                x, y = figure(point), point.learned
                axis.errorbar(
                    [x.mean], [y.mean], xerr=_deviations([x]), yerr=_deviations([y]), elinewidth=0.8, capsize=2,
                    linestyle="none", **look,
                )  # fmt: skip
            best = front(own, figure)
            axis.plot(
                [figure(point).mean for point in best], [point.learned.mean for point in best], linewidth=1.2,
                label=entry, **look,
            )  # fmt: skip
        axis.set_xlabel(label)
        axis.set_ylabel(TaskMeasure.of(results).learned_name)
        axis.locator_params(axis="x", nbins=4)
        axis.margins(x=0.08, y=0.12)
        axis.legend(fontsize=8, frameon=False)

    panels = [svg_panel(label, partial(draw, figure, label)) for label, figure in figures.items()]
    return Plot("Learning against forgetting", text, panels, legend=False)


def overview_of(runs: Sequence[RunResults], styles: Styles) -> Plot:
    """Return one plot of several runs."""
    text = "Every method of every run. Up and to the left is better." + "".join(map(_unplotted, runs))
    return Plot("Learning against forgetting", text, _trade_offs(runs, styles, fills_of(runs))[::-1])


def _trade_offs(runs: Sequence[RunResults], styles: Styles, fills: Sequence[str]) -> list[Markup]:
    """Plot what is learned against the rise of perplexity, and what each task gave against forgetting if it exists."""
    rise, forgotten = [], []
    measures = [TaskMeasure.of(run) for run in runs]
    for run, measure, fill in zip(runs, measures, fills, strict=True):
        for method in run.methods:
            style = styles[_identity(method)]
            rise.append(_Point(per_cent(method.perplexity_rise), measure.learned(method), style, fill))
            if (forgetting := measure.forgetting(method)) is not None:
                forgotten.append(_Point(forgetting, measure.when_learned(method), style, fill))
    learned = " or ".join(dict.fromkeys(measure.learned_name for measure in measures))
    figure = " or ".join(dict.fromkeys(measure.figure for measure in measures))
    panels = [svg_panel(f"{figure} and perplexity", partial(_points, rise, "rise of perplexity (%)", learned))]
    if forgotten:
        when_learned = " or ".join(dict.fromkeys(measure.when_learned_name for measure in measures))
        labels = ("forgetting", f"{when_learned} (plasticity)")
        panels.append(svg_panel("plasticity and forgetting", partial(_points, forgotten, *labels)))
    return panels


def _bars_text(results: RunResults) -> str:
    several = any(len(method.seeds) > 1 for method in results.methods)
    over = "seeds and orders" if results.in_orders else "seeds"
    return f" Bars: standard deviation over {over}." if several else ""


def _unplotted(results: RunResults) -> str:
    labels = [method.label for method in results.methods if not 100 * method.perplexity_rise.mean < _FAR]
    return f" Diverged, and not shown on the panel of perplexity: {', '.join(labels)}." if labels else ""


def svg_panel(title: str, draw: Callable[[Axes], None], width: float = _WIDTH, height: float = 3.2) -> Markup:
    """Draw one plot under a title, ``width`` by ``height`` inches."""
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        axis = figure.subplots()
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        axis.set_axisbelow(True)
        axis.set_title("\n".join(textwrap.wrap(title, 30)), fontsize=10)
        draw(axis)
        return _svg(figure, f'role="img" aria-label="{html.escape(title)}" ')


def key_of(style: Style, fill: str = "full") -> Markup:
    """Draw a method's line and marker for a legend."""
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(0.42, 0.17))
        FigureCanvasSVG(figure)
        figure.patch.set_alpha(0)
        axis = figure.add_axes((0, 0, 1, 1))
        axis.set_axis_off()
        axis.set_xlim(0, 1)
        axis.plot([0.03, 0.5, 0.97], [0, 0, 0], linewidth=1.8, markersize=7, markevery=[1], **_look(style, fill))
        return _svg(figure, 'class="key" aria-hidden="true" ')


def _svg(figure: Figure, attributes: str) -> Markup:
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    svg = stream.getvalue()
    return Markup(svg[svg.index("<svg") :].replace("<svg ", f"<svg {attributes}", 1))


def _look(style: Style, fill: str = "full") -> dict[str, Any]:
    look = {"color": style.colour, "marker": style.marker, "linestyle": style.line, "fillstyle": fill}
    return {**look, "markerfacecoloralt": "white"}


def _over_stream(results: RunResults, measure: TaskMeasure, styles: Styles, j: int, axis: Axes) -> None:
    stages = range(j, len(results.tasks))
    for m, method in enumerate(results.methods):
        figures = [measure.at(method, i, j) for i in stages]
        beside = 0.24 * ((m + 0.5) / len(results.methods) - 0.5)  # equal figures would hide each other
        axis.errorbar(
            [i + beside for i in stages],
            [figure.mean for figure in figures],
            yerr=_deviations(figures),
            elinewidth=0.8,
            capsize=2,
            linewidth=1.4,
            markersize=5,
            **_look(styles[_identity(method)]),
        )
    axis.axhline(measure.floor[results.tasks[j].name], color="black", linestyle=":", linewidth=1)
    names = [task.name for task in results.tasks]
    _name_ticks(axis.set_xticks, names)
    axis.set_xlim(-0.4, len(names) - 0.6)
    low, high = _span(results, measure)
    axis.set_ylim(low - 0.04, high + 0.04)
    axis.set_xlabel("after learning")
    axis.set_ylabel(results.tasks[j].metric if measure.figure == "accuracy" else "loss, nats per token")


def _name_ticks(set_ticks: Callable[..., object], names: Sequence[str], crowded: int = 24) -> None:
    """Label a horizontal axis with the names of tasks, slanted if they would touch."""
    slant = 0 if sum(map(len, names)) + len(names) <= crowded else 35 if len(names) <= 6 else 90
    alignment = {"ha": "right", "rotation_mode": "anchor"} if slant == 35 else {}
    set_ticks(range(len(names)), names, fontsize=9, rotation=slant, **alignment)


def _span(results: RunResults, measure: TaskMeasure) -> tuple[float, float]:
    """Return the smallest and largest figure of the run that is finite."""
    rows = [row for method in results.methods for seed in method.seeds for row in seed.scores]
    values = [getattr(score, measure.figure) for row in rows for score in row] + list(measure.floor.values())
    finite = [value for value in values if math.isfinite(value)]
    return min(finite), max(finite)


def _deviations(figures: Sequence[Statistic]) -> list[float] | None:
    if all(figure.deviation is None for figure in figures):
        return None
    return [figure.deviation or 0.0 for figure in figures]


def _in_per_cent(results: RunResults, measure: TaskMeasure) -> bool:
    return measure.figure == "accuracy" and len(results.tasks) > 6


def _matrix_size(tasks: int) -> tuple[float, float]:
    return min(_WIDTH, 1.1 + 0.55 * max(tasks, 2)), 1.0 + 0.28 * tasks


def _matrix(results: RunResults, measure: TaskMeasure, method: MethodResult, axis: Axes) -> None:
    names = [task.name for task in results.tasks]
    tasks = range(len(names))
    low, high = _span(results, measure)
    means = [[measure.at(method, i, j).mean if j <= i else math.nan for j in tasks] for i in tasks]
    colours = "Blues" if measure.figure == "accuracy" else "Blues_r"  # darker is better
    edges = [edge - 0.5 for edge in range(len(names) + 1)]
    axis.pcolormesh(edges, edges, means, cmap=colours, vmin=low, vmax=max(high, low + 0.01), edgecolor="white")
    axis.invert_yaxis()
    for i in tasks:
        for j in range(i + 1):
            text = f"{100 * means[i][j]:.0f}" if _in_per_cent(results, measure) else f"{means[i][j]:.3f}"
            dark = (means[i][j] > (low + high) / 2) == (measure.figure == "accuracy")
            colour = "white" if dark else "black"
            axis.text(j, i, text, ha="center", va="center", color=colour, fontsize=7 if len(names) > 4 else 9)
    axis.grid(visible=False)
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    _name_ticks(axis.set_xticks, names)
    axis.set_yticks(list(tasks), names, fontsize=9)


def _points(points: Sequence[_Point], x_label: str, y_label: str, axis: Axes) -> None:
    shown = [point for point in points if abs(point.x.mean) < _FAR]
    for x, y, style, fill in shown:
        axis.errorbar(
            [x.mean],
            [y.mean],
            xerr=_deviations([x]),
            yerr=_deviations([y]),
            elinewidth=1,
            capsize=3,
            markersize=8,
            **_look(style._replace(line="none"), fill),
        )
    if max((abs(point.x.mean) for point in shown), default=0) > 300:  # a diverged run would hide the others
        axis.set_xscale("symlog", linthresh=10)
    else:
        axis.locator_params(axis="x", nbins=4)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.margins(x=0.15, y=0.15)
    axis.set_xlabel(x_label)
    axis.set_ylabel(y_label)


def _trainable(results: RunResults, styles: Styles, axis: Axes) -> None:
    trained = [method for method in results.methods if method.trainable_parameters]
    counts = [method.trainable_parameters for method in trained]
    bars = axis.barh(
        range(len(trained)), counts, height=0.55, color=[styles[_identity(method)].colour for method in trained]
    )
    axis.bar_label(bars, [f"{count:,}" for count in counts], padding=4, fontsize=9)
    axis.set_yticks(range(len(trained)), [textwrap.fill(method.label, 16) for method in trained], fontsize=9)
    axis.set_xscale("log")
    decades = math.log10(max(counts) / min(counts)) + 1
    axis.set_xlim(min(counts) / 10, max(counts) * 10 ** (0.75 * decades))  # room for the figures
    axis.invert_yaxis()


def _losses(results: RunResults, styles: Styles, axis: Axes) -> None:
    highest = 0.0
    for method in results.methods:
        curve = _loss_curve(method)
        if curve:
            steps, losses = zip(*curve, strict=True)
            style = styles[_identity(method)]
            axis.plot(steps, _smooth(losses), color=style.colour, linestyle=style.line, linewidth=1.4)
            highest = max([highest, *filter(math.isfinite, losses)])
    if highest > 30:  # a diverged run would hide the others
        axis.set_yscale("log")
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("nats")


def _loss_curve(method: MethodResult) -> list[tuple[int, float]]:
    """Return the mean loss over seeds if they were logged at the same steps, else the first seed's losses."""
    first, *others = [seed.losses for seed in method.seeds]
    steps = [step for step, _ in first]
    if any([step for step, _ in losses] != steps for losses in others):
        return first
    return [(step, fmean(losses[n][1] for losses in (first, *others))) for n, step in enumerate(steps)]


def _smooth(values: Sequence[float], weight: float = 0.6) -> list[float]:
    smoothed: list[float] = []
    level = math.nan
    for value in values:
        if math.isfinite(value):
            level = weight * level + (1 - weight) * value if math.isfinite(level) else value
        smoothed.append(level if math.isfinite(value) else math.nan)
    return smoothed
