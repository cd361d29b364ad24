"""A subclass of transformers' Trainer for one task: the order of rows, checkpoints, and scoring."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Sampler, SequentialSampler
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from curlora import _compat
from curlora.continual.batches import Collator, LengthGrouped
from curlora.continual.generation import Generation, score_generated
from curlora.continual.plugins import Plugin
from curlora.continual.processes import process_state, use_cpu
from curlora.continual.results import Score
from curlora.continual.settings import Settings
from curlora.continual.task_model import TaskModel
from curlora.continual.tasks import Row
from curlora.storage import Checkpoints
from curlora.text.rows import IGNORED

__all__ = ["TaskTrainer", "steps_of"]

_WEIGHTS = "model.safetensors"


def steps_of(rows: int, settings: Settings) -> int:
    """Return the number of optimizer steps that training on ``rows`` rows takes."""
    batches = -(-rows // settings.batch_size)
    return -(-batches // settings.gradient_accumulation_steps) * settings.epochs


_compat.require_hooks(
    Trainer,
    ("_get_train_sampler", "_get_output_dir", "_save", "_load_from_checkpoint", "_save_checkpoint"),
)


class TaskTrainer(Trainer):
    """Trains a :class:`TaskModel` on one task and scores rows.

    Args:
        model: the model; its current head and all other parameters that require a gradient are trained.
        learning_rate: learning rate of all parameters but the head's.
        rows: the training rows; empty to score only.
        tokenizer: the tokenizer, for padding.
        settings: how to train.
        seed: seed of the order of the rows and of dropout.
        directory: folder for checkpoints, each with the trained parameters and the state of the training.
        logs: folder for the logs of the trackers in ``report_to``.
        plugins: plug-ins, whose penalties are added to the loss and which receive the Trainer's events.
        on_step, on_prediction_step: called after each step of training and of prediction.
        on_generated: called with the number of decoding steps that are done.
    """

    def __init__(
        self,
        model: TaskModel,
        learning_rate: float,
        rows: Sequence[Row],
        tokenizer: PreTrainedTokenizerBase,
        settings: Settings,
        seed: int,
        directory: Path,
        logs: Path | None = None,
        plugins: Sequence[Plugin] = (),
        on_step: Callable[[], None] = lambda: None,
        on_prediction_step: Callable[[], None] = lambda: None,
        on_generated: Callable[[int], None] = lambda tokens: None,
    ) -> None:
        processes = process_state().num_processes
        one_by_one = settings.evaluation == "one_by_one"
        evaluation_batch_size = 1 if one_by_one else max(1, settings.evaluation_batch_size // processes)
        reporting = {"report_to": "none", **settings.trainer} if rows else {**settings.trainer, "report_to": "none"}
        arguments = TrainingArguments(
            # Trackers write into a subfolder of output_dir; checkpoints go to _get_output_dir().
            output_dir=str(directory if logs is None or reporting["report_to"] == "none" else logs),
            num_train_epochs=settings.epochs,
            per_device_train_batch_size=settings.batch_size // processes,
            per_device_eval_batch_size=evaluation_batch_size,
            gradient_accumulation_steps=settings.gradient_accumulation_steps,
            learning_rate=settings.head_learning_rate,
            max_grad_norm=settings.max_grad_norm,
            lr_scheduler_type=settings.schedule,
            warmup_steps=settings.warmup,
            seed=seed,
            data_seed=seed,
            logging_steps=settings.logging_steps,
            save_strategy="steps",
            save_steps=settings.checkpoint_steps,
            logging_nan_inf_filter=False,  # NaN losses are logged as they are
            disable_tqdm=True,
            remove_unused_columns=False,
            label_names=["labels"],
            use_cpu=use_cpu(),
            **{"dataloader_pin_memory": torch.cuda.is_available(), **reporting},
        )
        _compat.use_one_gpu(arguments)  # else a step would have as many times the examples
        groups: list[dict[str, Any]] = []
        backbone = list(model.backbone_parameters())
        if backbone:  # the first group: the Trainer logs its learning rate
            groups.append({"params": backbone, "lr": learning_rate})
        head = [p for p in model.heads.parameters() if p.requires_grad]
        if head:
            groups.append({"params": head, "lr": settings.head_learning_rate})
        optimizer = None
        if groups:
            betas = (arguments.adam_beta1, arguments.adam_beta2)
            decay, epsilon = settings.weight_decay, arguments.adam_epsilon
            optimizer = torch.optim.AdamW(groups, betas=betas, eps=epsilon, weight_decay=decay)
        super().__init__(
            # Accelerate marks a module that it has prepared and does not prepare it again for the next Trainer. Several
            # processes would then not share gradients. It gets a shallow copy to mark, with the same parameters.
            model=copy.copy(model),
            args=arguments,
            train_dataset=[*rows, *_fillers(rows, settings.batch_size, processes)],
            data_collator=Collator(tokenizer, settings.readout),
            optimizers=(optimizer, None),
            callbacks=[_Listener(on_step, on_prediction_step), *plugins],
        )
        self.remove_callback(PrinterCallback)
        self.rows = rows
        self.settings = settings
        self.seed = seed
        self.checkpoints = Checkpoints(directory)
        self.plugins = plugins
        self.tokenizer = tokenizer
        self.on_generated = on_generated
        self.seconds = self._began = 0.0
        self._penalized = -1  # the last step whose loss has the plug-ins' penalties

    def train_or_go_on(self) -> None:
        """Train from the start, or resume from the newest complete checkpoint in the directory.

        ``seconds`` is then the time of the training in seconds, including the time before the checkpoint.
        """
        checkpoint = self.checkpoints.newest()
        self.seconds = self.checkpoints.seconds(checkpoint)
        self._began = time.monotonic()
        self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        self.seconds += time.monotonic() - self._began

    def score(self, rows: Sequence[Row], generation: Generation | None = None, keep: Path | None = None) -> Score:
        """Return the fraction of correct rows, or the score of generated answers, and the mean loss per label in nats.

        Generated answers are written to ``keep`` if it is given.
        """
        scores = torch.from_numpy(self.predict(list(rows)).predictions).double()
        assert len(scores) == len(rows)
        loss, labels, right = scores.sum(0).tolist()
        if generation is None:
            return Score(accuracy=right / len(rows), loss=loss / labels)
        with self.accelerator.autocast():
            found = score_generated(self.model.language_model, self.tokenizer, generation, self.on_generated, keep)
        return Score(accuracy=found.score, loss=loss / labels, unfinished=found.unfinished)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if model.training and self.state.global_step != self._penalized:  # only in the first batch of a step
            self._penalized = self.state.global_step
            for plugin in self.plugins:
                penalty = plugin.penalty(self.model)
                loss = loss if penalty is None else loss + penalty
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            drifts = [drift for plugin in self.plugins if (drift := plugin.drift()) is not None]
            logs = {**logs, **({"drift": max(drifts)} if drifts else {})}
        super().log(logs, start_time)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.settings.schedule_length == "examples":
            num_training_steps = len(self.rows) * self.settings.epochs
        return super().create_scheduler(num_training_steps, optimizer)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        if self.settings.order == "as_given":
            return SequentialSampler(self.train_dataset)
        lengths = [len(row["input_ids"]) for row in self.rows]
        return LengthGrouped(
            lengths,
            self.settings.batch_size,
            self.seed,
            batches=self.settings.gradient_accumulation_steps,
            fixed=self.settings.fixed_batches,
            fillers=len(self.train_dataset) - len(lengths),
        )

    def _get_output_dir(self, trial: Any = None) -> str:
        return str(self.checkpoints.folder)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        assert output_dir is not None
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        save_file(trained_state(self.model), Path(output_dir) / _WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_trained_state(self.model, load_file(Path(resume_from_checkpoint) / _WEIGHTS))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # each process writes the state of its random generators
        if not self.is_world_process_zero():
            return
        seconds = self.seconds + time.monotonic() - self._began
        self.checkpoints.keep_only(self.checkpoints.complete(self.state.global_step, seconds))


def _fillers(rows: Sequence[Row], batch_size: int, processes: int) -> list[Row]:
    """Return rows without labels that fill up the last batch when several processes share it.

    Accelerate would fill it up with rows from the start of the data, which would then count twice.
    """
    if processes == 1 or not rows:
        return []
    missing = -len(rows) % batch_size
    filler = {**rows[0], "labels": IGNORED}
    if "state" not in filler:
        filler.update(input_ids=filler["input_ids"][:1], labels=[IGNORED])
    return [filler] * missing


def trained_state(model: TaskModel) -> dict[str, Tensor]:
    """Return all parameters that are or were trained, all heads, and CURLoRA's columns and rows, by name."""
    trained = model.trained_parameters()
    drawn = (".indices", ".fingerprint")
    state = {
        name: value
        for name, value in model.state_dict(keep_vars=True).items()
        if name in trained or name.startswith("heads.") or (".curlora_U." in name and name.endswith(drawn))
    }
    return {name: value.detach().contiguous().clone() for name, value in state.items()}


def load_trained_state(model: TaskModel, state: dict[str, Tensor]) -> None:
    """Load the state that :func:`trained_state` returned.

    Raises:
        ValueError: if the names differ from those of this model's state.
    """
    expected = set(trained_state(model))
    if set(state) != expected:
        raise ValueError(
            f"the saved state belongs to another model: {sorted(set(state) ^ expected)[:5]} are not in both"
        )
    model.load_state_dict(state, strict=False)


class _Listener(TrainerCallback):
    def __init__(self, step: Callable[[], None], prediction_step: Callable[[], None]) -> None:
        self.step = step
        self.prediction_step = prediction_step

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.step()

    def on_prediction_step(self, *_: Any, **__: Any) -> None:
        self.prediction_step()
