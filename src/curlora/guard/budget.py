"""Fine-tuning within a forgetting budget: one callback for transformers' Trainer and for TRL's trainers."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from curlora._compat import scale_base_rate
from curlora.guard.anchors import Anchors
from curlora.guard.calibration import Calibration, adapter_of, layers_of
from curlora.guard.callback import GuardCallback, act_first
from curlora.guard.collect import calibrate
from curlora.guard.errors import GuardError
from curlora.guard.examples import Examples
from curlora.guard.guard import Guard
from curlora.guard.learning_rate import learning_rate as rate_for
from curlora.guard.ledger import Ledger, TextOutcome, TrainingRecord, digest_of, pack, unpack
from curlora.guard.measured_limit import Kept, log
from curlora.guard.model_pass import perplexity
from curlora.guard.own_text import own_text
from curlora.guard.processes import of_first
from curlora.guard.progress import Shown, part_of, stage
from curlora.guard.redraw import redraw
from curlora.guard.texts import Rows, Texts, digest, named_texts, rows_of
from curlora.tuner.config import LEDGER_NAME, CurloraConfig
from curlora.tuner.layer import CurloraLayer
from curlora.tuner.param_wrapper import ParamWrapper
from curlora.tuner.sharded import whole

__all__ = ["ForgettingBudget", "Outcome"]

STATE_NAME = "forgetting_budget.safetensors"  # in the Trainer's output folder and in its checkpoints
_OWN = "own text"
_TOO_LOW = 0.05  # relative to the default rate of the budget; a lower rate hardly changes the model

# The work for a token, in forward passes over one token.
_WITH_BACKWARD = 3
_WRITTEN = 4  # generated token by token, many rows at once

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of a training under a budget.

    Args:
        predicted: the guard's prediction of the KL divergence from the base model on its text, in nats per token.
        kept: the share of the training's change that remained after scaling back, 0 to 1.
        learning_rate: the adapter's learning rate, in square roots of nats.
        texts: the measurements by the texts' names.
    """

    predicted: float
    kept: float
    learning_rate: float
    texts: dict[str, TextOutcome]


@dataclasses.dataclass
class _Prepared:
    """The state that is fixed when training begins, and that a resumed training needs."""

    ledger: Ledger
    before: dict[str, Tensor]
    budget: float
    base: dict[str, float]
    limits: dict[str, float]

    def to_bytes(self) -> bytes:
        about = {"budget": self.budget, "base": self.base, "limits": self.limits}
        ledger = torch.frombuffer(bytearray(self.ledger.to_bytes()), dtype=torch.uint8)
        return pack({"ledger": ledger, **{f"before.{name}": U for name, U in self.before.items()}}, about)

    @classmethod
    def from_bytes(cls, content: bytes, where: str) -> _Prepared:
        tensors, about = unpack(content, where)
        ledger = Ledger.from_bytes(tensors.pop("ledger").numpy().tobytes(), where)
        before = {name.removeprefix("before."): U for name, U in tensors.items()}
        return cls(ledger, before, about["budget"], about["base"], about["limits"])


class ForgettingBudget(TrainerCallback):
    """Keeps the forgetting of a training within a budget. All other settings have defaults.

    ```python
    trainer = SFTTrainer(
        model, train_dataset=data, peft_config=CurloraConfig(r=32), callbacks=[ForgettingBudget(0.01)]
    )
    trainer.train()
    ```

    When training begins, the callback

    - chooses the adapter's columns and rows for the task, if the adapter is untrained (:func:`curlora.redraw`),
    - calibrates the adapter on the guard's text (:func:`curlora.calibrate`),
    - sets the learning rate, unless one was given,
    - and attaches a :class:`curlora.Guard`, which keeps the predicted forgetting within the budget.

    After the last step, the callback measures each text, and scales the training's change back until every text is
    within its limit. This happens before the last evaluation and the last checkpoint, and again if
    ``load_best_model_at_end`` loads another checkpoint.

    The adapter then carries a ledger (:class:`curlora.guard.Ledger`), which is saved with it. The next training of the
    saved adapter uses this ledger. Forgetting is still counted from the base model before the first training. The
    earlier tasks are protected by their anchors (:class:`curlora.guard.Anchors`), without their data.

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
        lifetime: the largest allowed rise of each text over all trainings of the adapter. The ledger stores it for
            later trainings.
        learning_rate: the adapter's learning rate, in square roots of nats. If ``None``, the rate of the training
            arguments if it differs from their default, else :func:`curlora.guard.learning_rate`.
        redraw: whether to choose columns and rows for the task.
        anchors: whether to protect the tasks of earlier trainings, and to add this task to them.
        tokens: the largest number of tokens of each text. The model's own text may exceed it by less than a row.
        max_length: the largest number of tokens in a row of text. Perplexity is measured on such rows.
        batch_size: the number of rows of text, or of training examples, in a forward pass. Examples that are longer
            than rows form smaller batches.
        damping: see :class:`curlora.Guard`.
        adapter: the adapter's name; the active one if ``None``.
        seed: the seed of the model's own text, of drawn answers, and of the choice of training examples.
        progress: how to show the progress of the guard's own work, see :data:`curlora.guard.progress.Shown`. The work
            is counted in tokens of a forward pass. If ``None``, bars are shown if the trainer shows its own.

    Attributes:
        outcome: an :class:`Outcome` after training, ``None`` before.

    Raises:
        GuardError: if a limit is not a share between 0 and 1, or a text is missing or has the wrong type. When training
            begins: if there is no adapter, if a text cannot be read, if the ledger belongs to another adapter or base
            model, or if the lifetime's budget is used up.
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
        tokens: int = 8192,
        max_length: int = 128,
        batch_size: int = 8,
        damping: float = 0.1,
        adapter: str | None = None,
        seed: int = 0,
        progress: Shown | None = None,
    ) -> None:
        self.limit = _share("max_perplexity_increase", max_perplexity_increase)
        self.texts = {_OWN: None} if texts is None else named_texts(texts)
        self.limits = {name: _share(f"limits[{name!r}]", value) for name, value in (limits or {}).items()}
        if unknown := sorted(set(self.limits) - set(self.texts)):
            raise GuardError(f"limits has {unknown[0]!r}, which is none of the texts: {sorted(self.texts)}.")
        self.lifetime = None if lifetime is None else _share("lifetime", lifetime)
        if learning_rate is not None and not (learning_rate > 0 and math.isfinite(learning_rate)):
            raise GuardError(f"learning_rate must be a positive number, got {learning_rate!r}.")
        self.learning_rate, self.redraw, self.anchors = learning_rate, redraw, anchors
        self.tokens, self.max_length, self.batch_size = tokens, max_length, batch_size
        self.damping, self.adapter, self.seed = damping, adapter, seed
        self.progress = progress
        self._shown: Shown = False
        self.outcome: Outcome | None = None
        self._held: GuardCallback | None = None
        self._prepared: _Prepared | None = None
        self._rows: dict[str, Rows] = {}
        self._measured: dict[str, float] = {}
        self._rate = math.nan
        self._examples: Examples

    # Events

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        model = kwargs["model"]
        if model is None:  # model_init creates it when training begins
            return
        # TRL casts the adapter of a quantized base model to bfloat16, where small steps round to zero.
        for layer in layers_of(model, _check_model(model, self.adapter)).values():
            for matrix in layer.curlora_U.values():
                for parameter in matrix.parameters():
                    if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
                        parameter.data = parameter.data.float()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        act_first(self)
        model, processing = kwargs["model"], kwargs.get("processing_class")
        adapter = _check_model(model, self.adapter)
        tokenizer = getattr(processing, "tokenizer", processing)
        tokens = self.batch_size * self.max_length
        examples = Examples(kwargs.get("train_dataloader"), self.batch_size, tokens, self.seed)
        self._shown = not args.disable_tqdm if self.progress is None else self.progress
        self.outcome = None
        self._read_texts(model, tokenizer)
        if state.global_step:
            self._prepared = self._found(args, state)
        else:
            self._prepared = self._prepare(model, adapter, examples)
            self._write(Path(args.output_dir) / STATE_NAME, state)
        _config_of(model, adapter).beside.pop(LEDGER_NAME, None)  # it does not match the checkpoints of this training
        self._attach(model, adapter, args, state, control, kwargs)
        self._examples = examples
        self._measured = {}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._holding.on_step_end(args, state, control, **kwargs)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._held is not None:
            self._held.on_log(args, state, control, **kwargs)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self._prepared is not None and folder.is_dir():
            self._write(folder / STATE_NAME, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        held, prepared, model = self._holding, self._prepared, kwargs["model"]
        assert prepared is not None
        held.finish()
        guard = held.guard
        kept = 1.0 if held.kept is None else held.kept.scale
        texts = {
            name: TextOutcome(
                before=before,
                after=(now := self._measured[name]),
                rise=now / before - 1,
                limit=prepared.limits[name],
                tokens=sum(map(len, self._rows.get(name, []))),
                sha256=digest(self._rows[name]) if name in self._rows else None,
            )
            for name, before in prepared.base.items()
        }
        self.outcome = Outcome(guard.drift(), kept, self._rate, texts)
        rises = {f"perplexity_rise/{name}": text.rise for name, text in texts.items()}
        log(self, args, state, control, {"drift": self.outcome.predicted, "kept": kept, **rises})
        self._enter_in_ledger(model, guard, state)
        self._held = None

    # Helpers of the events

    @property
    def _holding(self) -> GuardCallback:
        if self._held is None:
            raise GuardError(
                "The budget was added to a training that has already begun: pass it to the trainer before train()."
            )
        return self._held

    def _read_texts(self, model: nn.Module, tokenizer: Any) -> None:
        texts = {name: text for name, text in self.texts.items() if not callable(text)}
        texts = texts or {_OWN: None}  # with measurements only, the guard still needs a text to calibrate on
        tokens, length = self.tokens, self.max_length
        shown = part_of(self._shown, _WRITTEN * tokens)
        self._rows = {
            name: own_text(model, tokenizer, tokens=tokens, max_length=length, seed=self.seed, progress=shown)
            if text is None
            else rows_of(name, text, tokenizer, tokens=tokens, max_length=length)
            for name, text in texts.items()
        }

    @property
    def _all_rows(self) -> Rows:
        return Rows.joined(self._rows.values())

    @property
    def _tokens(self) -> int:
        return sum(map(len, self._all_rows))

    def _prepare(self, model: nn.Module, adapter: str, examples: Examples) -> _Prepared:
        layers = layers_of(model, adapter)
        ledger = Ledger.of(_config_of(model, adapter))
        if ledger is not None:
            ledger.calibration.check(model, adapter)
            if ledger.adapter != digest_of(layers, adapter):
                raise GuardError(
                    f"The adapter does not match its ledger ({LEDGER_NAME}): the ledger belongs to another adapter, or "
                    "the adapter has been trained since without a budget. Load the adapter that the last training with "
                    "a budget saved, or delete the ledger to count forgetting from the present adapter."
                )
        else:
            examples.check()
            if self.redraw:
                self._redraw(model, adapter, layers, examples)
            calibration = calibrate(
                model, self._all_rows, adapter=adapter, max_length=self.max_length, batch_size=self.batch_size,
                seed=self.seed, progress=part_of(self._shown, _WITH_BACKWARD * self._tokens),
            )  # fmt: skip
            ledger = Ledger(calibration, Anchors())
        if self.lifetime is not None:
            ledger = dataclasses.replace(ledger, lifetime=self.lifetime)
        now = {name: whole(U.detach()).clone() for name, U in _weights(layers, adapter).items()}
        guard = Guard(model, ledger.calibration, damping=self.damping, adapter=adapter)
        with guard.as_calibrated():
            base = {name: self._measure(model, name) for name in self.texts}
        spent = {name: self._measure(model, name) for name in self.texts} if ledger.trainings else base
        limits = {}
        for name, before in base.items():
            if not (before > 0 and math.isfinite(before) and math.isfinite(spent[name])):
                raise GuardError(
                    f"The measure of {name!r} must be a positive, finite number. It is {before} for the base model and "
                    f"{spent[name]} before this training. Check the text or the measurement."
                )
            used = max(0.0, spent[name] / before - 1)
            limits[name] = used + self.limits.get(name, self.limit)
            if ledger.lifetime is not None:
                if used >= ledger.lifetime:
                    raise GuardError(
                        f"The lifetime's budget is used up: the measure of {name!r} has risen by {used:.2%} since the "
                        f"adapter's first training, and {ledger.lifetime:.2%} is allowed. Give a larger lifetime to "
                        "train further."
                    )
                limits[name] = min(limits[name], ledger.lifetime)
        sizes = {name: rows.tokens for name, rows in self._rows.items()}
        # The prediction for earlier trainings may be larger than what was measured after them.
        budget = max(allowed_nats(sizes, limits, self.limit), guard.drift() * 1.001)
        return _Prepared(ledger, now, budget, base, limits)

    def _redraw(
        self,
        model: nn.Module,
        adapter: str,
        layers: Mapping[str, CurloraLayer],
        examples: Examples,
    ) -> None:
        if any(bool(layer.matrices[adapter].weight.any()) for layer in layers.values()):
            return  # the trained U belongs to the present columns and rows
        if any(isinstance(layer, ParamWrapper) for layer in layers.values()):
            _logger.info("Columns and rows of experts cannot be chosen for the task: those that were drawn are kept.")
            return
        if examples.problem is not None:
            warnings.warn(
                f"Columns and rows are not chosen for the task, because {examples.problem}. Those that were drawn are "
                "kept.",
                stacklevel=3,
            )
            return
        each = _WITH_BACKWARD * (self._tokens + examples.tokens) / 2  # redraw has two stages
        redraw(
            model, list(examples.batches(model)), self._all_rows, adapter=adapter, max_length=self.max_length,
            batch_size=self.batch_size, seed=self.seed, progress=part_of(self._shown, each),
        )  # fmt: skip

    def _attach(
        self,
        model: nn.Module,
        adapter: str,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        kwargs: Mapping[str, Any],
    ) -> None:
        prepared = self._prepared
        assert prepared is not None
        guard = Guard(
            model, prepared.ledger.calibration, budget=prepared.budget, damping=self.damping, adapter=adapter,
            anchors=prepared.ledger.anchors if self.anchors else None,
        )  # fmt: skip
        before = {id(U): prepared.before[name] for name, U in _weights(layers_of(model, adapter), adapter).items()}
        self._held = _Held(guard, lambda: 1.0 + self._worst(model), max_rise=1.0)
        self._held.at_start = 1.0
        self._held.count_from([before[id(U)] for U in guard.parameters])
        self._set_rate(guard, args, state, kwargs)
        self._held.on_train_begin(args, state, control, **kwargs)

    def _worst(self, model: nn.Module) -> float:
        """Measure all texts, and return the largest share of its limit that a text has used."""
        assert self._prepared is not None
        base, limits = self._prepared.base, self._prepared.limits
        # The number of measurements until all limits hold is unknown, so progress counts only the first as work.
        again = bool(self._measured)
        self._measured = {name: self._measure(model, name, again) for name in self.texts}
        return max((value / base[name] - 1) / limits[name] for name, value in self._measured.items())

    def _measure(self, model: nn.Module, name: str, again: bool = False) -> float:
        text, rows = self.texts[name], self._rows.get(name, Rows([]))
        shown = part_of(self._shown, 0 if again else sum(map(len, rows)), f"measuring {name}")
        if callable(text):
            with stage(shown, f"measuring {name}", None):
                return float(text())
        return perplexity(model, rows, max_length=self.max_length, batch_size=self.batch_size, progress=shown)

    def _set_rate(self, guard: Guard, args: TrainingArguments, state: TrainerState, kwargs: Mapping[str, Any]) -> None:
        assert guard.budget is not None
        ranks = [U.shape[-1] for U in guard.parameters]
        rule = rate_for(guard.budget, state.max_steps, max(ranks))
        default = next(f.default for f in dataclasses.fields(type(args)) if f.name == "learning_rate")
        chosen = args.learning_rate if args.learning_rate != default else None
        rate = self.learning_rate or (rule if chosen is None else None)
        if rate is None:
            assert chosen is not None
            if chosen < _TOO_LOW * rule:
                warnings.warn(
                    f"At learning_rate={chosen:g} the adapter will hardly learn: under a budget learning rates are in "
                    f"square roots of nats, and about {rule:.2g} suits this budget. Leave learning_rate out to have it "
                    "set.",
                    stacklevel=3,
                )
            self._rate = chosen
            return
        self._rate = rate
        optimizer = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])
        guarded = {id(U) for U in guard.parameters}
        for number, group in enumerate(optimizer.param_groups):
            mine = [id(parameter) in guarded for parameter in group["params"]]
            if any(mine) and not all(mine):
                raise GuardError(
                    f"{mine.count(False)} parameters that are not the adapter's U are in the same optimizer group, and "
                    f"the budget's learning rate, {rate:.2g}, does not suit them. Leave modules_to_save and trained "
                    "biases out, or set learning_rate in the training arguments."
                )
            if any(mine):
                scale_base_rate(optimizer, kwargs.get("lr_scheduler"), number, rate)

    def _enter_in_ledger(self, model: nn.Module, guard: Guard, state: TrainerState) -> None:
        prepared, outcome = self._prepared, self.outcome
        assert prepared is not None
        assert outcome is not None
        assert guard.budget is not None
        ledger, layers = prepared.ledger, layers_of(model, guard.adapter)
        examples = self._examples
        if self.anchors and examples.problem is None and outcome.kept > 0:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # they concern the guard's text, not the task
                task = calibrate(
                    model, list(examples.batches(model, to_device=False)), adapter=guard.adapter,
                    batch_size=self.batch_size, seed=self.seed,
                    progress=part_of(self._shown, _WITH_BACKWARD * examples.tokens, "computing the task's anchor"),
                )  # fmt: skip
            _add_anchor(ledger.anchors, task, layers, guard.adapter)
        training = TrainingRecord(
            state.global_step, outcome.learning_rate, guard.budget, outcome.predicted, outcome.kept, outcome.texts
        )
        ledger.after(training, digest_of(layers, guard.adapter)).put_beside(_config_of(model, guard.adapter))

    # The state that a resumed training needs

    def _write(self, path: Path, state: TrainerState) -> None:
        if state.is_world_process_zero:
            assert self._prepared is not None
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(path.name + ".partial")
            partial.write_bytes(self._prepared.to_bytes())
            partial.replace(path)

    def _found(self, args: TrainingArguments, state: TrainerState) -> _Prepared:
        folders = [Path(args.output_dir) / f"checkpoint-{state.global_step}", Path(args.output_dir)]
        if isinstance(args.resume_from_checkpoint, str):
            folders.insert(0, Path(args.resume_from_checkpoint))
        there = (folder / STATE_NAME for folder in folders if (folder / STATE_NAME).exists())
        path = next(there, None) if state.is_world_process_zero else None
        content: bytes | None = of_first(None if path is None else path.read_bytes())
        if content is None:
            raise GuardError(
                f"The training resumes at step {state.global_step}, and its calibration was not found: "
                f"{STATE_NAME} is in none of {', '.join(map(str, folders))}. Set output_dir to the folder that the "
                "training began with."
            )
        return _Prepared.from_bytes(content, STATE_NAME)


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


def work_of(tokens: int, examples: int, *, written: bool, continued: bool) -> tuple[float, float]:
    """Return the work of a budget before training and after it, in tokens of a forward pass, as ``progress`` counts it.

    Args:
        tokens: the number of tokens of the guard's texts.
        examples: the number of tokens of the training examples that are used, at most
            :data:`curlora.guard.examples.COUNT` examples.
        written: whether the model has to write the text.
        continued: whether the adapter already has a ledger.
    """
    before = _WRITTEN * tokens * written + tokens * (1 + continued)
    if not continued:  # columns and rows, and the calibration
        before += _WITH_BACKWARD * (2 * tokens + examples)
    return float(before), float(tokens + _WITH_BACKWARD * examples)


class _Held(GuardCallback):
    """A callback whose measure is 1 plus the largest used share of a limit, so that its rise is that share."""

    def why_nothing(self, kept: Kept, finite: bool) -> str:
        if not finite:
            return super().why_nothing(kept, finite)
        if kept.rise > 1:
            return (
                f"The measure of a text has risen by {kept.rise:.3g} times its limit, although the whole change of U "
                "in this training was taken back. Were other parameters trained as well?"
            )
        return (
            "No part of the change of U keeps every text within its limit, so the whole change was taken back. Give a "
            "larger limit, or a lower learning rate."
        )


def _check_model(model: nn.Module, adapter: str | None) -> str:
    """Check that the model can have a budget, and return the adapter's name.

    Raises:
        GuardError: if the model is an encoder-decoder, or has no such CURLoRA adapter.
    """
    base: Any = getattr(model, "get_base_model", lambda: model)()
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        raise GuardError(
            f"{type(base).__name__} is an encoder-decoder, whose forgetting cannot be measured. Use a causal language "
            "model."
        )
    return adapter_of(model, adapter)


def _config_of(model: nn.Module, adapter: str) -> CurloraConfig:
    configs: Any = getattr(model, "peft_config", {})
    return configs[adapter]


def _share(name: str, value: Any) -> float:
    """Return a limit as a share, given as a number or as per cent such as ``"1%"``.

    Raises:
        GuardError: if it is not between 0 and 1.
    """
    if isinstance(value, str) and value.strip().endswith("%"):
        with contextlib.suppress(ValueError):  # raised as a GuardError below
            value = float(value.strip()[:-1]) / 100
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value) or value <= 0:
        raise GuardError(f'{name} must be a positive share, such as 0.01 or "1%" for 1 %, got {value!r}.')
    if value >= 1:
        raise GuardError(
            f"{name}={value:g} would let perplexity rise by {value:.0%}, which limits nothing. For {value:g} % give "
            f"{value / 100:g}."
        )
    return float(value)


def _add_anchor(anchors: Anchors, task: Calibration, layers: Mapping[str, CurloraLayer], adapter: str) -> None:
    moments = {}
    for name, layer in layers.items():
        of = task.layers[name]
        assert of.left is not None
        assert of.right is not None
        left, right = (of.right, of.left) if layer.fan_in_fan_out else (of.left, of.right)  # M = alpha U^T there
        alpha = layer.scaling[adapter]
        moments[name] = alpha**2 * left, alpha**2 * right
    anchors.add_moments({name: whole(U.detach()).cpu() for name, U in _weights(layers, adapter).items()}, moments)


def _weights(layers: Mapping[str, CurloraLayer], adapter: str) -> dict[str, Tensor]:
    return {name: layer.matrices[adapter].weight for name, layer in layers.items()}
