"""Data are read unchanged from files of every format; errors name what is wrong."""

import json
import os
from pathlib import Path

import datasets
import pandas
import pytest
from pydantic import ValidationError

from curlora.continual.data import DataError, HeldOutSpec, Source, TaskSpec, read_task, read_text

ROWS = [("a b", "yes"), ('he said "no"', "no"), ("null", "yes"), ("é,\tx", "no")]


def write(path):
    table = [{"text": text, "label": label} for text, label in ROWS]
    frame = pandas.DataFrame(table)
    if path.suffix == ".parquet":
        frame.to_parquet(path)
    elif path.suffix in (".jsonl", ".json"):
        path.write_text("".join(json.dumps(row) + "\n" for row in table))
    else:
        frame.to_csv(path, sep="\t" if path.suffix == ".tsv" else ",", index=False)
    return path


def part(path, **changes):
    source = dict(path=path, text="text", label="label", **changes)
    return TaskSpec(name="t", labels=["no", "yes"], train=source, evaluation=source)


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".jsonl", ".json", ".parquet"])
def test_every_local_format(suffix, tmp_path):
    task = read_task(part(write(tmp_path / f"data{suffix}")))
    assert task.train == [(text, int(label == "yes")) for text, label in ROWS]


def test_a_file_without_a_heading_and_one_without_quotation_marks(tmp_path):
    (tmp_path / "bare.csv").write_text('4,"one, two"\n0,three\n')
    names = {0: "no", 4: "yes"}
    task = read_task(part(tmp_path / "bare.csv", columns=["label", "text"], label_names=names))
    assert task.train == [("one, two", 1), ("three", 0)]
    (tmp_path / "glue.tsv").write_text('text\tlabel\n"open\t1\nplain\t0\n')
    assert read_task(part(tmp_path / "glue.tsv", quoted=False)).train == [('"open', 1), ("plain", 0)]


def test_columns_are_joined_limited_and_shuffled_by_a_seed(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"a": f"a{i}", "b": f"b{i}", "label": i % 2}) + "\n" for i in range(20)))

    def texts(**changes):
        source = dict(path=path, text=["a", "b"], label="label", **{"limit": 5, **changes})
        task = read_task(TaskSpec(name="t", labels=["x", "y"], train=source, evaluation=source))
        return [text for text, _ in task.train]

    assert texts() == [f"a{i}\nb{i}" for i in range(5)]
    assert texts(join="")[0] == "a0b0"
    assert texts(shuffle=1) == texts(shuffle=1) != texts(shuffle=2)
    assert len(set(texts(shuffle=1))) == 5
    assert texts(skip=3) == [f"a{i}\nb{i}" for i in range(3, 8)]
    assert texts(skip=17, shuffle=1) == texts(shuffle=1, limit=20)[17:]
    with pytest.raises(DataError, match=r"skip leaves none of the 20 rows\. Lower skip from 20"):
        texts(skip=20)


@pytest.mark.parametrize("kind", ["classification", "completion", "chat"])
def test_examples_in_both_splits_are_counted(kind, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"a": f"a{i}", "label": i % 2}) + "\n" for i in range(20)))
    columns = dict(text="a", label="label") if kind == "classification" else dict(prompt="a", completion="{a}!")
    labels = ["x", "y"] if kind == "classification" else None
    own = dict(path=path, **columns)

    def both(train, evaluation):
        return read_task(
            TaskSpec(name="t", kind=kind, labels=labels, train={**own, **train}, evaluation={**own, **evaluation})
        )

    assert both({"limit": 12}, {"skip": 12}).evaluation_in_train == 0
    assert both({"limit": 12}, {"skip": 9, "limit": 6}).evaluation_in_train == 3
    assert both({}, {}).evaluation_in_train == 20


def test_completions_from_columns_or_templates(tmp_path):
    path = tmp_path / "qa.jsonl"
    path.write_text(json.dumps({"question": "2+2?", "answer": "4"}) + "\n")

    def examples(**source):
        given = dict(path=path, **source)
        return read_task(TaskSpec(name="t", kind="completion", train=given, evaluation=given)).train

    assert examples(prompt="question", completion="answer") == [("2+2?", "4")]
    assert examples(prompt="Q: {question}\nA:", completion=" {answer}") == [("Q: 2+2?\nA:", " 4")]
    with pytest.raises(DataError, match="no column 'query' among question, answer"):
        examples(prompt="{query}", completion="answer")
    with pytest.raises(DataError, match="is not a valid template"):
        examples(prompt="{question", completion="answer")


def test_conversations(tmp_path):
    path = tmp_path / "chat.jsonl"
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    path.write_text(json.dumps({"messages": messages}) + "\n")
    given = dict(path=path, messages="messages")
    task = read_task(TaskSpec(name="t", kind="chat", train=given, evaluation=given))
    assert task.train == [messages]
    path.write_text(json.dumps({"messages": messages[:1]}) + "\n")
    with pytest.raises(DataError, match="row 0 has no assistant message that answers"):
        read_task(TaskSpec(name="t", kind="chat", train=given, evaluation=given))
    path.write_text(json.dumps({"messages": "hi"}) + "\n")
    with pytest.raises(DataError, match="row 0 is not a list of messages"):
        read_task(TaskSpec(name="t", kind="chat", train=given, evaluation=given))


@pytest.mark.parametrize("labels", [["1", "0"], ["True", "False"]])
def test_names_that_look_like_numbers_are_names(labels, tmp_path):
    """Other CSV readers convert them to numbers and booleans."""
    (tmp_path / "data.csv").write_text("text,label\n" + "".join(f"t,{label}\n" for label in labels))
    source = dict(path=tmp_path / "data.csv", text="text", label="label")
    task = read_task(TaskSpec(name="t", labels=labels, train=source, evaluation=source))
    assert [label for _, label in task.train] == [0, 1]


def test_the_reference_variant_of_a_task(tmp_path):
    path = write(tmp_path / "data.csv")
    reference = {"labels": ["no", "yes", "never"], "evaluation": dict(path=path, text="text", label="label", limit=1)}
    given = TaskSpec.model_validate({**part(path).model_dump(), "reference": reference})
    assert (len(read_task(given).labels), len(read_task(given).evaluation)) == (2, 4)
    other = read_task(given, reference=True)
    assert (len(other.labels), len(other.evaluation), len(other.train)) == (3, 1, 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty"),
        ("text,label\n", "the file has no rows"),
        ("text,label\nx,maybe\n", "row 0 has label 'maybe', which is neither one of"),
        ("text,label\nx,7\n", "row 0 has label 7, which is neither"),
        ("words,label\nx,1\n", "no column 'text' among words, label"),
        ("a,text,label\n1,x,y,yes\n2,y,no,no\n", "line 2 has 4 fields, but the header has 3"),
        ("text,label\nx,\n", "row 0 has label ''"),
    ],
)
def test_bad_tables_are_named(content, message, tmp_path):
    (tmp_path / "data.csv").write_text(content)
    with pytest.raises(DataError, match=message):
        read_task(part(tmp_path / "data.csv"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"label": 0}, "row 1 has no text in text: None"),
        ({"text": None, "label": 0}, "row 1 has no text in text: None"),
        ({"text": 5, "label": 0}, "row 1 has no text in text: 5"),
        ({"text": ["x"], "label": 0}, r"row 1 has no text in text: \['x'\]"),
        ({"text": "x"}, "row 1 has no label"),
        ({"text": "x", "label": None}, "row 1 has no label"),
        ({"text": "x", "label": [0]}, r"row 1 has label \[0\], which is neither"),
        ({"text": "x", "label": 0.5}, "row 1 has label 0.5, which is neither"),
        ({"text": "x", "label": True}, "row 1 has label True, which is neither"),
        ({"text": "x", "label": -1}, "row 1 has label -1, which is neither"),
    ],
)
def test_a_row_that_has_not_what_is_needed_is_named(row, message, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in ({"text": "x", "label": 1}, row)))
    with pytest.raises(DataError, match=message):
        read_task(part(path))


def test_rows_are_counted_in_the_file_whatever_their_order(tmp_path):
    path = tmp_path / "data.jsonl"
    rows = [{"text": "x", "label": 1}] * 40 + [{"text": None, "label": 1}] + [{"text": "x", "label": 1}] * 9
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="row 40 has no text"):
        read_task(part(path, shuffle=0))
    assert len(read_task(part(path, limit=30)).train) == 30


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(labels=["a", "a", "b"]), "'a' is listed twice"),
        (dict(label_names={0: "no", 1: "maybe"}), "train: label_names: 'maybe' is not among the labels no, yes"),
        (dict(prompt="text", completion="label"), "train: completion is not for a task of classification"),
        (dict(score={"generate": None}), "score is for completion and chat tasks"),
        (dict(turns="last"), "a task of classification has no turns"),
        (dict(too_long="split"), "Input should be 'cut' or 'drop'"),
        (dict(kind="completion", labels=None, score={"generate": {}, "metric": "bleu"}), "'exact_match' or 'rouge'"),
        (dict(kind="completion", labels=None, score={"generate": {}, "normalize": "("}), "nor a regular expression"),
        (dict(kind="completion", labels=None, score={"generate": {"max_new_tokens": 0}}), "greater than 0"),
    ],
)
def test_bad_entries_of_a_task_are_named(changes, message, tmp_path):
    text = dict(prompt="text", completion="label") if changes.get("kind") else dict(text="text", label="label")
    keys = {key: changes.pop(key) for key in ("label_names", "prompt", "completion") if key in changes}
    source = dict(path=tmp_path / "data.csv", **text, **keys)
    with pytest.raises(ValidationError, match=message):
        TaskSpec(**{**dict(name="t", labels=["no", "yes"], train=source, evaluation=source), **changes})


def test_labels_that_differ_in_case_alone_are_two(tmp_path):
    (tmp_path / "data.csv").write_text("text,label\nx,US\ny,us\n")
    source = dict(path=tmp_path / "data.csv", text="text", label="label")
    task = read_task(TaskSpec(name="t", labels=["us", "US"], train=source, evaluation=source))
    assert [label for _, label in task.train] == [1, 0]


SQUAD = {"question": "Who?", "answers": {"text": ["Ada"], "answer_start": [3]}}


def squad(path, **source):
    given = dict(path=path, **source)
    return read_task(TaskSpec(name="t", kind="completion", train=given, evaluation=given)).train


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_what_is_nested_is_taken_by_indices_and_never_written_as_python_would(suffix, tmp_path):
    path = tmp_path / f"squad{suffix}"
    if suffix == ".parquet":
        datasets.Dataset.from_list([SQUAD]).to_parquet(str(path))
    else:
        path.write_text(json.dumps(SQUAD) + "\n")
    assert squad(path, prompt="question", completion=" {answers[text][0]}") == [("Who?", " Ada")]
    with pytest.raises(DataError, match=r"row 0 has a dict in answers, .* such as {answers\[text\]\[0\]}"):
        squad(path, prompt="question", completion="answers")
    with pytest.raises(DataError, match=r"row 0 has no answers\[text\]\[1\]"):
        squad(path, prompt="question", completion="{answers[text][1]}")


def test_messages_in_the_place_of_a_prompt_are_for_chat(tmp_path):
    (tmp_path / "pairs.jsonl").write_text(
        json.dumps({"prompt": [{"role": "user", "content": "hi"}], "completion": "x"}) + "\n"
    )
    with pytest.raises(DataError, match="row 0 has a list in prompt, .*. For lists of messages set kind: chat"):
        squad(tmp_path / "pairs.jsonl", prompt="prompt", completion="completion")


def test_numbers_of_a_csv_file_are_the_text_that_stands_there(tmp_path):
    (tmp_path / "sums.csv").write_text("q,a\n1+1,2.0\n007,3.10\n,5\n")
    assert squad(tmp_path / "sums.csv", prompt="{q}=", completion="a") == [
        ("1+1=", "2.0"),
        ("007=", "3.10"),
        ("=", "5"),
    ]


def test_a_right_answer_that_cannot_be_compared_is_named_with_its_row(tmp_path):
    path = tmp_path / "gsm.jsonl"
    path.write_text("".join(json.dumps({"q": "x", "a": a}) + "\n" for a in ("#### 1", "#### 2", "none", "#### 4")))
    source = dict(path=path, prompt="q", completion="a")
    given = dict(name="t", kind="completion", train=source, evaluation={**source, "shuffle": 1})
    with pytest.raises(DataError, match="evaluation row 2 has an answer in which the normalization 'gsm8k' finds noth"):
        read_task(TaskSpec(**given, score={"generate": {"max_new_tokens": 4}, "normalize": "gsm8k"}))
    assert read_task(TaskSpec(**given, score={"generate": None})).score.max_new_tokens == 256


def test_held_out_texts_that_are_none_are_named(tmp_path):
    (tmp_path / "text.txt").write_bytes(b"a\0b")
    with pytest.raises(DataError, match="holds NUL characters"):
        read_text(HeldOutSpec(name="h", path=tmp_path / "text.txt"))
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": ["b"]}\n')
    with pytest.raises(DataError, match=r"the column 'text' does not hold text: row 1 has \['b'\]"):
        read_text(HeldOutSpec(name="h", path=tmp_path / "rows.jsonl"))
    (tmp_path / "rows.csv").write_text("text\na,b\n")
    with pytest.raises(DataError, match="text 'h' .*: line 2 has 2 fields, but the header has 1"):
        read_text(HeldOutSpec(name="h", path=tmp_path / "rows.csv"))


def test_held_out_texts(tmp_path):
    (tmp_path / "text.txt").write_text("\ufeffone\ntwo")
    assert read_text(HeldOutSpec(name="h", path=tmp_path / "text.txt")) == "one\ntwo"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in ("one\n", "", "two\n")))
    assert read_text(HeldOutSpec(name="h", path=tmp_path / "rows.jsonl")) == "one\ntwo\n"
    with pytest.raises(DataError, match="text 'h' .*cannot be read as text"):
        read_text(HeldOutSpec(name="h", path=tmp_path / "gone.txt"))


DATA = os.environ.get("CURLORA_DATA_DIR")
REAL = pytest.mark.skipif(not DATA, reason="CURLORA_DATA_DIR is not set: the real data sets are not here")


@REAL
@pytest.mark.parametrize(
    ("train", "evaluation", "rows", "majority"),
    [
        (
            dict(path="mrpc/train.tsv", text=["#1 String", "#2 String"], label="Quality"),
            "mrpc/dev.tsv",
            3667,
            279 / 408,
        ),
        (dict(path="sst2/train.tsv", text="sentence", label="label"), "sst2/dev.tsv", 67_349, 444 / 872),
        (
            dict(path="sentiment140/train_sample_fit.tsv", text="text", label="label"),
            "sentiment140/train_sample_eval.tsv",
            5000,
            0.5,
        ),
    ],
)
def test_real_data_is_read_whole(train, evaluation, rows, majority):
    source = Source(**{**train, "path": Path(DATA) / train["path"]}, quoted=False)
    scored = source.model_copy(update={"path": Path(DATA) / evaluation})
    task = read_task(TaskSpec(name="t", labels=["no", "yes"], train=source, evaluation=scored))
    assert len(task.train) == rows
    assert task.majority_rate == pytest.approx(majority)


@REAL
def test_the_papers_sentiment140():
    """Trained on the test file, with neutral as negative; evaluated on rows that are all negative."""
    names = {0: "negative", 2: "negative", 4: "positive"}
    columns = ["polarity", "id", "date", "query", "user", "text"]
    source = Source(
        path=Path(DATA) / "sentiment140/testdata.manual.2009.06.14.csv",
        columns=columns, text="text", label="polarity", label_names=names,
    )  # fmt: skip
    scored = source.model_copy(update={"path": Path(DATA) / "sentiment140/train_first1000.csv"})
    task = read_task(TaskSpec(name="t", labels=["negative", "positive", "never"], train=source, evaluation=scored))
    assert [sum(label == k for _, label in task.train) for k in range(3)] == [177 + 139, 182, 0]
    assert len(task.evaluation) == 1000
    assert task.majority_rate == 1.0
