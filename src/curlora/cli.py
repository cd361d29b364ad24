"""The command line: parse, call, print."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from curlora.continual.results import RunResults

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console()
errors = Console(stderr=True)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    """CURLoRA: fine-tune a language model again and again, and see what it forgets."""
    if version:
        print(metadata.version("curlora"))
        raise typer.Exit


@app.command()
def demo(
    out: Annotated[Path | None, typer.Option(help="Run directory to make; runs/demo-<time> if not given.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A smoke run; its figures mean nothing.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the run.")] = 0,
) -> None:
    """Fine-tune a small language model on three real tasks, one after another, by three methods."""
    out = out or Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    with _errors_for_people("Nothing was written to the run directory."), _quiet_libraries():
        console.print("Loading (the first time fetches a model and texts, about 130 MB) ...")
        from curlora.demo import run_demo

        with _progress_bars() as bars:
            results = run_demo(out, quick=quick, seed=seed, progress=lambda total: _Bar(bars, total))
    _conclude(results, out)


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe: a YAML file.")],
    out: Annotated[Path | None, typer.Option(help="Run directory; runs/<name of the recipe> if not given.")] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="key.key=value: change an entry of the recipe. May be repeated.")
    ] = None,
) -> None:
    """Run a recipe: a stream of tasks by several methods. On a directory that holds part of it, go on."""
    out = out or Path("runs") / recipe.stem
    with _errors_for_people("The same command goes on with the method it was at."), _quiet_libraries():
        console.print("Loading ...")
        from curlora.continual.recipe import load_recipe, run_recipe
        from curlora.report import write_report

        loaded = load_recipe(recipe, changes or [])
        with _progress_bars() as bars:
            results = run_recipe(loaded, out, progress=lambda total: _Bar(bars, total))
        write_report(results, out / "report.html")
    _conclude(results, out)


@app.command()
def report(directory: Annotated[Path, typer.Argument(help="A run directory, with its results.json.")]) -> None:
    """Print a run again and write its report.html anew."""
    with _errors_for_people():
        from curlora.continual.results import RunResults
        from curlora.report import write_report

        results = RunResults.load(directory / "results.json")
        write_report(results, directory / "report.html")
    _conclude(results, directory)


def main() -> None:
    """Entry point of the ``curlora`` command."""
    app()


def print_results(results: RunResults) -> None:
    """Print a run as two tables."""
    from curlora.report import format_size, format_time

    matrix = Table(title=f"{results.title}: accuracy", title_justify="left", box=SIMPLE_HEAD)
    for heading in ("method", "after"):
        matrix.add_column(heading)
    for task in results.tasks:
        matrix.add_column(task.name, justify="right")
    matrix.add_row("majority class", "", *(f"{task.majority_rate:.3f}" for task in results.tasks), end_section=True)
    for method in results.methods:
        for i, row in enumerate(method.accuracy):
            cells = [f"{value:.3f}" for value in row] + [""] * (len(results.tasks) - len(row))
            last = i == len(method.accuracy) - 1
            matrix.add_row(method.label if i == 0 else "", results.tasks[i].name, *cells, end_section=last)
    console.print(matrix)

    summary = Table(title="After the last task", title_justify="left", box=None, padding=(0, 1, 0, 0))
    summary.add_column("method", no_wrap=True)
    for heading in (
        "average\naccuracy",
        "for-\ngetting",
        "perplexity",
        "rise",
        "trained\nnumbers",
        "adapter\nfile",
        "time",
    ):
        summary.add_column(heading, justify="right", no_wrap=True)
    summary.add_row("base model", "", "", f"{results.methods[0].perplexity[0]:.2f}")
    for method in results.methods:
        summary.add_row(
            method.label,
            f"{method.average_accuracy:.3f}",
            "-" if method.forgetting is None else f"{method.forgetting:+.3f}",
            f"{method.perplexity[-1]:.2f}",
            f"{100 * method.perplexity_rise:+.1f} %",
            f"{method.trainable_parameters:,}",
            format_size(method.adapter_bytes),
            format_time(method.seconds),
        )
    console.print(summary)
    note = f"Perplexity of {results.heldout}. Trained numbers and file without the heads."
    console.print(note, style="dim", highlight=False)


class _Bar:
    """Shows a run's progress as one bar."""

    def __init__(self, bars: Progress, total: float) -> None:
        self.bars = bars
        self.task = bars.add_task("", total=total)

    def stage(self, text: str) -> None:
        self.bars.update(self.task, description=text.ljust(42))

    def advance(self, units: float) -> None:
        self.bars.advance(self.task, units)


def _progress_bars() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def _conclude(results: RunResults, directory: Path) -> None:
    print_results(results)
    text = f"\nReport: {directory / 'report.html'}\nFigures and adapters: {directory}"
    console.print(Text(text), soft_wrap=True)


@contextlib.contextmanager
def _errors_for_people(after_interrupt: str = "") -> Iterator[None]:
    """Turn what a user can mend into one message and a non-zero exit; let real faults keep their trace."""
    try:
        yield
    except KeyboardInterrupt:
        errors.print(f"Interrupted. {after_interrupt}", highlight=False)
        raise typer.Exit(130) from None
    except Exception as error:
        from curlora.continual.recipe import RecipeError
        from curlora.continual.results import ResultsError
        from curlora.continual.run import RunDirectoryError
        from curlora.demo.assets import AssetError

        if not isinstance(error, (AssetError, RecipeError, ResultsError, RunDirectoryError, OSError)):
            raise
        errors.print("[bold red]Error:[/]", Text(str(error)), highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Keep the libraries' bars and notices off the screen."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.filterwarnings("ignore", category=FutureWarning)
        yield


if __name__ == "__main__":
    main()
