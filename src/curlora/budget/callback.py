"""Fine-tuning within a forgetting budget: one callback for transformers' Trainer and for TRL's trainers."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from curlora._compat import when_the_card_is_written
from curlora.budget.adapter import add_how_to_load, in_half_precision, keep_in_float32, trained_adapter
from curlora.budget.examples import Examples
from curlora.budget.guard_restraint import GuardRestraint
from curlora.budget.learning_rate import set_rate
from curlora.budget.limited_texts import LimitedTexts
from curlora.budget.outcome import Outcome
from curlora.budget.penalty_restraint import PenaltyRestraint
from curlora.budget.pushes import Pushes
from curlora.budget.restraint import Restraint
from curlora.budget.start import UNKNOWN, Start
from curlora.callbacks.penalty import uses_deepspeed
from curlora.errors import GuardError
from curlora.guard.callback import act_first
from curlora.guard.measured_limit import Kept, MeasuredLimit, log
from curlora.guard.share import as_share
from curlora.text.processes import in_all, rank_and_count
from curlora.text.progress import Shown
from curlora.text.rows import Texts
from curlora.tuner.sharded import whole

__all__ = ["ForgettingBudget"]


class ForgettingBudget(TrainerCallback):
    """Keeps the forgetting of a training within a budget. All other settings have defaults.

    ```python
    trainer = SFTTrainer(
        model, train_dataset=data, peft_config=CurloraConfig(r=32), callbacks=[ForgettingBudget(0.01)]
    )
    trainer.train()
    ```

    When training begins, the callback measures the base model on each text and sets the learning rate, unless one was
    given. While the model trains, the adapter decides what keeps it near the base model:

    - A CURLoRA adapter trains under a :class:`curlora.Guard`. If it is untrained, its columns and rows are chosen for
      the task (:func:`curlora.redraw`), and it is calibrated on the texts (:func:`curlora.calibrate`).
    - LoRA and other adapters of PEFT train under a penalty on the KL divergence from the base model, on a few rows of
      the texts at every step (:class:`curlora.callbacks.KLToBaseCallback`). A step takes two more forward passes and
      one more backward pass over these rows.

    After the last step, the callback measures each text, and scales the training's change back until every text is
    within its limit. This happens before the last evaluation and the last checkpoint, and again if
    ``load_best_model_at_end`` loads another checkpoint. If the measurement after the last step fails, the trained
    parameters are saved as a checkpoint before the error is raised.

    A further training of the adapter still counts forgetting from the base model before the first training. A CURLoRA
    adapter carries a ledger (:class:`curlora.guard.Ledger`), which is saved with it. With it the next training needs no
    calibration, and the earlier tasks are protected by their anchors (:class:`curlora.guard.Anchors`), without their
    data. Other adapters have no ledger: state a ``lifetime`` again in each training.

    To resume a training (``resume_from_checkpoint``), keep the Trainer's ``output_dir`` unchanged.

    Args:
        max_perplexity_increase: the largest allowed rise of a text's perplexity in this training, relative to the base
            model: 0.01 for 1 %. On text that the model writes itself, the rise of the log-perplexity estimates the KL
            divergence from the base model.
        texts: the guard's texts: a list of texts, conversations or rows of tokens; the path of a text file; or a
            mapping from names to several of these. A function without arguments is a measurement of your own; its value
            is positive, and lower is better. If ``None``, the model writes the text itself
            (:func:`curlora.guard.own_text`).
        limits: the limits of some texts by name, in place of ``max_perplexity_increase``.
        lifetime: the largest allowed rise of each text over all trainings of the adapter. A CURLoRA adapter's ledger
            stores it for later trainings.
        learning_rate: the adapter's learning rate; for CURLoRA in square roots of nats. If ``None``, the rate of the
            training arguments if it differs from their default, else that of a rule:
            :func:`curlora.guard.learning_rate` for CURLoRA, :func:`curlora.budget.lora_learning_rate` for LoRA. For
            other adapters there is no rule, and the training arguments' rate is used.
        redraw: for CURLoRA, whether to choose columns and rows for the task.
        anchors: for CURLoRA, whether to protect the tasks of earlier trainings, and to add this task to them.
        strength: for other adapters, the penalty's factor relative to the mean loss of a batch.
        rows_per_step: for other adapters, the number of rows of text in a step's penalty. A short training needs
            several: with one row it meets only a part of the text, and forgets the rest.
        tokens: the largest number of tokens of each text. The model's own text may exceed it by less than a row.
        max_length: the largest number of tokens in a row of text. Perplexity is measured on such rows.
        batch_size: the number of rows of text, or of training examples, in a forward pass. Examples that are longer
            than rows form smaller batches.
        damping: for CURLoRA, see :class:`curlora.Guard`.
        adapter: the adapter's name; the active one if ``None``.
        seed: the seed of the model's own text, of drawn answers, and of the choice of training examples.
        progress: how to show the progress of the guard's own work, see :data:`curlora.text.progress.Shown`. The work
            is counted in tokens of a forward pass. If ``None``, bars are shown if the trainer shows its own.

    Attributes:
        outcome: an :class:`Outcome` after training, ``None`` before.

    Raises:
        GuardError: if a limit is not a share between 0 and 1, or a text is missing or has the wrong type. When training
            begins: if there is no adapter, if a text cannot be read, if the ledger belongs to another adapter or base
            model, if the base model cannot be had by disabling the adapter, or if the lifetime's budget is used up.
        ValueError: when training begins, if the model is sharded by FSDP or DeepSpeed and the adapter is not CURLoRA.
    """

    def __init__(
        self,
        max_perplexity_increase: float = 0.01,
        *,
        texts: Mapping[str, Texts] | Texts | None = None,
        limits: Mapping[str, float] | None = None,
        lifetime: float | None = None,
        learning_rate: float | None = None,
        redraw: bool = True,
        anchors: bool = True,
        strength: float = 3.0,
        rows_per_step: int = 4,
        tokens: int = 8192,
        max_length: int = 128,
        batch_size: int = 8,
        damping: float = 0.1,
        adapter: str | None = None,
        seed: int = 0,
        progress: Shown | None = None,
    ) -> None:
        self.limit = as_share("max_perplexity_increase", max_perplexity_increase)
        self.lifetime = None if lifetime is None else as_share("lifetime", lifetime)
        positive = {"strength": strength, "damping": damping}
        positive |= {} if learning_rate is None else {"learning_rate": learning_rate}
        for option, number in positive.items():
            if not isinstance(number, Real) or not (number > 0 and math.isfinite(number)):
                raise GuardError(f"{option} must be a positive number, got {number!r}.")
        whole_numbers = {
            "rows_per_step": (rows_per_step, 1), "tokens": (tokens, 2), "max_length": (max_length, 2),
            "batch_size": (batch_size, 1), "seed": (seed, 0),
        }  # fmt: skip
        for option, (number, least) in whole_numbers.items():
            if not isinstance(number, int) or number < least:
                raise GuardError(f"{option} must be a whole number of {least} or more, got {number!r}.")
        self.strength, self.rows_per_step = strength, rows_per_step
        self.learning_rate, self.redraw, self.anchors = learning_rate, redraw, anchors
        self._texts = LimitedTexts(
            self.limit,
            texts,
            {} if limits is None else limits,
            tokens=tokens,
            max_length=max_length,
            batch_size=batch_size,
            seed=seed,
        )
        self.max_length, self.batch_size = max_length, batch_size
        self.damping, self.adapter, self.seed = damping, adapter, seed
        self.progress = progress
        self._shown: Shown = False
        self.outcome: Outcome | None = None
        self._held: _Held | None = None
        self._start: Start | None = None
        self._rate = math.nan
        self._pushes = Pushes()
        self._last_saved: list[Tensor] = []  # the trained parameters in the newest checkpoint
        self._recorded: list[Tensor] = []  # the trained parameters of the outcome

    # Events

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        model = kwargs["model"]
        if model is None:  # model_init creates it when training begins
            return
        trained_adapter(model, self.adapter)
        keep_in_float32(model)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        act_first(self)
        try:
            self._set_up(args, state, control, kwargs)
        except BaseException:
            self._pushes.release()
            raise

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._holding.restraint.on_step_begin(args, state, control, **kwargs)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        held = self._holding
        held.restraint.on_step_end(args, state, control, **kwargs)
        if state.global_step < state.max_steps:
            return
        kept = self._kept_before(held)
        held.on_step_end(args, state, control, **kwargs)
        if held.kept is None:
            return  # it has failed
        kept *= held.kept.scale
        try:
            in_all(lambda: self._record(held, kept, state))
        except Exception as error:
            held.save_before_raising(error, control)
        else:  # the limits are held, and the last checkpoint comes next
            self._pushes.release()

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir)
        if self._held is not None:
            # The trainer copies the files that PEFT knows from the checkpoint to the folder that it pushes.
            self._held.restraint.save_record(folder)
        add = functools.partial(add_how_to_load, kwargs["model"], folder)
        add()
        when_the_card_is_written(self, add)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._held is not None and logs is not None and "loss" in logs:
            found = self._held.restraint.logs()
            logs.update(found)
            state.log_history[-1].update(found)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self._start is not None and self._held is not None:
            # In all processes, also in one that does not see the folder: sharded parameters are gathered.
            saved = self._held.values()
            if folder.is_dir():
                self._last_saved = saved
                kept = 1.0 if self._held.kept is None else self._held.kept.scale
                dataclasses.replace(self._start, kept=kept).write(folder, state)
        if self._held is not None and self._held.failed:
            self._pushes.release()
            self._held.on_save(args, state, control, **kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        held = self._holding
        self._pushes.release()
        held.restraint.on_train_end(args, state, control, **kwargs)
        kept = self._kept_before(held)
        held.finish()
        kept *= 1.0 if held.kept is None else held.kept.scale
        # Another checkpoint may have been loaded since the last step, or training may have ended early.
        if self.outcome is None or not held.unchanged(self._recorded):
            self._record(held, kept, state)
            last = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if held.unchanged(self._last_saved) and last.is_dir() and state.is_world_process_zero:
                held.restraint.save_record(last)
        outcome = self.outcome
        assert outcome is not None
        losses = [one["loss"] for one in state.log_history if "loss" in one]
        if losses and not any(losses):
            warnings.warn(
                "The logged loss was 0 at every step. Unless this trainer's loss is near 0 by nature, as GRPO's is, "
                "all labels are masked (-100) and nothing was learned.",
                stacklevel=2,
            )
        rises = {f"perplexity_rise/{name}": text.rise for name, text in outcome.texts.items()}
        drift = {} if outcome.predicted is None else {"drift": outcome.predicted}
        log(self, args, state, control, {**drift, "kept": kept, **rises})
        self._held, self._last_saved, self._recorded = None, [], []

    # Helpers of the events

    def _set_up(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, kwargs: dict[str, Any]
    ) -> None:
        """Prepare a training that begins or resumes."""
        if uses_deepspeed(args):
            raise GuardError(
                "DeepSpeed trains copies of its own of the parameters, which a budget cannot reach. Train with DDP or "
                "FSDP2."
            )
        interrupted = False
        if self._held is not None:  # the last training did not come to its end
            self._held.restraint.on_train_end(args, state, control, **kwargs)
            assert self._start is not None
            interrupted = not (state.global_step or self._held.unchanged(self._start.before))
            self._held = None
        model, processing = kwargs["model"], kwargs.get("processing_class")
        adapter, guarded = trained_adapter(model, self.adapter)
        if in_half_precision(model):  # the budget was added to a trainer that was there, or model_init made the model
            if state.global_step or rank_and_count()[1] > 1:  # the optimizer's state, or DDP's, is in half precision
                raise GuardError(
                    "U has been rounded to half precision before the budget could keep it in float32. Pass the budget "
                    "to the trainer as it is made: callbacks=[budget], with a model instead of model_init."
                )
            keep_in_float32(model)
        if interrupted and not guarded:  # a CURLoRA adapter does not match its ledger then
            raise GuardError(
                "The last training under this budget did not come to its end and has changed the adapter, so "
                "forgetting would be counted from there. Resume it (resume_from_checkpoint), or begin again with a new "
                "adapter."
            )
        self._pushes.hold(self, args)
        tokenizer = getattr(processing, "tokenizer", processing)
        tokens = self.batch_size * self.max_length
        examples = Examples(kwargs.get("train_dataloader"), self.batch_size, tokens, self.seed)
        self._shown = not args.disable_tqdm if self.progress is None else self.progress
        self.outcome = None
        self._texts.read(model, tokenizer, self._shown)
        restraint = self._guard(model, adapter, examples) if guarded else self._penalty(model, adapter, examples)
        if state.global_step:
            self._start = Start.find(args, state)
            if self._start.lifetime not in (UNKNOWN, self.lifetime):
                raise GuardError(
                    f"The training that resumes began with lifetime={self._start.lifetime}, and now it is "
                    f"{self.lifetime}. Give it the same."
                )
            rewritten = self._texts.check_stated(self._start.stated)
            restraint.load_state_dict(self._start.restraint)
            if rewritten:
                with restraint.as_base():
                    self._start.base.update(self._texts.measure(model, rewritten))
            restraint.set_limits(self._start.limits, self.limit)
        else:
            self._start = self._begun(model, restraint)
            self._start.write(Path(args.output_dir), state)
        start = self._start
        self._held = _Held(restraint, lambda: 1.0 + self._texts.worst_share(model, start), start.before)
        self._rate = set_rate(
            restraint, self.learning_rate, args, state.max_steps, kwargs["optimizer"], kwargs.get("lr_scheduler"),
            last=self._rate,
        )  # fmt: skip
        self._held.on_train_begin(args, state, control, **kwargs)
        restraint.on_train_begin(args, state, control, **kwargs)

    def _kept_before(self, held: _Held) -> float:
        """Return what is left of the training's change before the limits are held.

        A training that is resumed from its last step has been scaled back already.
        """
        assert self._start is not None
        return self._start.kept if held.unchanged(held.begun_with) else 1.0

    def _record(self, held: _Held, kept: float, state: TrainerState) -> None:
        """Set the outcome, and enter the training in the adapter's history."""
        assert self._start is not None
        outcome = Outcome(held.restraint.predicted(), kept, self._rate, self._texts.outcomes(self._start))
        held.restraint.record(state.global_step, outcome)
        self.outcome = outcome
        self._recorded = held.values()

    @property
    def _holding(self) -> _Held:
        if self._held is None:
            raise GuardError(
                "The budget was added to a training that has already begun: pass it to the trainer before train()."
            )
        return self._held

    def _penalty(self, model: nn.Module, adapter: str, examples: Examples) -> Restraint:
        return PenaltyRestraint(
            model, adapter, self._texts.rows, examples, strength=self.strength, rows_per_step=self.rows_per_step
        )

    def _guard(self, model: nn.Module, adapter: str, examples: Examples) -> Restraint:
        return GuardRestraint(
            model, adapter, self._texts.rows, examples, redraw=self.redraw, anchors=self.anchors, damping=self.damping,
            max_length=self.max_length, batch_size=self.batch_size, seed=self.seed, progress=self._shown,
        )  # fmt: skip

    def _begun(self, model: nn.Module, restraint: Restraint) -> Start:
        """Prepare a training that begins: measure the base model, and set the limits."""
        lifetime = restraint.prepare(self.lifetime)
        self._texts.check_same(restraint.last_measured, lifetime)
        with restraint.as_base():
            base = self._texts.measure(model)
        spent = self._texts.measure(model) if restraint.trained_before else base
        self._texts.check_unchanged(restraint.last_measured, restraint.newest_measured, base, spent, lifetime)
        limits = self._texts.limits_from(base, spent, lifetime, known=bool(restraint.last_measured))
        restraint.set_limits(limits, self.limit)
        before_training = [whole(parameter.detach()).clone() for parameter in restraint.parameters]
        return Start(
            before_training, base, limits, restraint.state_dict(), stated=self._texts.stated(), lifetime=self.lifetime
        )


class _Held(MeasuredLimit):
    """A limit whose measure is 1 plus the largest used share of a text's limit, so that its rise is that share.

    Args:
        restraint: whose parameters are scaled back.
        measure: the measure.
        before: the parameters' values before training.
    """

    def __init__(self, restraint: Restraint, measure: Callable[[], float], before: Sequence[Tensor]) -> None:
        self.restraint = restraint
        super().__init__(restraint.model, lambda: restraint.parameters, measure, max_rise=1.0, at_start=1.0)
        self.count_from(before)
        self.begun_with = self.values()

    def why_nothing(self, kept: Kept, finite: bool) -> str:
        return self.restraint.why_nothing(kept) if finite else super().why_nothing(kept, finite)
