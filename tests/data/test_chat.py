"""The trained tokens of a conversation are exactly those that the template renders for the assistant's turns."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from curlora.continual.data import TaskSpec, read_task
from curlora.continual.tasks import ChatTask, TaskError
from curlora.data.chat import closing_token
from curlora.data.conversations import trained_turns
from curlora.demo import assets
from curlora.text.rows import IGNORED
from tests.models import word_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# With a beginning-of-text token, an end-of-turn token that is not end-of-text, no system message, other role names.
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim"
    " + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# The template drops the text in <think> from all answers but the last.
THINKING = CHATML.replace(
    "m.content +", "(m.content if loop.last or '</think>' not in m.content else m.content.split('</think>')[1]) +"
)
MARKS = ["<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<bos>", "<eos>"]


def tokenizer(template, eos="<|im_end|>"):
    """A byte-level tokenizer with a few merges, some of which span a line break, as GPT-2's do."""
    model = Tokenizer(BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    corpus = ["assistant\n\nuser\n\nsystem\n\n the there\n\n hello model\n\n\n"] * 20
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    made = PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<bos>", eos_token=eos, pad_token="<eos>")
    made.add_special_tokens({"additional_special_tokens": MARKS})
    made.chat_template = template
    return made


@pytest.fixture(scope="module")
def smollm2():
    try:
        return AutoTokenizer.from_pretrained(assets.language_model())
    except assets.AssetError as error:
        pytest.skip(f"the demo's model cannot be had here: {error}")


def talk(*contents, roles=("user", "assistant") * 9):
    return [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]


def trained_by_the_text(messages, turns, made, mark="<|im_end|>", trimmed=False):
    """Find the tokens with a character of a trained answer, or of the mark that ends it, in the rendered text."""
    whole = made.apply_chat_template(messages, tokenize=False)
    found = made(whole, add_special_tokens=False, return_offsets_mapping=True)
    spans, place = [], 0
    for number, message in enumerate(messages):
        text = message["content"].strip() if trimmed else message["content"]
        begin = whole.index("\n", whole.index(MARKS[2 if trimmed else 0], place)) + 1
        assert whole[begin:].startswith(text + mark)
        place = begin + len(text) + len(mark)
        if number in turns:
            spans.append((begin, place))
    return found["input_ids"], [any(a < end and b > begin for begin, end in spans) for a, b in found["offset_mapping"]]


def row_of(messages, made, **options):
    task = ChatTask("t", [messages], [messages], **options)
    (row,) = task.encode("train", made, 10_000).rows
    return row


def learned(row):
    """Return each input token with the next token if that is trained."""
    return [(i + 1, label) for i, label in enumerate(row["labels"]) if label != IGNORED]


def check(messages, made, turns="all", **text):
    row = row_of(messages, made, turns=turns)
    ids, mask = trained_by_the_text(messages, trained_turns(messages, turns), made, **text)
    last = max(place for place, trained in enumerate(mask) if trained)
    assert row["input_ids"] == ids[:last]
    assert learned(row) == [(place, ids[place]) for place, trained in enumerate(mask) if trained]


TALKS = [
    talk("hi", "hello"),
    talk("hi", "hello there", "more", "the end", "and", "so\non"),
    talk("be brief", "hi", "hello", "x", "y", roles=("system", "user", "assistant", "user", "assistant")),
    talk("hi", "hello", "not answered"),
    talk("opening", "hi", "hello", roles=("assistant", "user", "assistant")),
    talk("hi", "one", "two", roles=("user", "assistant", "assistant")),
    talk("hi", "", "more", "\n\nhello", "x", "\n"),
]


@pytest.mark.parametrize("turns", ["all", "last"])
@pytest.mark.parametrize("messages", TALKS)
@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["plain", "marked"])
def test_token_by_token_as_the_template_renders(template, messages, turns):
    check(messages, tokenizer(template), turns)


@pytest.mark.parametrize("turns", ["all", "last"])
@pytest.mark.parametrize("messages", [TALKS[0], TALKS[1], TALKS[3]])
def test_an_end_of_turn_that_is_not_the_end_of_the_text(messages, turns):
    made = tokenizer(GEMMA, eos="<eos>")
    check(messages, made, turns, mark="<end_of_turn>", trimmed=True)
    task = ChatTask("t", [messages], [messages])
    (laid_out,) = task._laid_out("train", made)
    assert made.convert_ids_to_tokens(closing_token(laid_out, made)) == "<end_of_turn>"


CONTENT = st.text(st.sampled_from("ahe \ntlos.é中😀"), max_size=12)


@settings(max_examples=60)
@given(st.lists(CONTENT, min_size=2, max_size=7), st.sampled_from([CHATML, MARKED]), st.sampled_from(["all", "last"]))
def test_any_content(contents, template, turns):
    check(talk(*contents), tokenizer_of(template), turns)


_MADE = {}


def tokenizer_of(template):
    return _MADE.setdefault(template, tokenizer(template))


@pytest.mark.parametrize("turns", ["all", "last"])
@pytest.mark.parametrize("messages", TALKS[:5])
def test_smollm2(messages, turns, smollm2):
    if messages[0]["role"] == "system":
        check(messages, smollm2, turns)
    row = row_of(messages, smollm2, turns=turns)
    ids = [*row["input_ids"], row["labels"][-1]]
    assert smollm2.decode(ids) + "\n" == smollm2.apply_chat_template(
        messages[: trained_turns(messages)[-1] + 1], tokenize=False
    )
    answers = [messages[i]["content"] for i in trained_turns(messages, turns)]
    assert smollm2.decode([label for _, label in learned(row)]) == "".join(f"{text}<|im_end|>" for text in answers)


def test_what_is_context_is_not_trained_though_the_template_marks_it():
    messages = talk("hi", "hello", "more", "the end")
    messages[1]["weight"] = 0
    for template in (CHATML, MARKED):
        check(messages, tokenizer(template))


def test_marks_that_do_not_tell_the_turns_apart_are_not_gone_by():
    """This tokenizer has no token for the space that ends a mark; transformers then marks everything after it."""
    made = word_tokenizer()
    made.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}w2 {% generation %}{{ m.content }} w3 {% endgeneration %}"
        "{% else %}w1 {{ m.content }} {% endif %}{% endfor %}{% if add_generation_prompt %}w2 {% endif %}"
    )
    row = row_of(talk("w10", "w11", "w12", "w13 w14"), made)
    assert made.decode(row["input_ids"]) == "w1 w10 w2 w11 w3 w1 w12 w2 w13 w14"
    assert made.decode([label for _, label in learned(row)]) == "w11 w3 w13 w14 w3"
    found = made.apply_chat_template(
        talk("w10", "w11", "w12", "w13"), return_dict=True, return_assistant_tokens_mask=True
    )
    assert sum(found["assistant_masks"]) > 4  # else the test checks nothing


def test_a_template_that_leaves_out_earlier_thoughts_can_train_the_last_turn_alone():
    made = tokenizer(THINKING)
    messages = talk("hi", "<think>a</think>hello", "more", "<think>b</think>the end")
    with pytest.raises(TaskError, match=r"train row 0: the chat template renders the start .* Set turns: last"):
        row_of(messages, made)
    row = row_of(messages, made, turns="last")
    assert made.decode([label for _, label in learned(row)]) == "<think>b</think>the end<|im_end|>"
    assert "<think>a" not in made.decode(row["input_ids"])
    row_of(messages[:2], made)


def test_a_refusal_is_the_templates_own_with_the_row_of_the_file(tmp_path):
    rows = [talk("hi", "hello")] * 20 + [talk("s", "hi", "hello", roles=("system", "user", "assistant"))]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    source = dict(path=tmp_path / "chat.jsonl", shuffle=1)
    task = read_task(TaskSpec(name="t", kind="chat", train=source, evaluation=source))
    with pytest.raises(TaskError, match="train row 20: the chat template rejects the conversation: System role not su"):
        task.encode("train", tokenizer(GEMMA), 64)
    with pytest.raises(TaskError, match="train row 0: the chat template rejects the conversation: TypeError"):
        row_of(talk("hi", "hello"), tokenizer("{{ 1 + 'x' }}"))


def test_a_conversation_that_is_too_long_loses_its_end():
    made = tokenizer(CHATML)
    messages = talk("hi", "hello", "more", "the end", "x", "y")
    whole = row_of(messages, made)
    task = ChatTask("t", [messages, messages[:2]], [messages])
    length = len(whole["input_ids"])
    for max_length in range(1, length + 3):
        if not any(place <= max_length for place, _ in learned(whole)):
            with pytest.raises(TaskError, match="no train example is left. All 2 are too long for max_length"):
                task.encode("train", made, max_length)
            continue
        split = task.encode("train", made, max_length)
        assert split.kept == [0, 1]
        assert split.cut == (max_length < length) + (max_length < len(row_of(messages[:2], made)["input_ids"]))
        assert learned(split.rows[0]) == [(place, label) for place, label in learned(whole) if place <= max_length]
        assert split.rows[0]["input_ids"] == whole["input_ids"][: len(split.rows[0]["input_ids"])]
        assert len(split.rows[0]["input_ids"]) <= max_length
    dropping = ChatTask("t", [messages, messages[:2]], [messages], too_long="drop")
    split = dropping.encode("train", made, length - 1)
    assert (split.kept, split.cut) == ([1], 0)
