"""A self-contained HTML page that shows a training: figures, loss curve and replies. It loads nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from importlib import resources
from pathlib import Path

import jinja2
from markupsafe import Markup
from matplotlib.axes import Axes

from curlora.report.plots import svg_panel
from curlora.storage import write_whole
from curlora.train.outcome import TrainOutcome
from curlora.train.tables import budget_rows, loss_row, text_rows

__all__ = ["render", "write_page"]


def write_page(outcome: TrainOutcome, path: Path) -> None:
    """Write the page atomically: the file appears complete or not at all."""
    write_whole(path, render(outcome))


def render(outcome: TrainOutcome) -> str:
    """Return the page as a string."""
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        resources.files("curlora.train").joinpath("page.html.j2").read_text(encoding="utf-8")
    )
    return template.render(
        outcome=outcome,
        loss=loss_row(outcome),
        texts=text_rows(outcome),
        budget=budget_rows(outcome),
        plots=_plots(outcome),
    )


def _plots(outcome: TrainOutcome) -> list[Markup]:
    plots = []
    for key, title in (
        ("loss", "Training loss"),
        ("drift", "Predicted forgetting"),
        ("kl_to_base", "Divergence from the base model"),
    ):
        points = [(entry["step"], entry[key]) for entry in outcome.run.log if key in entry and "step" in entry]
        if len(points) > 1:
            plots.append(svg_panel(title, partial(_curve, points)))
    return plots


def _curve(points: Sequence[tuple[float, float]], axis: Axes) -> None:
    axis.plot(*zip(*points, strict=True), color="#0072b2", linewidth=1.6)
    axis.set_xlabel("step")
    axis.set_ylabel("nats per token")
    axis.set_ylim(bottom=0)  # so that a small change does not look large
