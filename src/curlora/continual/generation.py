"""Scoring by generation: the model answers prompts greedily, and its answers are scored."""

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
from curlora.continual.storage import write_whole
from curlora.continual.tasks import Prompts
from curlora.guard.decoding import generating, named_ends, padded

__all__ = [
    "Answer",
    "GeneratedScore",
    "Generation",
    "generate",
    "score_generated",
]


@dataclass(frozen=True)
class Generation:
    """What a model is to answer in the evaluation of a task.

    Args:
        task: the task's name.
        prompts: what is answered, and how that is scored.
        batch_size: prompts that are answered together, over all processes.
    """

    task: str
    prompts: Prompts
    batch_size: int

    @property
    def longest(self) -> int:
        """Tokens that the longest prompt has with its answer."""
        return max(map(len, self.prompts.ids)) + self.prompts.score.max_new_tokens

    @property
    def steps(self) -> int:
        """Tokens that each process generates for a row of a batch, one after the other, if no answer ends before."""
        return -(-len(self.prompts.ids) // self.batch_size) * self.prompts.score.max_new_tokens

    def problem_of_positions(self, positions: int | None) -> str | None:
        """What to say if prompts and answers do not fit into the positions that a model has; it may have any number."""
        if positions is None or self.longest <= positions:
            return None
        new = self.prompts.score.max_new_tokens
        return (
            f"Task {self.task!r} generates up to {new} tokens after a prompt of {self.longest - new}, where the "
            f"model has {positions} positions. Lower max_new_tokens or max_length."
        )


class GeneratedScore(NamedTuple):
    """Of all prompts: the mean score, and the share of answers that were cut off at ``max_new_tokens``."""

    score: float
    unfinished: float


class Answer(NamedTuple):
    """What was generated.

    Args:
        text: without special tokens.
        finished: whether it came to an end before ``max_new_tokens``.
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
    """Generate and score; in a distributed run every process its share of the prompts.

    Args:
        model: a causal language model of transformers, with whatever adapters are in it.
        tokenizer: its tokenizer.
        generation: what to answer.
        on_steps: told of tokens of ``generation.steps`` that are done.
        keep: a file for all of it, if it is to be kept: JSON Lines of ``prompt``, ``expected``, ``generated``,
            ``score`` and ``finished``, in the order of the prompts.

    Raises:
        RunError: if a prompt and its answer do not fit into the model's positions.
    """
    if problem := generation.problem_of_positions(getattr(model.config, "max_position_embeddings", None)):
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
    """Answer prompts greedily, those of about the same length together, padded on the left.

    An answer ends with any of the tokens in ``stop``, the tokenizer's end of text, and those that the model's
    generation configuration names. Nothing else of that configuration counts: no sampling, no penalty.

    Args:
        model: a causal language model of transformers, with whatever adapters are in it; in evaluation mode meanwhile.
        tokenizer: its tokenizer.
        prompts: tokens of each, at least one.
        max_new_tokens: where an answer is cut off.
        stop: further tokens that end one.
        batch_size: prompts that are answered together.
        on_steps: told of tokens that are done, ``max_new_tokens`` for each batch in all.

    Returns:
        In the order of the prompts.
    """
    ends = stop | named_ends(model) | ({tokenizer.eos_token_id} - {None})
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # what needs the most memory comes first
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
    """Stops nothing: hears of every token of a batch."""

    def __init__(self, on_steps: Callable[[int], None], steps: int) -> None:
        self.on_steps = on_steps
        self.left = steps

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self._done(1)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def finish(self) -> None:
        """The batch is done, whether or not any answer was as long as it may be."""
        self._done(self.left)

    def _done(self, steps: int) -> None:
        self.left -= steps
        self.on_steps(steps)
