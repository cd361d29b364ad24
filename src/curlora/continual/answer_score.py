"""Scores of answers that a model has generated: exact match after a normalization, and ROUGE-L."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

__all__ = ["METRICS", "NORMALIZATIONS", "AnswerScore"]

METRICS = {"exact_match": "exact match", "rouge": "ROUGE-L"}
NORMALIZATIONS = ("none", "lower", "gsm8k")


@dataclass(frozen=True)
class AnswerScore:
    """How a generated answer is scored against the right one.

    Both are normalized first:

    - ``none``: white space at both ends is left out.
    - ``lower``: also lower case, and each stretch of white space is one space.
    - ``gsm8k``: the number behind the first ``####``; without that the last number in the text. Commas and a dollar
      sign are left out. As the filters ``strict-match`` and ``flexible-extract`` have it, one after the other, of
      https://github.com/EleutherAI/lm-evaluation-harness/tree/main/lm_eval/tasks/gsm8k.
    - any other: a regular expression, of which the last match is taken, or of it the first group, if it has one.

    A generated answer in which nothing is found is wrong.

    Args:
        max_new_tokens: after so many an answer is cut off.
        metric: ``exact_match``: 1 if both are the same, else 0. ``rouge``: F1 of ROUGE-L
            (https://aclanthology.org/W04-1013), between 0 and 1, by the package ``rouge-score`` without stemming.
        normalize: as above.

    Raises:
        ValueError: if one of them is not one of these.
        ImportError: if ``rouge`` is asked for and ``rouge-score`` is not installed.
    """

    max_new_tokens: int = 256
    metric: str = "exact_match"
    normalize: str = "none"

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.metric not in METRICS:
            raise ValueError(f"metric {self.metric!r} is not one of {', '.join(METRICS)}")
        if self.normalize not in NORMALIZATIONS:
            try:
                re.compile(self.normalize)
            except re.error as error:
                raise ValueError(
                    f"normalize {self.normalize!r} is not one of {', '.join(NORMALIZATIONS)}, nor a regular "
                    f"expression: {error}"
                ) from error
        if self.metric == "rouge":
            self._rouge  # noqa: B018

    @property
    def name(self) -> str:
        """For people."""
        return f"{METRICS[self.metric]}, generated"

    def normalized(self, text: str) -> str | None:
        """What is compared; ``None`` where nothing is found."""
        if self.normalize == "none":
            return text.strip()
        if self.normalize == "lower":
            return " ".join(text.lower().split())
        if self.normalize == "gsm8k":
            return _gsm8k(text)
        matches = list(re.finditer(self.normalize, text))
        if not matches:
            return None
        found = matches[-1][1] if matches[-1].re.groups else matches[-1][0]
        return None if found is None else found.strip()

    def score(self, given: str, right: str) -> float:
        """Of one answer, between 0 and 1."""
        return self._score(self.normalized(given), self.normalized(right))

    def baseline(self, right: Sequence[str]) -> float:
        """The mean score of always giving the most frequent of the right answers."""
        answers = [self.normalized(text) for text in right]
        most_frequent, _ = Counter(answers).most_common(1)[0]
        return sum(self._score(most_frequent, answer) for answer in answers) / len(answers)

    def fault_of(self, right: str) -> str | None:
        """Why nothing can be compared with this right answer; ``None`` if something can."""
        found = self.normalized(right)
        if not found:
            return (
                f"has an answer in which the normalization {self.normalize!r} finds nothing (known are "
                f"{', '.join(NORMALIZATIONS)}, and regular expressions): {right[-80:]!r}"
            )
        if self.metric == "rouge" and not self._rouge.score(found, found)["rougeL"].fmeasure:
            return f"has an answer without a digit or a letter from a to z, all that ROUGE sees: {found[:80]!r}"
        return None

    def _score(self, given: str | None, right: str | None) -> float:
        if given is None or right is None:
            return 0.0
        if self.metric == "exact_match":
            return float(given == right)
        return float(self._rouge.score(right, given)["rougeL"].fmeasure)

    @cached_property
    def _rouge(self) -> Any:
        try:
            from rouge_score.rouge_scorer import RougeScorer
        except ImportError as error:
            raise ImportError("metric rouge needs the package rouge-score: pip install rouge-score") from error
        return RougeScorer(["rougeL"], use_stemmer=False)


_NUMBER = r"-?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"


def _gsm8k(text: str) -> str | None:
    marked = re.search(rf"####\s*({_NUMBER})", text)
    numbers = [marked[1]] if marked else re.findall(_NUMBER, text)
    return re.sub(r"[,$]", "", numbers[-1]) if numbers else None
