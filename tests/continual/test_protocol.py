"""Each switch of the paper's protocol gives what the reference code computes."""

import itertools
import math

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    TrainerCallback,
)

from curlora.continual.batches import Collator
from curlora.continual.methods import Frozen
from curlora.continual.settings import Settings
from curlora.continual.task_model import TaskModel
from curlora.continual.trainer import TaskTrainer
from tests.continual.paper import GPT, LEARNING_RATE, MISTRAL, SWITCHED, recipe_of, tasks_of
from tests.models import curlora, gpt2, tokens, word_tokenizer

# The schedule.


class Rates(TrainerCallback):
    """Records the learning rates of each step."""

    def __init__(self):
        self.rates = []

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append([group["lr"] for group in optimizer.param_groups])


def encoded(count, seed=0, longest=6, task=0):
    rng = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        length = int(torch.randint(1, longest + 1, (), generator=rng))
        ids = torch.randint(2, 100, (length,), generator=rng).tolist()
        rows.append({"input_ids": ids, "labels": i % 2, "task": task})
    return rows


def rates(settings, rows, tmp_path, adapter=False):
    base = curlora(gpt2(), r=2) if adapter else Frozen("frozen", "Heads only").apply(gpt2(), 0)
    model = TaskModel(base)
    model.begin(0, 2)
    trainer = TaskTrainer(model, 1e-3, rows, word_tokenizer(), settings, 0, tmp_path)
    recorder = Rates()
    trainer.add_callback(recorder)
    trainer.train()
    return recorder.rates


def cosine(step, warmup, total):
    """transformers' get_cosine_schedule_with_warmup, which the reference uses, written out."""
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def test_the_schedule_is_of_one_step_an_example_and_is_stepped_once_a_batch(tmp_path):
    settings = recipe_of(GPT, "paper").settings().changed({"batch_size": 4, "checkpoint_steps": 1000})
    rows = encoded(700, longest=2)
    found = rates(settings, rows, tmp_path)
    assert len(found) == 3 * 175  # the last 25 of them after the warm-up
    expected = [LEARNING_RATE * cosine(step, 500, 3 * 700) for step in range(525)]
    assert [rate for (rate,) in found] == pytest.approx(expected, rel=1e-9)


def test_the_head_and_the_adapter_share_the_schedule(tmp_path):
    settings = recipe_of(GPT, "paper", "reference.warmup=4").settings().changed({"batch_size": 4})
    found = rates(settings, encoded(10), tmp_path, adapter=True)
    expected = [cosine(step, 4, 3 * 10) for step in range(9)]
    assert [head for _, head in found] == pytest.approx([LEARNING_RATE * factor for factor in expected])
    assert [adapter for adapter, _ in found] == pytest.approx([1e-3 * factor for factor in expected])


def test_the_honest_schedule_is_of_the_real_steps(tmp_path):
    settings = recipe_of(GPT, "corrected").settings().changed({"batch_size": 4})
    found = rates(settings, encoded(50), tmp_path)
    steps = 3 * 13
    expected = [LEARNING_RATE * cosine(step, math.ceil(0.1 * steps), steps) for step in range(steps)]
    assert [rate for (rate,) in found] == pytest.approx(expected, rel=1e-9)


def test_gpt2s_sentiment140_has_no_schedule(tmp_path):
    recipe = recipe_of(GPT, "paper")
    settings = recipe.settings().changed({**tasks_of(recipe)[2].training, "batch_size": 4})
    assert [rate for (rate,) in rates(settings, encoded(10), tmp_path)] == [LEARNING_RATE] * (5 * 3)


# What the other switches do.


def test_the_label_stands_where_the_class_is_read():
    rows = [{"input_ids": [5, 6, 7, 8], "labels": 1, "task": 0}, {"input_ids": [9, 3], "labels": 0, "task": 0}]
    batches = {readout: Collator(word_tokenizer(), readout)(rows) for readout in SWITCHED["readout"]}
    assert batches["last_token"]["labels"].tolist() == [[-100, -100, -100, 1], [-100, 0, -100, -100]]
    assert batches["last_position"]["labels"].tolist() == [[-100, -100, -100, 1], [-100, -100, -100, 0]]
    for batch in batches.values():
        assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [9, 3, 0, 0]]
        assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def reference_logits(base, head, tokenizer, rows):
    """Logits as in the reference: one right-padded batch, with the head at its last position."""
    tokenizer.padding_side = "right"
    texts = [" ".join(tokenizer.convert_ids_to_tokens(row["input_ids"])) for row in rows]
    inputs = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    return head(base(**inputs).last_hidden_state[:, -1])


def test_last_position_reads_what_the_reference_reads():
    model = TaskModel(gpt2())
    model.begin(0, 2)
    rows = encoded(5)
    assert len({len(row["input_ids"]) for row in rows}) > 1
    with torch.no_grad():
        expected = reference_logits(model.model.transformer, model.heads["0"], word_tokenizer(), rows)
        (answers,) = model.answers(**Collator(word_tokenizer(), "last_position")(rows))
        (others,) = model.answers(**Collator(word_tokenizer(), "last_token")(rows))
    torch.testing.assert_close(answers.logits, expected)
    assert answers.targets.tolist() == [row["labels"] for row in rows]
    assert not torch.allclose(others.logits, expected, atol=1e-3)


def test_training_under_the_papers_protocol_is_the_references_loop(tmp_path):
    settings = recipe_of(GPT, "paper", "reference.warmup=3", "training.batch_size=4").settings()
    rows = encoded(10)
    trained = TaskModel(without_dropout(curlora(gpt2(), r=4)))
    trained.begin(0, 2)
    TaskTrainer(trained, LEARNING_RATE, rows, word_tokenizer(), settings, 0, tmp_path).train()

    by_hand = TaskModel(without_dropout(curlora(gpt2(), r=4)))
    by_hand.begin(0, 2)
    by_hand.train()
    parameters = [p for p in by_hand.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, eps=1e-6, weight_decay=0)
    step = 0
    for _ in range(3):
        for begin in range(0, 10, 4):
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * cosine(step, 3, 3 * 10)
            batch = rows[begin : begin + 4]
            logits = reference_logits(by_hand.language_model.transformer, by_hand.heads["0"], word_tokenizer(), batch)
            optimizer.zero_grad()
            nn.functional.cross_entropy(logits, torch.tensor([row["labels"] for row in batch])).backward()
            optimizer.step()
            step += 1
    assert all((p - before).abs().max() > 1e-4 for p, before in zip(parameters, start, strict=True))
    for name, value in trained.state_dict().items():
        torch.testing.assert_close(value, by_hand.state_dict()[name], rtol=0, atol=2e-6, msg=name)


class Batches:
    """Records the rows of every batch that the collator gets."""

    def __init__(self, collator):
        self.collator = collator
        self.seen = []

    def __call__(self, rows):
        self.seen.append([row["number"] for row in rows])
        return self.collator(rows)


def batches_seen(settings, rows, tmp_path, use):
    rows = [{**row, "number": number} for number, row in enumerate(rows)]
    model = TaskModel(Frozen("frozen", "Heads only").apply(gpt2(), 0))
    model.begin(0, 2)
    trainer = TaskTrainer(model, 0.0, rows, word_tokenizer(), settings, 0, tmp_path)
    trainer.data_collator = Batches(trainer.data_collator)
    score = use(trainer, rows)
    return trainer.data_collator.seen, score, model


@pytest.mark.parametrize("order", SWITCHED["order"])
def test_rows_in_the_order_of_the_file(order, tmp_path):
    settings = Settings(order=order, batch_size=4, epochs=3)
    seen, _, _ = batches_seen(settings, encoded(10), tmp_path, lambda trainer, rows: trainer.train())
    file_order = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    epochs = [seen[:3], seen[3:6], seen[6:9]]
    assert len(seen) == 9
    assert all(sorted(itertools.chain(*epoch)) == list(range(10)) for epoch in epochs)
    if order == "as_given":
        assert epochs == [file_order] * 3
    else:
        assert file_order not in epochs
        assert epochs[0] != epochs[1]


@pytest.mark.parametrize("evaluation", SWITCHED["evaluation"])
def test_examples_are_scored_one_at_a_time(evaluation, tmp_path):
    rows = encoded(10)
    settings = Settings(evaluation=evaluation, evaluation_batch_size=4, readout="last_position")
    seen, score, model = batches_seen(settings, rows, tmp_path, lambda trainer, rows: trainer.score(rows))
    size = 1 if evaluation == "one_by_one" else 4
    groups = [list(range(begin, min(begin + size, 10))) for begin in range(0, 10, size)]
    assert seen == groups
    model.eval()
    with torch.no_grad():
        logits = torch.cat(
            [
                reference_logits(model.model.transformer, model.heads["0"], word_tokenizer(), [rows[i] for i in group])
                for group in groups
            ]
        )
    labels = torch.tensor([row["labels"] for row in rows])
    assert score.accuracy == pytest.approx((logits.argmax(-1) == labels).double().mean().item())
    assert score.loss == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)


def test_the_references_indices_unless_a_method_says_otherwise():
    for name in (GPT, MISTRAL):
        for protocol, sampling, replacement in [("corrected", "inverse", False), ("paper", "reference", True)]:
            recipe = recipe_of(name, protocol)
            parts = [part for part in recipe.methods if part.method == "curlora"]
            assert len(parts) == 3
            for part in parts:
                adapter = part.make(recipe.switched()).configuration(seed=3)
                assert (adapter.sampling, adapter.replacement, adapter.seed) == (sampling, replacement, 3)
    own = recipe_of(GPT, "paper", "methods.4.options.sampling=uniform", "methods.4.options.replacement=false")
    adapter = own.methods[4].make(own.switched()).configuration(seed=0)
    assert (adapter.sampling, adapter.replacement) == ("uniform", False)


@pytest.mark.parametrize("r", [8, 24])
def test_loras_start(r):
    width = 1280
    (a, b), (peft_a, peft_b) = (lora_init(r, protocol) for protocol in ("paper", "corrected"))
    assert not b.any()
    assert not peft_b.any()
    assert a.shape == peft_a.shape == (r, width)
    # kaiming_uniform_(a=sqrt(5)) on a matrix of shape (n, r), the shape of the reference's A.
    torch.manual_seed(1)
    drawn = nn.init.kaiming_uniform_(torch.empty(width, r), a=math.sqrt(5))
    assert a.std().item() == pytest.approx(1 / math.sqrt(3 * r), rel=0.02)
    assert a.std().item() == pytest.approx(drawn.std().item(), rel=0.03)
    assert 0.99 / math.sqrt(r) < a.abs().max().item() <= 1 / math.sqrt(r)
    assert 0.99 / math.sqrt(width) < peft_a.abs().max().item() <= 1 / math.sqrt(width)


def lora_init(r, protocol):
    """Return LoRA's A and B of one layer of GPT-2 Large's width, made by the recipe's method."""
    recipe = recipe_of(GPT, protocol)
    (part,) = [part for part in recipe.methods if part.name == f"lora-{r}"]
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(
        GPT2Config(vocab_size=100, n_embd=1280, n_layer=1, n_head=20, n_positions=16, bos_token_id=0, eos_token_id=0)
    )
    before = base.eval()(tokens()).logits
    model = part.make(recipe.switched()).apply(base, seed=0).eval()
    torch.testing.assert_close(model(tokens()).logits, before)
    layer = model.get_base_model().transformer.h[0].attn.c_attn
    assert layer.scaling["default"] == 1
    return layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
