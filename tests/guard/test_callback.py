"""The guard in transformers' own Trainer."""

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from curlora import CurloraLayer, Guard, GuardCallback, calibrate
from curlora.guard import GuardError
from tests.models import curlora, llama, tokens

pytestmark = pytest.mark.filterwarnings("ignore:The guard's text has")


TEXT = tokens(batch=8, length=20)


def fresh():
    """A model whose adapter has learned nothing yet, and its ``U``."""
    model = curlora(llama())
    mixings = [m.curlora_U["default"].weight for m in model.modules() if isinstance(m, CurloraLayer)]
    for U in mixings:
        U.data.zero_()
    return model, mixings


@torch.no_grad()
def lost(model):
    """``exp`` of the divergence from the model without its adapter: 1 if the adapter is untrained."""
    now = model(input_ids=TEXT).logits.log_softmax(-1)
    with model.disable_adapter():
        base = model(input_ids=TEXT).logits.log_softmax(-1)
    return (base.exp() * (base - now)).sum(-1).mean().exp().item()


def trainer_of(model, folder, *callbacks, **arguments):
    rows = [{"input_ids": row, "labels": row} for row in tokens(seed=3, batch=24, length=6)]
    arguments = {
        "learning_rate": 0.1, "num_train_epochs": 3, "logging_steps": 1, "save_strategy": "no", **arguments
    }  # fmt: skip
    given = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, report_to="none", use_cpu=True, disable_tqdm=True,
        **arguments,
    )  # fmt: skip
    return Trainer(model=model, args=given, train_dataset=rows, callbacks=list(callbacks))


def test_the_trainer_stays_within_the_budget_and_logs_the_drift(tmp_path):
    model, mixings = fresh()
    guard = Guard(model, calibrate(model, TEXT.unbind(), progress=False), budget=1e-3)
    trainer = trainer_of(model, tmp_path, GuardCallback(guard))
    trainer.train()
    drifts = [log["drift"] for log in trainer.state.log_history if "loss" in log]
    assert len(drifts) == 18
    assert 0 < max(drifts) <= 1e-3 * (1 + 1e-3)
    assert guard.drift() == pytest.approx(drifts[-1])

    # After training, the optimizer works without the guard.
    optimizer = trainer.optimizer.optimizer
    for group in optimizer.param_groups:
        group.update(lr=1.0, weight_decay=0.0)
    optimizer.state.clear()
    before = [U.detach().clone() for U in mixings]
    for U in mixings:
        U.grad = torch.ones_like(U)
    optimizer.step()  # Adam's first step is the learning rate, whatever the gradient
    for U, was in zip(mixings, before, strict=True):
        torch.testing.assert_close(U.detach(), was - 1)


def guarded(model, measure=None, budget=1.0, **options):
    guard = Guard(model, calibrate(model, TEXT.unbind(), progress=False), budget=budget)
    return GuardCallback(guard, measure or (lambda: lost(model)), **options)


def test_a_measure_is_held_by_measuring(tmp_path):
    """The predicted budget alone would let the measure rise far above the limit."""
    model, _ = fresh()
    trainer_of(model, tmp_path, GuardCallback(guarded(model).guard)).train()
    assert lost(model) > 1.008

    model, mixings = fresh()
    callback = guarded(model, max_rise=0.004)
    trainer = trainer_of(model, tmp_path, callback)
    trainer.train()
    assert 1.003 < lost(model) <= 1.004
    assert callback.kept.rise == pytest.approx(lost(model) - 1)
    assert 0 < callback.kept.scale < 1
    assert any(U.any() for U in mixings)
    (last,) = [log for log in trainer.state.log_history if "kept" in log]
    assert last == {"kept": callback.kept.scale, "rise": callback.kept.rise, "step": 18}


def test_what_was_learned_before_counts_and_is_not_taken_back(tmp_path):
    model, mixings = fresh()
    first = guarded(model, max_rise=0.004)
    trainer_of(model, tmp_path, first).train()
    learned = [U.detach().clone() for U in mixings]
    # A limit that the first training has already used up.
    second = GuardCallback(first.guard, first.measure, max_rise=0.002)
    with pytest.warns(UserWarning, match="although the whole change of this training was taken back"):
        trainer_of(model, tmp_path, second, seed=1).train()
    assert second.kept == (0.0, first.kept.rise)
    for U, value in zip(mixings, learned, strict=True):
        torch.testing.assert_close(U.detach(), value)
    # A limit that leaves room.
    third = GuardCallback(first.guard, first.measure, max_rise=0.006)
    trainer_of(model, tmp_path, third, seed=1).train()
    assert 1.004 < lost(model) <= 1.006


def test_one_callback_for_two_trainings(tmp_path):
    model, mixings = fresh()
    callback = guarded(model, max_rise=0.004)
    trainer_of(model, tmp_path, callback).train()
    learned = [U.detach().clone() for U in mixings]
    callback.max_rise = 0.002
    with pytest.warns(UserWarning, match="although the whole change of this training was taken back"):
        trainer_of(model, tmp_path, callback, seed=1).train()
    for U, value in zip(mixings, learned, strict=True):
        torch.testing.assert_close(U.detach(), value)


def test_a_training_that_diverges_is_taken_back(tmp_path):
    model, mixings = fresh()
    callback = guarded(model)

    class Breaks(TrainerCallback):
        def on_step_end(self, *_, **__):
            mixings[0].data.fill_(torch.nan)

    with pytest.warns(UserWarning, match="not finite after training"):
        trainer_of(model, tmp_path, callback, Breaks()).train()
    assert callback.kept == (0.0, pytest.approx(0.0, abs=1e-6))
    assert not any(U.any() for U in mixings)


def test_a_training_that_is_gone_on_with_counts_from_its_beginning(tmp_path):
    ends = []
    for stop in (False, True):
        model, mixings = fresh()
        callback = guarded(model, max_rise=0.004)
        if stop:
            whole = trainer_of(model, tmp_path, GuardCallback(callback.guard), save_strategy="epoch")
            whole.train()  # for its checkpoints
            for U in mixings:
                U.data.zero_()
            trainer_of(model, tmp_path, callback).train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
        else:
            trainer_of(model, tmp_path / "other", callback).train()
        ends.append([*(U.detach().clone() for U in mixings), torch.tensor(callback.kept)])
    for whole, resumed in zip(*ends, strict=True):
        torch.testing.assert_close(whole, resumed)


def test_a_measure_that_allows_nothing_is_told(tmp_path):
    model, mixings = fresh()
    callback = guarded(model, measure=lambda: 2.0 if any(U.any() for U in mixings) else 1.0, max_rise=0.5)
    with pytest.warns(UserWarning, match="the whole change was taken back"):
        trainer_of(model, tmp_path, callback).train()
    assert callback.kept == (0.0, 0.0)
    assert not any(U.any() for U in mixings)


def test_limits_that_say_nothing_are_refused(tmp_path):
    model, _ = fresh()
    unlimited = Guard(model, calibrate(model, TEXT.unbind(), progress=False))
    with pytest.raises(GuardError, match="max_rise must be a positive number, .* got None"):
        GuardCallback(unlimited, lambda: 1.0)
    with pytest.raises(GuardError, match="got -1"):
        GuardCallback(unlimited, lambda: 1.0, max_rise=-1)
    with pytest.raises(GuardError, match="max_rise=0.1 is the limit of a measure"):
        GuardCallback(unlimited, max_rise=0.1)
    with pytest.raises(GuardError, match="is 0.0 before training"):
        trainer_of(model, tmp_path, GuardCallback(unlimited, lambda: 0.0, max_rise=0.1)).train()


def test_the_limit_is_the_guards_where_none_is_given():
    model, _ = fresh()
    guard = Guard(model, calibrate(model, TEXT.unbind(), progress=False), max_perplexity_increase=0.01)
    assert GuardCallback(guard, lambda: 1.0).max_rise == pytest.approx(0.01)
