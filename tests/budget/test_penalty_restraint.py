"""Trainings of LoRA and other adapters of PEFT under a budget."""

import copy
import math

import pytest
import torch
from datasets import Dataset
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from curlora import ForgettingBudget
from curlora.budget import lora_learning_rate
from curlora.guard import GuardError, perplexity
from tests.budget.test_callback import CHATS, OTHER, TEXT, base, budget, interrupted, measured, train, with_end
from tests.models import tokens

pytestmark = pytest.mark.filterwarnings("ignore:.*has new PAD/BOS/EOS tokens")
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CURLORA_CACHE_DIR", str(tmp_path / "cache"))


def lora(**config):
    torch.manual_seed(0)
    return get_peft_model(base(), LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **config}))


def weights(model):
    return [p.detach().clone() for name, p in model.named_parameters() if "lora_" in name]


def same(model, others):
    return all(torch.equal(one, other) for one, other in zip(weights(model), others, strict=True))


def test_nothing_else_to_set(tmp_path):
    model, callback = lora(), ForgettingBudget(0.01, tokens=512, max_length=16)
    trainer = train(model, tmp_path, callback)
    ((name, text),) = callback.outcome.texts.items()
    assert name == "own text"
    assert text.rise <= text.limit == 0.01
    assert callback.outcome.predicted is None
    assert any(B.any() for B in weights(model)[1::2])
    assert callback.outcome.learning_rate == lora_learning_rate(model.config.hidden_size, 8)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert logs[0]["learning_rate"] == pytest.approx(callback.outcome.learning_rate)
    assert logs[-1]["kl_to_base"] > 0


def test_what_is_measured_is_held(tmp_path):
    wide, model = lora(), lora()
    options = dict(learning_rate=0.3, strength=1e-3)
    train(wide, tmp_path / "wide", budget(0.9, **options))
    assert measured(wide) > 0.03
    callback = budget(0.02, **options)
    train(model, tmp_path, callback, save_strategy="steps", save_steps=12)
    outcome = callback.outcome.texts["words"]
    assert 0.01 < outcome.rise <= 0.02
    assert outcome.rise == pytest.approx(measured(model), rel=1e-4)
    with model.disable_adapter():
        assert outcome.before == pytest.approx(perplexity(model, TEXT, max_length=16))
    assert callback.outcome.kept < 1
    assert same(PeftModel.from_pretrained(base(), tmp_path / "checkpoint-12"), weights(model))


def test_the_penalty_keeps_more_of_the_training_than_scaling_back_alone(tmp_path):
    """Within the same limit, on rows that can be learned by heart."""
    rows = [{"input_ids": row, "labels": row} for row in tokens(seed=3, batch=8, length=8)]
    learned = {}
    for strength in (1e-6, 3.0):
        model, callback = lora(), budget(0.005, texts={"words": TEXT, "others": OTHER}, strength=strength)
        trainer = train(model, tmp_path / str(strength), callback, rows=rows, max_steps=60, learning_rate=0.02)
        assert all(text.rise <= text.limit for text in callback.outcome.texts.values())
        learned[strength] = trainer.evaluate()["eval_loss"]
    with model.disable_adapter():
        frozen = trainer.evaluate()["eval_loss"]
    assert learned[3.0] < learned[1e-6] < frozen


def test_every_text_has_its_limit(tmp_path):
    callback = budget(0.5, texts={"a": TEXT, "b": OTHER, "size": lambda: 1.0}, limits={"b": 1e-4}, learning_rate=0.05)
    train(lora(), tmp_path, callback)
    texts = callback.outcome.texts
    assert {name: text.limit for name, text in texts.items()} == {"a": 0.5, "b": 1e-4, "size": 0.5}
    assert all(text.rise <= text.limit for text in texts.values())
    assert callback.outcome.kept < 1


def test_the_logged_divergence_is_the_mean_of_the_steps(tmp_path):
    """With one row of text and a learning rate of 0 in effect, every step measures the same."""
    model = lora(init_lora_weights=False)
    trainer = train(model, tmp_path, budget(0.9, texts={"a": TEXT[:1]}), learning_rate=1e-12, logging_steps=4)
    with torch.no_grad():
        q = model(input_ids=TEXT[0][None]).logits[0, :-1].double().log_softmax(-1)
        with model.disable_adapter():
            p = model(input_ids=TEXT[0][None]).logits[0, :-1].double().log_softmax(-1)
    logs = [log["kl_to_base"] for log in trainer.state.log_history if "loss" in log]
    assert logs == pytest.approx([float((p.exp() * (p - q)).sum(-1).mean())] * 3, rel=1e-4)


def test_gone_on_with_to_the_bit(tmp_path):
    options = dict(learning_rate=0.1, strength=0.1)
    model, callback = lora(), budget(0.002, **options)
    arguments = dict(save_strategy="steps", save_steps=4)
    whole = train(model, tmp_path, callback, **arguments)
    again, second = lora(), budget(0.002, **options)
    resumed = train(again, tmp_path, second, resume=str(tmp_path / "checkpoint-8"), **arguments)
    assert same(again, weights(model))
    assert second.outcome == callback.outcome
    logged = [[log["kl_to_base"] for log in trainer.state.log_history if "loss" in log] for trainer in (whole, resumed)]
    assert logged[0] == logged[1]


def test_gone_on_with_to_the_bit_between_evaluations_and_with_dropout(tmp_path):
    """An evaluation leaves the model in evaluation mode until the next batch, a resumed training begins without one."""
    options = dict(save_strategy="steps", save_steps=4, eval_strategy="steps", eval_steps=4)
    model, callback = lora(lora_dropout=0.1), budget(0.002, learning_rate=0.1)
    train(model, tmp_path, callback, **options)
    again, second = lora(lora_dropout=0.1), budget(0.002, learning_rate=0.1)
    train(again, tmp_path, second, resume=str(tmp_path / "checkpoint-4"), **options)
    assert same(again, weights(model))
    assert second.outcome == callback.outcome


class TestAgain:
    def two(self, path, **options):
        model, first = lora(), budget(0.01, learning_rate=0.1, strength=0.1)
        train(model, path / "one", first)
        model.save_pretrained(path / "saved")
        model = PeftModel.from_pretrained(base(), path / "saved", is_trainable=True)
        second = budget(0.01, learning_rate=0.1, strength=0.1, **options)
        train(model, path / "two", second, seed=4)
        return model, first.outcome.texts["words"], second.outcome.texts["words"]

    def test_forgetting_counts_from_the_base_model(self, tmp_path):
        model, one, two = self.two(tmp_path)
        assert one.rise > 0.002
        assert two.before == pytest.approx(one.before, rel=1e-6)
        assert two.limit == pytest.approx(one.rise + 0.01, rel=1e-6)
        assert two.rise <= two.limit
        assert two.rise == pytest.approx(measured(model), abs=1e-6)

    def test_what_it_has_cost_before_is_told(self, tmp_path):
        model = lora()
        train(model, tmp_path, budget(0.05, learning_rate=0.3, strength=1e-3))
        with pytest.warns(UserWarning, match="has already risen by .* This training may add 0.10%. .* give lifetime"):
            train(model, tmp_path, budget(0.001))

    def test_an_interrupted_training_is_not_taken_for_a_beginning(self, tmp_path):
        model, callback = lora(), budget(0.01, learning_rate=0.3)
        trainer, interrupt = interrupted(4, model, tmp_path, callback)
        interrupt.at = -1
        with pytest.raises(GuardError, match="did not come to its end and has changed the adapter"):
            trainer.train()

    def test_one_that_was_interrupted_before_a_step_may_be_repeated(self, tmp_path):
        model, callback = lora(), budget(0.01)
        trainer, interrupt = interrupted(0, model, tmp_path, callback)
        interrupt.at = -1
        trainer.train()
        assert callback.outcome.texts["words"].limit == 0.01

    def test_a_lifetime_bounds_all_trainings(self, tmp_path):
        model, _, two = self.two(tmp_path, lifetime=0.012)
        assert two.limit == 0.012
        assert measured(model) <= 0.012
        before = weights(model)
        with pytest.raises(GuardError, match="The lifetime's budget is used up: the measure of 'words' has risen by"):
            train(model, tmp_path / "three", budget(lifetime=0.0001))
        assert same(model, before)


class TestRate:
    def test_the_rule(self):
        """At a width of 2,000 and alpha 32 it is the rate of the source; wider models train at lower rates."""
        assert lora_learning_rate(2000, 32) == 5e-4
        assert lora_learning_rate(2000, 16) == 1e-3
        assert lora_learning_rate(4096, 32) == pytest.approx(5e-4 * (2000 / 4096) ** 0.78)

    def test_an_update_that_is_scaled_by_zero_has_none(self, tmp_path):
        with pytest.raises(GuardError, match="alpha must be positive, got 32 and 0"):
            train(lora(lora_alpha=0), tmp_path, budget())

    @pytest.mark.parametrize("config", [{"r": 8}, {"r": 16, "use_rslora": True, "lora_alpha": 2}], ids=str)
    def test_it_does_not_depend_on_the_rank(self, config, tmp_path):
        callback, model = budget(), lora(**config)
        train(model, tmp_path, callback)
        assert callback.outcome.learning_rate == pytest.approx(lora_learning_rate(model.config.hidden_size, 8))

    def test_one_that_was_chosen_is_honoured(self, tmp_path):
        for options, arguments in (({}, {"learning_rate": 2e-5}), ({"learning_rate": 2e-5}, {})):
            callback = budget(**options)
            trainer = train(lora(), tmp_path, callback, **arguments)
            assert callback.outcome.learning_rate == 2e-5
            assert trainer.state.log_history[0]["learning_rate"] == pytest.approx(2e-5)

    @pytest.mark.parametrize(
        "config",
        [
            IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
            AdaLoraConfig(target_modules=["q_proj"], init_r=4, total_step=12),
        ],
        ids=type,
    )
    @pytest.mark.parametrize("rate", [None, 0.003])
    def test_other_methods_train_at_the_arguments_rate_or_at_a_given_one(self, config, rate, tmp_path):
        model = get_peft_model(base(), copy.deepcopy(config))
        callback = budget(learning_rate=rate)
        trainer = train(model, tmp_path, callback)
        assert callback.outcome.learning_rate == (rate or trainer.args.learning_rate)
        assert trainer.state.log_history[0]["learning_rate"] == pytest.approx(callback.outcome.learning_rate)
        assert callback.outcome.texts["words"].rise <= 0.02
        assert "kl_to_base" in trainer.state.log_history[0]

    def test_other_parameters_are_not_trained_at_it(self, tmp_path):
        with pytest.raises(GuardError, match="parameters other than the adapter are in the same optimizer group"):
            train(lora(modules_to_save=["lm_head"]), tmp_path, budget())
        model, callback = lora(modules_to_save=["lm_head"]), budget(0.005)
        train(model, tmp_path, callback, learning_rate=0.01)
        assert measured(model) <= 0.005  # counted from the base model's own head
        model, callback = lora(modules_to_save=["lm_head"]), budget(learning_rate=0.01)
        trainer = train(model, tmp_path, callback)
        assert {group["initial_lr"] for group in trainer.optimizer.param_groups if group["params"]} == {0.01}

    def test_the_rates_of_ones_own_optimizer_are_kept(self, tmp_path):
        """LoRA+ trains B at a multiple of A's rate."""
        model, callback = lora(), budget()
        optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16)
        rows = [{"input_ids": row, "labels": row} for row in tokens(batch=8)]
        arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", max_steps=2)
        trainer = Trainer(model, arguments, train_dataset=rows, processing_class=with_end(), callbacks=[callback],
                          optimizers=(optimizer, None))  # fmt: skip
        trainer.train()
        assert {group["initial_lr"] for group in optimizer.param_groups if group["params"]} == {1e-4, 16e-4}
        assert callback.outcome.learning_rate == 16e-4


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}], ids=str)
def test_trl(tmp_path, options):
    callback = budget()
    trainer = SFTTrainer(
        base(),
        SFTConfig(str(tmp_path), max_steps=4, per_device_train_batch_size=4, report_to="none", use_cpu=True,
                  disable_tqdm=True, logging_steps=1, save_strategy="no", max_length=16, bf16=False, **options),
        train_dataset=Dataset.from_list(CHATS), processing_class=with_end(), callbacks=[callback],
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer.train()
    assert callback.outcome.texts["words"].rise <= 0.02
    assert callback.outcome.learning_rate == lora_learning_rate(trainer.model.config.hidden_size, 8)


class TestBadInput:
    @pytest.mark.parametrize("init", ["pissa", "olora"])
    def test_an_initialization_that_changes_the_base(self, init, tmp_path):
        for model in (lora(init_lora_weights=init), lora()):
            if model.peft_config["default"].init_lora_weights is True:  # the base is changed by another adapter
                model.add_adapter("other", LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=init))
            with pytest.raises(GuardError, match=f"has init_lora_weights='{init}', which changes the base model's"):
                train(model, tmp_path, budget())

    def test_a_prompt(self, tmp_path):
        model = get_peft_model(base(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
        with pytest.raises(GuardError, match="PROMPT_TUNING trains a prompt, which a penalty on texts does not reach"):
            train(model, tmp_path, budget())

    def test_an_adapter_that_was_loaded_to_be_used(self, tmp_path):
        lora().save_pretrained(tmp_path / "saved")
        with pytest.raises(GuardError, match="no trained parameters. Load it with .*is_trainable=True"):
            train(PeftModel.from_pretrained(base(), tmp_path / "saved"), tmp_path, budget())

    def test_problems_are_found_when_the_trainer_is_created(self, tmp_path):
        with pytest.raises(GuardError, match="init_lora_weights='pissa'"):
            Trainer(lora(init_lora_weights="pissa"), TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"),
                    processing_class=with_end(), callbacks=[budget()])  # fmt: skip

    def test_an_optimizer_without_all_of_the_adapter(self, tmp_path):
        model = lora()
        some = [p for p in model.parameters() if p.requires_grad][:5]
        rows = [{"input_ids": row, "labels": row} for row in tokens(batch=8)]
        trainer = Trainer(
            model, TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"), train_dataset=rows,
            optimizers=(torch.optim.AdamW(some, lr=0.1), None), callbacks=[budget()],
        )  # fmt: skip
        with pytest.raises(GuardError, match=r"does not train \d+ of the \d+ trained parameters of the adapter"):
            trainer.train()

    def test_parameters_outside_the_adapter(self, tmp_path):
        model = lora()
        model.get_base_model().lm_head.weight.requires_grad_(True)
        with pytest.raises(GuardError, match=r"1 trained parameters are not part of an adapter \(.*lm_head"):
            train(model, tmp_path, budget())

    def test_another_adapter_than_the_active_one(self, tmp_path):
        with pytest.raises(GuardError, match="'other' is not an active adapter of this model"):
            train(lora(), tmp_path, budget(adapter="other"))

    def test_answers_that_are_all_masked(self, tmp_path):
        rows = [{"input_ids": row, "labels": torch.full_like(row, -100)} for row in tokens(batch=8)]
        with pytest.raises(GuardError, match="Every label of 8 examples is masked"):
            train(lora(), tmp_path, budget(), rows=rows)

    @pytest.mark.parametrize("strength", [0.0, -1.0, math.nan])
    def test_a_strength(self, strength):
        with pytest.raises(GuardError, match="strength must be a positive number"):
            ForgettingBudget(strength=strength)

    @pytest.mark.parametrize("rows", [0, 1.5])
    def test_rows(self, rows):
        with pytest.raises(GuardError, match="rows_per_step must be a whole number of 1 or more"):
            ForgettingBudget(rows_per_step=rows)
