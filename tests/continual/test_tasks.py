import pytest
from hypothesis import given
from hypothesis import strategies as st

from curlora.continual.tasks import ChatTask, ClassificationTask, CompletionTask, TaskError
from curlora.text.rows import IGNORED
from tests.models import word_tokenizer


def make(**changes):
    fields = dict(name="t", labels=["a", "b"], train=[("x", 0)], evaluation=[("x", 1), ("y", 1), ("z", 0)])
    return ClassificationTask(**{**fields, **changes})


def words(ids):
    return word_tokenizer().decode(ids)


def test_majority_rate_is_of_the_evaluation_split():
    assert make().majority_rate == pytest.approx(2 / 3)
    answers = [("p", "yes"), ("q", "yes"), ("r", "no"), ("s", "yes")]
    assert CompletionTask("t", answers, answers).majority_rate == 0.75


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(name="a/b"), "'a/b' may only hold letters"),
        (dict(labels=["a"]), "at least two labels"),
        (dict(labels=["a", "a", "b"]), "lists a label twice"),
        (dict(too_long="truncate"), "too_long must be cut or drop, got 'truncate'"),
        (dict(train=[]), "the train split is empty"),
        (dict(evaluation=[]), "the evaluation split is empty"),
        (dict(train=[("x", 0), ("y", 2)]), r"train row 1 has label 2, outside 0\.\.1"),
        (dict(evaluation=[("x", -1)]), r"evaluation row 0 has label -1, outside 0\.\.1"),
    ],
)
def test_bad_tasks_are_refused(changes, message):
    with pytest.raises(TaskError, match=message):
        make(**changes)


def test_a_text_that_becomes_nothing_is_named():
    with pytest.raises(TaskError, match=r"task 't': train row 1 has no token: \('   ', 1\)"):
        make(train=[("w1", 0), ("   ", 1)]).encode("train", word_tokenizer(), 8)


def completion(prompt, answer, max_length=16):
    tokenizer = word_tokenizer()
    tokenizer.eos_token = "[UNK]"
    task = CompletionTask("t", [(prompt, answer)], [("w1", "w2")])
    (row,) = task.encode("train", tokenizer, max_length).rows
    return row


def test_only_the_completion_is_learned_and_each_position_says_what_comes_next():
    row = completion("w1 w2 w3", "w4 w5")
    assert words(row["input_ids"]) == "w1 w2 w3 w4 w5"
    assert row["labels"][:2] == [IGNORED] * 2
    assert words(row["labels"][2:]) == "w4 w5 [UNK]"  # the end-of-text token is trained too


def test_a_long_prompt_loses_its_start():
    row = completion("w1 w2 w3 w4 w5", "w6 w7", max_length=4)
    assert words(row["input_ids"]) == "w4 w5 w6 w7"
    assert words(row["labels"][1:]) == "w6 w7 [UNK]"
    assert len(row["input_ids"]) == len(row["labels"]) == 4


def test_a_long_completion_loses_its_end_and_leaves_half_of_the_room_to_its_prompt():
    assert words(completion("w1", "w2 w3 w4", max_length=4)["labels"]).endswith("w2 w3 w4 [UNK]")
    row = completion("w1 w2 w3 w4", "w5 w6 w7 w8 w9", max_length=4)
    assert words(row["input_ids"]) == "w3 w4 w5 w6"
    assert row["labels"][0] == IGNORED
    assert words(row["labels"][1:]) == "w5 w6 w7"
    row = completion("w1", "w5 w6 w7 w8 w9", max_length=4)
    assert words(row["input_ids"]) == "w1 w5 w6 w7"
    assert words(row["labels"]) == "w5 w6 w7 w8"
    row = completion("w1 w2", "w5 w6", max_length=1)
    assert words(row["input_ids"]) == "w2"
    assert words(row["labels"]) == "w5"


EXAMPLES = [("w1 w2", "w3"), ("w1 w2 w3 w4", "w5"), ("w1", "w2 w3 w4 w5 w6")]


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=4),
    st.integers(1, 12),
    st.booleans(),
)
def test_no_row_is_longer_than_it_may_be_and_what_was_done_is_counted(sizes, max_length, begins):
    tokenizer = word_tokenizer()
    tokenizer.eos_token = "[UNK]"
    if begins:
        tokenizer.bos_token = "w0"
    examples = [(" ".join(f"w{i}" for i in range(a)), " ".join(f"w{20 + i}" for i in range(b))) for a, b in sizes]
    longer = [a + b > max_length for a, b in sizes]  # with the end-of-text token, without the last input
    split = CompletionTask("t", examples, examples).encode("train", tokenizer, max_length)
    assert split.cut == sum(longer)
    assert split.kept == list(range(len(sizes)))
    for row, (a, b), long in zip(split.rows, sizes, longer, strict=True):
        assert 1 <= len(row["input_ids"]) <= max_length
        target = [label for label in row["labels"] if label != IGNORED]
        assert words(target) == " ".join([*(f"w{20 + i}" for i in range(b)), "[UNK]"][: len(target)])
        assert target
        if not long:
            assert len(target) == b + 1
        prompt = len(row["input_ids"]) + 1 - len(target)
        assert prompt >= min(a, max(1, max_length // 2))
        assert words(row["input_ids"][prompt - 1 : prompt]) == f"w{a - 1}" or prompt == 1
    task = CompletionTask("t", examples, examples, too_long="drop")
    if all(longer):
        with pytest.raises(
            TaskError, match=r"no train example is left. All \d are too long for max_length \d+ \(too_long"
        ):
            task.encode("train", tokenizer, max_length)
    else:
        split = task.encode("train", tokenizer, max_length)
        assert (split.kept, split.cut) == ([i for i, long in enumerate(longer) if not long], 0)


def test_texts_with_a_class_are_cut_or_left_out_too():
    texts = [("w1 w2 w3", 0), ("w1 w2 w3 w4", 1), ("w1 w2 w3 w4 w5", 0)]
    cut = make(train=texts).encode("train", word_tokenizer(), 4)
    assert [words(row["input_ids"]) for row in cut.rows] == ["w1 w2 w3", "w1 w2 w3 w4", "w1 w2 w3 w4"]
    assert cut.cut == 1
    dropped = make(train=texts, too_long="drop").encode("train", word_tokenizer(), 4)
    assert (dropped.kept, dropped.cut, len(dropped.rows)) == ([0, 1], 0, 2)


def test_a_task_of_what_is_left_knows_the_rows_of_the_file():
    task = CompletionTask("t", EXAMPLES, EXAMPLES, numbers={"train": [7, 8, 9]})
    only = task.only(train=[0, 2], evaluation=[1])
    assert (only.train, only.evaluation) == ([EXAMPLES[0], EXAMPLES[2]], [EXAMPLES[1]])
    assert (only.numbers["train"], only.numbers["evaluation"]) == ([7, 9], [1])


TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} [PAD] {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def chat_tokenizer(template):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def conversation(*contents):
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 3, contents, strict=False)]


def test_every_answer_of_a_conversation_is_learned_or_the_last_alone():
    talk = conversation("w1", "w2", "w3", "w4 w5")
    (row,) = ChatTask("t", [talk], [talk]).encode("train", chat_tokenizer(TEMPLATE), 32).rows
    assert words([label for label in row["labels"] if label != IGNORED]) == "w2 [PAD] w4 w5 [PAD]"
    task = ChatTask("t", [talk], [conversation("w1", "w2")], turns="last")
    (row,) = task.encode("train", chat_tokenizer(TEMPLATE), 32).rows
    learned = [label for label in row["labels"] if label != IGNORED]
    assert words(learned) == "w4 w5 [PAD]"
    assert task.majority_rate == 1.0


def test_bad_conversations_and_templates_are_refused():
    with pytest.raises(TaskError, match="train row 0 has no assistant message that answers .*: its roles are user"):
        ChatTask("t", [conversation("w1")], [conversation("w1", "w2")])
    task = ChatTask("t", [conversation("w1", "w2")], [conversation("w1", "w2")])
    with pytest.raises(TaskError, match="has no chat template"):
        task.encode("train", word_tokenizer(), 32)
    counting = "{{ messages | length }} {% for m in messages %}{{ m.content }} {% endfor %}"
    tokenizer = chat_tokenizer("{% if messages|length > 1 %}w9 {% endif %}" + counting)
    with pytest.raises(TaskError, match="cannot be separated from its prompt"):
        task.encode("train", tokenizer, 32)


def marked_tokenizer():
    """A tokenizer that adds beginning- and end-of-text tokens to every text."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = word_tokenizer()
    tokenizer.bos_token, tokenizer.eos_token = "w0", "[UNK]"
    ids = tokenizer.convert_tokens_to_ids
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="w0 $A [UNK]", special_tokens=[("w0", ids("w0")), ("[UNK]", ids("[UNK]"))]
    )
    return tokenizer


@pytest.mark.parametrize(("max_length", "prompt"), [(16, "w0 w1 w2 w3"), (5, "w0 w2 w3")])
def test_a_prompt_is_not_ended_and_keeps_its_beginning(max_length, prompt):
    task = CompletionTask("t", [("w1 w2 w3", "w4 w5")], [("w1", "w2")])
    (row,) = task.encode("train", marked_tokenizer(), max_length).rows
    assert words(row["input_ids"]) == f"{prompt} w4 w5"
    assert words([label for label in row["labels"] if label != IGNORED]) == "w4 w5 [UNK]"


def test_an_answer_ends_where_generation_would():
    """ChatML has a line break after the end of a turn."""
    tokenizer = chat_tokenizer(TEMPLATE.replace("[PAD]", "[UNK] w9"))
    tokenizer.eos_token = "[UNK]"
    (row,) = ChatTask("t", [conversation("w1", "w4")], [conversation("w1", "w2")]).encode("train", tokenizer, 32).rows
    assert words([label for label in row["labels"] if label != IGNORED]) == "w4 [UNK]"


@pytest.mark.parametrize(("example", "missing"), [((" ", "w1"), "prompt")])
def test_an_empty_part_is_named(example, missing):
    with pytest.raises(TaskError, match=f"no token in its {missing}"):
        CompletionTask("t", [example], [("w1", "w2")]).encode("train", word_tokenizer(), 8)
