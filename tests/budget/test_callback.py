"""Trainings under a budget, in transformers' Trainer and in TRL's."""

import copy
import json
import math
import re
import shutil
import warnings
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BitsAndBytesConfig,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers import trainer as transformers_trainer
from transformers.trainer_utils import HubStrategy
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from typer.testing import CliRunner

from curlora import CurloraConfig, ForgettingBudget, calibrate
from curlora.budget import limited_texts
from curlora.budget.adapter import keep_in_float32
from curlora.budget.guard_restraint import GuardRestraint
from curlora.budget.start import STATE_NAME
from curlora.guard import GuardError, Ledger, perplexity
from curlora.guard.anchors import Anchors
from curlora.guard.learning_rate import learning_rate
from curlora.guard.ledger import TextOutcome, TrainingRecord, pack, unpack
from curlora.inspection import inspect_adapter
from curlora.text.rows import Rows
from curlora.train.errors import TrainError
from curlora.train.history import history_of
from curlora.tuner.config import LEDGER_NAME
from curlora_cli.commands import app
from tests.models import WORDS, curlora, layers, llama, tokens, word_tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:The guard's text has"),
    pytest.mark.filterwarnings("ignore:.*has new PAD/BOS/EOS tokens"),
]


def base():
    """A model with confident predictions, so that it can forget something."""
    model = llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(10)
    return model


@torch.no_grad()
def written(seed, rows=24, length=16):
    """Text that the model itself writes."""
    model, generator = base(), torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 100, (rows, 1), generator=generator)
    for _ in range(length - 1):
        p = model(ids).logits[:, -1].softmax(-1)
        ids = torch.cat([ids, torch.multinomial(p, 1, generator=generator)], 1)
    return list(ids.unbind())


TEXT, OTHER = written(1), written(2)


def with_end():
    tokenizer = word_tokenizer()
    tokenizer.eos_token = WORDS[-1]
    return tokenizer


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CURLORA_CACHE_DIR", str(tmp_path / "cache"))


def fresh(**config):
    return get_peft_model(base(), CurloraConfig(**{"r": 4, **config}))


def budget(limit=0.02, **options):
    return ForgettingBudget(limit, **{"texts": {"words": TEXT}, "tokens": 512, "max_length": 16, **options})


def train(model, folder, callback, resume=None, seed=3, rows=None, more=(), **arguments):
    rows = rows or [{"input_ids": row, "labels": row} for row in tokens(seed=seed, batch=40, length=8)]
    given = dict(
        max_steps=12, per_device_train_batch_size=4, report_to="none", use_cpu=True, disable_tqdm=True, logging_steps=1,
        save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(
        model=model, args=TrainingArguments(str(folder), **{**given, **arguments}), train_dataset=rows,
        eval_dataset=rows[:8], processing_class=with_end(), callbacks=[callback, *more],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def trained(model):
    return [parameter.detach().clone() for name, parameter in model.named_parameters() if "lora_" in name]


QUIET = dict(report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no")


class Interrupt(TrainerCallback):
    def __init__(self, at):
        self.at = at

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.at:
            raise KeyboardInterrupt


class Tracker(TrainerCallback):
    """A tracker as transformers integrates them, which is told the step of each checkpoint that it is given."""

    __module__ = "transformers.integrations.integration_utils"

    def __init__(self, told):
        self.told = told

    def on_save(self, args, state, control, **kwargs):
        self.told(state.global_step)


def pushing_to(upload_folder, monkeypatch):
    """Let Trainers push to a function that stands in for the hub's."""
    monkeypatch.setattr(
        transformers_trainer, "hf_api", lambda: SimpleNamespace(upload_folder=upload_folder), raising=False
    )
    monkeypatch.setattr(transformers_trainer, "upload_folder", upload_folder, raising=False)

    def repository(trainer, *_, **__):
        trainer.hub_model_id, trainer.push_in_progress = "me/adapter", None

    monkeypatch.setattr(Trainer, "init_hf_repo", repository)


def interrupted(step, model, folder, callback, **arguments):
    """Interrupt a training at a step, and return its trainer and what has interrupted it."""
    given = dict(max_steps=12, **QUIET)
    rows = [{"input_ids": row, "labels": row} for row in tokens(batch=40, length=8)]
    trainer = Trainer(
        model, TrainingArguments(str(folder), **{**given, **arguments}), train_dataset=rows,
        processing_class=with_end(), callbacks=[callback, interrupt := Interrupt(step)],
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    return trainer, interrupt


def matrices(model):
    return [layer.curlora_U["default"].weight.detach().clone() for layer in layers(model)]


def same(model, others):
    return all(torch.equal(U, other) for U, other in zip(matrices(model), others, strict=True))


def measured(model, text=TEXT):
    now = perplexity(model, text, max_length=16)
    with model.disable_adapter():
        return now / perplexity(model, text, max_length=16) - 1


def test_nothing_else_to_set(tmp_path):
    """The guard's text is the model's own; rate, columns and rows are set; the limit holds by measurement."""
    model = fresh()
    drawn = [layer.basis("default").indices.clone() for layer in layers(model)]
    callback = ForgettingBudget(0.01, tokens=512, max_length=16)
    trainer = train(model, tmp_path, callback)
    assert any(U.any() for U in matrices(model))
    assert not all(
        torch.equal(layer.basis("default").indices, was) for layer, was in zip(layers(model), drawn, strict=True)
    )
    ((name, text),) = callback.outcome.texts.items()
    assert name == "own text"
    assert text.rise <= text.limit == 0.01
    assert 0 < callback.outcome.predicted <= math.log(1.01) * (1 + 1e-3)
    assert callback.outcome.learning_rate == pytest.approx(learning_rate(math.log(1.01), 12, 4))
    rates = [log["learning_rate"] for log in trainer.state.log_history if "loss" in log]
    assert rates[0] == pytest.approx(callback.outcome.learning_rate)


def test_what_is_measured_is_held(tmp_path):
    """At a rate that exceeds the limit by far. The saved adapter is the one in memory; a user measures the same."""
    wide, model = fresh(), fresh()
    callback = budget(0.02, learning_rate=0.5)
    train(wide, tmp_path / "wide", budget(0.9, learning_rate=0.5))
    assert measured(wide) > 0.03
    train(model, tmp_path, callback, save_strategy="steps", save_steps=12)
    outcome = callback.outcome.texts["words"]
    assert 0.01 < outcome.rise <= 0.02
    assert outcome.rise == pytest.approx(measured(model), rel=1e-4)
    with model.disable_adapter():
        assert outcome.before == pytest.approx(perplexity(model, TEXT, max_length=16))
    assert callback.outcome.kept < 1
    last = PeftModel.from_pretrained(base(), tmp_path / "checkpoint-12")
    assert same(last, matrices(model))


def test_the_best_checkpoint_is_held_too(tmp_path):
    model = fresh()
    callback = budget(0.005, learning_rate=0.5)
    trainer = train(
        model, tmp_path, callback, save_strategy="steps", save_steps=4, eval_strategy="steps", eval_steps=4,
        load_best_model_at_end=True, metric_for_best_model="eval_loss",
    )  # fmt: skip
    assert trainer.state.best_model_checkpoint is not None
    best = PeftModel.from_pretrained(base(), trainer.state.best_model_checkpoint)
    assert measured(model) <= 0.005
    assert callback.outcome.texts["words"].rise == pytest.approx(measured(model), abs=1e-6)
    ratios = [(U.norm() / V.norm()).item() for U, V in zip(matrices(model), matrices(best), strict=True)]
    assert ratios == pytest.approx([callback.outcome.kept] * len(ratios), rel=1e-4)  # scaled back on a straight line


def test_gone_on_with_to_the_bit(tmp_path):
    model, callback = fresh(), budget(0.01, learning_rate=0.3)
    arguments = dict(save_strategy="steps", save_steps=4)
    train(model, tmp_path, callback, **arguments)
    for where in (tmp_path / "checkpoint-8", tmp_path):  # the fallback is the folder above
        again, second = fresh(), budget(0.01, learning_rate=0.3)
        train(again, tmp_path, second, resume=str(tmp_path / "checkpoint-8"), **arguments)
        assert same(again, matrices(model))
        assert second.outcome == callback.outcome
        (where / STATE_NAME).unlink()
    with pytest.raises(GuardError, match="resumes at step 8, and the state of its budget was not found"):
        train(fresh(), tmp_path, budget(0.01), resume=str(tmp_path / "checkpoint-8"), **arguments)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("config", [CurloraConfig(r=4), LoraConfig(r=4)], ids=lambda one: one.peft_type.value)
def test_a_limit_holds_in_half_precision(config, precision, tmp_path):
    model = get_peft_model(base(), config)
    train(model, tmp_path, callback := budget(0.02, learning_rate=0.05), **{precision: True})
    text = callback.outcome.texts["words"]
    assert callback.outcome.kept > 0
    assert text.rise <= 0.02
    kind = torch.bfloat16 if precision == "bf16" else torch.float16
    with torch.autocast("cpu", kind):
        assert perplexity(model, TEXT, max_length=16) == pytest.approx(text.after, rel=1e-3)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(limit=0.02), r"another limit or another text for 'words': it had 'words' \(limit 1.00%\)"),
        (dict(texts={"other": TEXT}), "another text for 'other', 'words'"),
        (dict(texts={"words": OTHER}), "another text for 'words'"),
        (dict(lifetime=0.05), "began with lifetime=None, and now it is 0.05. Give it the same"),
    ],
)
@pytest.mark.parametrize("kind", ["curlora", "lora"])
def test_gone_on_with_under_another_budget(changed, message, kind, tmp_path):
    make = fresh if kind == "curlora" else lambda: get_peft_model(base(), LoraConfig(r=4, target_modules=["q_proj"]))
    train(make(), tmp_path, budget(0.01), save_strategy="steps", save_steps=8)
    with pytest.raises(GuardError, match=message):
        train(make(), tmp_path, budget(**{"limit": 0.01, **changed}), resume=str(tmp_path / "checkpoint-8"))


@pytest.mark.parametrize("kind", ["curlora", "lora"])
def test_gone_on_with_where_the_model_writes_another_text(kind, tmp_path, monkeypatch):
    """As on another machine: forgetting is then counted on the new text from its own start."""
    make = fresh if kind == "curlora" else lambda: get_peft_model(base(), LoraConfig(r=4, target_modules=["q_proj"]))
    budget_of_own = lambda: ForgettingBudget(0.01, tokens=256, max_length=16)  # noqa: E731
    monkeypatch.setattr(limited_texts, "own_text", lambda *_, **__: Rows(TEXT))
    train(make(), tmp_path, first := budget_of_own(), save_strategy="steps", save_steps=8)
    monkeypatch.setattr(limited_texts, "own_text", lambda *_, **__: Rows(OTHER))
    train(make(), tmp_path, second := budget_of_own(), resume=str(tmp_path / "checkpoint-8"))
    before = [one.outcome.texts["own text"].before for one in (first, second)]
    assert before == pytest.approx([perplexity(base(), text, max_length=16) for text in (TEXT, OTHER)], rel=1e-5)


def test_resumed_from_the_last_step_it_says_what_was_kept(tmp_path):
    """There the change has been scaled back already."""

    def moved(of):
        return lambda: 1.0 + sum(float(U.norm()) for U in matrices(of))

    model, again = fresh(), fresh()
    callback, second = (budget(0.01, texts={"how far": moved(of)}, learning_rate=0.5) for of in (model, again))
    arguments = dict(save_strategy="steps", save_steps=12)
    train(model, tmp_path, callback, **arguments)
    assert 0 < callback.outcome.kept < 0.9
    train(again, tmp_path, second, resume=str(tmp_path / "checkpoint-12"), **arguments)
    assert same(again, matrices(model))
    assert second.outcome == callback.outcome


@pytest.mark.parametrize("first", [True, False])
def test_a_measurement_that_is_not_a_number_keeps_nothing(tmp_path, first):
    """Whatever its place among the texts."""
    taken = []

    def failing():
        taken.append(math.nan if taken else 1.0)
        return taken[-1]

    texts = {"mine": failing, "words": TEXT} if first else {"words": TEXT, "mine": failing}
    model, callback = fresh(), budget(texts=texts)
    with pytest.warns(UserWarning, match="The measure of a text is not a number after training"):
        train(model, tmp_path, callback)
    assert callback.outcome.kept == 0
    assert not any(U.any() for U in matrices(model))
    training = Ledger.of(model.peft_config["default"]).trainings[0]
    assert math.isnan(training.worst)
    assert math.isnan(Ledger.of(model.peft_config["default"]).after(training, "").left or math.nan)


@pytest.mark.parametrize("kind", ["curlora", "lora"])
@pytest.mark.parametrize("fails_with", [OSError("the server is away"), "no number"], ids=["raises", "text"])
def test_a_measurement_that_fails_at_the_end_loses_nothing(fails_with, kind, tmp_path):
    """The trained parameters are saved, and the training goes on from there once the measurement works."""
    make = fresh if kind == "curlora" else lambda: get_peft_model(base(), LoraConfig(r=4, target_modules=["q_proj"]))

    def run(folder, fails=False, resume=None):
        model, seen = make(), []
        start = trained(model)

        def how_far():
            seen.append(trained(model))
            moved = sum(float((now - then).norm()) for now, then in zip(seen[-1], start, strict=True))
            if not (fails and moved):
                return 1.0 + moved
            if isinstance(fails_with, Exception):
                raise fails_with
            return fails_with

        callback = budget(0.01, texts={"how far": how_far}, learning_rate=0.3)
        try:
            train(model, folder, callback, resume=resume)
        except GuardError as error:
            return model, callback, str(error)
        return model, callback, ""

    stopped, _, message = run(tmp_path, fails=True)
    assert re.search(r"after the last step failed .* are in checkpoint-12 of .*\. Correct the cause", message)
    mended, callback, _ = run(tmp_path, resume=str(tmp_path / "checkpoint-12"))
    assert 0 < callback.outcome.kept < 0.9
    undisturbed, expected, _ = run(tmp_path / "undisturbed")
    assert callback.outcome.kept == pytest.approx(expected.outcome.kept, rel=1e-4)
    torch.testing.assert_close(trained(mended), trained(undisturbed))
    with pytest.raises(AssertionError):  # these have not been scaled back
        torch.testing.assert_close(trained(stopped), trained(mended))


@pytest.mark.parametrize("strategy", ["no", "best"])
def test_a_record_that_fails_is_not_lost(strategy, tmp_path, monkeypatch):
    """With `best` the trainer itself decides whether to save, so the error comes at the end."""
    fails = [True]
    enter = GuardRestraint.record

    def record(self, *arguments):
        if fails[0]:
            raise OSError("no room")
        enter(self, *arguments)

    monkeypatch.setattr(GuardRestraint, "record", record)
    best = dict(metric_for_best_model="loss", eval_strategy="steps", eval_steps=4) if strategy == "best" else {}
    arguments = {**best, "save_strategy": strategy}
    model = fresh()
    with pytest.raises(GuardError, match="OSError: no room") as raised:
        train(model, tmp_path, failing := budget(0.02, learning_rate=0.1), **arguments)
    assert any(U.any() for U in matrices(model))
    assert failing.outcome is None
    if "are in checkpoint-12" in str(raised.value):
        fails[0] = False
        again, mended = fresh(), budget(0.02, learning_rate=0.1)
        train(again, tmp_path, mended, resume=str(tmp_path / "checkpoint-12"), **arguments)
        assert same(again, matrices(model))
        assert len(Ledger.of(again.peft_config["default"]).trainings) == 1
        assert not Ledger.load(tmp_path / "checkpoint-12").trainings  # as of any checkpoint during training
    else:
        assert strategy == "best"
        assert "save_model()" in str(raised.value)


def test_examples_may_be_longer_than_the_models_positions(tmp_path):
    """Rotary positions have no end. The text of the budget is cut to the number of positions."""
    model = get_peft_model(llama(max_position_embeddings=16), CurloraConfig(r=4))
    rows = [{"input_ids": row, "labels": row} for row in tokens(batch=8, length=24)]
    callback = budget()
    train(model, tmp_path, callback, rows=rows)
    assert callback.outcome.texts["words"].rise <= 0.02
    assert len(Ledger.of(model.peft_config["default"]).anchors) == 1


def test_every_text_has_its_limit_and_a_measurement_of_ones_own(tmp_path):
    model = fresh()
    asked = []

    def size():
        """Positive, and 1 for an untrained adapter."""
        asked.append(1 + sum(float(U.square().sum()) for U in matrices(model)))
        return asked[-1]

    train(fresh(), tmp_path / "wide", budget(0.5, texts={"a": TEXT, "b": OTHER}, learning_rate=0.5))
    callback = budget(0.5, texts={"a": TEXT, "b": OTHER, "size": size}, limits={"b": 0.01, "size": 0.2},
                      learning_rate=0.5)  # fmt: skip
    train(model, tmp_path, callback)
    texts = callback.outcome.texts
    assert {name: text.limit for name, text in texts.items()} == {"a": 0.5, "b": 0.01, "size": 0.2}
    assert all(text.rise <= text.limit for text in texts.values())
    assert max(text.rise / text.limit for text in texts.values()) > 0.9  # one of the limits binds
    assert measured(model, OTHER) == pytest.approx(texts["b"].rise, abs=1e-6)
    assert texts["size"].before == 1
    assert texts["size"].after == size()


class TestLedger:
    def two(self, path, lifetime=None, **options):
        model, first = fresh(), budget(0.02, learning_rate=0.3, lifetime=lifetime)
        train(model, path / "one", first)
        model.save_pretrained(path / "saved")
        model = PeftModel.from_pretrained(base(), path / "saved", is_trainable=True)
        second = budget(0.02, learning_rate=0.3, **options)
        train(model, path / "two", second, seed=4)
        return model, first, second

    def test_forgetting_counts_from_before_the_first_training(self, tmp_path):
        model, first, second = self.two(tmp_path)
        one, two = first.outcome.texts["words"], second.outcome.texts["words"]
        assert two.before == pytest.approx(one.before, rel=1e-6)
        assert two.limit == pytest.approx(max(one.rise, 0) + 0.02, rel=1e-6)
        assert two.rise <= two.limit
        assert two.rise == pytest.approx(measured(model), abs=1e-6)
        model.save_pretrained(tmp_path / "saved")
        ledger = Ledger.load(tmp_path / "saved")
        assert [training.texts["words"].rise for training in ledger.trainings] == [one.rise, two.rise]
        assert len(ledger.anchors) == 2
        assert ledger.left is None

    def test_a_lifetime_bounds_all_trainings(self, tmp_path):
        model, first, second = self.two(tmp_path, lifetime=0.03)
        assert first.outcome.texts["words"].rise > 0.01  # so that the second may not add 2 %
        assert second.outcome.texts["words"].limit == 0.03
        assert measured(model) <= 0.03
        model.save_pretrained(tmp_path / "saved")
        left = Ledger.load(tmp_path / "saved").left
        assert left == pytest.approx(0.03 - second.outcome.texts["words"].rise)
        with pytest.raises(GuardError, match="The lifetime's budget is used up: the measure of 'words' has risen by"):
            train(model, tmp_path / "three", budget(lifetime=0.001))
        assert same(PeftModel.from_pretrained(base(), tmp_path / "saved"), matrices(model))

    def test_a_lifetime_counts_on_its_texts(self, tmp_path):
        """What is forgotten of a text that is no longer measured would not be noticed."""
        model = fresh()
        train(model, tmp_path, budget(lifetime=0.5))
        for texts, problem in (
            ({"other": OTHER}, "'words', .* is not among the texts of this training. .* budget of 50.00% counts on it"),
            ({"words": OTHER}, "'words', .* is another text now, or is cut into other rows"),
        ):
            with pytest.raises(GuardError, match=problem):
                train(model, tmp_path, budget(texts=texts))
        callback = budget(texts={"words": TEXT, "other": OTHER})
        train(model, tmp_path, callback)
        ledger = Ledger.of(model.peft_config["default"])
        assert [sorted(one.texts) for one in ledger.trainings] == [["words"], ["other", "words"]]

    def test_what_is_left_counts_every_text(self):
        def after(**rises):
            texts = {name: TextOutcome(1.0, 1 + rise, rise, 0.02) for name, rise in rises.items()}
            return TrainingRecord(1, 0.1, 0.02, 0.01, 1.0, texts)

        ledger = Ledger(None, Anchors(), (after(a=0.02, b=0.005), after(b=0.01)), lifetime=0.03)
        assert ledger.left == pytest.approx(0.01)

    def test_without_a_lifetime_another_text_is_told(self, tmp_path):
        model = fresh()
        train(model, tmp_path, budget())
        with pytest.warns(UserWarning, match="What this training forgets of it would not be noticed"):
            train(model, tmp_path, budget(texts={"other": OTHER}))

    def test_the_record_goes_only_into_a_checkpoint_of_this_adapter(self, tmp_path):
        """The best checkpoint was loaded and scaled back: the last one holds another adapter."""
        model, callback = fresh(), budget(0.005, learning_rate=0.5)
        trainer = train(
            model, tmp_path, callback, save_strategy="steps", save_steps=4, eval_strategy="steps", eval_steps=4,
            load_best_model_at_end=True, metric_for_best_model="eval_loss",
        )  # fmt: skip
        assert len(Ledger.of(model.peft_config["default"]).trainings) == 1
        last = tmp_path / "checkpoint-12"
        is_last = trainer.state.best_model_checkpoint == str(last) and callback.outcome.kept == 1
        assert len(Ledger.load(last).trainings) == int(is_last)

    def test_it_belongs_to_its_adapter(self, tmp_path):
        model, other = fresh(), fresh(seed=1)
        train(model, tmp_path, budget(redraw=False))
        train(other, tmp_path, budget(redraw=False))
        model.save_pretrained(tmp_path / "saved")
        other.save_pretrained(tmp_path / "other")
        shutil.copytree(tmp_path / "saved", tmp_path / "copy")

        def go_on(folder):
            loaded = PeftModel.from_pretrained(base(), tmp_path / folder, is_trainable=True)
            train(loaded, tmp_path / "again", budget())

        go_on("copy")
        shutil.copy(tmp_path / "other" / LEDGER_NAME, tmp_path / "copy" / LEDGER_NAME)
        with pytest.raises(GuardError, match="other columns and rows"):
            go_on("copy")
        content = bytearray((tmp_path / "saved" / LEDGER_NAME).read_bytes())
        content[-3] ^= 1
        (tmp_path / "copy" / LEDGER_NAME).write_bytes(content)
        with pytest.raises(GuardError, match="damaged"):
            go_on("copy")
        (tmp_path / "copy" / LEDGER_NAME).unlink()
        go_on("copy")

    def test_one_of_the_first_version_is_read(self, tmp_path):
        """Version 1 has ``allowed`` for a text's limit. The next training writes version 2."""
        model, callback = fresh(), budget(0.02, learning_rate=0.3)
        train(model, tmp_path / "one", callback)
        model.save_pretrained(tmp_path / "saved")
        path = tmp_path / "saved" / LEDGER_NAME
        tensors, about = unpack(path.read_bytes(), "it")
        (training,), text = about["trainings"], callback.outcome.texts["words"]
        training["texts"] = {
            "words": {"sha256": text.sha256, "tokens": text.tokens, "before": text.before, "after": text.after,
                      "rise": text.rise, "allowed": text.limit}
        }  # fmt: skip
        path.write_bytes(pack(tensors, {**about, "version": 1}))
        assert Ledger.load(tmp_path / "saved").trainings[0].texts == callback.outcome.texts
        loaded = PeftModel.from_pretrained(base(), tmp_path / "saved", is_trainable=True)
        train(loaded, tmp_path / "two", budget(0.02), seed=4)
        loaded.save_pretrained(tmp_path / "saved")
        assert unpack(path.read_bytes(), "it")[1]["version"] == 2
        assert len(Ledger.load(tmp_path / "saved").trainings) == 2
        path.write_bytes(pack(tensors, {**about, "version": 3}))
        with pytest.raises(GuardError, match="has version 3, and this curlora reads versions 1 and 2: update curlora"):
            Ledger.load(tmp_path / "saved")

    def test_inspect_shows_it(self, tmp_path):
        model, first, second = self.two(tmp_path, lifetime=0.5)
        model.save_pretrained(tmp_path / "saved")
        done = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["inspect", str(tmp_path / "saved")])
        assert done.exit_code == 0, done.output
        for outcome in (first.outcome, second.outcome):
            assert f"{outcome.texts['words'].rise:+.2%}" in done.output
            assert f"{outcome.predicted:.4f}" in done.output
            assert f"{outcome.learning_rate:.2g}" in done.output
            assert outcome.texts["words"].sha256[:8] in done.output
            assert f"{outcome.texts['words'].tokens:,} tokens in 24 rows" in done.output
        calibration = Ledger.load(tmp_path / "saved").calibration
        assert calibration.base[:16] in done.output
        other = calibrate(curlora(llama(initializer_range=0.3)), TEXT[:2], progress=False)
        assert other.base != calibration.base
        left = 0.5 - second.outcome.texts["words"].rise
        assert f"50.00%, {left:.2%} of it left" in done.output
        (tmp_path / "saved" / LEDGER_NAME).write_bytes(b"\0" * 100)
        done = CliRunner().invoke(app, ["inspect", str(tmp_path / "saved")])
        assert done.exit_code == 1
        assert "is damaged" in done.output

    def test_trained_since_without_a_budget(self, tmp_path):
        model = fresh()
        train(model, tmp_path, budget())
        with torch.no_grad():
            layers(model)[0].curlora_U["default"].weight += 1
        model.save_pretrained(tmp_path / "saved")
        loaded = PeftModel.from_pretrained(base(), tmp_path / "saved", is_trainable=True)
        with pytest.raises(GuardError, match="has been trained since without a budget"):
            train(loaded, tmp_path / "again", budget())

    @pytest.mark.parametrize("lifetime", [None, 0.5])
    @pytest.mark.parametrize("what", ["base", "alpha"])
    def test_a_model_that_has_changed_where_no_fingerprint_sees_it(self, what, lifetime, tmp_path):
        model = fresh()
        train(model, tmp_path, budget(learning_rate=0.3))
        model.save_pretrained(tmp_path / "saved")
        other = base()
        if what == "base":
            other.lm_head.weight.data.mul_(0.7)
        else:
            path = tmp_path / "saved" / "adapter_config.json"
            options = json.loads(path.read_text())
            path.write_text(json.dumps({**options, "alpha": 9.0, "digest": "changed"}))
        loaded = PeftModel.from_pretrained(other, tmp_path / "saved", is_trainable=True)
        message = (
            f"The {'base model' if what == 'base' else 'adapter'} is not what it was at the end of the adapter's last"
        )
        if lifetime is None:
            with pytest.warns(UserWarning, match=message):
                train(loaded, tmp_path / "again", budget())
        else:
            with pytest.raises(GuardError, match=message):
                train(loaded, tmp_path / "again", budget(lifetime=lifetime))

    def test_a_text_that_the_last_training_has_not_measured_says_nothing_of_the_adapter(self, tmp_path):
        model = fresh()
        for name, text in (("a", TEXT), ("b", OTHER)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                train(model, tmp_path, budget(0.1, texts={name: text}, learning_rate=0.3), seed=len(name))
        model.save_pretrained(tmp_path / "saved")
        loaded = PeftModel.from_pretrained(base(), tmp_path / "saved", is_trainable=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*is not what it was")
            train(loaded, tmp_path / "again", budget(0.1, texts={"a": TEXT, "b": OTHER}))

    def test_a_text_under_another_name_is_the_same_text(self, tmp_path):
        model = fresh()
        train(model, tmp_path, budget(lifetime=0.5))
        model.save_pretrained(tmp_path / "saved")
        loaded = PeftModel.from_pretrained(base(), tmp_path / "saved", is_trainable=True)
        train(loaded, tmp_path / "again", budget(texts={"renamed": TEXT}))

    def test_a_new_adapter_with_the_columns_of_a_saved_one_has_no_ledger(self, tmp_path):
        model = fresh()
        train(model, tmp_path, budget())
        model.save_pretrained(tmp_path / "saved")
        config = CurloraConfig.from_pretrained(str(tmp_path / "saved"))
        config.inference_mode = False
        again = get_peft_model(base(), config)
        assert torch.equal(layers(again)[0].basis("default").indices, layers(model)[0].basis("default").indices)
        train(again, tmp_path / "again", callback := budget())
        assert callback.outcome.kept > 0
        assert len(Ledger.of(again.peft_config["default"]).trainings) == 1

    def test_inspect_and_the_command_tell_a_ledger_of_another_adapter(self, tmp_path):
        for name, seed in (("one", 3), ("other", 4)):
            model = fresh()
            train(model, tmp_path, budget(), seed=seed)
            model.save_pretrained(tmp_path / name)
        assert inspect_adapter(tmp_path / "one").ledger_fits
        shutil.copy(tmp_path / "one" / LEDGER_NAME, tmp_path / "other" / LEDGER_NAME)
        done = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["inspect", str(tmp_path / "other")])
        assert "The adapter does not match its ledger" in done.output
        with pytest.raises(TrainError, match="The adapter does not match its ledger"):
            history_of(CurloraConfig.from_pretrained(str(tmp_path / "other")), str(tmp_path / "other"), None)

    @pytest.mark.parametrize(("config", "rate"), [(CurloraConfig(r=4), 50.0), (LoraConfig(r=4), 0.1)])
    def test_what_was_forgotten_before_the_first_budget_counts(self, config, rate, tmp_path):
        """With an adapter that was trained without a budget, forgetting is counted from the base model."""
        model = get_peft_model(base(), config)
        before = perplexity(model, TEXT, max_length=16)
        rows = [{"input_ids": row, "labels": row} for row in tokens(seed=9, batch=40, length=8)]
        arguments = TrainingArguments(str(tmp_path / "without"), max_steps=12, learning_rate=rate, **QUIET)
        Trainer(model, arguments, train_dataset=rows, processing_class=with_end()).train()
        risen = perplexity(model, TEXT, max_length=16) / before - 1
        assert risen > 0.05
        callback = budget(0.02)
        with pytest.warns(UserWarning, match=r"has already risen by .* since the base model\. This training may add 2"):
            train(model, tmp_path, callback)
        text = callback.outcome.texts["words"]
        assert text.before == pytest.approx(before, rel=1e-6)
        assert text.limit == pytest.approx(risen + 0.02, rel=1e-6)
        assert text.rise <= text.limit

    @pytest.mark.parametrize("trainings", [1, 2])
    def test_of_the_checkpoints_only_the_last_can_be_trained_further(self, tmp_path, trainings):
        """The others would count forgetting from the middle of a training."""
        model = fresh()
        for _ in range(trainings):
            train(model, tmp_path, budget(learning_rate=0.3), save_strategy="steps", save_steps=4)
        model.save_pretrained(tmp_path / "saved")

        def go_on(folder):
            train(
                PeftModel.from_pretrained(base(), folder, is_trainable=True), tmp_path / "again", callback := budget()
            )
            return callback.outcome.texts["words"]

        with pytest.raises(GuardError, match="its last training with a budget did not come to its end"):
            go_on(tmp_path / "checkpoint-4")
        last, saved = go_on(tmp_path / "checkpoint-12"), go_on(tmp_path / "saved")
        assert last == saved
        assert last.before == pytest.approx(perplexity(base(), TEXT, max_length=16))

    def test_an_interrupted_training_is_not_taken_for_a_beginning(self, tmp_path):
        model, callback = fresh(), budget(learning_rate=0.3)
        train(model, tmp_path, budget(learning_rate=0.3, lifetime=0.06))
        trainer, interrupt = interrupted(0, model, tmp_path, callback)
        assert callback.outcome is None
        # Nothing had changed yet. So the training can begin again, with the same trainer.
        interrupt.at = 3
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        for begin in (trainer.train, lambda: train(model, tmp_path, budget())):
            with pytest.raises(GuardError, match="its last training with a budget did not come to its end"):
                begin()

    def test_nor_is_a_first_one(self, tmp_path):
        model = fresh()
        interrupted(3, model, tmp_path, budget(learning_rate=0.3))
        with pytest.raises(GuardError, match="its last training with a budget did not come to its end"):
            train(model, tmp_path, budget())

    def test_saved_where_another_was(self, tmp_path):
        model = fresh()
        train(model, tmp_path, budget())
        model.save_pretrained(tmp_path / "saved")
        fresh().save_pretrained(tmp_path / "saved")
        assert Ledger.load(tmp_path / "saved") is None


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_an_anchor_is_the_divergence_of_the_task(fan_in_fan_out, tmp_path):
    """The penalty against the divergence of the task's own answers, to second order along random directions."""
    from curlora.budget.guard_restraint import add_anchor
    from tests.models import gpt2

    model = curlora(gpt2() if fan_in_fan_out else base(), r=2, alpha=1.7)
    target = layers(model)[:1]
    by_name = {layer.name: layer for layer in target}
    rows = tokens(seed=5, batch=400, length=6)
    labels = rows.clone()
    labels[:, :3] = -100
    batches = [{"input_ids": rows[i : i + 50], "labels": labels[i : i + 50]} for i in range(0, 400, 50)]
    task = calibrate(model, batches, progress=False)
    anchors = Anchors()
    add_anchor(anchors, task, by_name, "default")

    U = target[0].curlora_U["default"].weight
    start = U.detach().clone()

    @torch.no_grad()
    def log_p():
        return model(input_ids=rows).logits[:, 2:-1].double().log_softmax(-1)

    before, ratios = log_p(), []
    for seed in range(8):
        step = 0.02 * torch.randn(U.shape, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            U.copy_(start + step)
        truth = (before.exp() * (before - log_p())).sum(-1).mean().item()
        ratios.append(anchors.penalty({target[0].name: U}).item() / truth)
    # One Kronecker product approximates the Fisher matrix: about right on average, and in magnitude for each direction.
    assert 0.5 < sum(ratios) / len(ratios) < 2
    assert all(0.2 < ratio < 5 for ratio in ratios)


def test_anchors_hold_what_was_learned_first(tmp_path):
    """How far the second training moves what matters to the first, with anchors and without, at the same budget."""
    first = [{"input_ids": row, "labels": row} for row in tokens(seed=21, batch=8, length=8)]
    second = [{"input_ids": row, "labels": row} for row in tokens(seed=22, batch=8, length=8)]
    moved = {}
    for anchors in (True, False):
        model = fresh()
        train(model, tmp_path / "1", budget(0.5, learning_rate=0.3), rows=first, max_steps=40)
        learned = copy.deepcopy(Ledger.of(model.peft_config["default"]).anchors)
        train(model, tmp_path / "2", budget(0.5, learning_rate=0.3, anchors=anchors), rows=second, max_steps=40)
        values = {layer.name: layer.curlora_U["default"].weight.detach() for layer in layers(model)}
        moved[anchors] = float(learned.penalty(values))
    assert moved[True] < 0.5 * moved[False]


class TestRate:
    def test_one_that_was_chosen_is_honoured(self, tmp_path):
        callback = budget()
        trainer = train(fresh(), tmp_path, callback, learning_rate=0.03)
        assert callback.outcome.learning_rate == 0.03
        assert trainer.state.log_history[0]["learning_rate"] == pytest.approx(0.03)

    def test_one_that_does_nothing_is_told(self, tmp_path):
        with pytest.warns(UserWarning, match=r"At learning_rate=2e-05 the adapter will hardly learn"):
            train(fresh(), tmp_path, budget(), learning_rate=2e-5)
        with pytest.warns(UserWarning, match=r"At learning_rate=2e-05 the adapter will hardly learn"):
            train(fresh(), tmp_path, budget(learning_rate=2e-5))

    def test_a_trainer_that_trains_again_sets_it_again(self, tmp_path):
        """The rule goes by the steps. The optimizer is the one of the first time."""
        callback = budget(0.02)
        trainer = train(fresh(), tmp_path, callback)
        first = callback.outcome.learning_rate
        trainer.args.max_steps = 48
        trainer.train()
        allowed = callback.outcome.texts["words"].limit  # what the first has cost, and 2 %
        assert callback.outcome.learning_rate == pytest.approx(learning_rate(math.log1p(allowed), 48, 4), rel=0.02)
        assert callback.outcome.learning_rate < 0.8 * first

    @pytest.mark.parametrize("schedule", ["linear", "cosine", "constant", "cosine_with_min_lr"])
    def test_schedules_and_warm_up(self, tmp_path, schedule):
        more = {"lr_scheduler_kwargs": {"min_lr": 1e-6}} if "min" in schedule else {}
        rates = {}
        for name, rate in (("set", {}), ("chosen", {"learning_rate": 0.04})):
            callback = budget(learning_rate=0.04) if name == "set" else budget()
            trainer = train(fresh(), tmp_path, callback, lr_scheduler_type=schedule, warmup_steps=3, **more, **rate)
            rates[name] = [log["learning_rate"] for log in trainer.state.log_history if "loss" in log]
        relative = 1e-3 if "min" not in schedule else 0.1  # its lowest rate is a share of the initial one
        assert rates["set"] == pytest.approx(rates["chosen"], rel=relative, abs=2e-3)

    def test_clipping_interferes_with_sgd_only(self, tmp_path, recwarn):
        train(fresh(), tmp_path, budget(), optim="sgd")
        assert any("Set max_grad_norm=0" in str(one.message) for one in recwarn)
        recwarn.clear()
        train(fresh(), tmp_path, budget(), optim="sgd", max_grad_norm=0)
        train(fresh(), tmp_path, budget())
        assert not any("max_grad_norm" in str(one.message) for one in recwarn)


def test_trackers_see_it(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    callback = budget()
    trainer = train(fresh(), tmp_path, callback, report_to="tensorboard")
    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    drifts = [event.value for event in events.Scalars("train/drift")]
    logged = [log["drift"] for log in trainer.state.log_history if "drift" in log]
    assert drifts == pytest.approx(logged)
    assert len(drifts) == 13
    (rise,) = events.Scalars("train/perplexity_rise/words")
    assert rise.value == pytest.approx(callback.outcome.texts["words"].rise, abs=1e-7)


def test_the_progress_bar_shows_it(tmp_path, capsys):
    train(fresh(), tmp_path, budget(), disable_tqdm=False)
    shown = capsys.readouterr()
    assert shown.out.count("'drift': ") == 13
    assert "'perplexity_rise/words': " in shown.out


def test_U_of_half_precision_is_trained_in_single(tmp_path):
    """TRL casts the adapter of a quantized base model to half precision."""
    model = fresh()
    for layer in layers(model):
        U = layer.curlora_U["default"].weight
        U.data = U.data.bfloat16()
    train(model, tmp_path, budget())
    assert {U.dtype for U in matrices(model)} == {torch.float32}


CHATS = [{"prompt": f"{WORDS[i]} {WORDS[i + 1]}", "completion": f" {WORDS[i + 2]} {WORDS[i + 3]}"} for i in range(40)]


class TestTRL:
    def arguments(self, folder, kind=SFTConfig, **options):
        given = dict(
            max_steps=4, per_device_train_batch_size=4, report_to="none", use_cpu=True, disable_tqdm=True,
            logging_steps=1, save_strategy="no", max_length=16, bf16=False,
        )  # fmt: skip
        return kind(str(folder), **{**given, **options})

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"packing": True},
            {"padding_free": True, "max_length": None},
            {"completion_only_loss": False},
            {"bf16": True},
            {"gradient_checkpointing": True, "gradient_accumulation_steps": 2},
        ],
        ids=str,
    )
    @pytest.mark.filterwarnings("ignore:.*flash attention")
    def test_sft(self, tmp_path, options):
        callback = budget()
        trainer = SFTTrainer(
            base(), self.arguments(tmp_path, **options), train_dataset=Dataset.from_list(CHATS),
            processing_class=with_end(), peft_config=CurloraConfig(r=4), callbacks=[callback],
        )  # fmt: skip
        trainer.train()
        assert callback.outcome.texts["words"].rise <= 0.02
        assert callback.outcome.learning_rate != trainer.args.learning_rate
        assert any(U.any() for U in matrices(trainer.model))

    @pytest.mark.parametrize(
        "more",
        [
            {},
            {"packing": True},
            {"bf16": True},
            {"fp16": True},
            {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2},
        ],
        ids=str,
    )
    @pytest.mark.filterwarnings("ignore:.*flash attention")
    def test_gone_on_with_to_the_bit(self, more, tmp_path):
        def run(resume=None):
            callback = budget(0.01, learning_rate=0.3)
            options = dict(save_strategy="steps", save_steps=2, gradient_accumulation_steps=2, **more)
            trainer = SFTTrainer(
                base(), self.arguments(tmp_path, per_device_train_batch_size=2, **{**options, "max_length": 32}),
                train_dataset=Dataset.from_list(CHATS), eval_dataset=Dataset.from_list(CHATS[:8]),
                processing_class=with_end(), peft_config=CurloraConfig(r=4), callbacks=[callback],
            )  # fmt: skip
            trainer.train(resume_from_checkpoint=resume)
            return trainer.model, callback.outcome

        whole, outcome = run()
        again, same_outcome = run(str(tmp_path / "checkpoint-2"))
        assert same(again, matrices(whole))
        assert same_outcome == outcome

    def test_assistant_only_loss(self, tmp_path):
        tokenizer = with_end()
        tokenizer.chat_template = (
            "{% for m in messages %}{% if m.role == 'assistant' %}w90 {% generation %}{{ m.content + ' w97 ' }}"
            "{% endgeneration %}{% else %}{{ 'w91 ' + m.content + ' ' }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}w90 {% endif %}"
        )
        turns = [
            {"messages": [{"role": "user", "content": one["prompt"]}, {"role": "assistant", "content": "w5 w6"}]}
            for one in CHATS
        ]
        callback = budget(texts={"chats": [one["messages"] for one in turns[:30]]})
        trainer = SFTTrainer(
            base(), self.arguments(tmp_path, assistant_only_loss=True), train_dataset=Dataset.from_list(turns),
            processing_class=tokenizer, peft_config=CurloraConfig(r=4), callbacks=[callback],
        )  # fmt: skip
        trainer.train()
        assert callback.outcome.texts["chats"].rise <= 0.02
        assert any(U.any() for U in matrices(trainer.model))

    @pytest.mark.parametrize("later", [False, True])
    def test_a_quantized_base(self, tmp_path, monkeypatch, later):
        """TRL casts its adapter to bfloat16; the callback trains it in float32, also if it is added later."""
        monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
        base().save_pretrained(tmp_path / "base")
        quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantized)
        callback = budget()
        trainer = SFTTrainer(
            model, self.arguments(tmp_path), train_dataset=Dataset.from_list(CHATS),
            processing_class=with_end(), peft_config=CurloraConfig(r=4), callbacks=[] if later else [callback],
        )  # fmt: skip
        if later:
            assert {U.dtype for U in matrices(trainer.model)} == {torch.bfloat16}
            trainer.add_callback(callback)
        trainer.train()
        assert {U.dtype for U in matrices(trainer.model)} == {torch.float32}
        assert any(U.any() for U in matrices(trainer.model))
        assert callback.outcome.texts["words"].rise <= 0.02

    @pytest.mark.parametrize("reloaded", [False, True])
    def test_a_second_training_on_a_quantized_base(self, reloaded, tmp_path, monkeypatch):
        """TRL rounds the trained adapter to bfloat16 before the callback sees it."""
        monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
        base().save_pretrained(tmp_path / "base")
        quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)

        def loaded():
            return AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantized)

        def trained(model, **options):
            callback = budget()
            trainer = SFTTrainer(
                model, self.arguments(tmp_path), train_dataset=Dataset.from_list(CHATS), processing_class=with_end(),
                callbacks=[callback], **options,
            )  # fmt: skip
            before = [U.detach().clone() for U in matrices(trainer.model)]
            trainer.train()
            return trainer.model, before

        model, _ = trained(loaded(), peft_config=CurloraConfig(r=4))
        after_first = [U.detach().clone() for U in matrices(model)]
        if reloaded:
            model.save_pretrained(tmp_path / "adapter")
            model = PeftModel.from_pretrained(loaded(), tmp_path / "adapter", is_trainable=True)
        model, before_second = trained(model)
        assert all(map(torch.equal, before_second, after_first))
        assert len(Ledger.of(model.peft_config["default"]).trainings) == 2

    def test_rounding_that_cannot_be_undone_is_told(self):
        model = fresh()
        for layer in layers(model):
            U = layer.curlora_U["default"].weight
            U.data = torch.full_like(U, 0.1).bfloat16()
        with pytest.warns(UserWarning, match="has been rounded to half precision"):
            keep_in_float32(model)
        assert {U.dtype for U in matrices(model)} == {torch.float32}

    def test_dpo(self, tmp_path):
        pairs = [{**one, "chosen": one.pop("completion"), "rejected": " w9 w8"} for one in map(dict, CHATS)]
        callback = budget()
        trainer = DPOTrainer(
            base(), args=self.arguments(tmp_path, DPOConfig), train_dataset=Dataset.from_list(pairs),
            processing_class=with_end(), peft_config=CurloraConfig(r=4), callbacks=[callback],
        )  # fmt: skip
        trainer.train()
        assert callback.outcome.texts["words"].rise <= 0.02
        assert len(Ledger.of(trainer.model.peft_config["default"]).anchors) == 1
        second = DPOTrainer(
            trainer.model, args=self.arguments(tmp_path, DPOConfig), train_dataset=Dataset.from_list(pairs),
            processing_class=with_end(), callbacks=[budget()],
        )  # fmt: skip
        second.train()
        assert len(Ledger.of(second.model.peft_config["default"]).trainings) == 2


def test_a_model_that_is_made_when_training_begins_is_trained_in_float32(tmp_path):
    made = []

    def make():
        made.append(fresh())
        for layer in layers(made[0]):
            layer.curlora_U["default"].to(torch.bfloat16)
        return made[0]

    rows = [{"input_ids": row, "labels": row} for row in tokens(batch=40)]
    trainer = Trainer(
        model_init=make, args=TrainingArguments(str(tmp_path), max_steps=4, **QUIET), train_dataset=rows,
        processing_class=with_end(), callbacks=[budget(learning_rate=0.1)],
    )  # fmt: skip
    made.clear()
    trainer.train()
    assert {U.dtype for U in matrices(made[0])} == {torch.float32}
    assert any(U.any() for U in matrices(made[0]))


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ((1,), "max_perplexity_increase=1 would let perplexity rise by 100%"),
            ((0,), "must be a positive share"),
            ((-0.1,), "must be a positive share"),
            ((math.nan,), "must be a positive share"),
            (("a",), "must be a positive share"),
            (("2",), "must be a positive share"),
        ],
    )
    def test_a_budget(self, options, message):
        with pytest.raises(GuardError, match=message):
            ForgettingBudget(*options)

    def test_per_cent(self):
        assert ForgettingBudget("1 %").limit == pytest.approx(0.01)
        assert ForgettingBudget(numpy.float32(0.25)).limit == 0.25

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"texts": "novel.txt"}, "is a string, 'novel.txt', and there is no such file"),
            ({"texts": {}}, "texts is empty"),
            ({"texts": []}, "is empty"),
            ({"texts": [__file__, "a text"]}, "is a list with the path of a file"),
            ({"texts": ["a text", "/gone/articles.txt"]}, "is a list with the path of a file, '/gone/articles.txt'"),
            ({"texts": {"a": 3}}, "is int: a list of texts"),
            ({"limits": {"a": 0.1}}, "limits has 'a', which is none of the texts"),
            ({"texts": ["w1 w2"], "limits": {"general text": 2}}, "would let perplexity rise"),
            ({"learning_rate": 0.0}, "learning_rate must be a positive number"),
            ({"lifetime": 1.0}, "lifetime=1 would let"),
            ({"damping": 0}, "damping must be a positive number"),
            ({"batch_size": 0}, "batch_size must be a whole number of 1 or more, got 0"),
            ({"batch_size": 2.5}, "batch_size must be a whole number of 1 or more, got 2.5"),
            ({"max_length": 1}, "max_length must be a whole number of 2 or more"),
            ({"tokens": 0}, "tokens must be a whole number of 2 or more"),
            ({"seed": -1}, "seed must be a whole number of 0 or more"),
            ({"strength": "3"}, "strength must be a positive number, got '3'"),
        ],
        ids=str,
    )
    def test_options(self, options, message):
        with pytest.raises(GuardError, match=message):
            ForgettingBudget(0.01, **options)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (["", " "], "no two tokens in a row"),
            (" ", r"texts\['words'\] is empty: give at least one text, or the path"),
            (
                [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}],
                r"texts\['words'\]\[0\] is dict",
            ),
            ([[{"role": "user", "content": "w1"}]], "the tokenizer has no chat template"),
            ([3], r"texts\['words'\]\[0\] is int"),
        ],
        ids=str,
    )
    def test_texts(self, tmp_path, text, message):
        model = fresh()
        with pytest.raises(GuardError, match=message):
            train(model, tmp_path, budget(texts={"words": text}))
        assert not any(U.any() for U in matrices(model))

    def test_a_file(self, tmp_path, caplog):
        (tmp_path / "words.txt").write_text("\n\n".join(" ".join(WORDS[i : i + 20]) for i in range(0, 70, 2)))
        caplog.set_level("WARNING", logger="curlora")
        for path in (str(tmp_path / "words.txt"), tmp_path / "words.txt"):
            train(fresh(), tmp_path, callback := budget(texts=path))
            assert list(callback.outcome.texts) == ["words"]
        said = [one.message for one in caplog.records if "is read from the file" in one.message]
        assert said == [f"The text 'words' is read from the file {tmp_path / 'words.txt'}."]  # a string could be a text

    def test_only_the_first_label_is_left(self, tmp_path):
        """Nothing comes before it, so it is not learned."""
        rows = [{"input_ids": row, "labels": torch.cat([row[:1], torch.full_like(row[1:], -100)])} for row in tokens()]
        with pytest.raises(GuardError, match="is masked"):
            train(fresh(), tmp_path, budget(), rows=rows)

    @pytest.mark.parametrize("kind", ["curlora", "lora"])
    @pytest.mark.filterwarnings("ignore:Columns and rows are not chosen")
    def test_masked_labels_that_could_not_be_seen_before(self, kind, tmp_path):
        """Data that can be iterated only once."""
        once = iter([{"input_ids": row, "labels": torch.full_like(row, -100)} for row in tokens(batch=48, length=8)])

        class Once(torch.utils.data.IterableDataset):
            def __iter__(self):
                return once

        model = fresh() if kind == "curlora" else get_peft_model(base(), LoraConfig(r=4, target_modules=["q_proj"]))
        arguments = TrainingArguments(
            str(tmp_path), max_steps=4, per_device_train_batch_size=4, use_cpu=True, report_to="none", logging_steps=2
        )
        trainer = Trainer(model, arguments, train_dataset=Once(), processing_class=with_end(), callbacks=[budget()])
        with pytest.warns(UserWarning, match="The logged loss was 0 at every step. Unless .* all labels are masked"):
            trainer.train()

    def test_an_encoder_with_a_decoder(self, tmp_path):
        config = T5Config(vocab_size=100, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
        model = get_peft_model(T5ForConditionalGeneration(config), CurloraConfig(r=2, target_modules=["q", "v"]))
        with pytest.raises(GuardError, match="is an encoder-decoder"):
            train(model, tmp_path, budget())

    @pytest.mark.parametrize("kind", [BertForMaskedLM, BertForSequenceClassification])
    def test_a_model_without_perplexity(self, kind, tmp_path):
        config = BertConfig(vocab_size=100, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                            num_attention_heads=2)  # fmt: skip
        for adapter in (CurloraConfig(r=2, target_modules=["query"]), LoraConfig(r=2, target_modules=["query"])):
            model = get_peft_model(kind(config), adapter)
            with pytest.raises(GuardError, match=f"{kind.__name__} does not predict the next token"):
                train(model, tmp_path, budget())

    def test_an_adapter_that_was_loaded_to_be_used(self, tmp_path):
        fresh().save_pretrained(tmp_path / "saved")
        with pytest.raises(GuardError, match="no trained parameters. Load it with .*is_trainable=True"):
            train(PeftModel.from_pretrained(base(), tmp_path / "saved"), tmp_path, budget())

    def test_a_measurement_that_is_no_number(self, tmp_path):
        with pytest.raises(GuardError, match="The measurement 'mine' returned None, not a number"):
            train(fresh(), tmp_path, budget(texts={"mine": lambda: None}))

    @pytest.mark.parametrize(("after", "kept"), [(0.0, 1.0), (-0.1, 0.0)])
    def test_a_measurement_that_falls_to_nothing_is_no_loss(self, after, kept, tmp_path):
        model = fresh()
        moved = lambda: any(bool(U.any()) for U in matrices(model))  # noqa: E731
        callback = budget(texts={"errors": lambda: after if moved() else 0.5})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            train(model, tmp_path, callback)
        assert callback.outcome.kept == kept

    def test_texts_that_only_look_like_paths(self):
        budget(texts=["pyproject.toml", "a text"])
        budget(texts=["https://example.com/a.json", "a text"])

    def test_limits_that_are_no_mapping(self):
        with pytest.raises(GuardError, match=r"limits must be a mapping .*, got \[0.01\]"):
            budget(limits=[0.01])

    def test_folders_and_lists_of_files(self, tmp_path):
        (tmp_path / "a.txt").write_text("w1 w2")
        with pytest.raises(GuardError, match="is a folder, .* give the path of a text file"):
            budget(texts=tmp_path)
        with pytest.raises(GuardError, match="is a list with the path of a file.*Items of a list are texts"):
            budget(texts=[str(tmp_path / "a.txt")])

    def test_no_adapter(self, tmp_path):
        with pytest.raises(GuardError, match="The model has no adapter. Add one first"):
            train(base(), tmp_path, budget())

    def test_an_update_that_is_scaled_by_zero(self, tmp_path):
        with pytest.raises(GuardError, match="has a scaling of 0"):
            train(fresh(alpha=0), tmp_path, budget())

    def test_answers_that_are_all_masked(self, tmp_path):
        rows = [{"input_ids": row, "labels": torch.full_like(row, -100)} for row in tokens(batch=8)]
        model = fresh()
        with pytest.raises(GuardError, match="Every label of 8 examples is masked"):
            train(model, tmp_path, budget(), rows=rows)
        train(model, tmp_path, budget())
        learned = matrices(model)
        with pytest.raises(GuardError, match="Every label of 8 examples is masked"):
            train(model, tmp_path, budget(), rows=rows)
        assert same(model, learned)

    def test_added_too_late(self, tmp_path):
        model = fresh()
        trainer = train(model, tmp_path, budget())

        class Adds(type(trainer.callback_handler.callbacks[-1])):
            def on_step_begin(self, *_, **__):
                trainer.add_callback(budget())

        trainer.callback_handler.callbacks = trainer.callback_handler.callbacks[1:]
        trainer.add_callback(Adds())
        with pytest.raises(GuardError, match="added to a training that has already begun"):
            trainer.train()

    def test_a_state_of_an_earlier_version(self, tmp_path):
        train(fresh(), tmp_path, budget(), save_strategy="steps", save_steps=8)
        for path in (tmp_path / "checkpoint-8" / STATE_NAME, tmp_path / STATE_NAME):
            path.write_bytes(pack({"before.layer": torch.zeros(1)}, {"budget": 0.1, "base": {}, "limits": {}}))
        with pytest.raises(GuardError, match="was written by an earlier version of curlora"):
            train(fresh(), tmp_path, budget(), resume=str(tmp_path / "checkpoint-8"))

    @pytest.mark.parametrize("options", [dict(modules_to_save=["lm_head"]), dict(bias="all")])
    def test_other_parameters_that_train(self, options, tmp_path):
        """The guard does not count them, and scaling U back does not undo them."""
        model = get_peft_model(llama(), CurloraConfig(r=4, **options))
        with pytest.raises(GuardError, match=r"trained parameters are not part of U \(the first is .*Leave out"):
            train(model, tmp_path, budget(), learning_rate=0.01)

    def test_no_tokenizer_to_write_the_text_with(self, tmp_path):
        for model in (fresh(), get_peft_model(base(), LoraConfig(r=4, target_modules=["q_proj"]))):
            rows = [{"input_ids": row, "labels": row} for row in tokens(batch=8)]
            arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
            trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[ForgettingBudget(0.01)])
            with pytest.raises(GuardError, match="pass processing_class=tokenizer to the trainer"):
                trainer.train()

    @pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints", "end"])
    def test_nothing_is_pushed_before_the_limits_are_held(self, strategy, tmp_path, monkeypatch):
        """What is pushed then is the adapter with its ledger."""
        pushed = []

        def upload_folder(folder_path, path_in_repo="", **_):
            pushed.append(path_in_repo)
            kept_back = shutil.ignore_patterns("checkpoint-*")
            shutil.copytree(folder_path, tmp_path / "hub" / path_in_repo, ignore=kept_back, dirs_exist_ok=True)
            done = Future()
            done.set_result(None)
            return done

        pushing_to(upload_folder, monkeypatch)
        callback, model = budget(learning_rate=3.0, lifetime=0.03), fresh()
        before = perplexity(model, TEXT, max_length=16)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            trainer = train(
                model, tmp_path / "out", callback, save_strategy="steps", save_steps=4, push_to_hub=True,
                hub_strategy=strategy,
            )  # fmt: skip
        assert trainer.args.hub_strategy == strategy
        others = {"checkpoint": ["last-checkpoint"], "all_checkpoints": ["checkpoint-12"]}
        assert pushed == ([] if strategy == "end" else ["", *others.get(strategy, [])])
        assert any("only the last checkpoint is pushed" in str(one.message) for one in told) == bool(pushed)
        for place in pushed:
            loaded = PeftModel.from_pretrained(base(), tmp_path / "hub" / place, is_trainable=True)
            assert perplexity(loaded, TEXT, max_length=16) <= before * 1.02
            ledger = Ledger.of(loaded.peft_config["default"])
            assert (ledger.lifetime, len(ledger.trainings)) == (0.03, 1)
            train(loaded, tmp_path / "next", budget(0.02, learning_rate=0.1))  # another's ledger would be refused

    def test_the_card_that_trl_writes_says_how_to_load_the_adapter(self, tmp_path, monkeypatch):
        uploaded = []

        def upload(folder_path, **_):
            uploaded.append((Path(folder_path) / "README.md").read_text())

        pushing_to(upload, monkeypatch)
        arguments = SFTConfig(
            str(tmp_path), report_to="none", use_cpu=True, bf16=False, disable_tqdm=True, max_steps=2, max_length=16
        )
        trainer = SFTTrainer(
            base(), arguments, train_dataset=Dataset.from_list(CHATS), processing_class=with_end(),
            peft_config=CurloraConfig(r=4), callbacks=[budget()],
        )  # fmt: skip
        trainer.train()
        for _ in range(2):
            trainer.push_to_hub()
        assert len(uploaded) == 2
        for card in uploaded:
            assert "SFT" in card, "TRL's own card"
            assert card.count("import curlora  # makes CURLoRA known to PEFT") == 1

    @pytest.mark.parametrize("kind", ["curlora", "lora"])
    def test_trackers_are_given_no_checkpoint_before_the_limits_are_held(self, kind, tmp_path):
        seen, holding = [], []

        def note(step):
            seen.append((step, holding[0].outcome is not None))

        make = (
            fresh if kind == "curlora" else lambda: get_peft_model(base(), LoraConfig(r=4, target_modules=["q_proj"]))
        )
        for _ in range(2):  # a second training holds back as the first
            holding[:] = [budget(learning_rate=0.1)]
            trainer = train(
                make(), tmp_path, holding[0], more=[tracker := Tracker(note)], save_strategy="steps", save_steps=4
            )
            assert seen == [(12, True)]
            tracker.on_save(trainer.args, trainer.state, trainer.control)  # it is as before
            assert len(seen) == 2
            seen.clear()

    def test_a_budget_that_was_interrupted_holds_back_for_another_trainer(self, tmp_path):
        seen, callback = [], budget(learning_rate=0.1)

        with pytest.raises(KeyboardInterrupt):
            train(fresh(), tmp_path / "one", callback, more=[first := Tracker(seen.append), Interrupt(at=5)])
        train(fresh(), tmp_path / "two", callback, more=[Tracker(seen.append)], save_strategy="steps", save_steps=4)
        assert seen == [12]
        first.on_save(None, TrainerState(global_step=0), None)
        assert seen == [12, 0]

    def test_deepspeed(self, tmp_path):
        model, callback = fresh(), budget()
        rows = [{"input_ids": row, "labels": row} for row in tokens(batch=8)]
        trainer = Trainer(model, TrainingArguments(str(tmp_path), **QUIET), train_dataset=rows, callbacks=[callback])
        trainer.args.deepspeed_plugin = object()
        with pytest.raises(GuardError, match="Train with DDP or FSDP2"):
            callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=model)

    def test_pushes_are_as_before_if_nothing_begins(self, tmp_path, monkeypatch):
        monkeypatch.setattr(Trainer, "init_hf_repo", lambda *_, **__: None)
        rows = [{"input_ids": row, "labels": torch.full_like(row, -100)} for row in tokens(batch=8)]
        arguments = TrainingArguments(str(tmp_path), push_to_hub=True, use_cpu=True, report_to="none")
        trainer = Trainer(fresh(), arguments, train_dataset=rows, processing_class=with_end(), callbacks=[budget()])
        with pytest.raises(GuardError, match="is masked"), pytest.warns(UserWarning, match="only the last checkpoint"):
            trainer.train()
        assert arguments.hub_strategy == HubStrategy.EVERY_SAVE

    def test_an_optimizer_without_the_adapter(self, tmp_path):
        model = fresh()
        rows = [{"input_ids": row, "labels": row} for row in tokens(batch=8)]
        other = torch.nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([other], lr=0.1)
        trainer = Trainer(
            model, TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"), train_dataset=rows,
            optimizers=(optimizer, None), callbacks=[budget()],
        )  # fmt: skip
        with pytest.raises(GuardError, match="does not train 6 of the 6 trained parameters of U. Create it"):
            trainer.train()
