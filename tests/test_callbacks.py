"""The callbacks against forgetting, in a Trainer without a recipe."""

import copy
import math

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import kl_div
from transformers import Trainer, TrainerState, TrainingArguments

from curlora.callbacks import EWCCallback, KLToBaseCallback, PenaltyCallback, ScaleBackCallback, replay
from curlora.callbacks.kl_to_base import pieces_of
from curlora.guard import perplexity
from curlora.text.rows import Rows
from tests.models import classifier, llama, tokens

ROWS = list(tokens(seed=5, batch=3, length=9))


class Steepest(torch.optim.SGD):
    """Keeps the gradients of its steps."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=1.0)
        self.gradients = []

    def step(self, closure=None):
        for group in self.param_groups:
            self.gradients.append([None if p.grad is None else p.grad.clone() for p in group["params"]])
        super().step(closure)


def adapted(seed=0):
    model = llama(seed, initializer_range=0.2).double()
    torch.manual_seed(seed)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    return model


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def trainer(model, folder, callbacks, dataset=None, **arguments):
    optimizer = Steepest(trained(model))
    dataset = dataset or [{"input_ids": row, "labels": row} for row in tokens(batch=8)]
    given = dict(per_device_train_batch_size=2, max_steps=2, lr_scheduler_type="constant", save_strategy="no",
                 report_to="none", disable_tqdm=True, use_cpu=True, bf16=False, logging_steps=1)  # fmt: skip
    return Trainer(model, TrainingArguments(str(folder), **given | arguments), train_dataset=dataset,
                   eval_dataset=dataset, callbacks=callbacks, optimizers=(optimizer, None))  # fmt: skip


class Half(PenaltyCallback):
    """Half of the sum of squares; its gradient is the parameters themselves."""

    def penalty(self, model, step):
        return 0.5 * sum(p.square().sum() for p in trained(model))


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_penalty_is_added_once_a_step(accumulated, tmp_path):
    options = dict(gradient_accumulation_steps=accumulated, max_steps=1, max_grad_norm=0.0)
    models = [adapted(), adapted()]
    plain, held = (trainer(model, tmp_path, [*of], **options) for model, of in zip(models, ([], [Half()]), strict=True))
    before = [p.detach().clone() for p in trained(models[0])]
    plain.train()
    held.train()
    for alone, both, value in zip(
        plain.optimizer.optimizer.gradients[0], held.optimizer.optimizer.gradients[0], before, strict=True
    ):
        torch.testing.assert_close(both, alone + value, rtol=1e-9, atol=1e-12)
    (log,) = [log for log in held.state.log_history if "loss" in log]
    assert log["penalty"] == pytest.approx(float(0.5 * sum(p.square().sum() for p in before)))
    assert log["loss"] == pytest.approx(plain.state.log_history[0]["loss"])


def test_clipping_goes_by_the_sum(tmp_path):
    one = trainer(adapted(), tmp_path, [Half()], max_steps=1, max_grad_norm=0.5)
    one.train()
    norm = math.sqrt(sum(float(g.square().sum()) for g in one.optimizer.optimizer.gradients[0]))
    assert norm == pytest.approx(0.5, rel=1e-5)


def test_in_fp16_the_penalty_is_scaled_as_the_loss_is():
    """Bitwise equal after unscaling, because a power of two does not round."""
    model, callback = adapted(), Half()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = AcceleratedOptimizer(torch.optim.SGD(trained(model), lr=1.0), device_placement=False, scaler=scaler)
    before = [p.detach().clone() for p in trained(model)]
    callback.on_step_begin(None, TrainerState(), None, model=model, optimizer=optimizer)
    assert all(torch.equal(p.grad, 2.0**10 * value) for p, value in zip(trained(model), before, strict=True))
    assert callback.value == pytest.approx(float(0.5 * sum(value.square().sum() for value in before)))
    scaler.unscale_(optimizer.optimizer)
    assert all(torch.equal(p.grad, value) for p, value in zip(trained(model), before, strict=True))


def divergence(base, model, row, counted=None):
    """In float64, term by term."""
    with torch.no_grad():
        p, q = (one(input_ids=row[None]).logits[0, :-1].double().log_softmax(-1) for one in (base, model))
    of_each = (p.exp() * (p - q)).sum(-1)
    return float((of_each if counted is None else of_each[counted[1:]]).mean())


@pytest.mark.parametrize("given", ["adapter", "copy"])
def test_kl_to_base_is_the_divergence_of_one_row_after_the_other(given, tmp_path):
    base, model = llama(initializer_range=0.2).double(), adapted()
    callback = KLToBaseCallback(ROWS, 3.0, base=base if given == "copy" else None)
    assert {tuple(row.tolist()) for row, _ in callback.pieces} == {tuple(row.tolist()) for row in ROWS}
    for step in range(4):
        found = callback.penalty(model, step)
        row, _ = callback.pieces[step % 3]
        assert float(found.detach()) == pytest.approx(3.0 * divergence(base, model, row), rel=1e-5)
    assert trained(model)
    got = torch.autograd.grad(found, trained(model))

    def penalty():
        log_p = base(input_ids=row[None]).logits[0, :-1].log_softmax(-1)
        log_q = model(input_ids=row[None]).logits[0, :-1].log_softmax(-1)
        return 3.0 * kl_div(log_q, log_p.detach(), reduction="batchmean", log_target=True)

    for one, other in zip(got, torch.autograd.grad(penalty(), trained(model)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-7)  # probabilities are float32


def test_several_rows_in_a_step():
    """The mean is over the tokens that count. Rows of different lengths are padded, which changes nothing."""
    base, model = llama(initializer_range=0.2).double(), adapted()
    rows = [row[:length] for row, length in zip(ROWS, (9, 4, 6), strict=True)]
    counted = [torch.arange(len(row)) >= begin for row, begin in zip(rows, (3, 1, 2), strict=True)]
    callback = KLToBaseCallback(Rows(rows, counted), 3.0, rows_per_step=2)
    for step in range(3):
        pairs = [callback.pieces[number % 3] for number in (2 * step, 2 * step + 1)]
        sizes = [int(mask[1:].sum()) for _, mask in pairs]
        parts = [divergence(base, model, row, mask) for row, mask in pairs]
        expected = 3.0 * sum(size * part for size, part in zip(sizes, parts, strict=True)) / sum(sizes)
        assert float(callback.penalty(model, step).detach()) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="rows_per_step must be a whole number of 1 or more, got 0"):
        KLToBaseCallback(rows, 3.0, rows_per_step=0)


def test_dropout_is_no_divergence():
    """An adapter that has learned nothing has none, also in training mode."""
    model = llama(initializer_range=0.2, attention_dropout=0.5).double()
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.5)).train()
    assert float(KLToBaseCallback(ROWS, 3.0).penalty(model, 0).detach()) == 0
    assert model.training


def test_a_model_that_deepspeed_shards_is_refused(tmp_path):
    """transformers gives only its plug-in where Accelerate's configuration asks for DeepSpeed."""
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    for name, value in (("deepspeed", {"zero_optimization": {}}), ("deepspeed_plugin", object())):
        changed = copy.copy(arguments)
        setattr(changed, name, value)
        with pytest.raises(ValueError, match="FSDP or DeepSpeed shards them"):
            Half().on_train_begin(changed, None, None, model=adapted())


def test_kl_to_base_goes_by_the_tokens_that_count():
    """The tokens that a chat template adds around a turn do not count, as in a guard's text."""
    base, model = llama(initializer_range=0.2).double(), adapted()
    counted = [torch.arange(len(row)) >= begin for row, begin in zip(ROWS, (3, len(ROWS[1]), 1), strict=True)]
    callback = KLToBaseCallback(Rows(ROWS, counted), 3.0)
    order = [number for row, _ in callback.pieces for number, one in enumerate(ROWS) if row is one]
    assert sorted(order) == [0, 2]  # in row 1 no token counts
    for step, number in enumerate([*order, order[0]]):
        expected = 3.0 * divergence(base, model, ROWS[number], counted[number])
        assert float(callback.penalty(model, step).detach()) == pytest.approx(expected, rel=1e-5)


def test_kl_to_base_keeps_the_model_nearer(tmp_path):
    drifts = []
    for callbacks in ([], [KLToBaseCallback(ROWS, 100.0)]):
        model = adapted()
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.zeros_(p)
        trainer(model, tmp_path, callbacks, max_steps=8).train()
        drifts.append(sum(divergence(llama(initializer_range=0.2).double(), model, row) for row in ROWS))
    assert drifts[1] < 0.7 * drifts[0]


def test_a_short_training_sees_rows_of_every_kind():
    """The rows of a text are in an order: those that the model itself writes begin with plain text, then chats."""
    seen = {int(row[0]) for row, _ in pieces_of([torch.tensor([i, 1]) for i in range(100)])[:20]}
    assert min(seen) < 25
    assert max(seen) > 75


def test_kl_to_base_without_a_base():
    with pytest.raises(ValueError, match="pass the base model too"):
        KLToBaseCallback(ROWS, 1.0).penalty(llama(), 0)
    with pytest.raises(ValueError, match="no row of two tokens"):
        KLToBaseCallback([torch.tensor([3])], 1.0)


@pytest.mark.parametrize("kind", ["language model", "classifier"])
def test_ewcs_curvature_is_the_fisher_information(kind):
    """With few classes the expectation over answers is exact, in float64."""
    if kind == "classifier":
        model = classifier().double().requires_grad_(False)
        model.score.requires_grad_(True)
        batch = {"input_ids": tokens(batch=2), "labels": torch.tensor([0, 2])}
    else:
        model = llama(initializer_range=0.2).double().requires_grad_(False)
        model.model.norm.requires_grad_(True)
        batch = {"input_ids": tokens(batch=2, length=3), "labels": torch.tensor([[-100, -100, 4]] * 2)}
    ewc = EWCCallback(1.0, examples=3000)
    ewc.remember(model, [batch] * 1500)
    ((name, curvature),) = ewc.held.curvature.items()
    parameter = dict(model.named_parameters())[name]
    expected = torch.zeros_like(parameter)
    for row in batch["input_ids"]:
        logits = model(input_ids=row[None]).logits
        log_p = (logits[0] if kind == "classifier" else logits[0, 1]).log_softmax(-1)
        for answer in log_p:
            (gradient,) = torch.autograd.grad(answer, parameter, retain_graph=True)
            expected += answer.detach().exp() * gradient**2 / 2
    assert float((curvature - expected).norm() / expected.norm()) < 0.15
    assert float(curvature.sum()) == pytest.approx(float(expected.sum()), rel=0.15)


def test_ewc_pulls_back_to_where_the_task_was_learned(tmp_path):
    model = adapted()
    ewc = EWCCallback(2.0, examples=4)
    training = trainer(model, tmp_path, [ewc], max_steps=1, max_grad_norm=0.0)
    assert ewc.penalty(model, 0) is None
    ewc.remember(model, training.get_train_dataloader())
    other = EWCCallback(2.0)
    other.load_state_dict(ewc.state_dict())
    with torch.no_grad():
        for p in trained(model):
            p += 0.1
    expected = sum(0.1**2 * float(curvature.sum()) for curvature in ewc.held.curvature.values())
    assert float(ewc.penalty(model, 0)) == pytest.approx(expected, rel=1e-5) == float(other.penalty(model, 0))
    assert all(p.grad is None for p in model.parameters())
    trained(model)[0].requires_grad_(False)
    with pytest.raises(ValueError, match="Other parameters are trained than in the earlier tasks"):
        ewc.penalty(model, 0)


def test_ewc_without_labels_or_examples():
    with pytest.raises(ValueError, match="batches with labels"):
        EWCCallback(1.0).remember(adapted(), [{"input_ids": tokens()}])
    with pytest.raises(ValueError, match="no example"):
        EWCCallback(1.0).remember(adapted(), [])


def test_scale_back_keeps_the_limit_on_the_way_that_training_took(tmp_path):
    model = adapted()
    measure = lambda: perplexity(model, ROWS)  # noqa: E731
    start = measure()
    before = [p.detach().clone() for p in trained(model)]
    plain = trainer(adapted(), tmp_path, [], max_steps=6)
    plain.train()
    assert perplexity(plain.model, ROWS) / start - 1 > 0.01
    callback = ScaleBackCallback(model, measure, max_rise=0.002)
    saving = trainer(model, tmp_path, [callback], max_steps=6, save_strategy="steps", save_steps=6)
    saving.train()
    assert 0 < callback.kept.scale < 1
    assert measure() / start - 1 == pytest.approx(callback.kept.rise)
    assert callback.kept.rise <= 0.002
    for old, free, now in zip(before, trained(plain.model), trained(model), strict=True):
        torch.testing.assert_close(now, torch.lerp(old, free, callback.kept.scale), rtol=1e-9, atol=1e-12)
    assert saving.state.log_history[-1]["kept"] == callback.kept.scale
    saved = PeftModel.from_pretrained(llama(initializer_range=0.2).double(), tmp_path / "checkpoint-6")
    again = [p for name, p in saved.named_parameters() if "lora_" in name]
    assert all(torch.equal(one, other) for one, other in zip(again, trained(model), strict=True))
    # In a further training, the limit still counts from before the first one.
    trainer(model, tmp_path, [callback], max_steps=6).train()
    assert measure() / start - 1 <= 0.002


def test_scale_back_measures_once_where_nothing_is_scaled_back(tmp_path):
    model, measured = adapted(), []

    def measure():
        measured.append(perplexity(model, ROWS))
        return measured[-1]

    callback = ScaleBackCallback(model, measure, max_rise=10.0)
    trainer(model, tmp_path, [callback], max_steps=2).train()
    assert len(measured) == 2  # before and after
    assert callback.kept == (1.0, measured[1] / measured[0] - 1)


def test_scale_back_measures_what_is_loaded_as_the_best(tmp_path):
    """``kept`` belongs to the loaded checkpoint, not to the last step."""
    model = adapted()
    callback = ScaleBackCallback(model, lambda: perplexity(model, ROWS), max_rise=0.002)
    before = [p.detach().clone() for p in trained(model)]
    training = trainer(
        model, tmp_path, [callback], max_steps=6, save_strategy="steps", save_steps=2, eval_strategy="steps",
        eval_steps=2, load_best_model_at_end=True, metric_for_best_model="eval_loss",
    )  # fmt: skip
    training.train()
    best = PeftModel.from_pretrained(llama(initializer_range=0.2).double(), training.state.best_model_checkpoint)
    loaded = [p for name, p in best.named_parameters() if "lora_" in name]
    assert 0 < callback.kept.scale <= 1
    for old, one, now in zip(before, loaded, trained(model), strict=True):
        torch.testing.assert_close(now, torch.lerp(old, one, callback.kept.scale), rtol=1e-9, atol=1e-12)


def test_scale_back_measures_twice_in_the_same_precision(tmp_path):
    """Under autocast, a model that has not changed has the same perplexity."""
    model = adapted().float()
    callback = ScaleBackCallback(model, lambda: perplexity(model, ROWS), max_rise=0.1)
    training = trainer(model, tmp_path, [callback], bf16=True)
    training.optimizer = torch.optim.SGD(trained(model), lr=0.0)
    training.train()
    assert callback.kept == (1.0, 0.0)


def test_scale_back_refuses_what_is_no_limit(tmp_path):
    model = adapted()
    with pytest.raises(ValueError, match="max_rise must be a positive number"):
        ScaleBackCallback(model, lambda: 1.0, 0.0)
    with pytest.raises(ValueError, match="is nan before training"):
        trainer(model, tmp_path, [ScaleBackCallback(model, lambda: math.nan, 0.1)]).train()
    with pytest.raises(ValueError, match="no trained parameters"):
        ScaleBackCallback(model.requires_grad_(False), lambda: 1.0, 0.1)


def test_replay_mixes_some_of_each_earlier_task():
    tasks = [[{"task": task, "n": n} for n in range(20)] for task in range(3)]
    mixed = replay(tasks[2], *tasks[:2], examples=4, seed=1)
    rows = [mixed[i] for i in range(len(mixed))]
    assert rows[:20] == tasks[2]
    of_earlier = [[row["n"] for row in rows[20:] if row["task"] == task] for task in range(2)]
    assert [len(set(ns)) for ns in of_earlier] == [4, 4]
    assert of_earlier[0] != of_earlier[1]
    alike = replay(*map(Dataset.from_list, (tasks[2], *tasks[:2])), examples=4, seed=1)
    assert isinstance(alike, Dataset)
    assert alike.to_list() == rows
    assert len(replay(tasks[1], tasks[0], examples=99)) == 40
    with pytest.raises(ValueError, match="1 or more"):
        replay(tasks[1], tasks[0], examples=0)


@pytest.mark.parametrize("options", [dict(init_lora_weights="pissa"), dict(bias="all")])
def test_kl_needs_the_base_where_an_adapter_has_changed_it(options):
    """Without the adapter the model is then another one than the base."""
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"], **options))
    callback = KLToBaseCallback(list(tokens(batch=2)), 1.0)
    with pytest.raises(ValueError, match=r"changes the base model itself \(.*pass the base model too"):
        callback.penalty(model, 0)
    whole = KLToBaseCallback(list(tokens(batch=2)), 1.0, base=llama())
    assert float(whole.penalty(model, 0)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KLToBaseCallback([torch.arange(4)], "1"), "strength must be a positive number, got '1'"),
        (lambda: KLToBaseCallback(["a text"], 1.0), "must be a tensor of tokens of shape .*, got 'a text'"),
        (lambda: KLToBaseCallback([[1, 2, 3]], 1.0), r"must be a tensor of tokens of shape .*, got \[1, 2, 3\]"),
        (lambda: KLToBaseCallback([torch.arange(4)], 1.0, rows_per_step=1.5), "a whole number of 1 or more, got 1.5"),
        (lambda: EWCCallback(1.0, examples=1.5), "examples must be a whole number of 1 or more, got 1.5"),
        (lambda: EWCCallback("1"), "strength must be a positive number, got '1'"),
    ],
)
def test_options_of_callbacks(make, message):
    with pytest.raises(ValueError, match=message):
        make()
