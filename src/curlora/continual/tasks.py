"""The tasks of a stream: their training and evaluation examples, and how these become tokens and labels."""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

from transformers import PreTrainedTokenizerBase

from curlora.continual.answer_score import AnswerScore
from curlora.data.chat import ChatError, LaidOut, closing_token, lay_out, prompt_of
from curlora.data.conversations import Conversation, fault_of, trained_turns
from curlora.text.rows import IGNORED

__all__ = [
    "ChatTask",
    "ClassificationTask",
    "CompletionTask",
    "EncodedSplit",
    "Prompts",
    "Row",
    "Task",
    "TaskError",
]

Row = dict[str, Any]
"""An encoded example: ``input_ids``, and ``labels``: a class, or for each token the next token (-100: no label)."""


class TaskError(ValueError):
    """A task or one of its examples is invalid; the message says which and why."""


class EncodedSplit(NamedTuple):
    """A split as rows.

    Args:
        rows: the rows.
        kept: the number of each row's example in the split; examples that were left out are missing.
        cut: the number of examples that were cut because they are too long.
    """

    rows: list[Row]
    kept: list[int]
    cut: int


class Prompts(NamedTuple):
    """Prompts to which answers are generated.

    Args:
        ids: the tokens of each prompt.
        answers: the reference answer to each prompt.
        score: how long an answer may be, and how it is scored.
        stop: tokens that end an answer, in addition to those of the model and the tokenizer.
    """

    ids: list[list[int]]
    answers: list[str]
    score: AnswerScore
    stop: frozenset[int] = frozenset()


class _Fitted(NamedTuple):
    """An example fitted to ``max_length``; its row is ``None`` if the example was left out."""

    row: Row | None
    cut: bool = False


@dataclass(frozen=True)
class Task:
    """Base class of all kinds of tasks.

    Args:
        name: short name of letters, digits, ``-`` and ``_``; unique in a stream.
        train: training examples.
        evaluation: evaluation examples.
        description: one sentence for the report.
        training: settings that are different for this task.
        too_long: what happens to an example of more than ``max_length`` tokens, in both splits: ``cut`` or ``drop``.
        numbers: for each split the numbers of the examples' rows in the file; their positions in the split if missing.

    Raises:
        TaskError: on a name that cannot be a file name, or an empty split.
    """

    kind: ClassVar[str]

    name: str
    train: Sequence[Any]
    evaluation: Sequence[Any]
    description: str = ""
    training: Mapping[str, Any] = field(default_factory=dict)
    too_long: str = "cut"
    numbers: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.name):
            raise TaskError(f"task name {self.name!r} may only hold letters, digits, '-' and '_'")
        if self.too_long not in ("cut", "drop"):
            raise TaskError(f"task {self.name!r}: too_long must be cut or drop, got {self.too_long!r}")
        for split in ("train", "evaluation"):
            if not getattr(self, split):
                raise TaskError(f"task {self.name!r}: the {split} split is empty")

    @property
    def metric(self) -> str:
        """The name of the task's metric in reports."""
        raise NotImplementedError

    @property
    def classes(self) -> int | None:
        """The number of classes of the task's head; ``None`` if the language model itself answers."""
        return None

    @property
    def majority_rate(self) -> float:
        """Score of always giving the most frequent answer of the evaluation split."""
        counts = Counter(self._answer(example) for example in self.evaluation)
        return max(counts.values()) / len(self.evaluation)

    @functools.cached_property
    def evaluation_in_train(self) -> int:
        """The number of evaluation examples that are also in the training split."""
        learned = {json.dumps(example) for example in self.train}
        return sum(json.dumps(example) in learned for example in self.evaluation)

    def encode(self, split: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> EncodedSplit:
        """Return the rows of a split, in its order.

        Raises:
            TaskError: if an example has no token to learn or score, or if all examples are left out because they are
                too long.
        """
        fitted = self._fitted(split, tokenizer, max_length)
        kept = [number for number, of in enumerate(fitted) if of.row is not None]
        if not kept:
            raise TaskError(
                f"task {self.name!r}: no {split} example is left. All {len(fitted)} are too long for max_length "
                f"{max_length} (too_long: {self.too_long}). Raise max_length"
            )
        rows = [of.row for of in fitted if of.row is not None]
        for number, row in zip(kept, rows, strict=True):
            labels = row["labels"]
            if not row["input_ids"] or (isinstance(labels, list) and all(label == IGNORED for label in labels)):
                what = "answer" if row["input_ids"] else "token"
                raise TaskError(f"{self._at(split, number)} has no {what}: {getattr(self, split)[number]!r}")
        return EncodedSplit(rows, kept, cut=sum(of.cut for of in fitted if of.row is not None))

    def only(self, **kept: Sequence[int]) -> Task:
        """Return the task with only these examples of the given splits."""
        changes: dict[str, Any] = {split: [getattr(self, split)[i] for i in which] for split, which in kept.items()}
        numbers = {split: [self._number(split, i) for i in which] for split, which in kept.items()}
        return replace(self, **changes, numbers={**self.numbers, **numbers})

    def prompts(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Prompts | None:
        """Return the prompts for scoring by generation, or ``None`` if no answers are generated."""
        return None

    def _number(self, split: str, place: int) -> int:
        return self.numbers[split][place] if split in self.numbers else place

    def _at(self, split: str, place: int) -> str:
        return f"task {self.name!r}: {split} row {self._number(split, place)}"

    def _answer(self, example: Any) -> Hashable:
        raise NotImplementedError

    def _fitted(self, split: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[_Fitted]:
        raise NotImplementedError


@dataclass(frozen=True)
class ClassificationTask(Task):
    """Texts with one class each, predicted by the task's own head and scored by accuracy.

    A text that is too long is truncated on the tokenizer's truncation side, by default at the end.

    Args:
        train, evaluation: ``(text, class)`` pairs.
        labels: the names of the classes.

    Raises:
        TaskError: also on fewer than two labels, two equal labels, or a class out of range.
    """

    kind: ClassVar[str] = "classification"

    labels: Sequence[str] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.labels) < 2:
            raise TaskError(f"task {self.name!r} needs at least two labels, got {list(self.labels)}")
        if len(set(self.labels)) < len(self.labels):
            raise TaskError(f"task {self.name!r} lists a label twice: {list(self.labels)}")
        for split in ("train", "evaluation"):
            for place, (_, label) in enumerate(getattr(self, split)):
                if not 0 <= label < len(self.labels):
                    raise TaskError(f"{self._at(split, place)} has label {label}, outside 0..{len(self.labels) - 1}")

    @property
    def metric(self) -> str:
        return "accuracy"

    @property
    def classes(self) -> int:
        return len(self.labels)

    def _answer(self, example: tuple[str, int]) -> Hashable:
        return example[1]

    def _fitted(self, split: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[_Fitted]:
        examples = getattr(self, split)
        texts = [text for text, _ in examples]
        rows = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
        full = [place for place, row in enumerate(rows) if len(row) >= max_length]
        whole = tokenizer([texts[place] for place in full], verbose=False)["input_ids"] if full else []
        longer = {place for place, row in zip(full, whole, strict=True) if len(row) > max_length}
        fitted = []
        for place, (row, (_, label)) in enumerate(zip(rows, examples, strict=True)):
            left_out = self.too_long == "drop" and place in longer
            fitted.append(_Fitted(None if left_out else {"input_ids": row, "labels": label}, place in longer))
        return fitted


@dataclass(frozen=True)
class CompletionTask(Task):
    """Prompts with one completion each, predicted by the language model itself. Only the completion is trained.

    The end-of-text token is part of the completion. The metric is exact match: the fraction of examples in which every
    token of the completion has the highest probability, so that greedy decoding gives exactly the completion. If
    ``score`` is given, generated answers are scored instead.

    If an example is too long, the start of its prompt is cut off, but at least half of ``max_length`` tokens of the
    prompt are kept. Then the end of the completion is cut off.

    Args:
        train, evaluation: ``(prompt, completion)`` pairs.
        score: how generated answers are scored; ``None`` to generate none.

    Raises:
        TaskError: also on a reference answer with which no answer can be compared.
    """

    kind: ClassVar[str] = "completion"

    score: AnswerScore | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score is not None:
            for place, example in enumerate(self.evaluation):
                fault = self.score.fault_of(self._text(example))
                if fault is not None:
                    raise TaskError(f"{self._at('evaluation', place)} {fault}")

    @property
    def metric(self) -> str:
        return "exact match" if self.score is None else self.score.name

    @property
    def majority_rate(self) -> float:
        if self.score is None:
            return super().majority_rate
        return self.score.baseline([self._text(example) for example in self.evaluation])

    def prompts(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Prompts | None:
        """Return the prompts of the evaluation split; a prompt longer than ``max_length`` loses its start."""
        if self.score is None:
            return None
        ids = [_last(prompt, max_length, tokenizer) for prompt in self._prompt_ids(tokenizer)]
        answers = [self._text(example) for example in self.evaluation]
        return Prompts(ids, answers, self.score, self._stop(tokenizer))

    def _answer(self, example: Any) -> Hashable:
        return self._text(example)

    def _text(self, example: Any) -> str:
        """Return the reference answer."""
        return str(example[1])

    def _prompt_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        texts = [prompt for prompt, _ in self.evaluation]
        return [_open_ended(ids, tokenizer) for ids in tokenizer(texts, verbose=False)["input_ids"]]

    def _stop(self, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
        return frozenset()

    def _fitted(self, split: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[_Fitted]:
        examples = getattr(self, split)
        prompts = tokenizer([prompt for prompt, _ in examples], verbose=False)["input_ids"]
        completions = tokenizer([text for _, text in examples], add_special_tokens=False, verbose=False)["input_ids"]
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        fitted = []
        for place, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            prompt, completion = _open_ended(prompt, tokenizer), [*completion, *end]
            if not prompt or not completion:
                missing = "completion" if prompt else "prompt"
                raise TaskError(f"{self._at(split, place)} has no token in its {missing}: {examples[place]!r}")
            trained = range(len(prompt), len(prompt) + len(completion))
            fitted.append(self._fit_answer([*prompt, *completion], trained, max_length, tokenizer))
        return fitted

    def _fit_answer(
        self, ids: list[int], trained: range, max_length: int, tokenizer: PreTrainedTokenizerBase
    ) -> _Fitted:
        """Make a row whose last tokens are trained; cut both ends of an example that is too long."""
        prompt, answer = ids[: trained.start], ids[trained.start : trained.stop]
        if len(prompt) + len(answer) - 1 <= max_length:  # the last token is only a label, not an input
            return _Fitted(_row([*prompt, *answer], [(len(prompt), len(prompt) + len(answer))]))
        if self.too_long == "drop":
            return _Fitted(None)
        room = max(max_length + 1 - len(answer), max_length // 2, 1)
        prompt = _last(prompt, room, tokenizer)
        answer = answer[: max_length + 1 - len(prompt)]
        return _Fitted(_row([*prompt, *answer], [(len(prompt), len(prompt) + len(answer))]), cut=True)


@dataclass(frozen=True)
class ChatTask(CompletionTask):
    """Conversations, in which the assistant's messages are trained as completions are.

    The tokenizer's chat template renders them; see :func:`curlora.data.chat.lay_out`. Everything after the last
    trained message is left out. A conversation that is too long loses its end, and is left out if no answer remains.
    If only the last message is trained, the conversation is cut as a :class:`CompletionTask` is. When answers are
    generated, the prompt is everything before the assistant's last message.

    Args:
        train, evaluation: lists of messages ``{"role": ..., "content": ...}``. Assistant messages with ``weight`` 0, or
            before the first user message, are not trained.
        turns: whether ``"all"`` of the assistant's messages are trained and scored, or only the ``"last"``.

    Raises:
        TaskError: also on an example that is not a conversation, or has no message of the assistant's to train.
    """

    kind: ClassVar[str] = "chat"

    turns: str = "all"

    def __post_init__(self) -> None:
        if self.turns not in ("all", "last"):
            raise TaskError(f"task {self.name!r}: turns must be all or last, got {self.turns!r}")
        for split in ("train", "evaluation"):
            for place, messages in enumerate(getattr(self, split)):
                fault = fault_of(messages)
                if fault is not None:
                    raise TaskError(f"{self._at(split, place)} {fault}")
        super().__post_init__()

    def _answer(self, example: Conversation) -> Hashable:
        return tuple(example[turn]["content"] for turn in trained_turns(example, self.turns))

    def _text(self, example: Conversation) -> str:
        (turn,) = trained_turns(example, "last")
        return str(example[turn]["content"])

    def _prompt_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        with self._refusals("evaluation"):
            return [
                prompt_of(place, messages, trained_turns(messages, "last")[0], tokenizer)
                for place, messages in enumerate(self.evaluation)
            ]

    def _stop(self, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
        ends = {closing_token(laid_out, tokenizer) for laid_out in self._laid_out("evaluation", tokenizer)}
        return frozenset(ends - {None})  # type: ignore[arg-type]

    def _fitted(self, split: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[_Fitted]:
        fitted = []
        for laid_out in self._laid_out(split, tokenizer):
            if self.turns == "last":
                trained = range(*laid_out.turns[-1])
                fitted.append(self._fit_answer(laid_out.ids, trained, max_length, tokenizer))
            else:
                fitted.append(self._fit_conversation(laid_out, max_length))
        return fitted

    def _fit_conversation(self, laid_out: LaidOut, max_length: int) -> _Fitted:
        if len(laid_out.ids) - 1 <= max_length:
            return _Fitted(_row(laid_out.ids, laid_out.turns))
        turns = [(begin, min(end, max_length + 1)) for begin, end in laid_out.turns if begin <= max_length]
        if self.too_long == "drop" or not turns:
            return _Fitted(None)
        return _Fitted(_row(laid_out.ids[: turns[-1][1]], turns), cut=True)

    def _laid_out(self, split: str, tokenizer: PreTrainedTokenizerBase) -> list[LaidOut]:
        if not tokenizer.chat_template:
            raise TaskError(
                f"task {self.name!r}: the model's tokenizer has no chat template, which a task of kind chat needs"
            )
        conversations = getattr(self, split)
        turns = [trained_turns(messages, self.turns) for messages in conversations]
        with self._refusals(split):
            return lay_out(conversations, turns, tokenizer)

    @contextlib.contextmanager
    def _refusals(self, split: str) -> Iterator[None]:
        """Turn a :class:`ChatError` into a :class:`TaskError` that names the row."""
        try:
            yield
        except ChatError as error:
            raise TaskError(f"{self._at(split, error.number)}: {error.reason}") from error


def _row(ids: list[int], trained: Sequence[tuple[int, int]]) -> Row:
    """Make a row: inputs, and for each the next token as label if that is within a ``(begin, end)`` of ``trained``."""
    targets = [IGNORED] * len(ids)
    for begin, end in trained:
        targets[begin:end] = ids[begin:end]
    return {"input_ids": ids[:-1], "labels": targets[1:]}


def _last(prompt: list[int], count: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return at most the last ``count`` tokens of a prompt, but keep a beginning-of-text token."""
    if len(prompt) <= count:
        return prompt
    first = prompt[:1] if prompt[0] == tokenizer.bos_token_id and count > 1 else []
    return [*first, *prompt[len(prompt) - count + len(first) :]]


def _open_ended(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Remove the end-of-text token that some tokenizers add, because a completion follows."""
    ends = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}
    return ids[:-1] if ids and ids[-1] in ends else ids
