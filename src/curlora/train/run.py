"""Run a training from its options to its outcome: data, plan, training, model card and page."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from pydantic import ValidationError
from transformers import AutoModelForCausalLM
from transformers.integrations import get_reporting_integration_callbacks
from transformers.integrations.integration_utils import get_available_reporting_integrations

from curlora.budget.limited_texts import OWN_TEXT
from curlora.budget.work import WRITTEN
from curlora.convert import save_as_lora, save_merged
from curlora.text.evaluating import without_adapters
from curlora.text.progress import Advance, NullProgress, Portion, Progress
from curlora.train.card import write_card
from curlora.train.data import Examples, read_examples
from curlora.train.errors import TrainError
from curlora.train.folder import Folder, claim
from curlora.train.measure import Measured, measure
from curlora.train.model import Base, find_base
from curlora.train.options import TrainOptions
from curlora.train.other_texts import OWN_SAMPLE, perplexities, read_files, write_sample
from curlora.train.outcome import Budget, HeldOut, OtherText, Reply, Run, TrainOutcome
from curlora.train.page import write_page
from curlora.train.plan import TrainPlan, make_plan

__all__ = ["Prepared", "finished", "prepare", "train"]

# Work per token, for the progress bar. The unit is a token of a forward pass.
_TRAINING = 3  # a backward pass takes twice as long as a forward pass
_WRITING = 8  # generation computes one token at a time


class Prepared(NamedTuple):
    """Everything that is prepared before the weights are loaded."""

    options: TrainOptions
    base: Base
    examples: Examples
    plan: TrainPlan
    folder: Folder


def prepare(options: TrainOptions) -> Prepared:
    """Inspect the model, read the data, check the folder and make the plan. No weights are loaded, no file is written.

    Raises:
        TrainError: if TRL is missing, if there are several processes, or if an option, the model, the data or the
            output folder cannot be used.
    """
    if importlib.util.find_spec("trl") is None:
        raise TrainError("curlora train needs TRL, which is not installed: pip install trl")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise TrainError(
            "curlora train runs in one process. For several GPUs, pass curlora.ForgettingBudget to TRL's SFTTrainer in "
            "your own script, and start the script with accelerate launch."
        )
    try:
        get_reporting_integration_callbacks([name for name in options.report_to if name not in ("none", "all")])
    except (ValueError, ImportError, RuntimeError) as error:
        raise TrainError(f"--report-to {' '.join(options.report_to)}: {error}") from error
    _check_installed(options.report_to)
    base = find_base(options)
    _check_texts(options, base)
    read_files(options, base)
    examples = read_examples(options, base)
    folder = Folder(options.out, {**options.identity(), "data": examples.sha256, "guard_texts": _digests(options)})
    folder.record()
    return Prepared(options, base, examples, make_plan(options, base, examples), folder)


def _check_installed(trackers: Sequence[str]) -> None:
    # transformers does not list the last two.
    installed = {"none", "all", *get_available_reporting_integrations(), "azure_ml", "flyte"}
    if missing := [name for name in trackers if name not in installed]:
        raise TrainError(f"--report-to {missing[0]}: the package of this tracker is not installed.")


def _check_texts(options: TrainOptions, base: Base) -> None:
    """Check that the texts on which a lifetime counts are given again."""
    given = {*options.guard_texts} or {OWN_TEXT}
    if missing := [name for name in base.history.texts if name not in given]:
        if base.history.lifetime is None:
            return  # the callback warns
        again = "leave --guard-text out" if missing[0] == OWN_TEXT else f"give --guard-text {missing[0]}=PATH again"
        raise TrainError(
            f"--continue-from {options.continue_from}: the lifetime's budget counts on the text {missing[0]!r}, which "
            f"is not measured in this training: {again}."
        )


def finished(prepared: Prepared) -> TrainOutcome | None:
    """Return the outcome of the training in the output folder; ``None`` if it is not finished.

    Raises:
        TrainError: if the folder belongs to another training, another version of curlora wrote its outcome, or it
            lacks the export that is asked for.
    """
    record = prepared.folder.record() or {}
    if "outcome" not in record:
        return None
    try:
        outcome = TrainOutcome.model_validate(record["outcome"])
    except ValidationError as error:
        raise TrainError(
            f"--out {prepared.options.out} holds a finished training, but this version of curlora cannot read its "
            "training.json: choose another folder."
        ) from error
    export, out = prepared.options.export, prepared.options.out
    if missing := [name for name in prepared.options.other_texts if name not in outcome.others]:
        raise TrainError(
            f"--out {out} holds a finished training, which was not measured on --other-text {missing[0]}. Measure the "
            "adapter with curlora.guard.perplexity, or choose another folder."
        )
    if export not in (None, outcome.exported):
        convert = f"curlora convert {out} --to {export} --out {out / export}"
        remedy = f"Export its adapter: {convert}" if prepared.base.guarded else "Merge its adapter with PEFT."
        raise TrainError(f"--out {out} holds a finished training, which was run without --export {export}. {remedy}")
    return outcome


def train(prepared: Prepared, progress: Callable[[float], Progress] = lambda _: NullProgress()) -> TrainOutcome:
    """Train, and write all results to the output folder. An interrupted training is resumed, a finished one returned.

    Args:
        prepared: the result of :func:`prepare`.
        progress: called with the total work; returns the object that is told of the progress. Nothing by default.

    Raises:
        TrainError: if another training uses the folder, the disk is full, or the device runs out of memory.
    """
    folder = prepared.folder
    with claim(folder):
        if (done := finished(prepared)) is not None:  # another process may have finished it meanwhile
            return done
        if folder.record() is None:
            folder.write({})
        try:
            return _train(prepared, progress)
        except torch.OutOfMemoryError as error:
            raise TrainError(
                f"The device has not enough memory ({str(error).partition('.')[0]}): lower --batch-size or "
                "--max-length, or give --gradient-checkpointing or --quantize 4bit."
            ) from error


def _train(prepared: Prepared, progress: Callable[[float], Progress]) -> TrainOutcome:
    from curlora.train.training import Training  # importing TRL takes seconds

    options, base, examples, plan, folder = prepared
    replies = len(examples.prompts) * examples.reply_tokens * _WRITING
    scored = 2 * (examples.held_out.tokens + replies) + WRITTEN * options.OTHER_TOKENS
    bar = progress(_TRAINING * plan.tokens + scored + sum(plan.guard_work))
    guard = _Guarding(bar)

    def begin() -> None:
        guard.part.end()
        bar.stage("training")
        guard.begin(plan.guard_work[1])

    bar.stage("loading the model")
    guard.begin(plan.guard_work[0])
    training = Training(
        prepared, on_begin=begin, on_tokens=lambda tokens: bar.advance(_TRAINING * tokens), guard=guard.stage
    )

    def measured() -> Measured:
        found = measure(
            training.model, base.tokenizer, examples.held_out, examples.prompts,
            stop=examples.stop, reply_tokens=examples.reply_tokens, batch_size=options.batch_size,
            autocast=training.autocast, on_tokens=bar.advance,
        )  # fmt: skip
        bar.advance(replies)
        return found

    bar.stage("other texts, before")
    others = {**read_files(options, base), OWN_SAMPLE: write_sample(options, base, training.model)}
    bar.advance(WRITTEN * options.OTHER_TOKENS)
    with without_adapters(training.model):
        others_before = perplexities(training.model, others, training.autocast)
    bar.stage("held-out examples, before")
    before = measured()
    bar.stage("preparing the training")
    ended = training.run()
    guard.part.end()
    bar.stage("held-out examples, after")
    after = measured()
    bar.stage("other texts, after")
    others_after = perplexities(training.model, others, training.autocast)

    bar.stage("writing")
    outcome = TrainOutcome(
        curlora=version("curlora"),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        base_model=base.name,
        continue_from=base.continue_from,
        quantize=base.quantize,
        data=options.data,
        layout=examples.layout,
        adapter=base.kind,
        rank=plan.rank,
        layers=plan.layers,
        run=Run(
            steps=ended.steps,
            examples=len(examples.train.rows),
            tokens=plan.tokens,
            trained_parameters=plan.trained,
            learning_rate=ended.budget.learning_rate,
            seconds=ended.seconds,
            device=str(training.model.device),
            log=ended.log,
        ),
        held_out=HeldOut(
            source=examples.held_out_from,
            examples=len(examples.held_out.rows),
            tokens=examples.held_out.trained_tokens,
            loss_before=before.loss,
            loss_after=after.loss,
        ),
        budget=Budget(
            stated=options.max_forgetting,
            limits=dict(options.limits),
            lifetime=base.history.lifetime,
            predicted=ended.budget.predicted,
            kept=ended.budget.kept,
            texts=ended.budget.texts,
        ),
        others={
            name: OtherText(tokens=sum(map(len, rows)), before=others_before[name], after=others_after[name])
            for name, rows in others.items()
        },
        replies=[
            Reply(prompt=prompt.text, before=one, after=other, data=prompt.answer)
            for prompt, one, other in zip(examples.prompts, before.replies, after.replies, strict=True)
        ],
        exported=options.export,
    )
    training.save(folder.path)
    write_card(outcome, folder.path / "README.md")
    write_page(outcome, folder.path / "report.html")
    if options.export is not None:
        _export(options.export, folder.path, base, training.model)
    folder.write({"outcome": json.loads(outcome.model_dump_json())})
    folder.remove_checkpoints()
    return outcome


class _Guarding:
    """The parts of the progress bar that the budget's own work takes.

    Args:
        bar: the progress bar.
    """

    def __init__(self, bar: Progress) -> None:
        self.bar, self.part = bar, Portion(bar.advance)

    def begin(self, work: float) -> None:
        self.part = Portion(self.bar.advance, work)

    @contextlib.contextmanager
    def stage(self, text: str, work: float | None) -> Iterator[Advance]:
        """See :data:`curlora.text.progress.Shown`."""
        self.bar.stage(text)
        yield self.part.advance


def _export(to: str, out: Path, base: Base, model: Any) -> None:
    """Export the adapter into a folder that appears complete or not at all."""
    final, partial = out / to, out / f"{to}.partial"
    for path in (final, partial):
        shutil.rmtree(path, ignore_errors=True)
    if to == "lora":
        save_as_lora(partial, model)
    else:  # merge into the stored weights, not into those quantized for training
        stored = AutoModelForCausalLM.from_pretrained(base.name, dtype="auto")
        save_merged(partial, PeftModel.from_pretrained(stored, str(out)).eval())
    partial.rename(final)


def _digests(options: TrainOptions) -> dict[str, str]:
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in options.guard_texts.items()}
