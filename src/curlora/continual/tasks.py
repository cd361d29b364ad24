"""The tasks of a stream: what is learned from and what is scored."""

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
from curlora.continual.chat import ChatError, LaidOut, closing_token, lay_out, prompt_of
from curlora.continual.conversations import Conversation, fault_of, trained_turns

__all__ = [
    "IGNORED",
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
"""An encoded example: ``input_ids``, and ``labels``: a class, or for every token what comes next (-100: not scored)."""

IGNORED = -100
"""A label that is not one; the value that torch's losses pass over."""


class TaskError(ValueError):
    """A task, or an example of it, is not right; says which and what."""


class EncodedSplit(NamedTuple):
    """A split as rows.

    An example that is too long was cut, or has no row; ``kept`` are the numbers of those that have one.
    """

    rows: list[Row]
    kept: list[int]
    cut: int


class Prompts(NamedTuple):
    """What the model is given to generate answers to.

    Args:
        ids: tokens of each prompt.
        answers: the right answer to each.
        score: how long an answer may be, and how it is scored.
        stop: tokens of the task's own that end an answer, beside those of the model and the tokenizer.
    """

    ids: list[list[int]]
    answers: list[str]
    score: AnswerScore
    stop: frozenset[int] = frozenset()


class _Fitted(NamedTuple):
    """An example within ``max_length``; its row is ``None`` if it was left out."""

    row: Row | None
    cut: bool = False


@dataclass(frozen=True)
class Task:
    """What all kinds of tasks share.

    Args:
        name: short name, of letters, digits, ``-`` and ``_``; unique in a stream.
        train: examples to learn from.
        evaluation: examples to be scored on.
        description: one sentence for people.
        training: settings that are different for this task.
        too_long: what becomes of an example of more than ``max_length`` tokens, in both splits: ``cut`` or ``drop``.
        numbers: by split, which row of its file each example is; its place in the split if not given.

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
            raise TaskError(f"task {self.name!r}: too_long is cut or drop, not {self.too_long!r}")
        for split in ("train", "evaluation"):
            if not getattr(self, split):
                raise TaskError(f"task {self.name!r}: the {split} split is empty")

    @property
    def metric(self) -> str:
        """What accuracy means here, for people."""
        raise NotImplementedError

    @property
    def classes(self) -> int | None:
        """Classes of the task's own head; ``None`` if the language model itself answers."""
        return None

    @property
    def majority_rate(self) -> float:
        """Score on the evaluation split of always giving its most frequent answer."""
        counts = Counter(self._answer(example) for example in self.evaluation)
        return max(counts.values()) / len(self.evaluation)

    @functools.cached_property
    def evaluation_in_train(self) -> int:
        """How many of the examples to be scored on are learned from too."""
        learned = {json.dumps(example) for example in self.train}
        return sum(json.dumps(example) in learned for example in self.evaluation)

    def encode(self, split: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> EncodedSplit:
        """The rows of a split, in its order.

        Raises:
            TaskError: if an example becomes nothing that can be learned or scored, or if all are left out because they
                are too long.
        """
        fitted = self._fitted(split, tokenizer, max_length)
        kept = [number for number, of in enumerate(fitted) if of.row is not None]
        if not kept:
            raise TaskError(
                f"task {self.name!r}: no {split} example is left: all {len(fitted)} are too long for max_length "
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
        """The task with these examples alone of a split."""
        changes: dict[str, Any] = {split: [getattr(self, split)[i] for i in which] for split, which in kept.items()}
        numbers = {split: [self._number(split, i) for i in which] for split, which in kept.items()}
        return replace(self, **changes, numbers={**self.numbers, **numbers})

    def prompts(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Prompts | None:
        """What is generated from in scoring; ``None`` where nothing is."""
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
    """Texts with a class each, told by a head of the task's own; scored by accuracy.

    A text that is too long loses its end, or its start with a tokenizer that truncates there.

    Args:
        train, evaluation: ``(text, class)`` pairs.
        labels: the names of the classes.

    Raises:
        TaskError: also on fewer than two classes, two of one name, or a class out of range.
    """

    kind: ClassVar[str] = "classification"

    labels: Sequence[str] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.labels) < 2:
            raise TaskError(f"task {self.name!r} needs at least two labels, got {list(self.labels)}")
        if len(set(self.labels)) < len(self.labels):
            raise TaskError(f"task {self.name!r} has a label twice: {list(self.labels)}")
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
    """Prompts with a completion each, given by the language model itself; the loss is on the completion alone.

    The end of the text is part of the completion. Scored by exact match: the share of examples whose every token of
    the completion is the most likely one, which is whether greedy decoding gives the completion token for token; or
    where ``score`` is given, by what the model generates.

    Of an example that is too long, the start of the prompt is cut off, but no more than to half of ``max_length``; then
    the end of the completion.

    Args:
        train, evaluation: ``(prompt, completion)`` pairs.
        score: how generated answers are scored; ``None`` if none are generated.

    Raises:
        TaskError: also on a right answer that nothing can be compared with.
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
        """The prompts of the evaluation split; one longer than ``max_length`` loses its start."""
        if self.score is None:
            return None
        ids = [_last(prompt, max_length, tokenizer) for prompt in self._prompt_ids(tokenizer)]
        answers = [self._text(example) for example in self.evaluation]
        return Prompts(ids, answers, self.score, self._stop(tokenizer))

    def _answer(self, example: Any) -> Hashable:
        return self._text(example)

    def _text(self, example: Any) -> str:
        """The right answer."""
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
        """A row of which the last tokens are trained; of one that is too long, both ends of the example are cut."""
        prompt, answer = ids[: trained.start], ids[trained.start : trained.stop]
        if len(prompt) + len(answer) - 1 <= max_length:  # the last token is nobody's context, and so not an input
            return _Fitted(_row([*prompt, *answer], [(len(prompt), len(prompt) + len(answer))]))
        if self.too_long == "drop":
            return _Fitted(None)
        room = max(max_length + 1 - len(answer), max_length // 2, 1)
        prompt = _last(prompt, room, tokenizer)
        answer = answer[: max_length + 1 - len(prompt)]
        return _Fitted(_row([*prompt, *answer], [(len(prompt), len(prompt) + len(answer))]), cut=True)


@dataclass(frozen=True)
class ChatTask(CompletionTask):
    """Conversations, of which what the assistant answers is the completion.

    Laid out by the tokenizer's own chat template, see :func:`curlora.continual.chat.lay_out`. What follows the last
    trained turn is left out. A conversation that is too long loses its end, and is left out where no answer remains;
    where the last turn alone is trained, it is cut as a completion is. Answers are generated to all that comes before
    the last of the assistant's messages.

    Args:
        train, evaluation: lists of messages, ``{"role": ..., "content": ...}``. The assistant's message of ``weight`` 0
            is not trained, nor what it says before anybody has said anything.
        turns: whether ``"all"`` of the assistant's messages are trained and scored, or the ``"last"`` alone.

    Raises:
        TaskError: also on what is no conversation, or has no message of the assistant's to be trained.
    """

    kind: ClassVar[str] = "chat"

    turns: str = "all"

    def __post_init__(self) -> None:
        if self.turns not in ("all", "last"):
            raise TaskError(f"task {self.name!r}: turns are all or last, not {self.turns!r}")
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
            raise TaskError(f"task {self.name!r}: the model's tokenizer has no chat template")
        conversations = getattr(self, split)
        turns = [trained_turns(messages, self.turns) for messages in conversations]
        with self._refusals(split):
            return lay_out(conversations, turns, tokenizer)

    @contextlib.contextmanager
    def _refusals(self, split: str) -> Iterator[None]:
        """The template's refusal becomes the task's own, with the row."""
        try:
            yield
        except ChatError as error:
            raise TaskError(f"{self._at(split, error.number)}: {error.reason}") from error


def _row(ids: list[int], trained: Sequence[tuple[int, int]]) -> Row:
    """Inputs, and for each what comes next where that is trained: tokens from one place to another (exclusive)."""
    targets = [IGNORED] * len(ids)
    for begin, end in trained:
        targets[begin:end] = ids[begin:end]
    return {"input_ids": ids[:-1], "labels": targets[1:]}


def _last(prompt: list[int], count: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """At most so many tokens of a prompt: the first, where it begins every text, and the last ones."""
    if len(prompt) <= count:
        return prompt
    first = prompt[:1] if prompt[0] == tokenizer.bos_token_id and count > 1 else []
    return [*first, *prompt[len(prompt) - count + len(first) :]]


def _open_ended(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Without the end of text that some tokenizers add: a completion follows."""
    ends = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}
    return ids[:-1] if ids and ids[-1] in ends else ids
