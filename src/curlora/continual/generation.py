"""Scoring by generation: the model answers prompts with greedy decoding, and the answers are scored."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from curlora.continual.errors import RunError
from curlora.continual.processes import process_state
from curlora.continual.tasks import Prompts
from curlora.storage import write_whole
from curlora.text.decoding import generating, named_ends, padded
from curlora.text.rows import longest_row

__all__ = [
    "Answer",
    "GeneratedScore",
    "Generation",
    "generate",
    "score_generated",
]


@dataclass(frozen=True)
class Generation:
    """The prompts that a model answers in the evaluation of a task.

    Args:
        task: the task's name.
        prompts: the prompts, and how the answers are scored.
        batch_size: prompts in a batch, over all processes.
    """

    task: str
    prompts: Prompts
    batch_size: int

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and the longest answer together."""
        return max(map(len, self.prompts.ids)) + self.prompts.score.max_new_tokens

    @property
    def steps(self) -> int:
        """Decoding steps of each process if every answer has ``max_new_tokens`` tokens."""
        return -(-len(self.prompts.ids) // self.batch_size) * self.prompts.score.max_new_tokens

    def problem_of_positions(self, positions: int | None) -> str | None:
        """Return an error message if prompts and answers exceed a model's positions; ``None`` means no limit."""
        if positions is None or self.longest <= positions:
            return None
        new = self.prompts.score.max_new_tokens
        return (
            f"Task {self.task!r} generates up to {new} tokens after a prompt of {self.longest - new} tokens, but the "
            f"model has only {positions} positions. Lower max_new_tokens or max_length."
        )


class GeneratedScore(NamedTuple):
    """The mean score over all prompts, and the share of answers that were cut off at ``max_new_tokens``."""

    score: float
    unfinished: float


class Answer(NamedTuple):
    """A generated answer.

    Args:
        text: the answer without special tokens.
        finished: whether the answer ended within ``max_new_tokens``.
    """

    text: str
    finished: bool


def score_generated(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    generation: Generation,
    on_steps: Callable[[int], None] = lambda steps: None,
    keep: Path | None = None,
) -> GeneratedScore:
    """Generate answers and score them; in a distributed run each process takes its share of the prompts.

    Args:
        model: a causal language model of transformers, with or without adapters.
        tokenizer: its tokenizer.
        generation: the prompts, and how the answers are scored.
        on_steps: called with the number of decoding steps that are done, of ``generation.steps``.
        keep: a file for the answers, or ``None``: JSON Lines of ``prompt``, ``expected``, ``generated``, ``score`` and
            ``finished``, in the order of the prompts.

    Raises:
        RunError: if a prompt and its answer do not fit into the model's positions.
    """
    if problem := generation.problem_of_positions(longest_row(model.config)):
        raise RunError(problem)
    prompts, score = generation.prompts, generation.prompts.score
    state = process_state()
    numbers = list(range(len(prompts.ids)))[state.process_index :: state.num_processes]
    answers = generate(
        model,
        tokenizer,
        [prompts.ids[i] for i in numbers],
        max_new_tokens=score.max_new_tokens,
        stop=prompts.stop,
        batch_size=max(1, generation.batch_size // state.num_processes),
        on_steps=on_steps,
    )
    scored = [
        (i, answer.text, score.score(answer.text, prompts.answers[i]), answer.finished)
        for i, answer in zip(numbers, answers, strict=True)
    ]
    if state.num_processes > 1:
        scored = sorted(gather_object(scored))
    if keep is not None and state.is_main_process:
        lines = (
            {
                "prompt": tokenizer.decode(prompts.ids[i]),
                "expected": prompts.answers[i],
                "generated": text,
                "score": value,
                "finished": finished,
            }
            for i, text, value, finished in scored
        )
        keep.parent.mkdir(parents=True, exist_ok=True)
        write_whole(keep, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return GeneratedScore(
        score=math.fsum(value for _, _, value, _ in scored) / len(scored),
        unfinished=sum(not finished for *_, finished in scored) / len(scored),
    )


def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: frozenset[int] = frozenset(),
    batch_size: int = 16,
    on_steps: Callable[[int], None] = lambda steps: None,
) -> list[Answer]:
    """Answer prompts with greedy decoding, in batches of similar lengths, padded on the left.

    An answer ends at a token in ``stop``, at the tokenizer's end-of-text token, or at an end token of the model's
    generation configuration. Nothing else of that configuration is used: no sampling, no penalty.

    Args:
        model: a causal language model of transformers, with or without adapters; set to evaluation mode meanwhile.
        tokenizer: its tokenizer.
        prompts: the tokens of each prompt, at least one.
        max_new_tokens: the number of tokens after which an answer is cut off.
        stop: further tokens that end an answer.
        batch_size: prompts in a batch.
        on_steps: called with the number of decoding steps that are done; they add up to ``max_new_tokens`` per batch.

    Returns:
        The answers, in the order of the prompts.
    """
    ends = stop | named_ends(model) | ({tokenizer.eos_token_id} - {None})
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # the batch that needs the most memory first
    answers: list[Answer | None] = [None] * len(prompts)
    with generating(model, ends, tokenizer.pad_token_id, max_new_tokens, do_sample=False):
        for begin in range(0, len(order), batch_size):
            chosen = order[begin : begin + batch_size]
            counter = _Counter(on_steps, max_new_tokens)
            generated = model.generate(
                **padded([prompts[i] for i in chosen], tokenizer.pad_token_id, model.device),
                stopping_criteria=StoppingCriteriaList([counter]),
            )
            counter.finish()
            for i, row in zip(chosen, generated[:, len(prompts[chosen[0]]) :].tolist(), strict=True):
                end = next((place for place, token in enumerate(row) if token in ends), None)
                answers[i] = Answer(tokenizer.decode(row[:end], skip_special_tokens=True), end is not None)
    return [answer for answer in answers if answer is not None]


class _Counter(StoppingCriteria):
    """Reports every decoding step of a batch; never stops the generation."""

    def __init__(self, on_steps: Callable[[int], None], steps: int) -> None:
        self.on_steps = on_steps
        self.left = steps

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self._done(1)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def finish(self) -> None:
        """Report the remaining steps of the batch, whose answers may all have ended early."""
        self._done(self.left)

    def _done(self, steps: int) -> None:
        self.left -= steps
        self.on_steps(steps)
