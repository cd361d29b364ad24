"""The restraint of a CURLoRA adapter: a guard, calibrated before the first training and kept in the ledger."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from curlora.budget.examples import Examples
from curlora.budget.outcome import Outcome
from curlora.budget.restraint import Restraint
from curlora.budget.work import WITH_BACKWARD
from curlora.errors import GuardError
from curlora.guard.anchors import Anchors
from curlora.guard.calibration import Calibration, layers_of
from curlora.guard.collect import calibrate
from curlora.guard.guard import Guard
from curlora.guard.learning_rate import learning_rate
from curlora.guard.ledger import OTHER_LEDGER, Ledger, TextOutcome, TrainingRecord, digest_of
from curlora.guard.redraw import redraw
from curlora.guard.scale_back import with_values
from curlora.storage import write_whole
from curlora.text.progress import Shown, part_of
from curlora.text.rows import Rows
from curlora.tuner.config import LEDGER_NAME, CurloraConfig
from curlora.tuner.layer import CurloraLayer
from curlora.tuner.param_wrapper import ParamWrapper
from curlora.tuner.sharded import whole

__all__ = ["GuardRestraint", "add_anchor", "allowed_nats"]

_TOO_LOW = 0.05  # relative to the default rate of the budget; a lower rate hardly changes the model

_logger = logging.getLogger(__name__)


class GuardRestraint(Restraint):
    """Trains ``U`` under a guard (:class:`curlora.Guard`).

    Before the first training it chooses columns and rows for the task and calibrates the adapter. The calibration, the
    anchors of the tasks and the history are the adapter's ledger (:class:`curlora.guard.Ledger`), which is saved with
    it and used by its next training.

    Args:
        model, adapter, rows: see :class:`curlora.budget.restraint.Restraint`.
        examples: the task's examples.
        redraw: whether to choose columns and rows for the task, if the adapter is untrained.
        anchors: whether to protect the tasks of earlier trainings, and to add this task to them.
        damping: see :class:`curlora.Guard`.
        max_length, batch_size, seed: see :func:`curlora.calibrate`.
        progress: see :data:`curlora.text.progress.Shown`.
    """

    moved: ClassVar[str] = "U"

    def __init__(
        self,
        model: nn.Module,
        adapter: str,
        rows: Mapping[str, Rows],
        examples: Examples,
        *,
        redraw: bool,
        anchors: bool,
        damping: float,
        max_length: int,
        batch_size: int,
        seed: int,
        progress: Shown,
    ) -> None:
        super().__init__(model, adapter, rows)
        self.examples, self.redraw, self.anchors, self.damping = examples, redraw, anchors, damping
        self.max_length, self.batch_size, self.seed, self.progress = max_length, batch_size, seed, progress
        self.layers = layers_of(model, adapter)
        self.budget: float | None = None
        self._ledger: Ledger | None = None
        self._guard: Guard | None = None

    @property
    def parameters(self) -> Sequence[Tensor]:
        return self.guard.parameters

    @property
    def guard(self) -> Guard:
        """The guard. Until :meth:`set_limits` it has no budget."""
        if self._guard is None:
            self._guard = Guard(self.model, self.ledger.calibration, damping=self.damping, adapter=self.adapter)
        return self._guard

    @property
    def ledger(self) -> Ledger:
        """The adapter's ledger, as it was before this training."""
        assert self._ledger is not None
        return self._ledger

    @property
    def trained_before(self) -> bool:
        return bool(self.ledger.trainings) or self._has_moved()

    @property
    def last_measured(self) -> Mapping[str, TextOutcome]:
        return self.ledger.last_measured

    @property
    def newest_measured(self) -> Collection[str]:
        return self.ledger.trainings[-1].texts if self.ledger.trainings else ()

    def prepare(self, lifetime: float | None) -> float | None:
        self.examples.check()
        ledger = Ledger.of(self._config)
        fits = ledger is None or ledger.adapter == digest_of(self.layers, self.adapter)
        if not fits and not self._has_moved():
            ledger = None  # it came with the configuration of a saved adapter, whose columns and rows this new one has
        if ledger is not None:
            ledger.calibration.check(self.model, self.adapter)
            if not fits:
                raise GuardError(OTHER_LEDGER)
        else:
            if self.redraw:
                self._redraw()
            parameters = [layer.matrices[self.adapter].weight for layer in self.layers.values()]
            # An adapter that was trained without a budget is calibrated as if it were new, so that forgetting counts
            # from the base model, as with LoRA.
            with with_values(parameters, [torch.zeros_like(U) for U in parameters]):
                calibration = self._calibrate(self._texts, WITH_BACKWARD * self._tokens)
            ledger = Ledger(calibration, Anchors(), adapter=digest_of(self.layers, self.adapter))
        self._ledger = ledger if lifetime is None else dataclasses.replace(ledger, lifetime=lifetime)
        return self._ledger.lifetime

    def as_base(self) -> AbstractContextManager[None]:
        return self.guard.as_calibrated()

    def set_limits(self, limits: Mapping[str, float], otherwise: float) -> None:
        if self.budget is None:
            sizes = {name: rows.tokens for name, rows in self.rows.items()}
            # The prediction for earlier trainings may be larger than what was measured after them.
            self.budget = max(allowed_nats(sizes, limits, otherwise), self.guard.drift() * 1.001)
        self._guard = Guard(
            self.model, self.ledger.calibration, budget=self.budget, damping=self.damping, adapter=self.adapter,
            anchors=self.ledger.anchors if self.anchors else None,
        )  # fmt: skip

    def state_dict(self) -> dict[str, Tensor]:
        ledger = torch.frombuffer(bytearray(self.ledger.to_bytes()), dtype=torch.uint8)
        return {"ledger": ledger, "budget": torch.tensor(self.budget, dtype=torch.float64)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._ledger = Ledger.from_bytes(state["ledger"].numpy().tobytes(), "The ledger of this training")
        self.budget = float(state["budget"])

    def learning_rate(self, steps: int) -> float:
        assert self.budget is not None
        return learning_rate(self.budget, steps, max(U.shape[-1] for U in self.parameters))

    def problem_of(self, rate: float, steps: int) -> str | None:
        rule = self.learning_rate(steps)
        if rate >= _TOO_LOW * rule:
            return None
        return (
            f"At learning_rate={rate:g} the adapter will hardly learn: under a budget learning rates are in square "
            f"roots of nats, and about {rule:.2g} suits this budget. Leave learning_rate out to have it set."
        )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Until the training is recorded the ledger belongs to the adapter as it was before. So a checkpoint, or an
        # adapter whose training was interrupted, is not taken for one from which forgetting could be counted.
        self.ledger.put_beside(self._config)
        optimizer = kwargs["optimizer"]
        self.guard.attach(optimizer)
        if isinstance(getattr(optimizer, "optimizer", optimizer), torch.optim.SGD) and args.max_grad_norm:
            warnings.warn(
                f"Gradient clipping (max_grad_norm={args.max_grad_norm:g}) changes the length of SGD's steps, so the "
                "learning rate does not mean what it says. Set max_grad_norm=0, or use AdamW, which clipping does not "
                "affect.",
                stacklevel=3,
            )

    def logs(self) -> dict[str, float]:
        return {"drift": self.guard.drift()}

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.guard.detach()

    def predicted(self) -> float:
        return self.guard.drift()

    def record(self, steps: int, outcome: Outcome) -> None:
        anchors = copy.deepcopy(self.ledger.anchors)  # the task may be entered again, as another checkpoint has it
        if self.anchors and self.examples.problem is None and outcome.kept > 0:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # they concern the guard's text, not the task
                work = WITH_BACKWARD * self.examples.tokens
                batches = list(self.examples.batches(self.model, to_device=False))
                task = self._calibrate(batches, work, "computing the task's anchor", cut=False)
            add_anchor(anchors, task, self.layers, self.adapter)
        assert self.budget is not None
        assert outcome.predicted is not None
        training = TrainingRecord(
            steps, outcome.learning_rate, self.budget, outcome.predicted, outcome.kept, outcome.texts
        )
        for layer in self.layers.values():
            matrix = layer.matrices[self.adapter]
            matrix.trained = whole(matrix.weight.detach()).clone()
        ledger = dataclasses.replace(self.ledger, anchors=anchors)
        ledger.after(training, digest_of(self.layers, self.adapter)).put_beside(self._config)

    def save_record(self, folder: Path) -> None:
        folder = folder if self.adapter == "default" else folder / self.adapter
        folder.mkdir(exist_ok=True)
        write_whole(folder / LEDGER_NAME, self._config.beside[LEDGER_NAME])

    @property
    def _config(self) -> CurloraConfig:
        configs: Any = getattr(self.model, "peft_config", {})
        return configs[self.adapter]

    @property
    def _texts(self) -> Rows:
        return Rows.joined(self.rows.values())

    @property
    def _tokens(self) -> int:
        return sum(map(len, self._texts))

    def _calibrate(self, data: Any, work: float, title: str | None = None, cut: bool = True) -> Calibration:
        options: dict[str, Any] = {"max_length": self.max_length} if cut else {}
        return calibrate(
            self.model, data, adapter=self.adapter, batch_size=self.batch_size, seed=self.seed,
            progress=part_of(self.progress, work, *([] if title is None else [title])), **options,
        )  # fmt: skip

    def _has_moved(self) -> bool:
        return any(bool(layer.matrices[self.adapter].weight.any()) for layer in self.layers.values())

    def _redraw(self) -> None:
        if self._has_moved():
            return  # the trained U belongs to the present columns and rows
        if any(isinstance(layer, ParamWrapper) for layer in self.layers.values()):
            _logger.info("Columns and rows of experts cannot be chosen for the task: those that were drawn are kept.")
            return
        if self.examples.problem is not None:
            warnings.warn(
                f"Columns and rows are not chosen for the task, because {self.examples.problem}. Those that were drawn "
                "are kept.",
                stacklevel=3,
            )
            return
        each = WITH_BACKWARD * (self._tokens + self.examples.tokens) / 2  # redraw has two stages
        redraw(
            self.model, list(self.examples.batches(self.model)), self._texts, adapter=self.adapter,
            max_length=self.max_length, batch_size=self.batch_size, seed=self.seed,
            progress=part_of(self.progress, each),
        )  # fmt: skip


def allowed_nats(sizes: Mapping[str, int], limits: Mapping[str, float], otherwise: float) -> float:
    """Return the allowed KL divergence, in nats per token of all texts together, from limits on their perplexities.

    Each text is allowed the log of its own rise. The divergence on all texts together is their mean, weighted by
    tokens.

    Args:
        sizes: the number of tokens of each text.
        limits: the limits of some of the texts, as relative rises of perplexity.
        otherwise: the limit of the other texts.
    """
    allowed = sum(size * math.log1p(limits.get(name, otherwise)) for name, size in sizes.items())
    return allowed / sum(sizes.values())


def add_anchor(anchors: Anchors, task: Calibration, layers: Mapping[str, CurloraLayer], adapter: str) -> None:
    """Add a learned task to the anchors.

    Args:
        anchors: the anchors.
        task: the calibration of the trained adapter on the task's examples.
        layers: the adapter's layers by their names in the base model.
        adapter: the adapter's name.
    """
    moments, values = {}, {}
    for name, layer in layers.items():
        of = task.layers[name]
        assert of.left is not None
        assert of.right is not None
        left, right = (of.right, of.left) if layer.fan_in_fan_out else (of.left, of.right)  # M = alpha U^T there
        alpha = layer.scaling[adapter]
        moments[name] = alpha**2 * left, alpha**2 * right
        values[name] = whole(layer.matrices[adapter].weight.detach()).cpu()
    anchors.add_moments(values, moments)
