import pytest

from curlora.continual.tasks import Task


def make(**changes):
    fields = dict(name="t", labels=["a", "b"], train=[("x", 0)], evaluation=[("x", 1), ("y", 1), ("z", 0)])
    return Task(**{**fields, **changes})


def test_majority_rate_is_of_the_evaluation_split():
    assert make().majority_rate == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(name="a/b"), "'a/b' may only hold letters"),
        (dict(labels=["a"]), "at least two labels"),
        (dict(train=[]), "the train split is empty"),
        (dict(evaluation=[]), "the evaluation split is empty"),
        (dict(train=[("x", 0), ("y", 2)]), r"train row 1 has label 2, outside 0\.\.1"),
        (dict(evaluation=[("x", -1)]), r"evaluation row 0 has label -1, outside 0\.\.1"),
    ],
)
def test_bad_tasks_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)
