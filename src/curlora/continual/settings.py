"""How every method of a run is trained and measured."""

from __future__ import annotations

import inspect
import tempfile
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from transformers import TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_utils import SchedulerType

from curlora.continual.problems import unknown_names
from curlora.continual.processes import use_cpu

__all__ = ["OF_A_METHOD", "OWN_ARGUMENTS", "Settings"]

# The arguments of transformers' Trainer that the engine sets itself.
OWN_ARGUMENTS = {
    "output_dir", "num_train_epochs", "max_steps", "per_device_train_batch_size", "per_device_eval_batch_size",
    "gradient_accumulation_steps", "train_sampling_strategy", "learning_rate", "weight_decay", "max_grad_norm",
    "lr_scheduler_type", "warmup_steps", "warmup_ratio", "seed", "data_seed", "logging_steps", "logging_strategy",
    "save_strategy", "save_steps", "save_total_limit", "eval_strategy", "remove_unused_columns", "label_names",
    "disable_tqdm", "ignore_data_skip", "optim", "load_best_model_at_end", "auto_find_batch_size", "push_to_hub",
    "use_cpu", "dataloader_drop_last", "save_only_model", "logging_nan_inf_filter", "prediction_loss_only",
    "neftune_noise_alpha", "label_smoothing_factor", "include_for_metrics", "batch_eval_metrics",
}  # fmt: skip


# These need an evaluation during training.
_NOT_BY_STEPS = ("reduce_lr_on_plateau", "greedy")

# Settings that may differ between methods. Settings that change what is scored, or how, may not.
OF_A_METHOD = {
    "epochs", "batch_size", "gradient_accumulation_steps", "head_learning_rate", "weight_decay", "max_grad_norm",
    "schedule", "warmup", "trainer",
}  # fmt: skip


class Settings(BaseModel):
    """How every method of a run is trained and scored.

    - ``head_learning_rate`` is the heads' learning rate; a method has its own for everything else.
    - Batch sizes count the examples of a batch over all processes.
    - ``fixed_batches`` puts the examples into batches once; each epoch and seed has these batches in another order.
    - ``warmup`` is a fraction of a task's steps if below 1, else a number of steps.
    - ``max_grad_norm: 0`` turns gradient clipping off.
    - ``checkpoint_steps`` is the most steps that an interrupted run loses.
    - ``forward_transfer`` scores each task also just before it is learned.
    - ``cache_frozen_layers`` caches the outputs of the lowest layers, which no method trains; see
      :mod:`curlora.continual.frozen_layers`.
    - ``fp32_products`` says how a CPU multiplies float32; see :mod:`curlora.continual.computing`.
    - ``trainer`` holds further arguments of transformers' ``TrainingArguments``, such as ``bf16``,
      ``gradient_checkpointing`` or ``report_to``.
    - ``readout``, ``order``, ``schedule_length``, ``evaluation`` and ``heads`` are switches of the protocol; see
      :mod:`curlora.continual.protocol`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: Annotated[int, Field(gt=0)] = 1
    batch_size: Annotated[int, Field(gt=0)] = 8
    gradient_accumulation_steps: Annotated[int, Field(gt=0)] = 1
    fixed_batches: bool = False
    evaluation_batch_size: Annotated[int, Field(gt=0)] = 16
    max_length: Annotated[int, Field(gt=0)] = 128
    head_learning_rate: Annotated[float, Field(gt=0)] = 5e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    schedule: str = "cosine"
    warmup: Annotated[float, Field(ge=0)] = 0.1
    logging_steps: Annotated[int, Field(gt=0)] = 5
    checkpoint_steps: Annotated[int, Field(gt=0)] = 100
    forward_transfer: bool = False
    cache_frozen_layers: bool = False
    fp32_products: Literal["float32", "bfloat16"] = "float32"
    trainer: dict[str, Any] = {}

    readout: Literal["last_token", "last_position"] = "last_token"
    order: Literal["shuffled", "as_given"] = "shuffled"
    schedule_length: Literal["batches", "examples"] = "batches"
    evaluation: Literal["batched", "one_by_one"] = "batched"
    heads: Literal["by_seed", "fixed"] = "by_seed"

    @field_validator("schedule")
    @classmethod
    def _known_schedule(cls, value: str) -> str:
        known = [kind.value for kind in SchedulerType if kind.value not in _NOT_BY_STEPS]
        if value not in known:
            raise ValueError(
                f"{value!r} is not a schedule of transformers that depends only on the step: {', '.join(known)}"
            )
        return value

    @field_validator("trainer")
    @classmethod
    def _known_arguments(cls, value: dict[str, Any]) -> dict[str, Any]:
        known = set(inspect.signature(TrainingArguments).parameters)
        for key in value:
            if key in OWN_ARGUMENTS:
                raise ValueError(f"{key!r} is set by the run itself. Use the other keys of training instead")
        if unknown := [key for key in value if key not in known]:
            raise ValueError(unknown_names("transformers' Trainer", unknown, known, "argument"))
        return value

    @model_validator(mode="after")
    def _checkpoints_after_logs(self) -> Settings:
        # A logged loss is the mean since the last log. Resuming between two logs would give another mean.
        if self.checkpoint_steps % self.logging_steps:
            raise ValueError(
                f"checkpoint_steps ({self.checkpoint_steps}) must be a multiple of logging_steps ({self.logging_steps})"
            )
        return self

    @model_validator(mode="after")
    def _layers_run_once(self) -> Settings:
        """Reject options that recompute, compile or shard the layers, whose outputs could then not be cached."""
        if self.cache_frozen_layers:
            for key in ("gradient_checkpointing", "torch_compile", "fsdp", "deepspeed"):
                if self.trainer.get(key):
                    raise ValueError(f"cache_frozen_layers cannot be combined with {key}: leave one of them out")
        return self

    def check_trainer(self) -> None:
        """Check that transformers accepts the ``trainer`` arguments.

        Raises:
            ValueError: with transformers' message.
        """
        try:
            with tempfile.TemporaryDirectory() as folder:
                TrainingArguments(output_dir=folder, use_cpu=use_cpu(), **self.trainer)
                get_reporting_integration_callbacks(_names(self.trainer.get("report_to", "none")))
                parameter = torch.nn.Parameter(torch.zeros(1))
                optimizer = torch.optim.SGD([parameter], lr=1.0)
                kwargs = self.trainer.get("lr_scheduler_kwargs")
                get_scheduler(self.schedule, optimizer, 1, 2, scheduler_specific_kwargs=kwargs)
        except (ValueError, TypeError, ImportError, RuntimeError, KeyError) as error:
            raise ValueError(f"training: transformers' Trainer rejects the arguments: {error}") from error

    def changed(self, changes: dict[str, Any]) -> Settings:
        """Return these settings with some entries changed, validated again. Entries of ``trainer`` are added to it."""
        trainer = changes.get("trainer", {})
        if isinstance(trainer, dict):
            changes = {**changes, "trainer": {**self.trainer, **trainer}}
        return Settings.model_validate({**self.model_dump(), **changes})


def _names(value: Any) -> list[str]:
    names = [value] if isinstance(value, str) else list(value or [])
    return [name for name in names if name not in ("none", "all")]
