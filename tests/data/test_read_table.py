"""Tables are read unchanged; a file of another type than its name says, or with bad rows, gives a clear error."""

import csv
import gzip
import io
import json
import sqlite3
import zipfile

import datasets
import numpy
import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from curlora.data.errors import DataError
from curlora.data.read_table import Place, read_table


def rows_of(path, **options):
    return [dict(row) for row in read_table(Place(path=path, **options), "task 't'")]


def refused(path, **options):
    with pytest.raises(DataError) as error:
        rows_of(path, **options)
    message = str(error.value)
    assert message.startswith("task 't': ")
    assert "\n" not in message
    return message


FIELD = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)


@given(st.lists(st.lists(FIELD, min_size=3, max_size=3), min_size=1, max_size=6), st.sampled_from(["csv", "tsv"]))
def test_what_pythons_writer_writes_is_read_as_it_was(tmp_path_factory, table, suffix):
    path = tmp_path_factory.mktemp("csv") / f"data.{suffix}"
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, delimiter="," if suffix == "csv" else "\t", quoting=csv.QUOTE_ALL)
        writer.writerows([["a", "b", "c"], *table])
    assert rows_of(path) == [dict(zip("abc", row, strict=True)) for row in table]


def test_every_field_is_text_as_it_stands_there(tmp_path):
    (tmp_path / "data.csv").write_text("a,b,c\n007,3.10,True\n1e5,,NA\n2020-01-01, x ,null\n")
    assert rows_of(tmp_path / "data.csv") == [
        {"a": "007", "b": "3.10", "c": "True"},
        {"a": "1e5", "b": "", "c": "NA"},
        {"a": "2020-01-01", "b": " x ", "c": "null"},
    ]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_byte_order_mark_is_not_part_of_the_heading(encoding, mark, tmp_path):
    (tmp_path / "data.csv").write_text(mark + "text,label\nx,1\n", encoding="utf-8")
    assert rows_of(tmp_path / "data.csv", encoding=encoding) == [{"text": "x", "label": "1"}]
    (tmp_path / "data.jsonl").write_text(mark + '{"text": "x"}\n', encoding="utf-8")
    assert rows_of(tmp_path / "data.jsonl", encoding=encoding) == [{"text": "x"}]


def test_another_encoding_is_read_where_it_is_named_and_refused_where_not(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("text,label\nnaïve,1\n", encoding="utf-16")
    assert rows_of(path, encoding="utf-16") == [{"text": "naïve", "label": "1"}]
    assert "is text in UTF-16. Set encoding: utf-16" in refused(path)
    path.write_text("text,label\nnaïve,1\n", encoding="latin-1")
    assert rows_of(path, encoding="latin-1") == [{"text": "naïve", "label": "1"}]
    assert "line 2 is not text in the encoding utf-8-sig: invalid continuation byte at byte 13" in refused(path)
    path.write_bytes(b"text,label\n" + b"long enough for several buffers,1\n" * 1000 + b"na\xefve,1\n")
    assert "line 1002 is not text in the encoding utf-8-sig: invalid continuation byte at byte 34013" in refused(path)
    path.write_bytes("text,label\nx,1\n".encode("utf-16-le"))
    assert "line 1 holds a NUL character" in refused(path)
    with pytest.raises(ValidationError, match="'utf-88' is not an encoding of Python"):
        Place(path=path, encoding="utf-88")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,text,label\n1,x,yes\n2,y,no,no\n", "line 3 has 4 fields, but the header has 3. Enclose text that holds a"),
        ("a,text,label\n1,x,y,yes\n", "line 2 has 4 fields, but the header has 3"),
        ("a,text,label\n1,x\n", "line 2 has 2 fields, but the header has 3"),
        ("a,text,label\n1,x,yes\n\n2\n", "line 4 has 1 field, but the header has 3"),
        ('text,label\n"two\nlines",yes\nx,y,z\n', "line 4 has 3 fields, but the header has 2"),
        ("text,label,text\nx,1,y\n", "two columns have the name 'text'"),
        ('text,label\n"open,1\nx,2\n', "line 2: unexpected end of data. A field that starts with a quotation mark"),
        ('text,label\n"open,1\n"closed",2\n', "line 2: ',' expected after '\"'. A field that starts with"),
        ("text,label\nx\0y,1\n", "line 2 holds a NUL character"),
        ("", "the file is empty"),
        ("text,label\n", "the file has no rows"),
        ("\n\n", "the file has no rows"),
    ],
)
def test_rows_that_do_not_fit_the_heading_are_refused_with_their_line(content, message, tmp_path):
    (tmp_path / "data.csv").write_text(content)
    assert message in refused(tmp_path / "data.csv")
    (tmp_path / "data.tsv").write_text(content.replace(",", "\t"))
    assert message.replace("','", "'\t'") in refused(tmp_path / "data.tsv")


def test_rows_are_counted_against_the_columns_that_are_named(tmp_path):
    (tmp_path / "bare.csv").write_text("4,one\n0,two,three\n")
    message = refused(tmp_path / "bare.csv", columns=["label", "text"])
    assert "line 2 has 3 fields, but columns names 2" in message
    (tmp_path / "glue.tsv").write_text('text\tlabel\n"a\tb"\t1\n')
    assert "line 2 has 3 fields" in refused(tmp_path / "glue.tsv", quoted=False)
    with pytest.raises(ValidationError, match="'a' is listed twice"):
        Place(path=tmp_path / "bare.csv", columns=["a", "a"])
    with pytest.raises(ValidationError, match="columns is only for a TSV or CSV file without a header"):
        Place(path=tmp_path / "bare.jsonl", columns=["a", "b"])


def test_the_index_that_pandas_writes_is_a_column_without_a_name(tmp_path):
    pandas.DataFrame({"text": ["x", "y"], "label": [0, 1]}).to_csv(tmp_path / "data.csv")
    table = read_table(Place(path=tmp_path / "data.csv"), "t")
    assert list(table.columns) == ["text", "label"]
    assert [row["label"] for row in table] == ["0", "1"]


def test_long_fields_are_read(tmp_path):
    (tmp_path / "data.csv").write_text("text,label\n" + "x" * 500_000 + ",1\n")
    before = csv.field_size_limit()
    assert len(rows_of(tmp_path / "data.csv")[0]["text"]) == 500_000
    assert csv.field_size_limit() == before


def workbook():
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as archive:
        archive.writestr("xl/workbook.xml", "<workbook/>")
    return memory.getvalue()


def parquet():
    memory = io.BytesIO()
    pandas.DataFrame({"text": ["x"]}).to_parquet(memory)
    return memory.getvalue()


def database(path):
    connection = sqlite3.connect(path)
    connection.execute("create table t (x)")
    connection.commit()
    connection.close()
    return path.read_bytes()


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json"])
def test_another_kind_of_file_by_a_tables_name_is_one_sentence(suffix, tmp_path):
    broken = workbook()[:20]
    cases = {
        workbook(): "is a zip archive, such as an Excel workbook",
        broken: "is a zip archive, such as an Excel workbook",
        gzip.compress(b"text,label\nx,1\n"): "is compressed by gzip",
        parquet(): "is a Parquet file",
        database(tmp_path / "base"): "is an SQLite database",
        bytes(range(256)): "is not text|holds a NUL",
        numpy.zeros(5).tobytes(): "holds a NUL",
    }
    for content, message in cases.items():
        (tmp_path / f"data{suffix}").write_bytes(content)
        found = refused(tmp_path / f"data{suffix}")
        assert any(part in found for part in message.split("|")), found


def test_what_is_no_parquet_file(tmp_path):
    (tmp_path / "data.parquet").write_text("text,label\nx,1\n")
    assert "is not a Parquet file, although its name" in refused(tmp_path / "data.parquet")
    (tmp_path / "data.parquet").write_bytes(parquet()[:-30])
    assert "cannot be read as parquet" in refused(tmp_path / "data.parquet")
    pandas.DataFrame({"text": []}).to_parquet(tmp_path / "data.parquet")
    assert "the file has no rows" in refused(tmp_path / "data.parquet")


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_json_is_read_as_it_stands_there(suffix, tmp_path):
    path = tmp_path / f"data{suffix}"
    table = [{"when": "2020-01-01", "n": "1"}, {"n": 2, "more": {"a": [1, {"b": None}]}}, {"more": {"c": "\u2028"}}]
    path.write_text("\n".join(json.dumps(row) for row in table) + "\n\n")
    assert rows_of(path) == table
    assert list(read_table(Place(path=path), "t").columns) == ["when", "n", "more"]
    path.write_text(json.dumps(table, indent=1))
    assert rows_of(path) == table
    path.write_text(json.dumps(table[0]))
    assert rows_of(path) == table[:1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "x"}\n{"text": \n', "line 2 is not valid JSON"),
        ('{"text": "x"}\n["y"]\n', "row 1 (line 2) is a list, but an object"),
        ('["x", "y"]', "row 0 is a string, but an object"),
        ('[{"text": "x"},', "is not valid JSON"),
        ('{"text": "x"}\n3\n', "row 1 (line 2) is a number"),
        ("null\n", "row 0 (line 1) is null"),
        ("[]", "the file has no rows"),
        ('{"text": "\\ud83d"}\n', "row 0 (line 1) holds half of a character"),
        ("text,label\nx,1\n", "is not valid JSON"),
    ],
)
def test_bad_json_is_named(content, message, tmp_path):
    (tmp_path / "data.jsonl").write_text(content)
    assert message in refused(tmp_path / "data.jsonl")


def test_the_same_rows_are_chosen_by_a_seed_as_the_library_datasets_chooses(tmp_path):
    from curlora.continual.data import TaskSpec, read_task

    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": f"t{i}", "label": i % 2}) + "\n" for i in range(50)))
    source = dict(path=path, text="text", label="label", shuffle=3, limit=20)
    task = read_task(TaskSpec(name="t", labels=["a", "b"], train=source, evaluation=source))
    theirs = datasets.Dataset.from_list(rows_of(path)).shuffle(seed=3).select(range(20))
    assert [text for text, _ in task.train] == theirs["text"]
    assert task.numbers["train"] == [int(text[1:]) for text in theirs["text"]]


def test_rows_know_their_lines(tmp_path):
    (tmp_path / "data.csv").write_text('text,label\n"two\nlines",1\n\nx,2\n')
    (tmp_path / "data.jsonl").write_text('{"text": "x"}\n\n{"text": "y"}\n')
    (tmp_path / "data.json").write_text('[{"text": "x"}, {"text": "y"}]')
    for name, lines in (("data.csv", [2, 5]), ("data.jsonl", [1, 3]), ("data.json", None)):
        assert read_table(Place(path=tmp_path / name), "data").lines == lines
    table = read_table(Place(path=tmp_path / "data.csv"), "data").select([1])
    assert table.number(0) == "0 (line 5)"


@pytest.mark.parametrize("content", ["[" * 100_000, '{"text": ' + "[" * 100_000])
def test_values_inside_each_other_without_end(content, tmp_path):
    (tmp_path / "data.jsonl").write_text(f"{content}\n")
    assert refused(tmp_path / "data.jsonl")
