"""TRL's SFTTrainer with a forgetting budget, resumed from the last checkpoint if there is one."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from datasets import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

import curlora
from curlora.continual.processes import use_cpu
from curlora.errors import GuardError
from curlora.text.progress import Shown
from curlora.train.errors import TrainError
from curlora.train.folder import Folder
from curlora.train.plan import guard_row, with_checkpointing

if TYPE_CHECKING:
    from curlora.train.run import Prepared

__all__ = ["Ended", "Training"]

# Other logged values start anew when a training resumes in another process.
_LOGGED = ("step", "epoch", "loss", "grad_norm", "learning_rate", "drift", "kl_to_base")


class Ended(NamedTuple):
    """A finished training: steps, seconds, the budget's :class:`curlora.budget.Outcome`, and the Trainer's log."""

    steps: int
    seconds: float
    budget: Any
    log: list[dict[str, Any]]


class Training:
    """The loaded model and its trainer.

    Args:
        prepared: the prepared training.
        on_begin: called before the first step.
        on_tokens: called after each step with the average number of tokens of a step.
        guard: shows the guard's progress, see :data:`curlora.text.progress.Shown`.

    Raises:
        TrainError: if several GPUs are visible, or if the model cannot be loaded.
    """

    def __init__(
        self,
        prepared: Prepared,
        on_begin: Callable[[], None],
        on_tokens: Callable[[float], None],
        guard: Shown,
    ) -> None:
        options, base, examples, plan, folder = prepared
        if torch.cuda.device_count() > 1:
            raise TrainError(
                f"curlora train runs on one GPU, but {torch.cuda.device_count()} are visible: set "
                "CUDA_VISIBLE_DEVICES=0, or pass curlora.ForgettingBudget to TRL's SFTTrainer in your own script."
            )
        self.budget = curlora.ForgettingBudget(
            options.max_forgetting,
            texts=dict(options.guard_texts) or None,
            limits=options.limits,
            lifetime=base.history.lifetime,
            learning_rate=options.learning_rate,
            tokens=options.GUARD_TOKENS,
            max_length=guard_row(base),
            batch_size=options.GUARD_BATCH,
            rows_per_step=options.PENALTY_ROWS,
            seed=options.seed,
            progress=guard,
        )
        self.folder = folder
        self.checkpoint = folder.checkpoints.newest()
        folder.checkpoints.keep_only(self.checkpoint)
        arguments = SFTConfig(
            output_dir=str(folder.checkpoints.folder),
            num_train_epochs=options.epochs,
            per_device_train_batch_size=options.batch_size,
            gradient_accumulation_steps=options.gradient_accumulation,
            # The rows are tokenized and truncated already. TRL's own preparation would train all turns of a
            # conversation, or only those that the template marks.
            dataset_kwargs={"skip_prepare_dataset": True},
            max_length=None,
            logging_steps=plan.logging_steps,
            save_strategy="steps",
            save_steps=plan.save_steps,
            save_total_limit=2,  # one is complete while the next is written
            seed=options.seed,
            data_seed=options.seed,
            bf16=base.bf16,
            use_cpu=use_cpu(),
            gradient_checkpointing=with_checkpointing(options),
            report_to=list(options.report_to) or "none",
            disable_tqdm=True,
            logging_nan_inf_filter=False,  # log a NaN loss as NaN
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        set_seed(options.seed)  # LoRA's A is drawn when the trainer adds the adapter, before the trainer sets its seed
        self._listener = _Listener(folder, self.checkpoint, on_begin, on_tokens, plan.tokens / plan.steps)
        self.trainer = SFTTrainer(
            model=base.load(),
            args=arguments,
            train_dataset=Dataset.from_list(examples.train.rows),
            processing_class=base.tokenizer,
            peft_config=None if base.continue_from else base.adapter,
            callbacks=[self.budget, self._listener],
        )
        self.trainer.remove_callback(PrinterCallback)
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                callback.logging_dir = str(folder.path / "logs")  # the checkpoints' folder is removed

    @property
    def model(self) -> Any:
        """The model with its adapter."""
        return self.trainer.model

    def autocast(self) -> Any:
        """Return the context manager that sets the precision of training."""
        return self.trainer.accelerator.autocast()

    def run(self) -> Ended:
        """Train to the last step."""
        try:
            self.trainer.train(resume_from_checkpoint=None if self.checkpoint is None else str(self.checkpoint))
        except GuardError:
            # If the last measurement failed, the budget has raised at the last save, before the listener heard of it.
            self._listener.complete(self.trainer.state.global_step)
            raise
        state = self.trainer.state
        log = [{name: entry[name] for name in _LOGGED if name in entry} for entry in state.log_history]
        log = [entry for entry in log if "loss" in entry]
        return Ended(state.global_step, self._listener.seconds, self.budget.outcome, log)

    def save(self, path: Path) -> None:
        """Save the adapter and its ledger."""
        self.model.save_pretrained(str(path))


class _Listener(TrainerCallback):
    """Report the progress of training, and mark complete checkpoints."""

    def __init__(
        self,
        folder: Folder,
        checkpoint: Path | None,
        on_begin: Callable[[], None],
        on_tokens: Callable[[float], None],
        tokens_a_step: float,
    ) -> None:
        self.folder, self.on_begin, self.on_tokens = folder, on_begin, on_tokens
        self.tokens_a_step = tokens_a_step
        self._step = 0
        self._began = time.monotonic()
        self._before = folder.checkpoints.seconds(checkpoint)

    @property
    def seconds(self) -> float:
        """The seconds of training so far, those of earlier processes included."""
        return self._before + time.monotonic() - self._began

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.on_begin()
        self._began = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.on_tokens((state.global_step - self._step) * self.tokens_a_step)
        self._step = state.global_step

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.complete(state.global_step)

    def complete(self, step: int) -> None:
        """Mark the checkpoint of a step as complete, if there is one."""
        if self.folder.checkpoints.of(step).is_dir():
            self.folder.checkpoints.complete(step, self.seconds)
