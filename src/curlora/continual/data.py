"""The data of a recipe: tasks and held-out texts, from local files or the hub."""

from __future__ import annotations

import csv
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from curlora.continual.tasks import ChatTask, ClassificationTask, CompletionTask, Task, TaskError

__all__ = [
    "AnswersPart",
    "DataError",
    "HeldOutPart",
    "Source",
    "TaskPart",
    "read_prompts",
    "read_task",
    "read_text",
]


class DataError(ValueError):
    """Data that a recipe names is not right; says where and what."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Place(_Part):
    """A table: a local ``.tsv``, ``.csv``, ``.jsonl``, ``.json`` or ``.parquet`` file, or a data set of the hub.

    ``quoted`` says whether a TSV or CSV file uses quotation marks to enclose fields (GLUE's do not). ``columns`` names
    those of a TSV or CSV file that has no heading.
    """

    path: Path | None = None
    columns: list[str] | None = None
    quoted: bool = True
    encoding: str = "utf-8-sig"  # with or without a byte-order mark
    hub: str | None = None
    subset: str | None = None
    revision: str | None = None
    split: str | None = None

    @model_validator(mode="after")
    def _one_place(self) -> Place:
        if (self.path is None) == (self.hub is None):
            raise ValueError("give either path (a local file) or hub (a data set's id)")
        if self.hub is not None and self.split is None:
            raise ValueError("a data set of the hub needs split")
        return self


class Source(Place):
    """The examples of a split.

    Classification: ``text`` is a column, or several that are joined by ``join``, and ``label`` a column;
    ``label_names`` maps its values to names in the task's ``labels``, without it they are names, or positions.
    Completion: ``prompt`` and ``completion``, each a column or a template such as
    ``"Question: {question}\\nAnswer:"``. Chat: ``messages``, a column of conversations.

    ``shuffle`` is the seed of an order to put the rows in before the first ``limit`` of them are taken.
    """

    text: str | list[str] | None = None
    join: str = "\n"
    label: str | None = None
    label_names: dict[str | int, str] | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None
    shuffle: int | None = None
    limit: Annotated[int, Field(gt=0)] | None = None


_NEEDS = {"classification": ("text", "label"), "completion": ("prompt", "completion"), "chat": ("messages",)}


class Splits(_Part):
    """What a task is made of, and how it is trained otherwise."""

    labels: Annotated[list[str], Field(min_length=2)] | None = None
    train: Source | None = None
    evaluation: Source | None = None
    training: dict[str, Any] | None = None


class TaskPart(_Part):
    """A task of the stream.

    ``training`` holds settings that are different for this task. ``reference`` holds what is different where the
    protocol's ``data`` is ``reference``.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
    kind: Literal["classification", "completion", "chat"] = "classification"
    labels: Annotated[list[str], Field(min_length=2)] | None = None
    train: Source
    evaluation: Source
    description: str = ""
    training: dict[str, Any] = {}
    reference: Splits | None = None

    @model_validator(mode="after")
    def _complete(self) -> TaskPart:
        if (self.kind == "classification") != bool(self.labels):
            raise ValueError("labels are missing" if not self.labels else f"a task of {self.kind} has no labels")
        for split in ("train", "evaluation"):
            for key in _NEEDS[self.kind]:
                if getattr(getattr(self, split), key) is None:
                    raise ValueError(f"{split}: a task of {self.kind} needs {key}")
        if self.reference is not None:
            try:
                self.variant(reference=True)
            except ValidationError as error:
                raise ValueError(f"reference: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from error
        return self

    def variant(self, reference: bool) -> TaskPart:
        """The task as the protocol has it."""
        if not reference or self.reference is None:
            return self
        changes = self.reference.model_dump(exclude_none=True)
        return TaskPart.model_validate({**self.model_dump(exclude={"reference"}), **changes})


class HeldOutPart(Place):
    """A text whose perplexity is followed.

    A ``.txt`` file, or the column ``text`` of a table, whose rows are joined by ``join``. After the first ``skip``
    tokens, ``tokens`` of them are scored in windows of ``window`` tokens, one every ``stride`` (a whole window if not
    given); under ``perplexity: first_chunk`` only ``chunk`` tokens (a whole window if not given), at once.
    """

    name: str
    text: str = "text"
    join: str = ""
    skip: Annotated[int, Field(ge=0)] = 0
    tokens: Annotated[int, Field(ge=2)] = 8192
    window: Annotated[int, Field(ge=2)] = 512
    stride: Annotated[int, Field(gt=0)] | None = None
    chunk: Annotated[int, Field(ge=2)] | None = None

    @model_validator(mode="after")
    def _stride_fits(self) -> HeldOutPart:
        if self.stride is not None and self.stride > self.window:
            raise ValueError(f"stride {self.stride} is longer than window {self.window}")
        return self


class AnswersPart(_Part):
    """What the base model answers to ``prompts``: a list of them, or a file with one a line.

    They are sampled once for a run, at temperature 1, and kept in its directory.
    """

    name: str
    prompts: Annotated[list[str], Field(min_length=1)] | Path
    max_new_tokens: Annotated[int, Field(gt=0)] = 128
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


def read_prompts(part: AnswersPart) -> tuple[str, ...]:
    """The prompts of a recipe.

    Raises:
        DataError: if the file cannot be read or holds none.
    """
    if isinstance(part.prompts, list):
        return tuple(part.prompts)
    try:
        lines = part.prompts.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"heldout {part.name!r} ({part.prompts}) cannot be read as text: {error}") from error
    prompts = tuple(line for line in lines if line.strip())
    if not prompts:
        raise DataError(f"heldout {part.name!r}: {part.prompts} holds no prompts; one a line is expected")
    return prompts


def read_task(part: TaskPart, reference: bool = False) -> Task:
    """Read a task's data.

    Args:
        part: the task.
        reference: take its reference variant, where there is one.

    Raises:
        DataError: naming the task and file, if a file is missing, a column is not there, a label is unknown, or a
            split is empty.
    """
    part = part.variant(reference)
    fields: dict[str, Any] = dict(name=part.name, description=part.description, training=part.training)
    for split in ("train", "evaluation"):
        fields[split] = _examples(part, split, getattr(part, split))
    try:
        if part.kind == "classification":
            return ClassificationTask(labels=part.labels or (), **fields)
        return (CompletionTask if part.kind == "completion" else ChatTask)(**fields)
    except TaskError as error:
        raise DataError(str(error)) from error


def read_text(part: HeldOutPart) -> str:
    """Read a held-out text.

    Raises:
        DataError: if it cannot be read.
    """
    where = f"heldout {part.name!r} ({part.path or part.hub})"
    if part.path is not None and part.path.suffix.lower() not in _KINDS:
        try:
            return part.path.read_text(encoding=part.encoding)
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{where} cannot be read as text: {error}") from error
    table = _table(part, where)
    _check_columns(table, [part.text], where)
    rows = [row for row in table[part.text] if row]
    if any(not isinstance(row, str) for row in rows):
        raise DataError(f"{where}: the column {part.text!r} does not hold text")
    return part.join.join(rows)


def _examples(task: TaskPart, split: str, source: Source) -> list[Any]:
    where = f"task {task.name!r}, {split} ({source.path or source.hub})"
    table = _table(source, where)
    if source.shuffle is not None:
        table = table.shuffle(seed=source.shuffle)
    if source.limit is not None:
        table = table.select(range(min(source.limit, len(table))))
    read = {"classification": _labelled, "completion": _completed, "chat": _conversations}[task.kind]
    return read(task, source, table, where)


def _labelled(task: TaskPart, source: Source, table: Any, where: str) -> list[Any]:
    assert source.text is not None
    assert source.label is not None
    columns = [source.text] if isinstance(source.text, str) else source.text
    _check_columns(table, [*columns, source.label], where)
    examples = []
    for number, row in enumerate(table):
        texts = [row[column] for column in columns]
        if any(not isinstance(text, str) for text in texts):
            raise DataError(f"{where}: row {number} has no text: {texts!r}")
        label = _label(row[source.label], source, task.labels or [], f"{where}: row {number}")
        examples.append((source.join.join(texts), label))
    return examples


def _completed(task: TaskPart, source: Source, table: Any, where: str) -> list[Any]:
    assert source.prompt is not None
    assert source.completion is not None
    templates = [_template(given, table, where) for given in (source.prompt, source.completion)]
    examples = []
    for number, row in enumerate(table):
        values = {key: value for key, value in row.items() if value is not None}
        try:
            examples.append(tuple(template.format_map(values) for template in templates))
        except KeyError as error:
            raise DataError(f"{where}: row {number} has no {error.args[0]}") from error
        except (ValueError, AttributeError, IndexError) as error:
            raise DataError(f"{where}: row {number} does not fit {templates}: {error}") from error
    return examples


def _conversations(task: TaskPart, source: Source, table: Any, where: str) -> list[Any]:
    assert source.messages is not None
    _check_columns(table, [source.messages], where)
    examples = []
    for number, messages in enumerate(table[source.messages]):
        whole = isinstance(messages, list) and all(
            isinstance(m, Mapping) and {"role", "content"} <= set(m) for m in messages
        )
        if not whole:
            raise DataError(f"{where}: row {number} is not a list of messages with role and content: {messages!r}")
        examples.append([{"role": m["role"], "content": m["content"]} for m in messages])
    return examples


def _template(given: str, table: Any, where: str) -> str:
    template = given if "{" in given else f"{{{given}}}"
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise DataError(f"{where}: {given!r} is not a template: {error}") from error
    _check_columns(table, names, where)
    return template


def _check_columns(table: Any, columns: list[str], where: str) -> None:
    for column in columns:
        if column not in table.column_names:
            raise DataError(f"{where}: there is no column {column!r} among {', '.join(table.column_names)}")


def _label(value: Any, source: Source, labels: list[str], where: str) -> int:
    if source.label_names is not None:
        names = {str(key): name for key, name in source.label_names.items()}
        if str(value) not in names:
            raise DataError(f"{where} has label {value!r}, which label_names does not name")
        value = names[str(value)]
    if str(value) in labels:  # a CSV file's 0 and 1, or True and False, are read as numbers and truth values
        return labels.index(str(value))
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(labels):
        return value
    raise DataError(f"{where} has label {value!r}, which is neither one of {labels} nor a position among them")


_KINDS = {".tsv": "csv", ".csv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def _table(source: Place, where: str) -> Any:
    import datasets

    if source.hub is not None:
        try:
            return datasets.load_dataset(source.hub, source.subset, split=source.split, revision=source.revision)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise DataError(f"{where}: cannot be had from the hub: {error}") from error
    assert source.path is not None
    if not source.path.is_file():
        raise DataError(f"{where}: there is no such file")
    suffix = source.path.suffix.lower()
    if suffix not in _KINDS:
        raise DataError(f"{where}: {suffix or 'no'} is not among the file types that are read: {', '.join(_KINDS)}")
    if source.path.stat().st_size == 0:
        raise DataError(f"{where}: the file is empty")
    options: dict[str, Any] = {}
    if _KINDS[suffix] == "csv":
        options = {"delimiter": "\t" if suffix == ".tsv" else ",", "encoding": source.encoding}
        options["keep_default_na"] = False  # a text may well be "null" or "NA"
        if source.columns is not None:
            options["names"] = source.columns
        if not source.quoted:
            options["quoting"] = csv.QUOTE_NONE
    try:
        return datasets.load_dataset(_KINDS[suffix], data_files=str(source.path), split="train", **options)
    except datasets.exceptions.DatasetGenerationError as error:
        raise DataError(f"{where}: cannot be read as {suffix[1:]}: {error.__cause__ or error}") from error
    except ValueError as error:
        reason = "the file has no rows" if "no data" in str(error) else f"cannot be read as {suffix[1:]}: {error}"
        raise DataError(f"{where}: {reason}") from error
