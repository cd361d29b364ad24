"""Heads, batches and losses. A class is read from padding, as in the paper's reference, only if asked for."""

import pytest
import torch
from peft import get_peft_model
from torch._dynamo.testing import CompileCounter

from curlora import CurloraConfig
from curlora.continual.batches import Collator
from curlora.continual.task_model import TaskModel
from curlora.continual.tasks import ClassificationTask, CompletionTask
from curlora.text.rows import IGNORED
from tests.models import BASES, llama, multimodal, word_tokenizer


@pytest.fixture
def tokenizer():
    return word_tokenizer()


def rows_of(task, tokenizer, number):
    return [{**row, "task": number} for row in task.encode("train", tokenizer, 64).rows]


CLASSES = ClassificationTask("c", [("w1 w2 w3", 0), ("w4", 2), ("w5 w6", 1)], [("w1", 0)], labels=["a", "b", "c"])
TEXTS = CompletionTask("t", [("w1 w2", "w3 w4 w5"), ("w6", "w7")], [("w1", "w2")])


@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_stand_at_the_last_token_whichever_side_the_tokenizer_pads_on(tokenizer, side):
    tokenizer.padding_side = side
    batch = Collator(tokenizer)(rows_of(CLASSES, tokenizer, 0))
    assert batch["attention_mask"].sum(1).tolist() == [3, 1, 2]
    expected = [(0, 2), (1, 0), (2, 1)]
    assert [tuple(place) for place in (batch["labels"] != IGNORED).nonzero().tolist()] == expected
    assert batch["labels"][batch["labels"] != IGNORED].tolist() == [0, 2, 1]
    for row, position in expected:
        assert batch["attention_mask"][row, position] == 1


def test_the_references_readout_is_the_padded_end(tokenizer):
    batch = Collator(tokenizer, "last_position")(rows_of(CLASSES, tokenizer, 0))
    assert (batch["labels"] != IGNORED).nonzero().tolist() == [[0, 2], [1, 2], [2, 2]]
    assert batch["attention_mask"][:, 2].tolist() == [1, 0, 0]


@pytest.mark.parametrize("base", [*BASES.values(), multimodal], ids=[*BASES, "multimodal"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_class_is_told_from_its_own_text_whatever_the_batch(base, side, tokenizer):
    tokenizer.padding_side = side
    model = TaskModel(base()).eval()
    model.begin(0, 3)
    rows = rows_of(CLASSES, tokenizer, 0)
    collate = Collator(tokenizer)
    (together,) = model.answers(**collate(rows))
    for i, row in enumerate(rows):
        hidden = model.language_model.base_model(torch.tensor([row["input_ids"]])).last_hidden_state[:, -1]
        logits = model.heads["0"](hidden)
        torch.testing.assert_close(together.logits[together.rows == i], logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("base", BASES)
def test_completions_are_scored_like_the_plain_formula(base, tokenizer):
    model = TaskModel(BASES[base]()).eval()
    model.begin(0, None)
    rows = rows_of(TEXTS, tokenizer, 0)
    result = model(**Collator(tokenizer)(rows))
    losses, exact = [], []
    for prompt, completion in TEXTS.train:
        ids = tokenizer(f"{prompt} {completion}")["input_ids"]
        begin = len(prompt.split())
        logits = model.language_model(torch.tensor([ids])).logits[0, begin - 1 : -1].log_softmax(-1)
        losses.append([-row[token].item() for row, token in zip(logits, ids[begin:], strict=True)])
        exact.append(float(all(int(r.argmax()) == t for r, t in zip(logits, ids[begin:], strict=True))))
    assert result["scores"][:, 0].tolist() == pytest.approx([sum(row) for row in losses], rel=1e-5)
    assert result["scores"][:, 1].tolist() == [3, 1]
    assert result["scores"][:, 2].tolist() == exact
    assert result["loss"].item() == pytest.approx(sum(map(sum, losses)) / 4, rel=1e-5)


def test_exact_match_is_what_greedy_decoding_gives(tokenizer):
    model = TaskModel(llama()).eval()
    model.begin(0, None)
    prompts = ["w1 w2 w3", "w9 w8", "w30 w31 w32 w33"]
    examples = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        made = model.language_model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
        examples.append((prompt, tokenizer.decode(made[0, ids.shape[1] :])))
    if any("[" in completion for _, completion in examples):
        pytest.skip("the random model gives special tokens")
    wrong = [(prompt, " ".join([*completion.split()[:-1], "w50"])) for prompt, completion in examples]
    task = CompletionTask("t", examples + wrong, examples)
    scores = model(**Collator(tokenizer)(rows_of(task, tokenizer, 0)))["scores"]
    assert scores[:, 2].tolist() == [1, 1, 1, 0, 0, 0]


def test_a_mixed_batch_is_the_sum_of_its_parts(tokenizer):
    model = TaskModel(llama()).eval()
    model.begin(0, 3)
    model.begin(1, None)
    model.begin(2, 3)
    torch.nn.init.normal_(model.heads["2"].weight)
    collate = Collator(tokenizer)
    parts = [rows_of(CLASSES, tokenizer, 0), rows_of(TEXTS, tokenizer, 1), rows_of(CLASSES, tokenizer, 2)]
    mixed = [row for rows in parts for row in rows]
    order = [5, 0, 3, 7, 1, 4, 2, 6]
    got = model(**collate([mixed[i] for i in order]))["scores"]
    expected = torch.cat([model(**collate(rows))["scores"] for rows in parts])
    torch.testing.assert_close(got, expected[order], rtol=1e-5, atol=1e-6)


def test_the_loss_is_divided_by_the_labels_of_the_whole_step(tokenizer):
    model = TaskModel(llama()).eval()
    model.begin(0, None)
    rows = rows_of(TEXTS, tokenizer, 0)
    collate = Collator(tokenizer)
    whole = model(**collate(rows))["loss"]
    parts = sum(model(**collate([row]), num_items_in_batch=torch.tensor(4))["loss"] for row in rows)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)


def test_heads_are_fresh_seeded_kept_and_frozen_when_the_next_comes():
    model = TaskModel(llama())
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    model.begin(0, 2)
    assert torch.equal(state, torch.random.get_rng_state())
    first = model.heads["0"].weight.clone()
    model.begin(1, 2)
    assert torch.equal(model.heads["0"].weight, first)
    assert torch.equal(model.heads["1"].weight, first)  # always the paper's seed
    assert not model.heads["0"].weight.requires_grad
    assert model.heads["1"].weight.requires_grad


def test_the_adapter_is_active_and_trained(tokenizer):
    model = TaskModel(get_peft_model(llama(), CurloraConfig(r=4)))
    model.begin(0, 3)
    batch = Collator(tokenizer)(rows_of(CLASSES, tokenizer, 0))
    before = model(**batch)["loss"]
    before.backward()
    assert all(p.grad is not None for p in model.backbone_parameters())
    for parameter in model.backbone_parameters():
        torch.nn.init.normal_(parameter, std=3.0)
    assert not torch.allclose(model(**batch)["loss"], before)


def test_gradient_checkpointing_gives_the_same_gradients(tokenizer):
    batch = Collator(tokenizer)(rows_of(CLASSES, tokenizer, 0))
    gradients = []
    for checkpointing in (False, True):
        model = TaskModel(get_peft_model(llama(), CurloraConfig(r=4)))
        model.begin(0, 3)
        if checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        model(**batch)["loss"].backward()
        gradients.append([p.grad for p in model.backbone_parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_compiled_the_language_model_is_one_graph_for_all_tasks(tokenizer):
    torch._dynamo.reset()
    graphs = CompileCounter()
    model = TaskModel(get_peft_model(llama(), CurloraConfig(r=4, init_weights=False)))
    compiled = torch.compile(model, backend=graphs)
    rows = [row for number in range(4) for row in rows_of(CLASSES, tokenizer, number)]
    for number in range(4):
        model.begin(number, 3)
    for some in (rows[:3], rows[3:6], rows[6:9], [rows[0], rows[4], rows[11]]):
        batch = Collator(tokenizer)(some)
        torch.testing.assert_close(compiled(**batch)["loss"], model(**batch)["loss"])
    assert graphs.frame_count == 1
    torch._dynamo.reset()
