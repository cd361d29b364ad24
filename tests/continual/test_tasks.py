import pytest

from curlora.continual.tasks import IGNORED, ChatTask, ClassificationTask, CompletionTask, TaskError
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
    (row,) = task.encode("train", tokenizer, max_length)
    return row


def test_only_the_completion_is_learned_and_each_position_says_what_comes_next():
    row = completion("w1 w2 w3", "w4 w5")
    assert words(row["input_ids"]) == "w1 w2 w3 w4 w5"
    assert row["labels"][:2] == [IGNORED] * 2
    assert words(row["labels"][2:]) == "w4 w5 [UNK]"  # the end of the text is learned too


def test_a_long_prompt_loses_its_start():
    row = completion("w1 w2 w3 w4 w5", "w6 w7", max_length=4)
    assert words(row["input_ids"]) == "w4 w5 w6 w7"
    assert words(row["labels"][1:]) == "w6 w7 [UNK]"
    assert len(row["input_ids"]) == len(row["labels"]) == 4


def test_a_completion_that_does_not_fit_is_refused():
    with pytest.raises(TaskError, match="a completion of 4 tokens leaves no room for its prompt in max_length 4"):
        completion("w1", "w2 w3 w4", max_length=4)


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


def test_a_conversation_ends_with_what_is_learned():
    task = ChatTask("t", [conversation("w1", "w2", "w3", "w4 w5")], [conversation("w1", "w2")])
    (row,) = task.encode("train", chat_tokenizer(TEMPLATE), 32)
    learned = [label for label in row["labels"] if label != IGNORED]
    assert words(learned) == "w4 w5 [PAD]"
    assert task.majority_rate == 1.0


def test_bad_conversations_and_templates_are_refused():
    with pytest.raises(
        TaskError, match=r"train row 0 must be a conversation that ends with the assistant's.*\['user'\]"
    ):
        ChatTask("t", [conversation("w1")], [conversation("w1", "w2")])
    task = ChatTask("t", [conversation("w1", "w2")], [conversation("w1", "w2")])
    with pytest.raises(TaskError, match="has no chat template"):
        task.encode("train", word_tokenizer(), 32)
    counting = "{{ messages | length }} {% for m in messages %}{{ m.content }} {% endfor %}"
    tokenizer = chat_tokenizer("{% if messages|length > 1 %}w9 {% endif %}" + counting)
    with pytest.raises(TaskError, match="cannot be told from the prompt"):
        task.encode("train", tokenizer, 32)


def marked_tokenizer():
    """Adds a beginning and an end to every text, as some do."""
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
    (row,) = task.encode("train", marked_tokenizer(), max_length)
    assert words(row["input_ids"]) == f"{prompt} w4 w5"
    assert words([label for label in row["labels"] if label != IGNORED]) == "w4 w5 [UNK]"


def test_an_answer_ends_where_generation_would():
    """ChatML has a line break behind the end of a turn."""
    tokenizer = chat_tokenizer(TEMPLATE.replace("[PAD]", "[UNK] w9"))
    tokenizer.eos_token = "[UNK]"
    (row,) = ChatTask("t", [conversation("w1", "w4")], [conversation("w1", "w2")]).encode("train", tokenizer, 32)
    assert words([label for label in row["labels"] if label != IGNORED]) == "w4 [UNK]"


@pytest.mark.parametrize(("example", "missing"), [((" ", "w1"), "prompt")])
def test_an_empty_part_is_named(example, missing):
    with pytest.raises(TaskError, match=f"no token in its {missing}"):
        CompletionTask("t", [example], [("w1", "w2")]).encode("train", word_tokenizer(), 8)
