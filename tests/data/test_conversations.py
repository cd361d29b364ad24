"""Every layout gives the same conversations; an error names the row of an invalid one."""

import json

import datasets
import pytest
from pydantic import ValidationError

from curlora.continual.data import DataError, TaskSpec, read_task
from curlora.data.conversations import trained_turns

SYSTEM, ASKED, ANSWERED, MORE, LAST = (
    {"role": role, "content": text}
    for role, text in zip(
        ("system", "user", "assistant", "user", "assistant"), ("be brief", "hi", "hello", "2+2?", "4"), strict=True
    )
)
TALK = [SYSTEM, ASKED, ANSWERED, MORE, LAST]


def sharegpt(messages):
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[message["role"]], "value": message["content"]} for message in messages]


@pytest.fixture
def read(tmp_path):
    def read(rows, suffix=".jsonl", **source):
        path = tmp_path / f"chat{suffix}"
        if suffix == ".parquet":
            datasets.Dataset.from_list(rows).to_parquet(str(path))
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        given = dict(path=path, **source)
        return read_task(TaskSpec(name="t", kind="chat", train=given, evaluation=given)).train

    return read


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("rows", "source"),
    [
        ([{"messages": TALK}], {}),
        ([{"messages": TALK}], {"layout": "messages"}),
        ([{"prompt": "not this", "messages": TALK}], {}),
        ([{"talk": TALK}], {"messages": "talk"}),
        ([{"conversations": TALK}], {}),
        ([{"conversations": sharegpt(TALK)}], {}),
        ([{"conversations": sharegpt(TALK)}], {"layout": "sharegpt"}),
        ([{"messages": sharegpt(TALK)}], {"layout": "sharegpt"}),
        ([{"talk": sharegpt(TALK)}], {"messages": "talk"}),
    ],
)
def test_layouts_of_whole_conversations(rows, source, suffix, read):
    assert read(rows, suffix, **source) == [TALK]


def test_the_other_names_of_sharegpts_roles(read):
    for human, machine in (("human", "gpt"), ("user", "chatgpt"), ("user", "assistant"), ("human", "model")):
        rows = [{"conversations": [{"from": human, "value": "hi"}, {"from": machine, "value": "hello"}]}]
        assert read(rows) == [[ASKED, ANSWERED]]


@pytest.mark.parametrize("source", [{}, {"layout": "alpaca"}])
def test_alpaca(source, read):
    rows = [
        {"instruction": "Add", "input": "1, 2", "output": "3"},
        {"instruction": "Say hi", "input": "", "output": "hi"},
        {"instruction": "Say hi", "input": None, "output": ""},
    ]
    assert [[m["content"] for m in talk] for talk in read(rows, **source)] == [
        ["Add\n\n1, 2", "3"],
        ["Say hi", "hi"],
        ["Say hi", ""],
    ]
    assert all([m["role"] for m in talk] == ["user", "assistant"] for talk in read(rows, **source))
    assert read([{"instruction": "Add", "output": "3"}], **source)[0][0]["content"] == "Add"


def test_pairs_of_text_and_of_messages(read):
    texts = [{"prompt": "hi", "completion": "hello"}]
    (talk,) = read(texts)
    assert [(m["role"], m["content"]) for m in talk] == [("user", "hi"), ("assistant", "hello")]
    assert read(texts, prompt="prompt", completion="completion") == [talk]
    (talk,) = read([{"q": "hi", "a": "4"}], prompt="Q: {q}", completion="a")
    assert [m["content"] for m in talk] == ["Q: hi", "4"]
    pairs = [{"prompt": TALK[:4], "completion": [LAST]}]
    for source in ({}, {"prompt": "prompt", "completion": "completion"}):
        (talk,) = read(pairs, **source)
        assert [{"role": m["role"], "content": m["content"]} for m in talk] == TALK
        assert trained_turns(talk) == [4]  # assistant messages in the prompt are not trained


def test_which_turns_are_trained():
    assert trained_turns(TALK) == [2, 4]
    assert trained_turns(TALK, "last") == [4]
    assert trained_turns([LAST, ASKED, ANSWERED, MORE]) == [2]  # a first assistant message is not an answer
    assert trained_turns([ASKED, {**ANSWERED, "weight": 0}, MORE, {**LAST, "weight": 1}]) == [3]


def test_content_in_parts_is_joined_and_other_keys_are_left_out(read):
    parts = [{"type": "text", "text": "he"}, {"type": "text", "text": "llo"}]
    rows = [{"messages": [{**ASKED, "name": "x", "id": 3}, {**ANSWERED, "content": parts, "weight": 0}, MORE, LAST]}]
    assert read(rows) == [[ASKED, {**ANSWERED, "weight": 0}, MORE, LAST]]


def test_a_dict_of_lists_is_a_list_of_dicts(read):
    rows = [{"messages": {"role": ["user", "assistant"], "content": ["hi", "hello"]}}]
    assert read(rows) == [[ASKED, ANSWERED]]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hi", "is not a list of messages: 'hi'"),
        (None, "is not a list of messages: None"),
        (["hi"], r"is not a list of messages: \['hi'\]"),
        ([], "is an empty conversation"),
        ([ASKED], "has no assistant message that answers a user message: its roles are user"),
        ([SYSTEM, ANSWERED, ASKED], "its roles are system, assistant, user"),
        ([ASKED, {**ANSWERED, "weight": 0}], "has no assistant message that answers"),
        ([ASKED, {"role": "bot", "content": "x"}], "has the unknown role 'bot' in message 1; known roles are system"),
        ([ASKED, {"content": "x"}], "has the unknown role None in message 1"),
        ([{"role": "user"}, ANSWERED], "has a message whose content is not text: message 0, None"),
        ([ASKED, {"role": "assistant", "content": None}], "content is not text: message 1, None"),
        ([ASKED, {"role": "assistant", "content": 4}], "content is not text: message 1, 4"),
        ([ASKED, {"role": "assistant", "content": [{"type": "image"}]}], "content is not text: message 1"),
        ([ASKED, {**ANSWERED, "tool_calls": [{"name": "f"}]}], "has a tool call in message 1"),
        ([{"from": "human", "value": "hi"}, {"from": "robot", "value": "x"}], "the unknown role 'robot'"),
    ],
)
def test_what_is_no_conversation_is_named_with_its_row_in_the_file(messages, message, read):
    good = {"messages": [ASKED, ANSWERED]}
    with pytest.raises(DataError, match=rf"task 't', train \(.*chat.jsonl\): row 1 .*{message}"):
        read([good, {"messages": messages}])
    rows = [good] * 30 + [{"messages": messages}] + [good] * 30
    with pytest.raises(DataError, match=rf"row 30 .*{message}"):
        read(rows, shuffle=5)


@pytest.mark.parametrize("tools", [[{"type": "function", "function": {"name": "f"}}], '[\n  {"type": "function"}]'])
def test_tools_are_not_left_out_in_silence(tools, read):
    read([{"messages": [ASKED, ANSWERED], "tools": ["hammer", "saw"]}])
    with pytest.raises(DataError, match="row 1 has tools, which would not reach the prompt"):
        read([{"messages": [ASKED, ANSWERED], "tools": None}, {"messages": [ASKED, ANSWERED], "tools": tools}])


@pytest.mark.parametrize(
    ("rows", "source", "message"),
    [
        ([{"instruction": None, "output": "x"}], {}, "row 0 has no instruction"),
        ([{"instruction": "x", "output": ["y"]}], {}, r"row 0 has a list in output, .*{output\[0\]}"),
        ([{"instruction": "x", "input": ["a"], "output": "y"}], {}, "row 0 has a list in input"),
        ([{"prompt": "x", "completion": None}], {}, "row 0 has no completion"),
        ([{"prompt": "x", "completion": {"a": "b"}}], {}, r"row 0 has a dict in completion, .*{completion\[a\]}"),
        ([{"text": "x"}], {}, "the columns text match no layout of conversations. Set messages to the column"),
        ([{"text": "x"}], {"layout": "alpaca"}, "there is no column 'instruction' among text"),
        ([{"text": "x"}], {"layout": "sharegpt"}, "there is no column 'conversations' among text"),
        ([{"text": "x"}], {"messages": "talk"}, "there is no column 'talk' among text"),
    ],
)
def test_what_is_not_in_the_layout_is_named(rows, source, message, read):
    with pytest.raises(DataError, match=message):
        read(rows, **source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (dict(layout="vicuna"), "layout"),
        (dict(layout="alpaca", messages="m"), "the layout alpaca has the columns instruction, input and output"),
        (dict(layout="messages", prompt="p", completion="c"), "give either messages or layout, or prompt and"),
        (dict(prompt="p"), "completion is missing"),
        (dict(text="p"), "train: text is not for a task of chat"),
    ],
)
def test_bad_entries_of_a_recipe_are_named(source, message):
    given = dict(path="x.jsonl", **source)
    with pytest.raises(ValidationError, match=message):
        TaskSpec(name="t", kind="chat", train=given, evaluation=given)
