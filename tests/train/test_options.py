"""What a user may state, and what is refused before anything is looked at."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curlora.train import (
    TrainError,
    TrainOptions,
    parse_columns,
    parse_limits,
    parse_share,
    parse_targets,
    parse_texts,
    read_prompts,
)


@given(st.integers(1, 9999))
def test_a_budget_is_the_same_in_per_cent_and_as_a_share(hundredths):
    share = hundredths / 10000
    for text in (f"{hundredths / 100}%", f" {hundredths / 100} % ", str(share)):
        assert parse_share(text) == pytest.approx(share)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("1", "would let perplexity rise by 100%, which limits nothing. For 1 % give 0.01."),
        ("1.0", "For 1 % give 0.01."),
        ("100%", "would let perplexity rise by 100%"),
        ("0", "must be a positive share"),
        ("0%", "must be a positive share"),
        ("-1%", "must be a positive share"),
        ("inf", 'such as 0.01 or "1%" for 1 %, got inf'),
        ("one", "got 'one'"),
        ("", "got ''"),
        ("1%%", "got '1%%'"),
        ("1,5%", "got '1,5%'"),
    ],
)
def test_a_budget_that_nobody_can_mean(given, message):
    with pytest.raises(TrainError) as error:
        parse_share(given, "--lifetime")
    assert str(error.value).startswith("--lifetime")
    assert message in str(error.value)


def test_texts_have_names(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("some text")
    texts = parse_texts([str(tmp_path / "a.txt"), f"code={tmp_path / 'b.txt'}"])
    assert texts == {"a": tmp_path / "a.txt", "code": tmp_path / "b.txt"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["{}/gone.txt"], "there is no such file"),
        (["{}/empty.txt"], "is empty"),
        (["{}/bytes.txt"], "cannot be read as text in UTF-8"),
        (["{}"], "cannot be read as text"),
        (["={}/a.txt"], "has no name before the equals sign"),
        (["{}/a.txt", "a={}/empty.txt"], "two texts are called 'a'"),
    ],
)
def test_texts_that_are_none(given, message, tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(TrainError, match=message):
        parse_texts([one.format(tmp_path) for one in given])


def test_limits_of_texts():
    assert parse_limits(["code=0.5%", "a=b=0.02"]) == {"code": 0.005, "a=b": 0.02}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["1%"], "--limit '1%' does not name a text: write NAME=1%"),
        (["=1%"], "does not name a text"),
        (["code"], "does not name a text"),
        (["code=1"], "--limit code=1 would let perplexity rise by 100%, which limits nothing."),
        (["code=0%"], "--limit code must be a positive share"),
        (["code=-1%"], "must be a positive share"),
        (["code="], "--limit code must be a positive share, such as 0.01 or \"1%\" for 1 %, got ''"),
        (["code=1%", "code=2%"], "'code' has two limits"),
    ],
)
def test_limits_that_are_none(given, message):
    with pytest.raises(TrainError) as error:
        parse_limits(given)
    assert message in str(error.value)


def test_lists_of_names():
    assert parse_columns(None) is None
    assert parse_columns("question, answer") == ("question", "answer")
    with pytest.raises(TrainError, match="does not name two columns"):
        parse_columns("question")
    assert parse_targets("q_proj, v_proj") == ["q_proj", "v_proj"]
    assert parse_targets("all-linear") == "all-linear"
    assert parse_targets(r".*\.[qv]_proj") == r".*\.[qv]_proj"


def test_prompts_of_a_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffone\n\n two \n", encoding="utf-8")
    assert read_prompts(["zero"], path) == ["zero", "one", " two "]
    path.write_text("\n")
    for name, message in ((path, "holds no prompt"), (tmp_path / "gone", "cannot be read as text")):
        with pytest.raises(TrainError, match=message):
            read_prompts([], name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(model=None), "Which model is trained"),
        (dict(epochs=0), "--epochs must be at least 1, got 0"),
        (dict(batch_size=-1), "--batch-size must be at least 1"),
        (dict(max_length=1), "--max-length must be at least 2, a token of the prompt and one of the answer, got 1"),
        (dict(learning_rate=0.0), "--learning-rate must be a positive number"),
        (dict(lifetime=0.005), "--lifetime 0.005 is less than --max-forgetting 0.01"),
        (dict(lifetime=0.01, guard_texts={"a": "a.txt"}, limits={"a": 0.02}), "--lifetime 0.01 is less than --limit a"),
        (dict(limits={"a": 0.02}), "--limit a=...: no --guard-text has this name; none is given. Name"),
        (dict(limits={"c": 0.1}, guard_texts={"a": "a.txt", "b": "b.txt"}), "has this name; the names are a, b. Name"),
        (dict(continue_from="adapter", rank=8), "--adapter, --rank and --target-modules apply to a new adapter"),
        (dict(continue_from="adapter", adapter="lora"), "apply to a new adapter only"),
        (dict(target_modules=[]), "--target-modules names no layer"),
        (dict(seed=-1), "--seed must be between 0 and 4294967295, got -1"),
        (dict(adapter="dora"), "--adapter must be curlora or lora, got 'dora'"),
        (dict(adapter="lora", export="lora"), "--export lora is for CURLoRA adapters"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(TrainError, match=message):
        TrainOptions(**{"data": "chat.jsonl", "out": Path("out"), "model": "base", **options})


def test_a_lifetime_is_not_held_against_a_budget_that_no_text_has():
    TrainOptions(
        data="chat.jsonl", out=Path("out"), model="base", lifetime=0.005, limits={"a": 0.002},
        guard_texts={"a": Path("a.txt")},
    )  # fmt: skip
