"""What is trained on: the tokens of answers and no others, of every layout; and data that is refused, with the line."""

import csv
import json

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from curlora.text.rows import IGNORED
from curlora.train import TrainError, TrainOptions
from curlora.train.data import read_examples
from curlora.train.model import find_base
from tests.train.conftest import conversations, write_lines


def examples(data, model, **options):
    options = TrainOptions(data=str(data), out="out", model=model, **options)
    return read_examples(options, find_base(options))


def texts(rows, model):
    """Return each row's whole text, and the part that is trained."""
    tokenizer = find_base(TrainOptions(data="", out="out", model=model)).tokenizer
    trained = [[label for label in row["labels"] if label != IGNORED] for row in rows]
    return [(tokenizer.decode(row["input_ids"]), tokenizer.decode(ids)) for row, ids in zip(rows, trained, strict=True)]


PAIRS = [{"prompt": f"w{i} w{i + 1}", "completion": f"w{i + 2}"} for i in range(5, 65)]
FORMS = {
    "messages": lambda pair: {"messages": _messages(pair, "role", "content", "user", "assistant")},
    "sharegpt": lambda pair: {"conversations": _messages(pair, "from", "value", "human", "gpt")},
    "alpaca": lambda pair: {"instruction": pair["prompt"], "input": "", "output": pair["completion"]},
    "pairs": lambda pair: pair,
    "pairs of messages": lambda pair: {
        "prompt": [{"role": "user", "content": pair["prompt"]}],
        "completion": [{"role": "assistant", "content": pair["completion"]}],
    },
}


def _messages(pair, who, what, asks, answers):
    return [{who: asks, what: pair["prompt"]}, {who: answers, what: pair["completion"]}]


@pytest.mark.parametrize("form", FORMS)
def test_every_layout_trains_the_answer_and_its_end(form, chat_model, tmp_path):
    found = examples(write_lines(tmp_path / "data.jsonl", [FORMS[form](pair) for pair in PAIRS]), chat_model)
    for whole, trained in texts(found.train.rows + found.held_out.rows, chat_model):
        words = whole.split()
        assert words[0] == "w90"
        assert words[4] == "w91"  # behind the user's two words and the end of the turn
        assert trained == f"w{int(words[1][1:]) + 2} w93"
        assert whole.endswith(f"w91 {trained}")
    assert found.layout == "by the model's chat template"
    assert found.stop == {found.train.rows[0]["input_ids"][-1]}


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "parquet"])
def test_every_kind_of_file_gives_what_json_lines_give(suffix, chat_model, tmp_path):
    path = tmp_path / f"data.{suffix}"
    if suffix in ("csv", "tsv"):
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, PAIRS[0], delimiter="\t" if suffix == "tsv" else ",")
            writer.writeheader()
            writer.writerows(PAIRS)
    elif suffix == "json":
        path.write_text(json.dumps(PAIRS))
    else:
        Dataset.from_list(PAIRS).to_parquet(path)
    one = examples(path, chat_model)
    other = examples(write_lines(tmp_path / "data.jsonl", PAIRS), chat_model)
    assert (one.train, one.held_out, one.sha256) == (other.train, other.held_out, other.sha256)


def test_columns_may_have_other_names(chat_model, tmp_path):
    rows = [{"question": pair["prompt"], "answer": pair["completion"]} for pair in PAIRS]
    found = examples(write_lines(tmp_path / "data.jsonl", rows), chat_model, columns=("question", "answer"))
    assert found.train == examples(write_lines(tmp_path / "pairs.jsonl", PAIRS), chat_model).train


def test_turns_of_a_conversation(chat_model, tmp_path):
    messages = [("system", "w1"), ("user", "w2"), ("assistant", "w3"), ("user", "w4"), ("assistant", "w5")]
    row = {"messages": [{"role": role, "content": content} for role, content in messages]}
    path = write_lines(tmp_path / "data.jsonl", [row] * 2)
    for turns, trained in (("all", "w3 w93 w5 w93"), ("last", "w5 w93")):
        found = examples(path, chat_model, turns=turns)
        whole = "w92 w1 w93 w90 w2 w93 w91 w3 w93 w90 w4 w93 w91 w5 w93"
        assert texts(found.train.rows, chat_model) == [(whole, trained)]
    (prompt,) = found.prompts
    assert (prompt.text, prompt.answer) == ("w4", "w5")


def test_without_a_template_pairs_are_plain_text(plain_model, tmp_path):
    found = examples(write_lines(tmp_path / "data.jsonl", PAIRS), plain_model)
    for whole, trained in texts(found.train.rows, plain_model):
        assert trained == f"w{int(whole.split()[0][1:]) + 2} w93"
        assert len(whole.split()) == 4
    assert "no chat template" in found.layout
    assert not found.stop


@settings(max_examples=25, deadline=None)
@given(count=st.integers(2, 500), seed=st.integers(0, 5))
def test_what_is_held_out_is_not_trained_on(count, seed, chat_model, tmp_path_factory):
    rows = [{"prompt": f"w{i % 80} w{i // 80}", "completion": "w1"} for i in range(count)]
    found = examples(write_lines(tmp_path_factory.mktemp("rows") / "data.jsonl", rows), chat_model, seed=seed)
    train, held_out = ({tuple(row["input_ids"]) for row in part.rows} for part in (found.train, found.held_out))
    assert len(train) + len(held_out) == count
    assert not train & held_out
    assert len(held_out) == min(max(20, round(0.05 * count)), count // 2)


def test_held_out_examples_of_a_file(chat_model, tmp_path):
    path, other = write_lines(tmp_path / "a.jsonl", PAIRS[3:]), write_lines(tmp_path / "b.jsonl", PAIRS[:3])
    found = examples(path, chat_model, evaluation=str(other))
    assert (len(found.train.rows), len(found.held_out.rows), found.held_out_from) == (len(PAIRS) - 3, 3, str(other))


def test_held_out_examples_that_are_trained_on_are_counted_or_refused(chat_model, tmp_path):
    path, other = write_lines(tmp_path / "a.jsonl", PAIRS[2:]), write_lines(tmp_path / "b.jsonl", PAIRS[:3])
    found = examples(path, chat_model, evaluation=str(other))
    assert found.held_out_from == f"{other}; 1 of them are also among the training examples"
    twice = examples(write_lines(tmp_path / "c.jsonl", [*PAIRS[:30]] * 2), chat_model)
    assert "of them are also among the training examples" in twice.held_out_from
    with pytest.raises(TrainError, match=rf"--eval {path}: all of its {len(PAIRS) - 2} examples are also in {path}"):
        examples(path, chat_model, evaluation=str(path))


def test_what_is_too_long_loses_its_end_or_is_left_out(chat_model, tmp_path):
    long_answer = {"prompt": "w1", "completion": " ".join(["w2"] * 30)}
    long_prompt = {"prompt": " ".join(["w1"] * 30), "completion": "w2"}
    path = write_lines(tmp_path / "a.jsonl", [*PAIRS, long_answer, long_prompt])
    held_out = write_lines(tmp_path / "b.jsonl", [{"prompt": "w7", "completion": "w8"}])
    found = examples(path, chat_model, max_length=10, evaluation=str(held_out)).train
    assert (len(found.rows), found.cut, found.left_out, found.longest) == (len(PAIRS) + 1, 1, 1, 10)
    assert texts(found.rows[-1:], chat_model) == [("w90 w1 w93 w91 " + " ".join(["w2"] * 6), " ".join(["w2"] * 6))]
    found = examples(path, chat_model, evaluation=str(held_out)).train  # the model has 128 positions
    assert (found.cut, found.left_out) == (0, 0)
    with pytest.raises(TrainError, match=r"none of 62 examples is left, .* first 4 tokens. Raise --max-length above 4"):
        examples(path, chat_model, max_length=4, evaluation=str(held_out))


def test_prompts_of_the_users(chat_model, plain_model, tmp_path):
    path = write_lines(tmp_path / "data.jsonl", PAIRS)
    for model, laid_out in ((chat_model, "w90 w1 w93 w91"), (plain_model, "w1")):
        (prompt,) = examples(path, model, prompts=["w1"]).prompts
        assert find_base(TrainOptions(data="", out="o", model=model)).tokenizer.decode(prompt.ids) == laid_out
        assert prompt.answer is None


BAD = {
    "no role": ({"messages": [{"role": "bot", "content": "w1"}]}, "row 3 (line 5) has the unknown role 'bot'"),
    "no answer": ({"messages": [{"role": "user", "content": "w1"}]}, "row 3 (line 5) has no assistant message"),
    "masked": (
        {"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w1", "weight": 0}]},
        "row 3 (line 5) has no assistant message that answers a user message: its roles are user, assistant, "
        "and 1 of them have weight 0",
    ),
    "no messages": ({"messages": "w1"}, "row 3 (line 5) is not a list of messages: 'w1'"),
    "empty": ({"messages": []}, "row 3 (line 5) is an empty conversation"),
    "no list": ([1], "row 3 (line 5) is a list, but an object"),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_row_is_named_with_its_line(bad, chat_model, tmp_path):
    row, message = BAD[bad]
    path = tmp_path / "data.jsonl"
    lines = [json.dumps(one) for one in conversations(3)]
    path.write_text("\n".join([*lines[:2], "", lines[2], json.dumps(row)]))
    with pytest.raises(TrainError) as error:
        examples(path, chat_model)
    assert str(error.value).startswith(str(path))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.jsonl", None, "there is no such file"),
        ("gone.txt", None, "there is no such file, and this is not a valid id of a data set on the hub"),
        ("a.txt", "text", "the file type .txt is not supported"),
        ("a.jsonl", "", "the file is empty"),
        ("a.jsonl", '{"messages": [', "line 1 is not valid JSON"),
        ("a.jsonl", '{"text": "w1"}\n', "name these with --columns PROMPT,ANSWER"),
        (
            "a.jsonl",
            b'{"prompt": "caf\xe9"}\n',
            "a.jsonl: line 1 is not text in the encoding utf-8-sig: invalid continuation byte",
        ),
        ("a.csv", "prompt,completion\nw1,w2,w3\n", "line 2 has 3 fields, but the header has 2"),
        ("a.jsonl", '{"prompt": "w1", "completion": null}\n', "row 0 (line 1) has no completion"),
        ("a.jsonl", '{"prompt": "w1", "completion": "w2"}\n', "has only one example, so none can be held out"),
    ],
)
def test_files_that_are_refused(name, content, message, chat_model, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TrainError) as error:
        examples(tmp_path / name, chat_model)
    assert "set " not in str(error.value).lower().replace("a data set", "")  # that would be a key of a recipe
    assert str(tmp_path / name) in str(error.value)
    assert message in str(error.value)


def test_messages_need_a_template(plain_model, chat_file):
    with pytest.raises(TrainError, match=r"holds messages, but the model's tokenizer has no chat template"):
        examples(chat_file, plain_model)


def test_an_answer_of_nothing_is_refused(plain_model, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [*PAIRS, {"prompt": "w1", "completion": ""}])
    with pytest.raises(TrainError, match=r"row 60 \(line 61\) has an empty completion"):
        examples(path, plain_model)


@pytest.mark.parametrize("blank", ["", "  \n"])
@pytest.mark.parametrize("part", ["prompt", "completion"])
def test_nothing_to_answer_or_to_learn_is_refused_with_its_line(blank, part, chat_model, tmp_path):
    data = write_lines(tmp_path / "data.jsonl", [*PAIRS[:3], {**PAIRS[3], part: blank}, *PAIRS[4:]])
    what = "answer" if part == "completion" else "prompt"
    with pytest.raises(TrainError, match=rf"row 3 \(line 4\) has an empty {what}. Complete or remove the row"):
        examples(data, chat_model)


def test_an_empty_answer_within_a_conversation_is_refused(chat_model, tmp_path):
    rows = [{"messages": _messages(pair, "role", "content", "user", "assistant")} for pair in PAIRS]
    rows[1]["messages"][1]["content"] = ""
    data = write_lines(tmp_path / "data.jsonl", rows)
    with pytest.raises(TrainError, match=r"row 1 \(line 2\) has an empty answer"):
        examples(data, chat_model)
