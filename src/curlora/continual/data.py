"""The data of a recipe: tasks and held-out texts, from local files or the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy
from pydantic import AfterValidator, BaseModel, Field, ValidationError, field_validator, model_validator

from curlora.continual.answer_score import AnswerScore
from curlora.continual.tasks import ChatTask, ClassificationTask, CompletionTask, Task, TaskError
from curlora.data.conversations import read_conversations
from curlora.data.errors import DataError
from curlora.data.read_table import TABLE_SUFFIXES, Place, Table, read_table
from curlora.data.row_template import RowTemplate, RowTemplateError

__all__ = [
    "AnswersSpec",
    "DataError",
    "HeldOutSpec",
    "OwnTextSpec",
    "ScoreSpec",
    "Source",
    "TaskSpec",
    "read_prompts",
    "read_task",
    "read_text",
]


class Source(Place):
    """The examples of a split.

    Classification: ``text`` is a column, or several that are joined by ``join``. ``label`` is the column of the class.
    ``label_names`` maps its values to names in the task's ``labels``; without it the values are names or positions.

    Completion: ``prompt`` and ``completion`` are each a column or a template such as
    ``"Question: {question}\\nAnswer:"`` or ``"{answers[text][0]}"``.

    Chat: conversations in a ``layout``, which is detected if it is not given (see
    :func:`curlora.data.conversations.read_conversations`). ``messages`` names their column if it is not the
    layout's usual one. ``prompt`` and ``completion`` may be given instead.

    ``shuffle`` is the seed with which the rows are shuffled. The first ``skip`` rows are then skipped, and the next
    ``limit`` rows used.
    """

    text: str | list[str] | None = None
    join: str = "\n"
    label: str | None = None
    label_names: dict[str | int, str] | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None
    layout: Literal["messages", "sharegpt", "alpaca"] | None = None
    shuffle: int | None = None
    skip: Annotated[int, Field(ge=0)] = 0
    limit: Annotated[int, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _one_layout(self) -> Source:
        if self.layout == "alpaca" and self.messages is not None:
            raise ValueError(
                "the layout alpaca has the columns instruction, input and output: leave out messages, or choose "
                "another layout"
            )
        if self.messages is not None or self.layout is not None:
            if self.prompt is not None or self.completion is not None:
                raise ValueError("give either messages or layout, or prompt and completion")
        elif (self.prompt is None) != (self.completion is None):
            raise ValueError(f"{'prompt' if self.prompt is None else 'completion'} is missing")
        return self


_NEEDS: dict[str, tuple[str, ...]] = {
    "classification": ("text", "label"),
    "completion": ("prompt", "completion"),
    "chat": (),
}
_KEYS = {
    "classification": {"text", "join", "label", "label_names"},
    "completion": {"prompt", "completion"},
    "chat": {"prompt", "completion", "messages", "layout"},
}


def _distinct(labels: list[str]) -> list[str]:
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"{label!r} is listed twice")
    return labels


_Labels = Annotated[list[str], Field(min_length=2), AfterValidator(_distinct)]


class Splits(BaseModel, extra="forbid", frozen=True):
    """The parts of a task that its reference variant may change."""

    labels: _Labels | None = None
    train: Source | None = None
    evaluation: Source | None = None
    training: dict[str, Any] | None = None


class GenerateSpec(BaseModel, extra="forbid", frozen=True):
    """Greedy generation until the model ends the answer, or for ``max_new_tokens`` tokens."""

    max_new_tokens: Annotated[int, Field(gt=0)] = 256


class ScoreSpec(BaseModel, extra="forbid", frozen=True):
    """How the generated answers of a completion or chat task are scored.

    ``normalize`` is ``none``, ``lower``, ``gsm8k`` or a regular expression; see
    :class:`curlora.continual.answer_score.AnswerScore`.
    """

    generate: GenerateSpec
    metric: Literal["exact_match", "rouge"] = "exact_match"
    normalize: str = "none"

    @field_validator("generate", mode="before")
    @classmethod
    def _with_defaults(cls, value: Any) -> Any:
        return {} if value in (None, True) else value  # `generate:` without a value

    @model_validator(mode="after")
    def _complete(self) -> ScoreSpec:
        self.make()
        return self

    def make(self) -> AnswerScore:
        """Return the :class:`AnswerScore`.

        Raises:
            ValueError: if the normalization is unknown, or a package is missing.
        """
        try:
            return AnswerScore(self.generate.max_new_tokens, self.metric, self.normalize)
        except ImportError as error:
            raise ValueError(str(error)) from error


class TaskSpec(BaseModel, extra="forbid", frozen=True):
    """A task of the stream.

    ``training`` overrides settings for this task. ``too_long`` says what happens to an example of more than
    ``max_length`` tokens: ``cut`` removes what does not fit, ``drop`` leaves the example out. ``turns`` says which of
    the assistant's messages of a chat are trained: ``all`` or only the ``last``. ``score`` generates answers and scores
    them. ``reference`` is the task's variant for the protocol's ``data: reference``.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
    kind: Literal["classification", "completion", "chat"] = "classification"
    labels: _Labels | None = None
    train: Source
    evaluation: Source
    description: str = ""
    training: dict[str, Any] = {}
    too_long: Literal["cut", "drop"] = "cut"
    turns: Literal["all", "last"] = "all"
    score: ScoreSpec | None = None
    reference: Splits | None = None

    @model_validator(mode="after")
    def _complete(self) -> TaskSpec:
        if (self.kind == "classification") != bool(self.labels):
            raise ValueError("labels are missing" if not self.labels else f"a task of {self.kind} has no labels")
        if self.kind == "classification" and self.score is not None:
            raise ValueError("score is for completion and chat tasks; a classification task is scored by accuracy")
        if self.kind != "chat" and self.turns != "all":
            raise ValueError(f"a task of {self.kind} has no turns")
        for split in ("train", "evaluation"):
            self._check_source(split, getattr(self, split))
        if self.reference is not None:
            try:
                self.variant(reference=True)
            except ValidationError as error:
                raise ValueError(f"reference: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from error
        return self

    def _check_source(self, split: str, source: Source) -> None:
        for key in _NEEDS[self.kind]:
            if getattr(source, key) is None:
                raise ValueError(f"{split}: a task of {self.kind} needs {key}")
        misplaced = [
            key
            for key in sorted(set().union(*_KEYS.values()) - _KEYS[self.kind])
            if getattr(source, key) != Source.model_fields[key].default
        ]
        if misplaced:
            raise ValueError(f"{split}: {misplaced[0]} is not for a task of {self.kind}")
        labels = self.labels or []
        for name in (source.label_names or {}).values():
            if name not in labels:
                raise ValueError(f"{split}: label_names: {name!r} is not among the labels {', '.join(labels)}")

    def variant(self, reference: bool) -> TaskSpec:
        """Return the task, or its reference variant if ``reference`` is true and there is one."""
        if not reference or self.reference is None:
            return self
        changes = self.reference.model_dump(exclude_none=True)
        return TaskSpec.model_validate({**self.model_dump(exclude={"reference"}), **changes})


class HeldOutSpec(Place):
    """A held-out text whose perplexity is measured.

    The text is a ``.txt`` file, or the column ``text`` of a table, whose rows are joined by ``join``. The first
    ``skip`` tokens are skipped, and the next ``tokens`` tokens are scored in windows of ``window`` tokens. A window
    starts every ``stride`` tokens (``window`` if not given). Under ``perplexity: first_chunk`` only one window of
    ``chunk`` tokens (``window`` if not given) is scored.
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
    def _stride_fits(self) -> HeldOutSpec:
        if self.stride is not None and self.stride > self.window:
            raise ValueError(f"stride {self.stride} is longer than window {self.window}")
        return self


class AnswersSpec(BaseModel, extra="forbid", frozen=True):
    """The base model's answers to ``prompts``, which is a list of prompts or a file with one prompt per line.

    The answers are sampled once for a run, at temperature 1, and saved in the run directory.
    """

    name: str
    prompts: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] | Path
    max_new_tokens: Annotated[int, Field(gt=0)] = 128
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


class OwnTextSpec(BaseModel, extra="forbid", frozen=True):
    """Text that the base model writes without a prompt; see :func:`curlora.guard.own_text`.

    The text is sampled once for a run, at temperature 1, and saved in the run directory.
    """

    name: str
    written_by: Literal["model"]
    tokens: Annotated[int, Field(ge=2)] = 8192
    max_length: Annotated[int, Field(ge=2)] = 128
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


def read_prompts(part: AnswersSpec) -> tuple[str, ...]:
    """Return the prompts of a recipe.

    Raises:
        DataError: if the file cannot be read or holds no prompts.
    """
    if isinstance(part.prompts, list):
        return tuple(part.prompts)
    try:
        lines = part.prompts.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"text {part.name!r} ({part.prompts}) cannot be read as text: {error}") from error
    prompts = tuple(line for line in lines if line.strip())
    if not prompts:
        raise DataError(f"text {part.name!r}: {part.prompts} holds no prompts; one per line is expected")
    return prompts


def read_task(part: TaskSpec, reference: bool = False) -> Task:
    """Read a task's data.

    Args:
        part: the task.
        reference: read its reference variant if there is one.

    Raises:
        DataError: naming the task and file, if a file is missing or of another type than its name says, a column is
            missing, a row lacks a value, a label is unknown, or a split is empty. Rows are counted from 0 in the order
            of the file, without the header.
    """
    part = part.variant(reference)
    fields: dict[str, Any] = dict(
        name=part.name, description=part.description, training=part.training, too_long=part.too_long, numbers={}
    )
    for split in ("train", "evaluation"):
        fields[split], fields["numbers"][split] = _examples(part, split, getattr(part, split))
    try:
        if part.kind == "classification":
            return ClassificationTask(labels=part.labels or (), **fields)
        fields["score"] = None if part.score is None else part.score.make()
        return CompletionTask(**fields) if part.kind == "completion" else ChatTask(turns=part.turns, **fields)
    except TaskError as error:
        raise DataError(str(error)) from error


def read_text(part: HeldOutSpec) -> str:
    """Read a held-out text.

    Raises:
        DataError: if it cannot be read.
    """
    where = f"text {part.name!r} ({part.path or part.hub})"
    if part.path is not None and part.path.suffix.lower() not in TABLE_SUFFIXES:
        try:
            text = part.path.read_text(encoding=part.encoding)
        except (OSError, UnicodeError) as error:
            raise DataError(f"{where} cannot be read as text: {error}") from error
        if "\0" in text:
            raise DataError(f"{where} cannot be read as text: it holds NUL characters. Set encoding to its encoding")
        return text
    table = read_table(part, where)
    table.check_columns([part.text], where)
    rows = []
    for number, row in enumerate(table):
        found = row.get(part.text)
        if found is not None and not isinstance(found, str):
            raise DataError(f"{where}: the column {part.text!r} does not hold text: row {number} has {found!r}")
        if found:
            rows.append(found)
    return part.join.join(rows)


def _examples(task: TaskSpec, split: str, source: Source) -> tuple[list[Any], list[int]]:
    """Return the examples of a split and the number of each example's row in the file."""
    where = f"task {task.name!r}, {split} ({source.path or source.hub})"
    table = read_table(source, where)
    numbers = list(range(len(table)))
    if source.shuffle is not None:  # the same order as datasets.Dataset.shuffle
        numbers = numpy.random.default_rng(source.shuffle).permutation(len(table)).tolist()
    if source.skip and source.skip >= len(numbers):
        raise DataError(f"{where}: skip leaves none of the {len(numbers):,} rows. Lower skip from {source.skip:,}.")
    numbers = numbers[source.skip :][: source.limit]
    if source.shuffle is not None or len(numbers) < len(table):
        table = table.select(numbers)
    readers: dict[str, Callable[..., list[Any]]] = {
        "classification": _labelled,
        "completion": _completed,
        "chat": _conversations,
    }
    return readers[task.kind](task, source, table, where, lambda i: numbers[i]), numbers


def _labelled(
    task: TaskSpec, source: Source, table: Table, where: str, number_of: Callable[[int], int]
) -> list[tuple[str, int]]:
    assert source.text is not None
    assert source.label is not None
    columns = [source.text] if isinstance(source.text, str) else source.text
    table.check_columns([*columns, source.label], where)
    examples = []
    for i, row in enumerate(table):
        at = f"{where}: row {number_of(i)}"
        for column in columns:
            if not isinstance(row.get(column), str):
                raise DataError(f"{at} has no text in {column}: {row.get(column)!r}")
        label = _label(row.get(source.label), source, task.labels or [], at)
        examples.append((source.join.join(row[column] for column in columns), label))
    return examples


def _completed(
    task: TaskSpec, source: Source, table: Table, where: str, number_of: Callable[[int], int]
) -> list[tuple[str, ...]]:
    assert source.prompt is not None
    assert source.completion is not None
    templates = []
    for given in (source.prompt, source.completion):
        try:
            templates.append(RowTemplate(given, table.columns))
        except RowTemplateError as error:
            raise DataError(f"{where}: {error}") from error
    examples = []
    for i, row in enumerate(table):
        try:
            examples.append(tuple(template.fill(row) for template in templates))
        except RowTemplateError as error:
            raise DataError(f"{where}: row {number_of(i)} {error}" + _meant_chat(source, row)) from error
    return examples


def _meant_chat(source: Source, row: Mapping[str, Any]) -> str:
    for column in (source.prompt, source.completion):
        value = row.get(column or "")
        if isinstance(value, list) and value and isinstance(value[0], Mapping) and "role" in value[0]:
            return ". For lists of messages set kind: chat"
    return ""


def _conversations(
    task: TaskSpec, source: Source, table: Table, where: str, number_of: Callable[[int], int]
) -> list[Any]:
    return read_conversations(
        table,
        where,
        number_of,
        layout=source.layout,
        column=source.messages,
        prompt=source.prompt,
        completion=source.completion,
    )


def _label(value: Any, source: Source, labels: list[str], at: str) -> int:
    if value is None:
        raise DataError(f"{at} has no label")
    # Fields of TSV and CSV files are strings.
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    if source.label_names is not None:
        names = {str(key): name for key, name in source.label_names.items()}
        if str(value) not in names:
            raise DataError(f"{at} has label {number!r}, which is not in label_names")
        return labels.index(names[str(value)])
    if str(value) in labels:  # JSON's 0, 1, true and false are no strings
        return labels.index(str(value))
    if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < len(labels):
        return number
    raise DataError(f"{at} has label {number!r}, which is neither one of {labels} nor a position among them")
