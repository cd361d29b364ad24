"""Fine-tune on one task after another with one method and one seed, and score all tasks so far after each task."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, set_seed

from curlora.continual.batches import Collator
from curlora.continual.encoding import Encoded, evaluation_batch_size, trained_by
from curlora.continual.errors import RunError
from curlora.continual.heldout import HeldOut, measure
from curlora.continual.methods import Method
from curlora.continual.plugins import Plugin, TaskContext
from curlora.continual.processes import process_state
from curlora.continual.results import Score, SeedResult, TextScore
from curlora.continual.settings import Settings
from curlora.continual.state import State
from curlora.continual.task_model import HEAD_SEED, TaskModel
from curlora.continual.tasks import Row
from curlora.continual.trainer import TaskTrainer, steps_of
from curlora.storage import sync
from curlora.text.progress import Portion, Progress, part_of

__all__ = ["BaseScores", "MethodRun", "work_of"]


@dataclass(frozen=True)
class BaseScores:
    """The base model's scores on each held-out text, and, under ``forward_transfer``, on each task."""

    heldout: Mapping[str, TextScore]
    tasks: Sequence[Score] = ()


# Units of progress, each of about the same time. A training batch also runs a backward pass.
_TRAIN_UNITS, _WINDOW_UNITS, _TOKEN_UNITS = 3.0, 8.0, 0.125


def work_of(method: Method, stream: Sequence[Encoded], heldout: Sequence[HeldOut]) -> float:
    """Return the units of progress that :class:`MethodRun` will report."""
    stream = trained_by(method, stream)
    plugins = [make() for make in method.plugins]
    numbers = range(len(stream))
    return sum(_learning_work(method, plugins, stream[i]) + _scoring_work(method, stream, i, heldout) for i in numbers)


def _learning_work(method: Method, plugins: Sequence[Plugin], part: Encoded) -> float:
    work = _scoring_task(part) if part.settings.forward_transfer and part.number > 0 else 0.0
    if method.trains_backbone or part.task.classes is not None:
        rows = len(part.train) + sum(plugin.added_rows(part.number) for plugin in plugins)
        work += steps_of(rows, part.settings) * (_TRAIN_UNITS if method.trains_backbone else 1.0)
    return work


def _scoring_work(method: Method, stream: Sequence[Encoded], number: int, heldout: Sequence[HeldOut]) -> float:
    if not method.trains_backbone:
        return _scoring_task(stream[number])
    return sum(map(_scoring_task, stream[: number + 1])) + sum(text.windows for text in heldout) * _WINDOW_UNITS


def _scoring_task(part: Encoded) -> float:
    generated = 0 if part.generation is None else part.generation.steps
    return -(-len(part.evaluation) // evaluation_batch_size(part.settings)) + generated * _TOKEN_UNITS


class MethodRun:
    """One method over a stream with one seed, started or resumed.

    The weights and the measurements are saved in ``directory`` after each task, and the Trainer's checkpoints within a
    task. An interrupted run resumes from there with the same results as an uninterrupted one.

    Args:
        method: the method.
        load_model: returns a fresh causal language model.
        tokenizer: its tokenizer.
        stream: the tasks in order, from :func:`curlora.continual.encoding.encode` or ``in_order``.
        heldout: the texts whose perplexity is measured.
        seed: seed of the method's initialization, the heads, the order of examples and dropout.
        base: the base model's scores.
        directory: the folder in which the adapter and the heads are saved; created if missing.
        progress: is told of the progress.
        guard_text: the general text for plug-ins that need one.
        order: the order of the tasks that is written to the results.

    Raises:
        RunError: if the method cannot be applied to the model.
    """

    def __init__(
        self,
        method: Method,
        load_model: Callable[[], nn.Module],
        tokenizer: PreTrainedTokenizerBase,
        stream: Sequence[Encoded],
        heldout: Sequence[HeldOut],
        *,
        seed: int,
        base: BaseScores,
        directory: Path,
        progress: Progress,
        guard_text: HeldOut | None = None,
        order: Sequence[str] = (),
    ) -> None:
        stream = trained_by(method, stream)
        self.method, self.stream, self.heldout, self.seed = method, stream, heldout, seed
        self.tokenizer, self.directory, self.progress = tokenizer, directory, progress
        self.guard_text = guard_text
        set_seed(seed)
        base_model = load_model()
        try:
            if method.needs_guard_text:
                base_model.to(process_state().device)  # apply() runs the model
            adapted = method.apply(base_model, seed, guard_text)
        except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
            raise RunError(f"method {method.name!r} cannot be applied to this model: {error}") from error
        self.model = TaskModel(adapted.to(process_state().device))
        self.state = State(directory)
        self._part = Portion(progress.advance)
        self._begun = 0  # number of tasks that have begun; the last one with everything it starts with
        self.plugins: list[Plugin] = [make() for make in method.plugins]
        self.base_logits = method.base_logits(self.model.model, load_model) if method.trains_backbone else None
        self.result = SeedResult(
            seed=seed,
            order=list(order),
            scores=[],
            before=list(base.tasks[:1]),
            base=list(base.tasks),
            heldout={name: [score] for name, score in base.heldout.items()},
            losses=[],
            steps=0,
            train_tokens=0,
            train_seconds=0.0,
            seconds=0.0,
        )

    def run(self) -> tuple[SeedResult, int, int]:
        """Start or resume the run.

        Returns:
            The measurements, the number of trained parameters, and the size in bytes of the saved weights, the latter
            two without heads.

        Raises:
            RunError: if the state of an interrupted run cannot be read.
        """
        label = self.method.label if self.seed == 0 else f"{self.method.label} (seed {self.seed})"
        if self.result.order:
            label += f" ({', '.join(self.result.order)})"
        learned = 0  # number of learned tasks; the last one may not have been scored
        saved = self.state.load(self.model, self.plugins, self._begin)
        if saved is not None:
            learned, self._begun, self.result = saved
        for part in self.stream:
            with self._portion(_learning_work(self.method, self.plugins, part)):
                if part.number >= learned:
                    self.progress.stage(f"{label}: learning {part.task.name}")
                    with self._timed():
                        self._learn(part)
                    self._save_weights(part.number + 1, part.number + 1)
            with self._portion(_scoring_work(self.method, self.stream, part.number, self.heldout)):
                if part.number >= len(self.result.scores):
                    self.progress.stage(f"{label}: scoring after {part.task.name}")
                    with self._timed():
                        self._score(part)
                    self.state.save_result(part.number + 1, part.number + 1, self.result)
        size = self._finish() if process_state().is_main_process else 0
        process_state().wait_for_everyone()
        return self.result, sum(p.numel() for p in self.model.trained_parameters().values()), size

    def _begin(self, number: int) -> None:
        part = self.stream[number]
        seed = HEAD_SEED if part.settings.heads == "fixed" else ((self.seed + 1) * 1_000_003 + number) % 2**32
        self.model.begin(number, part.task.classes, seed)
        try:
            self.method.begin_task(self.model.model, number, self.seed)
        except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
            raise RunError(f"method {self.method.name!r} cannot begin task {number + 1}: {error}") from error

    def _learn(self, part: Encoded) -> None:
        fresh = part.number >= self._begun
        if fresh:
            self._begin(part.number)
        if part.settings.forward_transfer and part.number >= len(self.result.before):  # the first is the base model's
            before = self._scored(part, f"before-{part.task.name}")
            self._add(before=[*self.result.before, before])
        if not any(p.requires_grad for p in self.model.parameters()):
            return
        context = self._context(part)
        for plugin in self.plugins:
            plugin.before_task(context)
        first_of_adapter = context.adapter_since == part.number
        if fresh and first_of_adapter and any(plugin.changes_start for plugin in self.plugins):
            # On another machine the measurements behind this start could differ, so a resumed run loads it from here.
            self._save_weights(part.number, part.number + 1)
        self._train(part, context)
        for plugin in self.plugins:
            guarded = plugin.after_task(context)
            if guarded is not None:
                self._add(guarded=[*self.result.guarded, guarded])

    def _context(self, part: Encoded) -> TaskContext:
        adapters = [self.method.adapter(number) for number in range(part.number + 1)]
        return TaskContext(
            part.number,
            self.model,
            part.train,
            Collator(self.tokenizer, part.settings.readout),
            self.seed,
            guard_text=self.guard_text,
            base_logits=self.base_logits,
            tasks=len(self.stream),
            adapter=adapters[-1],
            adapter_since=adapters.index(adapters[-1]),
        )

    def _train(self, part: Encoded, context: TaskContext) -> None:
        rows: Sequence[Row] = part.train
        for plugin in self.plugins:
            rows = plugin.training_rows(replace(context, rows=rows))
        began = time.monotonic()
        if not self.method.trains_backbone and part.settings.readout == "last_token":
            rows = self._with_states(rows, part.settings, context.collate)
        ahead = time.monotonic() - began
        trainer = self._trainer(part, rows)
        trainer.train_or_go_on()
        offset = self.result.steps
        logs = [log for log in trainer.state.log_history if "loss" in log]
        self._add(
            losses=[*self.result.losses, *((offset + log["step"], log["loss"]) for log in logs)],
            drifts=[*self.result.drifts, *((offset + log["step"], log["drift"]) for log in logs if "drift" in log)],
            steps=offset + trainer.state.global_step,
            train_tokens=self.result.train_tokens + part.settings.epochs * sum(len(row["input_ids"]) for row in rows),
            train_seconds=self.result.train_seconds + ahead + trainer.seconds,
        )

    def _save_weights(self, learned: int, begun: int) -> None:
        self.state.save_weights(learned, begun, self.model, self.plugins, self.result)

    def _with_states(
        self, rows: Sequence[Row], settings: Settings, collate: Callable[[Sequence[Row]], dict[str, Tensor]]
    ) -> list[Row]:
        """Add to each row the hidden state that the head classifies, which is constant if only the head is trained.

        The states are always computed in the same order, so a resumed run gets bit-identical states.
        """
        device = process_state().device
        states: list[Tensor] = [torch.empty(0)] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
        self.model.eval()
        for begin in range(0, len(rows), settings.evaluation_batch_size):
            chosen = order[begin : begin + settings.evaluation_batch_size]
            batch = {key: value.to(device) for key, value in collate([rows[i] for i in chosen]).items()}
            for i, state in zip(chosen, self.model.states(**batch).float().cpu(), strict=True):
                states[i] = state
        return [{**row, "state": state} for row, state in zip(rows, states, strict=True)]

    def _score(self, part: Encoded) -> None:
        seen = self.stream[: part.number + 1]
        if not self.method.trains_backbone and self.result.scores:  # scores of earlier tasks cannot have changed
            row = [*self.result.scores[-1], self._scored(part, f"after-{part.task.name}")]
        else:
            row = [self._scored(other, f"after-{part.task.name}") for other in seen]
        scores = {}
        for text in self.heldout:
            known = self.result.heldout[text.name]
            if self.base_logits is None:
                scores[text.name] = [*known, known[0]]
            else:
                shown = part_of(lambda *_: contextlib.nullcontext(self._part.advance), _WINDOW_UNITS * text.windows)
                new = measure(self.model.language_model, text, self.base_logits, shown)
                scores[text.name] = [*known, new]
        self._add(scores=[*self.result.scores, row], heldout=scores)

    def _scored(self, part: Encoded, when: str) -> Score:
        generated = self.directory / "generated" / when / f"{part.task.name}.jsonl"
        return self._trainer(part, []).score(part.evaluation, part.generation, generated)

    def _trainer(self, part: Encoded, rows: Sequence[Row]) -> TaskTrainer:
        units = _TRAIN_UNITS if self.method.trains_backbone else 1.0
        return TaskTrainer(
            self.model,
            self.method.learning_rate,
            rows,
            self.tokenizer,
            part.settings,
            self.seed,
            self.state.checkpoints(part.number),
            self.directory / "logs" / part.task.name,
            self.plugins,
            on_step=lambda: self._part.advance(units),
            on_prediction_step=lambda: self._part.advance(1.0),
            on_generated=lambda tokens: self._part.advance(tokens * _TOKEN_UNITS),
        )

    def _add(self, **changes: object) -> None:
        self.result = self.result.model_copy(update=changes)

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._add(seconds=self.result.seconds + time.monotonic() - began)

    @contextlib.contextmanager
    def _portion(self, work: float) -> Iterator[None]:
        """Report ``work`` units in total, even if less was left to do because the run was resumed."""
        self._part = Portion(self.progress.advance, work)
        yield
        self._part.end()

    def _finish(self) -> int:
        heads = {key: value.contiguous() for key, value in self.model.heads.state_dict().items()}
        save_file(heads, self.directory / "heads.safetensors")
        size = self.method.save(self.model.model, self.directory)
        sync(self.directory)  # before the result is saved, which implies that these files are complete
        return size
