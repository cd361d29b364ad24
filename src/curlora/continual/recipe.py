"""A run as a YAML file: the model, the stream of tasks, the methods, the held-out text."""

from __future__ import annotations

import csv
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import yaml
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from transformers import AutoModelForCausalLM, AutoTokenizer

from curlora.continual.methods import Method
from curlora.continual.results import RunResults, write_whole
from curlora.continual.run import RunDirectoryError, Stream, run_stream
from curlora.continual.sequence import HeldOut, Progress, Settings
from curlora.continual.tasks import Task

__all__ = ["Recipe", "RecipeError", "build", "load_recipe", "read_task", "run_recipe"]


class RecipeError(ValueError):
    """A recipe, or data that it names, is not right; says where and what."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


# Names of folders of a run, and of heads.
_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]


class ModelPart(_Part):
    """The base model: a folder or a hub id, and a GGUF file in it where there is one."""

    name: str
    gguf_file: str | None = None
    dtype: str = "float32"

    @field_validator("dtype")
    @classmethod
    def _known(cls, value: str) -> str:
        if not isinstance(getattr(torch, value, None), torch.dtype):
            raise ValueError(f"{value!r} is not a dtype of torch, such as float32 or bfloat16")
        return value


class Source(_Part):
    """Labelled texts: a local ``.tsv``, ``.csv``, ``.jsonl`` or ``.parquet`` file, or a data set of the hub.

    ``text`` is a column, or several that are joined by line breaks. ``quoted`` says whether a TSV or CSV
    file uses quotation marks to enclose fields (GLUE's do not). ``label_names`` maps values of the label column to
    names in the task's ``labels``; without it they are names, or positions.
    """

    path: Path | None = None
    hub: str | None = None
    subset: str | None = None
    split: str | None = None
    text: str | list[str]
    label: str
    label_names: dict[str | int, str] | None = None
    quoted: bool = True
    limit: Annotated[int, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _one_place(self) -> Source:
        if (self.path is None) == (self.hub is None):
            raise ValueError("give either path (a local file) or hub (a data set's id)")
        if self.hub is not None and self.split is None:
            raise ValueError("a data set of the hub needs split")
        return self


class TaskPart(_Part):
    """A classification task."""

    name: _Name
    labels: Annotated[list[str], Field(min_length=2)]
    train: Source
    evaluation: Source
    description: str = ""


class MethodPart(_Part):
    """A method: ``frozen``, or any method of PEFT by its ``peft_type`` with its configuration's options."""

    name: _Name
    label: str | None = None
    peft_type: str | None = None
    options: dict[str, Any] = {}
    learning_rate: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _complete(self) -> MethodPart:
        if self.peft_type is None:
            if self.options or self.learning_rate is not None:
                raise ValueError("without peft_type only the heads are trained: leave out options and learning_rate")
            return self
        if self.learning_rate is None:
            raise ValueError("learning_rate is missing")
        self.configuration()
        return self

    def configuration(self) -> PeftConfig:
        """The PEFT configuration.

        Raises:
            ValueError: if the method or one of its options is unknown, or an option is not allowed.
        """
        known = {str(member.value): cls for member, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
        config_class = known.get(str(self.peft_type).upper())
        if config_class is None:
            raise ValueError(f"peft_type {self.peft_type!r} is not one of {', '.join(sorted(known)).lower()}")
        allowed = set(inspect.signature(config_class).parameters)
        unknown = sorted(set(self.options) - allowed)
        if unknown:
            raise ValueError(f"{config_class.__name__} has no option {unknown[0]!r}")
        try:
            return config_class(**self.options)
        except TypeError as error:
            raise ValueError(f"{config_class.__name__}: {error}") from error


class HeldOutPart(_Part):
    """A UTF-8 text file, of which the first ``tokens`` are scored."""

    name: str
    path: Path
    tokens: Annotated[int, Field(ge=2)] = 8192


class TrainingPart(_Part):
    """See :class:`curlora.continual.sequence.Settings`."""

    epochs: Annotated[int, Field(gt=0)] = Settings.epochs
    batch_size: Annotated[int, Field(gt=0)] = Settings.batch_size
    evaluation_batch_size: Annotated[int, Field(gt=0)] = Settings.evaluation_batch_size
    max_length: Annotated[int, Field(gt=0)] = Settings.max_length
    head_learning_rate: Annotated[float, Field(gt=0)] = Settings.head_learning_rate
    schedule: str = Settings.schedule
    warmup: Annotated[float, Field(ge=0)] = Settings.warmup
    window: Annotated[int, Field(ge=2)] = Settings.window
    seed: int = Settings.seed


class Recipe(_Part):
    """A run. Paths in it are relative to the recipe's own folder."""

    title: str
    model: ModelPart
    tasks: Annotated[list[TaskPart], Field(min_length=1)]
    methods: Annotated[list[MethodPart], Field(min_length=1)]
    heldout: HeldOutPart
    training: TrainingPart = TrainingPart()

    @model_validator(mode="after")
    def _distinct(self) -> Recipe:
        for kind in ("tasks", "methods"):
            names = [part.name for part in getattr(self, kind)]
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"two {kind} are called {twice[0]!r}")
        return self


def load_recipe(path: Path, changes: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        path: the YAML file.
        changes: ``key.key=value`` each, a number in the place of a key for an entry of a list; the value is YAML.

    Raises:
        RecipeError: if the file is not there, is not YAML, or an entry is missing, unknown or not allowed: with
            every such entry named.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(
            f"{path} holds no recipe: a mapping with title, model, tasks, methods and heldout is expected"
        )
    for change in changes:
        _apply(content, change)
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        entries = [f"  {'.'.join(map(str, e['loc'])) or 'recipe'}: {_message(e)}" for e in error.errors()]
        raise RecipeError(f"{path} is not a recipe that can be run:\n" + "\n".join(entries)) from error
    return _with_absolute_paths(recipe, path.absolute().parent)


def build(recipe: Recipe) -> Stream:
    """Read the data of a recipe, then its model.

    Raises:
        RecipeError: naming the task or file, if a file is missing, a column is not there, a label is unknown, a
            split is empty or the held-out text is too short: all of that before the model is loaded.
    """
    tasks = [read_task(part) for part in recipe.tasks]
    text = _read_text(recipe.heldout)
    tokenizer = AutoTokenizer.from_pretrained(recipe.model.name, gguf_file=recipe.model.gguf_file)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokens = torch.tensor(tokenizer(text)["input_ids"][: recipe.heldout.tokens])
    if len(tokens) < 2:
        raise RecipeError(f"heldout: {recipe.heldout.path} becomes {len(tokens)} tokens; perplexity needs at least 2")

    def load_model() -> torch.nn.Module:
        dtype = getattr(torch, recipe.model.dtype)
        return AutoModelForCausalLM.from_pretrained(recipe.model.name, gguf_file=recipe.model.gguf_file, dtype=dtype)

    return Stream(
        title=recipe.title,
        base_model=recipe.model.name,
        load_model=load_model,
        tokenizer=tokenizer,
        tasks=tasks,
        methods=[_method(part) for part in recipe.methods],
        heldout=HeldOut(recipe.heldout.name, tokens),
        settings=Settings(**recipe.training.model_dump()),
    )


def run_recipe(recipe: Recipe, directory: Path, progress: Callable[[float], Progress]) -> RunResults:
    """Run a recipe, or go on with it where ``directory`` holds part of it.

    Methods may have been added to the recipe since; anything else must be as it was.

    Args:
        recipe: what to run.
        directory: the run directory; made if missing.
        progress: given the whole amount of work, gives what hears about it.

    Returns:
        The measurements, also in ``directory / "results.json"``.

    Raises:
        RecipeError: as :func:`build`.
        RunDirectoryError: if ``directory`` holds a run of another recipe, or another process is at it.
    """
    saved = directory / "recipe.json"
    if saved.exists():
        before = Recipe.model_validate_json(saved.read_text(encoding="utf-8"))
        # Both through JSON, which knows no keys but strings.
        changed = _changes(before, Recipe.model_validate_json(recipe.model_dump_json()), directory)
        if changed:
            raise RunDirectoryError(
                f"{directory} holds a run of another recipe: {', '.join(changed)} changed. Choose another folder, or "
                "undo the change."
            )
    stream = build(recipe)
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(saved, recipe.model_dump_json(indent=2))
    return run_stream(stream, directory, progress)


def _changes(before: Recipe, now: Recipe, directory: Path) -> list[str]:
    changed = [
        part for part in ("model", "tasks", "heldout", "training") if getattr(before, part) != getattr(now, part)
    ]
    methods = {method.name: method for method in now.methods}
    begun = [method for method in before.methods if (directory / method.name).exists()]
    return changed + [f"method {method.name!r}" for method in begun if methods.get(method.name) != method]


def _method(part: MethodPart) -> Method:
    adapter = None if part.peft_type is None else part.configuration
    return Method(part.name, part.label or part.name, adapter, part.learning_rate or 0.0)


def read_task(part: TaskPart) -> Task:
    """Read a task's data.

    Raises:
        RecipeError: as :func:`build`.
    """
    splits = {split: _examples(part, split, getattr(part, split)) for split in ("train", "evaluation")}
    try:
        return Task(name=part.name, labels=part.labels, description=part.description, **splits)
    except ValueError as error:
        raise RecipeError(str(error)) from error


def _examples(task: TaskPart, split: str, source: Source) -> list[tuple[str, int]]:
    where = f"task {task.name!r}, {split} ({source.path or source.hub})"
    table = _table(source, where)
    columns = [source.text] if isinstance(source.text, str) else source.text
    for column in (*columns, source.label):
        if column not in table.column_names:
            raise RecipeError(f"{where}: there is no column {column!r} among {', '.join(table.column_names)}")
    if source.limit is not None:
        table = table.select(range(min(source.limit, len(table))))
    examples = []
    for number, row in enumerate(table):
        texts = [row[column] for column in columns]
        if any(not isinstance(text, str) for text in texts):
            raise RecipeError(f"{where}: row {number} has no text: {texts!r}")
        examples.append(("\n".join(texts), _label(row[source.label], source, task.labels, f"{where}: row {number}")))
    return examples


def _label(value: Any, source: Source, labels: list[str], where: str) -> int:
    if source.label_names is not None:
        if value not in source.label_names:
            raise RecipeError(f"{where} has label {value!r}, which label_names does not name")
        value = source.label_names[value]
    if value in labels:
        return labels.index(value)
    if isinstance(value, int) and 0 <= value < len(labels):
        return value
    raise RecipeError(f"{where} has label {value!r}, which is neither one of {labels} nor a position among them")


def _table(source: Source, where: str) -> Any:
    import datasets

    if source.hub is not None:
        return datasets.load_dataset(source.hub, source.subset, split=source.split)
    assert source.path is not None
    if not source.path.is_file():
        raise RecipeError(f"{where}: there is no such file")
    suffix = source.path.suffix.lower()
    options: dict[str, Any] = {}
    if suffix in (".tsv", ".csv"):
        options["delimiter"] = "\t" if suffix == ".tsv" else ","
        options["encoding"] = "utf-8-sig"  # with or without a byte-order mark
        if not source.quoted:
            options["quoting"] = csv.QUOTE_NONE
    kinds = {".tsv": "csv", ".csv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
    if suffix not in kinds:
        raise RecipeError(f"{where}: {suffix or 'no'} is not among the file types that are read: {', '.join(kinds)}")
    if source.path.stat().st_size == 0:
        raise RecipeError(f"{where}: the file is empty")
    try:
        return datasets.load_dataset(kinds[suffix], data_files=str(source.path), split="train", **options)
    except datasets.exceptions.DatasetGenerationError as error:
        raise RecipeError(f"{where}: cannot be read as {suffix[1:]}: {error.__cause__ or error}") from error


def _read_text(part: HeldOutPart) -> str:
    try:
        return part.path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"heldout: {part.path} cannot be read as UTF-8 text: {error}") from error


def _apply(content: Any, change: str) -> None:
    keys, found, value = change.partition("=")
    if not found:
        raise RecipeError(f"{change!r} is not a change: key.key=value is expected")
    *path, last = keys.split(".")
    place = content
    try:
        for key in path:
            place = place[int(key)] if isinstance(place, list) else place.setdefault(key, {})
        if isinstance(place, list):
            place[int(last)] = yaml.safe_load(value)
        else:
            place[last] = yaml.safe_load(value)
    except (ValueError, IndexError, TypeError, AttributeError) as error:
        raise RecipeError(f"{change!r} names no place in the recipe: {error}") from error


def _message(error: Any) -> str:
    return str(error["msg"]).removeprefix("Value error, ")


def _with_absolute_paths(recipe: Recipe, folder: Path) -> Recipe:
    def source(part: Source) -> Source:
        return part if part.path is None else part.model_copy(update={"path": folder / part.path.expanduser()})

    tasks = [
        part.model_copy(update={"train": source(part.train), "evaluation": source(part.evaluation)})
        for part in recipe.tasks
    ]
    heldout = recipe.heldout.model_copy(update={"path": folder / recipe.heldout.path.expanduser()})
    local = folder / recipe.model.name
    model = recipe.model.model_copy(update={"name": str(local)}) if local.is_dir() else recipe.model
    return recipe.model_copy(update={"tasks": tasks, "heldout": heldout, "model": model})
