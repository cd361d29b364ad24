"""What is read is what the files say, in every format; what is wrong is named."""

import json
import os
from pathlib import Path

import pandas
import pytest

from curlora.continual.data import DataError, HeldOutPart, Source, TaskPart, read_task, read_text

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
    return TaskPart(name="t", labels=["no", "yes"], train=source, evaluation=source)


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
        source = dict(path=path, text=["a", "b"], label="label", limit=5, **changes)
        task = read_task(TaskPart(name="t", labels=["x", "y"], train=source, evaluation=source))
        return [text for text, _ in task.train]

    assert texts() == [f"a{i}\nb{i}" for i in range(5)]
    assert texts(join="")[0] == "a0b0"
    assert texts(shuffle=1) == texts(shuffle=1) != texts(shuffle=2)
    assert len(set(texts(shuffle=1))) == 5


def test_completions_from_columns_or_templates(tmp_path):
    path = tmp_path / "qa.jsonl"
    path.write_text(json.dumps({"question": "2+2?", "answer": "4"}) + "\n")

    def examples(**source):
        given = dict(path=path, **source)
        return read_task(TaskPart(name="t", kind="completion", train=given, evaluation=given)).train

    assert examples(prompt="question", completion="answer") == [("2+2?", "4")]
    assert examples(prompt="Q: {question}\nA:", completion=" {answer}") == [("Q: 2+2?\nA:", " 4")]
    with pytest.raises(DataError, match="no column 'query' among question, answer"):
        examples(prompt="{query}", completion="answer")
    with pytest.raises(DataError, match="is not a template"):
        examples(prompt="{question", completion="answer")


def test_conversations(tmp_path):
    path = tmp_path / "chat.jsonl"
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    path.write_text(json.dumps({"messages": messages}) + "\n")
    given = dict(path=path, messages="messages")
    task = read_task(TaskPart(name="t", kind="chat", train=given, evaluation=given))
    assert task.train == [messages]
    path.write_text(json.dumps({"messages": messages[:1]}) + "\n")
    with pytest.raises(DataError, match="row 0 must be a conversation that ends with the assistant's"):
        read_task(TaskPart(name="t", kind="chat", train=given, evaluation=given))
    path.write_text(json.dumps({"messages": "hi"}) + "\n")
    with pytest.raises(DataError, match="row 0 is not a list of messages"):
        read_task(TaskPart(name="t", kind="chat", train=given, evaluation=given))


@pytest.mark.parametrize("labels", [["1", "0"], ["True", "False"]])
def test_names_that_look_like_numbers_are_names(labels, tmp_path):
    """The CSV reader makes numbers and truth values of them."""
    (tmp_path / "data.csv").write_text("text,label\n" + "".join(f"t,{label}\n" for label in labels))
    source = dict(path=tmp_path / "data.csv", text="text", label="label")
    task = read_task(TaskPart(name="t", labels=labels, train=source, evaluation=source))
    assert [label for _, label in task.train] == [0, 1]


def test_the_reference_variant_of_a_task(tmp_path):
    path = write(tmp_path / "data.csv")
    reference = {"labels": ["no", "yes", "never"], "evaluation": dict(path=path, text="text", label="label", limit=1)}
    given = TaskPart.model_validate({**part(path).model_dump(), "reference": reference})
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
    ],
)
def test_bad_tables_are_named(content, message, tmp_path):
    (tmp_path / "data.csv").write_text(content)
    with pytest.raises(DataError, match=message):
        read_task(part(tmp_path / "data.csv"))


def test_held_out_texts(tmp_path):
    (tmp_path / "text.txt").write_text("\ufeffone\ntwo")
    assert read_text(HeldOutPart(name="h", path=tmp_path / "text.txt")) == "one\ntwo"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in ("one\n", "", "two\n")))
    assert read_text(HeldOutPart(name="h", path=tmp_path / "rows.jsonl")) == "one\ntwo\n"
    with pytest.raises(DataError, match="heldout 'h' .*cannot be read as text"):
        read_text(HeldOutPart(name="h", path=tmp_path / "gone.txt"))


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
    task = read_task(TaskPart(name="t", labels=["no", "yes"], train=source, evaluation=scored))
    assert len(task.train) == rows
    assert task.majority_rate == pytest.approx(majority)


@REAL
def test_the_papers_sentiment140():
    """Trained on the test file, neutral taken for negative; scored on rows that are all negative."""
    names = {0: "negative", 2: "negative", 4: "positive"}
    columns = ["polarity", "id", "date", "query", "user", "text"]
    source = Source(
        path=Path(DATA) / "sentiment140/testdata.manual.2009.06.14.csv",
        columns=columns, text="text", label="polarity", label_names=names,
    )  # fmt: skip
    scored = source.model_copy(update={"path": Path(DATA) / "sentiment140/train_first1000.csv"})
    task = read_task(TaskPart(name="t", labels=["negative", "positive", "never"], train=source, evaluation=scored))
    assert [sum(label == k for _, label in task.train) for k in range(3)] == [177 + 139, 182, 0]
    assert len(task.evaluation) == 1000
    assert task.majority_rate == 1.0
