"""Fine-tune on one task after another, and measure everything met so far after each."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback

from curlora.continual.classifier import TaskClassifier
from curlora.continual.methods import Method
from curlora.continual.perplexity import perplexity, window_count
from curlora.continual.results import MethodResult
from curlora.continual.tasks import Example, Task

__all__ = ["HeldOut", "Progress", "Settings", "run_method", "work_of"]


class Progress(Protocol):
    """Hears what a run is doing."""

    def stage(self, text: str) -> None:
        """Something begins."""

    def advance(self, units: float) -> None:
        """That much of :func:`work_of` is done."""


@dataclass(frozen=True)
class Settings:
    """How every method of a run is trained. The head has its own learning rate, the same for all."""

    epochs: int = 1
    batch_size: int = 8
    evaluation_batch_size: int = 16
    max_length: int = 128
    head_learning_rate: float = 5e-3
    schedule: str = "cosine"
    warmup: float = 0.1
    """Share of a task's steps in which the learning rate rises from zero."""
    window: int = 512
    seed: int = 0


@dataclass(frozen=True)
class HeldOut:
    """A text that no method sees, whose perplexity tells what the model lost."""

    name: str
    tokens: Tensor = field(repr=False)


# Units of progress, about equal in time: a training batch runs a backward too.
_TRAIN_UNITS, _WINDOW_UNITS = 3.0, 8.0


def work_of(method: Method, tasks: Sequence[Task], heldout: HeldOut, settings: Settings) -> float:
    """Units of progress that :func:`run_method` will report."""
    per_step = 1.0 if method.adapter is None else _TRAIN_UNITS
    steps = sum(-(-len(task.train) // settings.batch_size) * settings.epochs for task in tasks) * per_step
    windows = window_count(len(heldout.tokens), settings.window) * _WINDOW_UNITS
    batches = [-(-len(task.evaluation) // settings.evaluation_batch_size) for task in tasks]
    if method.adapter is None:
        return steps + sum(batches)
    return steps + sum(sum(batches[: i + 1]) + windows for i in range(len(tasks)))


def run_method(
    method: Method,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    heldout: HeldOut,
    settings: Settings,
    *,
    base_perplexity: float,
    directory: Path,
    progress: Progress,
) -> MethodResult:
    """Run one method over a stream.

    Args:
        method: the method.
        model: a fresh causal language model; it is changed.
        tokenizer: its tokenizer.
        tasks: the stream, in order.
        heldout: the text whose perplexity is followed.
        settings: how to train.
        base_perplexity: of ``model`` on ``heldout``, before anything.
        directory: where the adapter and the heads are saved; made if missing.
        progress: hears what happens.

    Returns:
        The measurements.
    """
    started = time.monotonic()
    set_seed(settings.seed)
    classifier = TaskClassifier(method.apply(model))
    trainable = sum(p.numel() for p in classifier.parameters() if p.requires_grad)
    encoded = {task.name: _encode(task, tokenizer, settings.max_length) for task in tasks}

    accuracy: list[list[float]] = []
    perplexities = [base_perplexity]
    losses: list[tuple[int, float]] = []
    train_seconds, train_tokens, steps = 0.0, 0, 0
    directory.mkdir(parents=True, exist_ok=True)
    for i, task in enumerate(tasks):
        progress.stage(f"{method.label}: learning {task.name}")
        train, evaluation = encoded[task.name]
        classifier.add_head(task.name, len(task.labels))
        trainer = _make_trainer(classifier, method, tokenizer, train, settings, directory, progress)
        began = time.monotonic()
        trainer.train()
        train_seconds += time.monotonic() - began
        train_tokens += settings.epochs * sum(len(row["input_ids"]) for row in train)
        losses += [(steps + entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
        steps += trainer.state.global_step

        progress.stage(f"{method.label}: scoring after {task.name}")
        if method.adapter is None and accuracy:  # nothing that earlier tasks use has changed
            row = accuracy[-1] + [_accuracy(trainer, classifier, task.name, evaluation)]
        else:
            row = [_accuracy(trainer, classifier, seen.name, encoded[seen.name][1]) for seen in tasks[: i + 1]]
        accuracy.append(row)
        if method.adapter is None:
            perplexities.append(base_perplexity)
        else:
            language_model = classifier.language_model
            perplexities.append(
                perplexity(
                    language_model,
                    heldout.tokens,
                    window=settings.window,
                    on_window=lambda: progress.advance(_WINDOW_UNITS),
                )
            )

    return MethodResult(
        name=method.name,
        label=method.label,
        learning_rate=method.learning_rate,
        trainable_parameters=trainable,
        adapter_bytes=_save(classifier, directory),
        accuracy=accuracy,
        perplexity=perplexities,
        losses=losses,
        train_tokens=train_tokens,
        train_seconds=train_seconds,
        seconds=time.monotonic() - started,
    )


Rows = list[dict[str, Any]]


def _encode(task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[Rows, Rows]:
    def rows(split: str, examples: Sequence[Example]) -> Rows:
        texts = [text for text, _ in examples]
        ids = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
        for number, row in enumerate(ids):
            if not row:
                raise ValueError(f"task {task.name!r}: {split} row {number} has no token: {texts[number]!r}")
        return [{"input_ids": row, "labels": label} for row, (_, label) in zip(ids, examples, strict=True)]

    # Scored in order of length, so that batches hold little padding.
    evaluation = sorted(rows("evaluation", task.evaluation), key=lambda row: len(row["input_ids"]))
    return rows("train", task.train), evaluation


def _make_trainer(
    classifier: TaskClassifier,
    method: Method,
    tokenizer: PreTrainedTokenizerBase,
    train: Rows,
    settings: Settings,
    directory: Path,
    progress: Progress,
) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(directory),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.evaluation_batch_size,
        train_sampling_strategy="group_by_length",
        learning_rate=settings.head_learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup,
        seed=settings.seed,
        data_seed=settings.seed,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        label_names=["labels"],
    )
    groups: list[dict[str, Any]] = [
        {"params": list(classifier.head(classifier.task).parameters()), "lr": settings.head_learning_rate}
    ]
    adapter = [p for p in classifier.model.parameters() if p.requires_grad]
    if adapter:
        groups.append({"params": adapter, "lr": method.learning_rate})
    trainer = Trainer(
        model=classifier,
        args=arguments,
        train_dataset=train,
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        optimizers=(torch.optim.AdamW(groups, weight_decay=0.0), None),
        callbacks=[_Advance(progress, _TRAIN_UNITS if adapter else 1.0)],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


class _Advance(TrainerCallback):
    def __init__(self, progress: Progress, train_units: float) -> None:
        self.progress = progress
        self.train_units = train_units

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.progress.advance(self.train_units)

    def on_prediction_step(self, *_: Any, **__: Any) -> None:
        self.progress.advance(1.0)


def _accuracy(trainer: Trainer, classifier: TaskClassifier, task: str, rows: Rows) -> float:
    current = classifier.task
    classifier.task = task
    try:
        output = trainer.predict(rows)
    finally:
        classifier.task = current
    return float((output.predictions.argmax(-1) == output.label_ids).mean())


def _save(classifier: TaskClassifier, directory: Path) -> int:
    """Save the adapter and the heads; returns the size of the adapter's weights in bytes."""
    save_file(
        {key: value.contiguous() for key, value in classifier.heads.state_dict().items()},
        directory / "heads.safetensors",
    )
    if not isinstance(classifier.model, PeftModel):
        return 0
    adapter = directory / "adapter"
    classifier.model.save_pretrained(adapter, save_embedding_layers=False)
    return (adapter / SAFETENSORS_WEIGHTS_NAME).stat().st_size
