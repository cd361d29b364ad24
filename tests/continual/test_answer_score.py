"""The normalized part of an answer is compared, and the baseline always gives the most frequent answer."""

import builtins
import json
import os
from pathlib import Path

import pytest

from curlora.continual.answer_score import AnswerScore


def gsm8k(text):
    return AnswerScore(normalize="gsm8k").normalized(text)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She makes 9 * 2 = $<<9*2=18>>18 every day.\n#### 18", "18"),
        ("#### 70,000", "70000"),
        ("#### $1,234.50.", "1234.50"),
        ("#### -5\nQuestion: another\n#### 6", "-5"),
        ("####12", "12"),
        ("The answer is 1,234 dollars.", "1234"),
        ("First 3, then 7 apples", "7"),
        ("It costs $12.", "12"),
        ("about .5 of it ...", ".5"),
        ("#### about 4 or 5", "5"),
        ("no number at all ...", None),
        ("", None),
    ],
)
def test_gsm8ks_number(text, number):
    assert gsm8k(text) == number


@pytest.mark.skipif(not os.environ.get("CURLORA_DATA_DIR"), reason="CURLORA_DATA_DIR is not set")
def test_every_right_answer_of_gsm8k_has_the_number_behind_the_mark():
    for name in ("gsm8k_train", "gsm8k_test"):
        path = Path(os.environ["CURLORA_DATA_DIR"]) / "sft" / f"{name}.jsonl"
        for line in path.read_text(encoding="utf-8").splitlines():
            answer = json.loads(line)["answer"]
            assert gsm8k(answer) == answer.split("####")[1].strip().replace(",", "")


def test_normalizations():
    assert AnswerScore().normalized(" Yes,\n No ") == "Yes,\n No"
    assert AnswerScore(normalize="lower").normalized(" Yes,\n No ") == "yes, no"
    assert AnswerScore(normalize=r"[A-D]").normalized("A, no: B") == "B"
    assert AnswerScore(normalize=r"answer is (\w+)").normalized("the answer is yes.") == "yes"
    assert AnswerScore(normalize=r"answer is (\w+)").normalized("yes") is None
    with pytest.raises(ValueError, match="is not one of none, lower, gsm8k, nor a regular expression"):
        AnswerScore(normalize="(")


def test_exact_match_and_its_baseline():
    score = AnswerScore(normalize="gsm8k")
    assert score.score("so 1,000 it is", "#### 1000") == 1
    assert score.score("so 1,001 it is", "#### 1000") == 0
    assert score.score("I do not know", "#### 1000") == 0
    assert score.baseline(["#### 5", "it is\n#### 5", "#### 7", "#### 8"]) == 0.5


def test_a_right_answer_without_anything_to_compare_is_named():
    assert AnswerScore(normalize="gsm8k").fault_of("#### 5") is None
    assert "finds nothing" in AnswerScore(normalize="gsm8k").fault_of("five")
    assert "the normalization 'gsmk8' finds nothing (known are none, lower, gsm8k" in AnswerScore(
        normalize="gsmk8"
    ).fault_of("#### 5")
    assert "without a digit or a letter from a to z" in AnswerScore(metric="rouge").fault_of("你好")


def rouge_l(given, right):
    """F1 of the longest common subsequence of words, from the definition."""
    a, b = given.lower().split(), right.lower().split()
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    common = table[-1][-1]
    return 2 * common / (len(a) + len(b)) if common else 0.0


def test_rouge_and_its_baseline():
    score = AnswerScore(metric="rouge")
    pairs = [("the cat sat on the mat", "the cat lay on a mat"), ("a b c", "c b a"), ("x", "y"), ("same", "Same")]
    for given, right in pairs:
        assert score.score(given, right) == pytest.approx(rouge_l(given, right))
    answers = ["a b c", "a x c", "a b c", "q"]
    assert score.baseline(answers) == pytest.approx(sum(rouge_l("a b c", answer) for answer in answers) / 4)
    assert score.name == "ROUGE-L, generated"


def test_a_package_that_is_missing_is_named(monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **kwargs):
        if name.startswith("rouge_score"):
            raise ImportError(name)
        return real(name, *rest, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="metric rouge needs the package rouge-score: pip install"):
        AnswerScore(metric="rouge")
