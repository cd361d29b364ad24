"""The commands: parse, call, print. Libraries are imported by the command that needs them."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from curlora_cli import libraries_loaded

if TYPE_CHECKING:
    from curlora.continual.recipe import Recipe
    from curlora.continual.results import RunResults
    from curlora.train import TrainOptions

# Under torchrun or accelerate launch, only the first process prints.
_FIRST_PROCESS = os.environ.get("RANK", "0") == "0"

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
console = Console(quiet=not _FIRST_PROCESS)
errors = Console(stderr=True, quiet=not _FIRST_PROCESS)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    """Fine-tune language models within a stated forgetting budget, and measure what they forget."""
    if version:
        print(metadata.version("curlora"))
        raise typer.Exit


@app.command()
def demo(
    out: Annotated[Path | None, typer.Option(help="Run directory. Default: runs/demo-<time>.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A quick check that everything runs. Its figures mean nothing.")
    ] = False,
    full: Annotated[
        bool, typer.Option("--full", help="Train four methods on three tasks in sequence. Takes longer.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the run.")] = 0,
) -> None:
    """Train a small language model with LoRA and within a budget on the same data, and compare what it forgets."""
    out = out or Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    with _errors_for_people(f"Run the command again with --out {out} to resume."), _quiet_libraries():
        console.print("Loading (the first time fetches a model and texts, about 130 MB) ...")
        from curlora.demo import comparison_table, demo_recipe, replies, replies_table

        libraries_loaded()
        recipe = demo_recipe(quick, seed, full=full)
        results = _run(recipe, out)
        if results is not None and not full:
            console.print(comparison_table(results))
            console.print(replies_table(replies(results, out, recipe.model.name)))


@app.command()
def run(
    recipe: Annotated[
        Path, typer.Argument(help="A recipe: a YAML file, or the name of a recipe that comes with curlora.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Run directory. Default: the recipe's output, or runs/<recipe name>.")
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Override an entry: key.key=value, such as training.epochs=3. May be repeated.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the recipe and print the plan without running it.")
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Distribute methods, orders and seeds over this many processes. Needs Ray."),
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Distribute them over a running Ray cluster, such as 10.0.0.1:6379.")
    ] = None,
) -> None:
    """Run a recipe: several methods on a stream of tasks. Resumes a run directory that is not finished."""
    with _errors_for_people("Run the same command again to resume from the last checkpoint."), _quiet_libraries():
        console.print("Loading ...")
        from curlora.continual.recipe_file import load_recipe

        loaded = load_recipe(recipe, changes or [])
        if dry_run:
            _print_plan(loaded, workers is not None or address is not None)
        else:
            _run(loaded, out or loaded.output or Path("runs") / recipe.stem, workers, address)


class Target(str, Enum):
    """What an adapter can be converted to."""

    lora = "lora"
    merged = "merged"


class Adapter(str, Enum):
    """The kind of an adapter to train."""

    curlora = "curlora"
    lora = "lora"


class Quantized(str, Enum):
    """The precision to which the base model is quantized for training."""

    four = "4bit"
    eight = "8bit"


class Turns(str, Enum):
    """Which of the assistant's messages are trained."""

    all = "all"
    last = "last"


@app.command()
def train(
    data: Annotated[
        str,
        typer.Argument(
            help="Conversations, or prompts with completions: a .jsonl, .json, .csv, .tsv or .parquet file, or the id "
            "of a data set on the hub."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder for the adapter, its model card, the report and the figures.")],
    model: Annotated[
        str | None, typer.Option(help="The base model's folder or hub id. Default: the base model of --continue-from.")
    ] = None,
    max_forgetting: Annotated[
        str, typer.Option(help="The most that perplexity on the guard's text may rise: 1% or 0.01.")
    ] = "1%",
    adapter: Annotated[
        Adapter | None,
        typer.Option(
            help="The kind of a new adapter: curlora trains under a guard, lora under a penalty. Default: curlora."
        ),
    ] = None,
    continue_from: Annotated[str | None, typer.Option(help="Continue training this CURLoRA or LoRA adapter.")] = None,
    guard_text: Annotated[
        list[str] | None,
        typer.Option(
            help="A file of text that the model must not forget: NAME=PATH or PATH. May be repeated. Default: text "
            "that the model writes itself."
        ),
    ] = None,
    limit: Annotated[
        list[str] | None,
        typer.Option(help="NAME=1%: the limit of one --guard-text, instead of --max-forgetting. May be repeated."),
    ] = None,
    other_text: Annotated[
        list[str] | None,
        typer.Option(help="A file of text that is only measured: NAME=PATH or PATH. May be repeated."),
    ] = None,
    lifetime: Annotated[
        str | None, typer.Option(help="The limit over all trainings of this adapter together: 3% or 0.03.")
    ] = None,
    evaluation: Annotated[
        str | None,
        typer.Option("--eval", help="Held-out examples. Default: a share of the data."),
    ] = None,
    split: Annotated[str, typer.Option(help="The split of a hub data set.")] = "train",
    subset: Annotated[str | None, typer.Option(help="The subset of a hub data set.")] = None,
    columns: Annotated[
        str | None, typer.Option(help="PROMPT,COMPLETION: the names of these columns, if they differ.")
    ] = None,
    turns: Annotated[Turns, typer.Option(help="Which of the assistant's messages are trained.")] = Turns.all,
    epochs: Annotated[int, typer.Option(help="Passes over the training examples.")] = 3,
    batch_size: Annotated[int, typer.Option(help="Examples in a batch.")] = 8,
    gradient_accumulation: Annotated[int, typer.Option(help="Batches in an optimizer step.")] = 1,
    max_length: Annotated[int, typer.Option(help="Tokens of an example; longer ones are cut.")] = 1024,
    rank: Annotated[int | None, typer.Option(help="Rank of the adapter. Default: 32; of LoRA 16.")] = None,
    target_modules: Annotated[
        str | None,
        typer.Option(help="Layers to adapt: names separated by commas, a regular expression, or all-linear."),
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Default: by a rule for the adapter.")] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of the held-out split, the order of the examples and the adapter's draws.")
    ] = 0,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Show replies to this prompt. May be repeated. Default: prompts of three held-out examples."),
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="A file of prompts to show replies to, one per line.")] = None,
    quantize: Annotated[
        Quantized | None, typer.Option(help="Quantize the base model with bitsandbytes while training.")
    ] = None,
    export: Annotated[Target | None, typer.Option(help="Also export a LoRA adapter, or the merged model.")] = None,
    report_to: Annotated[
        list[str] | None, typer.Option(help="A tracker of transformers' Trainer, such as tensorboard. May be repeated.")
    ] = None,
    bf16: Annotated[
        bool | None, typer.Option("--bf16/--no-bf16", help="Compute in bfloat16. Default: on GPUs that support it.")
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option(
            "--gradient-checkpointing/--no-gradient-checkpointing",
            help="Use less memory and more time. Default: on GPUs.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and print the plan without training.")
    ] = False,
) -> None:
    """Fine-tune a model on your own data within a forgetting budget. Resumes a folder that is not finished."""
    with _errors_for_people("Run the same command again to resume from the last checkpoint."), _quiet_libraries():
        console.print("Loading ...")
        from curlora import train as training

        options = training.TrainOptions(
            data=data,
            out=out,
            model=model,
            max_forgetting=training.parse_share(max_forgetting),
            adapter=adapter and adapter.value,
            continue_from=continue_from,
            guard_texts=training.parse_texts(guard_text or []),
            limits=training.parse_limits(limit or []),
            other_texts=training.parse_texts(other_text or [], "--other-text"),
            lifetime=None if lifetime is None else training.parse_share(lifetime, "--lifetime"),
            split=split,
            subset=subset,
            columns=training.parse_columns(columns),
            turns=turns.value,
            evaluation=evaluation,
            quantize=quantize and quantize.value,
            export=export and export.value,
            epochs=epochs,
            batch_size=batch_size,
            gradient_accumulation=gradient_accumulation,
            max_length=max_length,
            rank=rank,
            target_modules=training.parse_targets(target_modules),
            learning_rate=learning_rate,
            seed=seed,
            prompts=training.read_prompts(prompt or [], prompts),
            report_to=report_to or [],
            bf16=bf16,
            gradient_checkpointing=gradient_checkpointing,
        )
        _train(options, dry_run)


def _train(options: TrainOptions, dry_run: bool) -> None:
    from curlora import train as training

    prepared = training.prepare(options)
    if (outcome := training.finished(prepared)) is not None:
        console.print(Text(f"{options.out} is finished: nothing was trained again."), soft_wrap=True)
    else:
        for part in training.plan_tables(prepared):
            console.print(part)
        if dry_run:
            return
        libraries_loaded()
        with _progress_bars() as bars:
            outcome = training.train(prepared, lambda total: _Bar(bars, total))
    for part in training.outcome_tables(outcome):
        console.print(part)
    for what, file in (("Report", "report.html"), ("Adapter, card and figures", "")):
        console.print(Text(f"{what}: {options.out / file}"), soft_wrap=True)


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, for completion and checks in editors."""
    with _errors_for_people(), _quiet_libraries():
        from curlora.continual.schema import recipe_schema

        sys.stdout.write(json.dumps(recipe_schema(), indent=2) + "\n")
        sys.stdout.flush()


@app.command()
def env(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Print versions, platform and devices, to paste into an issue."""
    from curlora_cli.environment import environment

    found = environment()
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        width = max(map(len, found))
        print("\n".join(f"{name:<{width}}  {value}" for name, value in found.items()))


@app.command()
def report(
    directories: Annotated[list[Path], typer.Argument(help="Run directories, each with its results.json.")],
    out: Annotated[
        Path | None,
        typer.Option(help="The page to write. Default: report.html, in the run directory if there is only one."),
    ] = None,
) -> None:
    """Write a report page of one or several runs, and print their tables."""
    with _errors_for_people(), _quiet_libraries():
        from curlora.continual.results import RunResults
        from curlora.report import write_report

        libraries_loaded()
        runs = [RunResults.load(directory / "results.json") for directory in directories]
        page = out or (directories[0] / "report.html" if len(directories) == 1 else Path("report.html"))
        write_report(runs, page)
        for results in runs:
            print_results(results)
    console.print(Text(f"\nReport: {page}"), soft_wrap=True)


@app.command()
def compare(
    directories: Annotated[list[Path], typer.Argument(help="Two or more run directories, each with its results.json.")],
) -> None:
    """Print runs side by side, a row for each method, and say where they are not comparable."""
    if len(directories) < 2:
        raise typer.BadParameter("give two or more run directories", param_hint="DIRECTORIES")
    with _errors_for_people(), _quiet_libraries():
        from curlora.continual.results import RunResults
        from curlora.continual.united_runs import unite
        from curlora.report.tables import comparison, within_limits

        runs = [RunResults.load(directory / "results.json") for directory in directories]
        console.print(comparison(runs, [str(directory) for directory in directories]))
        merged = unite(runs)
        for results in merged:
            for table in within_limits(results, of=results.title if len(merged) > 1 else ""):
                console.print(table)


_BASE_HELP = "The base model's folder or hub id. Default: the one that the adapter names."


@app.command()
def convert(
    adapter: Annotated[str, typer.Argument(help="A saved CURLoRA adapter: a folder, or a hub id.")],
    to: Annotated[
        Target, typer.Option(help="lora: an ordinary LoRA adapter; merged: the base model with the update added.")
    ],
    out: Annotated[Path, typer.Option(help="The folder to write. It must be new or empty.")],
    base: Annotated[str | None, typer.Option(help=_BASE_HELP)] = None,
) -> None:
    """Convert an adapter, without loss, to a LoRA adapter or a merged model."""
    with _errors_for_people(), _quiet_libraries():
        from curlora.convert import AdapterError, load_with_base, save_as_lora, save_merged

        libraries_loaded()
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise AdapterError(f"{out} exists and is not an empty folder: nothing was written")
        model = load_with_base(adapter, base)
        try:
            if to is Target.lora:
                save_as_lora(out, model)
            else:
                save_merged(out, model)
        except BaseException:  # a partial result could be mistaken for a complete one
            shutil.rmtree(out, ignore_errors=True)
            raise
    console.print(Text(f"Written: {out}"), soft_wrap=True)


@app.command()
def inspect(
    adapter: Annotated[Path, typer.Argument(help="The folder of a saved CURLoRA adapter.")],
    base: Annotated[str | None, typer.Option(help=_BASE_HELP)] = None,
    with_base: Annotated[
        bool, typer.Option("--with-base", help="Load the base model and print how far each weight moves.")
    ] = False,
) -> None:
    """Print what an adapter contains; with its base model also how far it moves each weight."""
    with _errors_for_people(), _quiet_libraries():
        from curlora.inspection import adapter_tables, inspect_adapter

        for part in adapter_tables(inspect_adapter(adapter, base, with_base=with_base)):
            console.print(part)


def _run(recipe: Recipe, directory: Path, workers: int | None = None, address: str | None = None) -> RunResults | None:
    """Run a recipe and print its results. Return them in the first process, and ``None`` in the others."""
    from curlora.continual.launch import run_recipe
    from curlora.report import write_report

    libraries_loaded()
    with _progress_bars() as bars:
        results = run_recipe(
            recipe, directory, progress=lambda total: _Bar(bars, total), workers=workers, address=address
        )
    if not _FIRST_PROCESS:
        return None
    page = directory / "report.html"
    write_report([results], page)
    print_results(results)
    console.print(Text(f"\nReport: {page}\nFigures and adapters: {directory}"), soft_wrap=True)
    return results


def _print_plan(recipe: Recipe, workers: bool) -> None:
    from curlora.continual.plan import make_plan
    from curlora.report.plan import plan_tables

    for part in plan_tables(make_plan(recipe, workers)):
        console.print(part)


def print_results(results: RunResults) -> None:
    """Print a run as tables."""
    from curlora.report.tables import results_tables

    for part in results_tables(results):
        console.print(part)


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
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


@contextlib.contextmanager
def _errors_for_people(after_interrupt: str = "") -> Iterator[None]:
    """Turn errors that a user can fix into one message and a non-zero exit. Other errors keep their traceback."""
    try:
        yield
    except KeyboardInterrupt:
        errors.print(f"Interrupted. {after_interrupt}", highlight=False, soft_wrap=True)
        raise typer.Exit(130) from None
    except Exception as error:
        from curlora.continual.errors import RecipeError, RunError
        from curlora.continual.results import ResultsError
        from curlora.continual.tasks import TaskError
        from curlora.convert import AdapterError
        from curlora.demo.assets import AssetError
        from curlora.guard import GuardError
        from curlora.storage import is_disk_full
        from curlora.train.errors import TrainError

        known = (
            AdapterError, AssetError, GuardError, RecipeError, ResultsError, RunError, TaskError, TrainError, OSError
        )  # fmt: skip
        full = is_disk_full(error) and not isinstance(error, known[:-1])  # these name the disk
        if not full and not isinstance(error, known):
            raise
        message = _DISK_FULL if full else str(error)
        errors.print("[bold red]Error:[/]", Text(message), highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None


_DISK_FULL = "The disk is full. Finished work is not lost: free some space and run the same command again."


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Hide progress bars and notices of other libraries."""
    logging.disable(logging.WARNING)  # their notices at import are about extensions that are not used
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging as transformers_logging

    from curlora.continual.errors import RecipeWarning

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    show, said = warnings.showwarning, set()

    def show_for_people(message: Warning | str, category: type[Warning], *where: Any) -> None:
        # A warning of a callback or a tuner is attributed to the library that calls it.
        callers = {"curlora", "peft", "transformers"} & set(Path(str(where[0])).parts)
        if str(message) in said:
            return
        said.add(str(message))
        if issubclass(category, RecipeWarning) or (issubclass(category, UserWarning) and callers):
            errors.print("[yellow]Warning:[/]", Text(str(message)), highlight=False, soft_wrap=True)
        else:
            show(message, category, *where)

    with warnings.catch_warnings():
        warnings.showwarning = show_for_people  # type: ignore[assignment]
        if not sys.warnoptions:
            warnings.filterwarnings("ignore", category=FutureWarning)
        yield
