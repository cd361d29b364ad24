"""The guard in transformers' own Trainer."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from curlora import CurloraLayer, Guard, GuardCallback, calibrate
from tests.models import curlora, llama, tokens

pytestmark = pytest.mark.filterwarnings("ignore:The guard's text has")


def test_the_trainer_stays_within_the_budget_and_logs_the_drift(tmp_path):
    model = curlora(llama())
    mixings = [m.curlora_U["default"] for m in model.modules() if isinstance(m, CurloraLayer)]
    for U in mixings:
        U.data.zero_()
    guard = Guard(model, calibrate(model, tokens(batch=8, length=20).unbind(), progress=False), budget=1e-3)
    rows = [{"input_ids": row, "labels": row} for row in tokens(seed=3, batch=24, length=6)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), learning_rate=0.1, per_device_train_batch_size=4, num_train_epochs=3,
        logging_steps=1, report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[GuardCallback(guard)])
    trainer.train()
    drifts = [log["drift"] for log in trainer.state.log_history if "loss" in log]
    assert len(drifts) == 18
    assert 0 < max(drifts) <= 1e-3 * (1 + 1e-3)
    assert guard.drift() == pytest.approx(drifts[-1])

    # Afterwards the optimizer is its own again.
    optimizer = trainer.optimizer.optimizer
    for group in optimizer.param_groups:
        group.update(lr=1.0, weight_decay=0.0)
    optimizer.state.clear()
    before = [U.detach().clone() for U in mixings]
    for U in mixings:
        U.grad = torch.ones_like(U)
    optimizer.step()  # Adam's first step: its learning rate, whatever the gradient
    for U, was in zip(mixings, before, strict=True):
        torch.testing.assert_close(U.detach(), was - 1)
