"""A small model that can chat, and conversations that it can learn."""

import json
import random

import pytest

from tests.models import WORDS, llama, word_tokenizer

TEMPLATE = (
    "{% for message in messages %}{{ {'user': 'w90', 'system': 'w92'}.get(message['role'], 'w91') }} "
    "{{ message['content'] }} w93 {% endfor %}{% if add_generation_prompt %}w91 {% endif %}"
)


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory):
    """The folder of a small model whose tokenizer has a chat template; w93 ends a turn."""
    return str(saved_model(tmp_path_factory.mktemp("model") / "chat", TEMPLATE))


@pytest.fixture(scope="session")
def plain_model(tmp_path_factory):
    """The same model, whose tokenizer has no chat template."""
    return str(saved_model(tmp_path_factory.mktemp("model") / "plain", None))


def saved_model(folder, template):
    model = llama(initializer_range=0.2, max_position_embeddings=128)
    tokenizer = word_tokenizer()
    tokenizer.eos_token = "w93"
    tokenizer.chat_template = template
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def conversations(count=60, seed=0):
    """Every answer is the number of the asked word plus one."""
    chosen = random.Random(seed)
    rows = []
    for _ in range(count):
        asked = [chosen.randrange(5, 80) for _ in range(3)]
        question = " ".join(WORDS[i] for i in asked)
        rows.append([("user", question), ("assistant", " ".join(WORDS[i + 1] for i in asked))])
    return [{"messages": [{"role": role, "content": content} for role, content in row]} for row in rows]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def chat_file(tmp_path):
    return write_lines(tmp_path / "chat.jsonl", conversations())


@pytest.fixture(scope="session")
def guard_file(tmp_path_factory):
    chosen = random.Random(1)
    texts = [" ".join(chosen.choice(WORDS[:90]) for _ in range(20)) for _ in range(30)]
    path = tmp_path_factory.mktemp("text") / "novel.txt"
    path.write_text("\n\n".join(texts), encoding="utf-8")
    return path
