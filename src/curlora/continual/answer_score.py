"""Scores of generated answers: exact match after a normalization, and ROUGE-L."""

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
    """How a generated answer is scored against the reference answer.

    Both are normalized first:

    - ``none``: strips white space at both ends.
    - ``lower``: converts to lower case and replaces each run of white space by one space.
    - ``gsm8k``: extracts the number after the first ``####``, or else the last number in the text, without commas and
      dollar signs. This is the filter ``strict-match``, then ``flexible-extract``, of
      https://github.com/EleutherAI/lm-evaluation-harness/tree/main/lm_eval/tasks/gsm8k.
    - anything else: a regular expression. Its last match is taken, or the match's first group if there is one.

    A generated answer in which the normalization finds nothing is wrong.

    Args:
        max_new_tokens: the number of tokens after which an answer is cut off.
        metric: ``exact_match``: 1 if both are the same, else 0. ``rouge``: F1 of ROUGE-L
            (https://aclanthology.org/W04-1013), between 0 and 1, from the package ``rouge-score`` without stemming.
        normalize: the normalization, as above.

    Raises:
        ValueError: if an argument has a value that is not allowed.
        ImportError: if ``metric`` is ``rouge`` and ``rouge-score`` is not installed.
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
        """The metric's name in reports."""
        return f"{METRICS[self.metric]}, generated"

    def normalized(self, text: str) -> str | None:
        """Return the part of ``text`` that is compared, or ``None`` if the normalization finds nothing."""
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
        """Return the score of the answer ``given`` against ``right``, between 0 and 1."""
        return self._score(self.normalized(given), self.normalized(right))

    def baseline(self, right: Sequence[str]) -> float:
        """Return the mean score of always giving the most frequent reference answer."""
        answers = [self.normalized(text) for text in right]
        most_frequent, _ = Counter(answers).most_common(1)[0]
        return sum(self._score(most_frequent, answer) for answer in answers) / len(answers)

    def fault_of(self, right: str) -> str | None:
        """Return why no answer can be compared with this reference answer, or ``None`` if one can."""
        found = self.normalized(right)
        if not found:
            return (
                f"has an answer in which the normalization {self.normalize!r} finds nothing (known are "
                f"{', '.join(NORMALIZATIONS)}, and regular expressions): {right[-80:]!r}"
            )
        if self.metric == "rouge" and not self._rouge.score(found, found)["rougeL"].fmeasure:
            return f"has an answer without a digit or a letter from a to z; ROUGE ignores all else: {found[:80]!r}"
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
