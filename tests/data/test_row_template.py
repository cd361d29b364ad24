"""Templates give text, or an error that says why not."""

import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curlora.data.row_template import RowTemplate, RowTemplateError

ROW = {
    "question": "Who?",
    "answers": {"text": ["Ada", "Ada Lovelace"], "answer_start": [3, 3]},
    "n": 4,
    "share": 0.5,
    "yes": True,
    "none": None,
    "nothing": [],
    "a.b": "dotted",
    "#1 String": "odd",
    "when": datetime.date(2020, 1, 1),
    "bytes": b"x",
    "nested": [{"text": None}, {"text": [["deep"]]}],
    "nan": float("nan"),
}


def fill(given):
    return RowTemplate(given, list(ROW)).fill(ROW)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("question", "Who?"),
        ("Q: {question}\nA:", "Q: Who?\nA:"),
        ("{answers[text][0]}", "Ada"),
        ("{answers[text][-1]}", "Ada Lovelace"),
        ("{answers[answer_start][1]}", "3"),
        ("{nested[1][text][0][0]}", "deep"),
        ("{n} {share} {yes}", "4 0.5 True"),
        ("{n:03d}{share:.2%}", "00450.00%"),
        ("{question!r:>8}", "  'Who?'"),
        ("{a.b}{#1 String}", "dottedodd"),
        ("{{{n}}}", "{4}"),
    ],
)
def test_columns_and_what_is_in_them(given, text):
    assert fill(given) == text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("answers", r"has a dict in answers, not text: use a value inside it, such as {answers\[text\]\[0\]}"),
        ("{answers!r}", "has a dict in answers"),
        ("{answers[text]}", r"has a list in answers\[text\], .*such as {answers\[text\]\[0\]}"),
        ("{nested}", r"has a list in nested, .* such as {nested\[0\]\[text\]}"),
        ("{nothing}", "has a list in nothing, not text$"),
        ("{when}", "has a date in when"),
        ("{bytes}", "has bytes in bytes"),
        ("{none}", "has no none"),
        ("{nan}", "has no nan"),
        ("{answers[text][2]}", r"has no answers\[text\]\[2\]"),
        ("{answers[gone]}", r"has no answers\[gone\]"),
        ("{answers[text][first]}", "has no"),
        ("{question[0]}", "has no"),
        ("{answers.text}", r"a value inside a column is written with brackets: answers\[text\]"),
        ("{question.__class__}", "is written with brackets"),
        ("{answers[text]x}", "is not a column with indices"),
        ("{gone}", "there is no column 'gone' among question"),
        ("{gone[0]}", "there is no column 'gone'"),
        ("{}", "there is no column ''"),
        ("{question", "is not a valid template"),
        ("{question:d}", "does not fit"),
    ],
)
def test_what_gives_no_text_is_refused(given, message):
    with pytest.raises(RowTemplateError, match=message):
        fill(given)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.binary(max_size=2),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "a"]), inner, max_size=2),
    max_leaves=8,
)


@given(VALUES, st.sampled_from(["x", "{x[0]}", "{x[text]}", "{x[text][0]}", "{x[0][text]}"]))
def test_text_is_only_ever_made_of_text_numbers_and_truth_values(value, given):
    indices = [int(key) if key.isdigit() else key for key in given.strip("{x}").strip("[]").split("][") if key]
    try:
        text = RowTemplate(given, ["x"]).fill({"x": value})
    except RowTemplateError:
        return
    for index in indices:
        value = value[index]
    assert isinstance(value, (str, int, float))
    assert text == str(value)
