"""Run a recipe: read its data, claim its run directory, and run its methods."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from curlora.continual.answers import OwnText, PromptList, encoded_prompt
from curlora.continual.base_model import forget_base
from curlora.continual.computing import computing
from curlora.continual.data import AnswersSpec, HeldOutSpec, OwnTextSpec, read_prompts, read_task, read_text
from curlora.continual.errors import RecipeError, RecipeWarning, RunError
from curlora.continual.heldout import HeldOut
from curlora.continual.method_spec import MethodSpec
from curlora.continual.protocol import Protocol
from curlora.continual.recipe import Recipe
from curlora.continual.results import RunResults
from curlora.continual.run import run_stream
from curlora.continual.stream import Stream
from curlora.continual.workers import ray_workers
from curlora.storage import LOCK, write_whole
from curlora.text.progress import NullProgress, Progress

__all__ = ["build", "run_recipe"]


def build(recipe: Recipe) -> Stream:
    """Read the data and the tokenizer of a recipe; the model's weights are loaded when the run starts.

    Raises:
        RecipeError: naming the task or file, if a file or column is missing, a label is unknown, a split is empty, or a
            held-out text is too short or the same as the guard's.
    """
    protocol = recipe.switched()
    reference = protocol.data == "reference"
    try:
        own = [
            recipe.settings().changed(part.variant(reference).training).changed(method.training)
            for part in recipe.tasks
            for method in recipe.methods
        ]
        # Check each distinct set of arguments once, not once for each task and method.
        for settings in {of.model_dump_json(include={"schedule", "trainer"}): of for of in own}.values():
            settings.check_trainer()
        tasks = [read_task(part, reference) for part in recipe.tasks]
        texts = [(part, read_text(part)) for part in recipe.heldout if isinstance(part, HeldOutSpec)]
        tokenizer = recipe.model.load_tokenizer()
        sampled = [_sampled(part, tokenizer) for part in recipe.heldout if not isinstance(part, HeldOutSpec)]
        part = recipe.guard
        guard = read_text(part) if isinstance(part, HeldOutSpec) else _sampled(part, tokenizer)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    guard_text: HeldOut | None = None
    heldout = [(part, _held_out(part, text, tokenizer, protocol)) for part, text in texts]
    if isinstance(recipe.guard, HeldOutSpec):
        assert isinstance(guard, str)
        guard_text = replace(_held_out(recipe.guard, guard, tokenizer, Protocol()), shown=True)
        _check_apart(heldout, recipe.guard, guard_text)
    elif guard is not None:
        assert not isinstance(guard, str)
        _check_written_apart(sampled, guard)
    return Stream(
        title=recipe.title,
        base_model=recipe.model.name if not Path(recipe.model.name).is_dir() else Path(recipe.model.name).name,
        load_model=recipe.model.load,
        tokenizer=tokenizer,
        tasks=tasks,
        methods=[part.make(protocol) for part in recipe.methods],
        heldout=[text for _, text in heldout],
        sampled=[part for part in sampled if part is not None],
        settings=recipe.settings(),
        seeds=recipe.seeds,
        protocol=protocol.describe(),
        recipe=recipe.portable().model_dump(mode="json", exclude_defaults=True),
        guard_text=guard if isinstance(guard, (OwnText, PromptList)) else guard_text,
        orders=recipe.orders,
        limits={figure: list(values) for figure, values in recipe.limits.items()},
        load_empty=recipe.model.load_empty,
    )


def run_recipe(
    recipe: Recipe,
    directory: Path | str,
    progress: Callable[[float], Progress] = lambda _: NullProgress(),
    *,
    workers: int | None = None,
    address: str | None = None,
) -> RunResults:
    """Run a recipe, or resume it if ``directory`` holds a part of the run.

    Between the two, methods, seeds and orders may be added to the recipe; nothing else may change.

    Args:
        recipe: the recipe to run.
        directory: the run directory; created if missing.
        progress: called with the total amount of work; returns the object that is told of the progress.
        workers: the number of processes that share the methods, orders and seeds, which needs Ray. If ``None``, this
            process runs them.
        address: the address of a running Ray cluster, whose machines must see ``directory`` and the recipe's files. If
            ``None``, this machine is used.

    Returns:
        The measurements, also saved in ``directory / "results.json"``. They do not depend on ``workers``.

    Raises:
        RecipeError: see :func:`build`.
        RunError: if ``directory`` holds a run of another recipe; also see :func:`curlora.continual.run.run_stream`.
    """
    directory = Path(directory)
    begin = partial(_claim, recipe, directory)
    if workers is not None or address is not None:
        with (
            computing(recipe.resources.threads(workers=True), recipe.settings().fp32_products),
            ray_workers(recipe, directory, workers, address) as runner,
        ):
            return run_stream(build(recipe), directory, progress, begin, runner)
    with computing(recipe.resources.threads(workers=False), recipe.settings().fp32_products):
        return run_stream(build(recipe), directory, progress, begin)


_SAVED = "recipe.json"


def _claim(recipe: Recipe, directory: Path) -> None:
    """Check that a directory is empty or belongs to a recipe, and save the recipe in it.

    Raises:
        RunError: if the directory holds a run of another recipe, or other files.
    """
    saved = directory / _SAVED
    recipe = recipe.portable()
    if saved.exists():
        try:
            before = Recipe.model_validate_json(saved.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RunError(
                f"{saved} cannot be read, so it is unknown whether {directory} belongs to this recipe. Choose another "
                f"folder, or remove {saved} if you are sure that it does."
            ) from error
        changed = _changes(before, recipe, directory)
        if changed and any(directory.glob("*/seed-*")):  # else the other recipe has trained nothing
            raise RunError(
                f"{directory} holds a run of another recipe: {', '.join(changed)} changed. Choose another folder, undo "
                "the change, or remove the folder."
            )
        if changed:
            forget_base(directory)
    elif any(path.name != LOCK for path in directory.iterdir()):
        raise RunError(f"{directory} holds files, but no run. Choose another folder.")
    write_whole(saved, recipe.model_dump_json(indent=2))


def _changes(before: Recipe, now: Recipe, directory: Path) -> list[str]:
    def known(recipe: Recipe) -> dict[str, Any]:
        """Return the parts that figures depend on."""
        tasks = [task.model_copy(update={"description": ""}) for task in recipe.tasks]
        parts = ("model", "heldout", "guard", "protocol", "switches", "reference")
        training = recipe.training.changed({"cache_frozen_layers": False})  # changes no figure
        return {**{part: getattr(recipe, part) for part in parts}, "tasks": tasks, "training": training}

    def methods(recipe: Recipe) -> dict[str, MethodSpec]:
        return {method.name: method.model_copy(update={"label": None}) for method in recipe.methods}

    old, new = known(before), known(now)
    begun = {name: method for name, method in methods(before).items() if (directory / name).exists()}
    changed = [f"method {name!r}" for name, method in begun.items() if methods(now).get(name) != method]
    # Folders are named by the position of an order, so new orders may only be appended.
    reordered = ["orders"] if now.orders[: len(before.orders)] != before.orders else []
    return [part for part in new if old[part] != new[part]] + reordered + changed


def _held_out(part: HeldOutSpec, text: str, tokenizer: PreTrainedTokenizerBase, protocol: Protocol) -> HeldOut:
    tokens = torch.tensor(tokenizer(text)["input_ids"])[part.skip :]
    if len(tokens) < 2:
        raise RecipeError(f"text {part.name!r} has {len(tokens)} tokens after skip; perplexity needs at least 2")
    if protocol.perplexity == "first_chunk":
        asked, given = part.chunk or part.window, part.chunk is not None
        scored = HeldOut(part.name, tokens[:asked], window=max(2, min(asked, len(tokens))))
    else:
        asked, given = part.tokens, "tokens" in part.model_fields_set
        scored = HeldOut(part.name, tokens[:asked], part.window, part.stride)
    if given and len(tokens) < asked:
        behind = f" after the first {part.skip:,}" if part.skip else ""
        warnings.warn(
            f"The text {part.name!r} is shorter than the recipe asks for: it has {len(tokens):,} tokens{behind}, but "
            f"{asked:,} are asked for.",
            RecipeWarning,
            stacklevel=2,
        )
    return scored


def _sampled(part: AnswersSpec | OwnTextSpec | None, tokenizer: PreTrainedTokenizerBase) -> PromptList | OwnText | None:
    """Return the text that the base model is to write."""
    if isinstance(part, AnswersSpec):
        prompts = read_prompts(part)
        longest = max(len(encoded_prompt(tokenizer, prompt)) for prompt in prompts)
        return PromptList(part.name, prompts, part.max_new_tokens, part.seed, longest)
    return None if part is None else OwnText(part.name, part.tokens, part.max_length, part.seed)


def _check_apart(heldout: Sequence[tuple[HeldOutSpec, HeldOut]], guard_part: HeldOutSpec, guard: HeldOut) -> None:
    """Refuse a held-out text that the guard uses, and warn of one that overlaps with the guard's."""
    for part, text in heldout:
        ends = part.skip + len(text.tokens), guard_part.skip + len(guard.tokens)
        shared = min(ends) - max(part.skip, guard_part.skip)
        if torch.equal(text.tokens, guard.tokens):
            shared = len(text.tokens)
        elif _source(part) != _source(guard_part) or shared <= 0:
            shared = _found_in(text.tokens, guard.tokens)
            if shared < _COPIED * len(text.tokens):
                continue
        found = (
            f"heldout {text.name!r} and guard {guard.name!r} have {shared:,} of {len(text.tokens):,} tokens in common. "
            "Hold out another text, or another part of it (skip)."
        )
        if shared == len(text.tokens):
            raise RecipeError(found)
        warnings.warn(found, RecipeWarning, stacklevel=2)


def _check_written_apart(sampled: Sequence[PromptList | OwnText | None], guard: PromptList | OwnText) -> None:
    """Refuse a held-out text that the base model writes if it is the guard's: both would be sampled alike."""
    for text in sampled:
        if text is not None and _sampled_from(text) == _sampled_from(guard):
            raise RecipeError(
                f"heldout {text.name!r} and guard {guard.name!r} are the same text of the base model, because their "
                "prompts and seeds are the same. Give one of them another seed."
            )


def _sampled_from(text: PromptList | OwnText) -> tuple[Any, ...]:
    return (text.prompts, text.seed) if isinstance(text, PromptList) else (text.max_length, text.seed)


_RUN = 16  # tokens in a row that are hardly alike by chance
_COPIED = 0.1  # the share of a text that must be found elsewhere to be taken for a copy


def _found_in(tokens: Tensor, elsewhere: Tensor) -> int:
    """Return how many of the tokens stand, in runs of ``_RUN``, anywhere in another text."""
    runs = {tuple(run) for run in elsewhere.unfold(0, _RUN, 1).tolist()} if len(elsewhere) >= _RUN else set()
    pieces = tokens.unfold(0, _RUN, _RUN).tolist() if len(tokens) >= _RUN else []
    found = sum(tuple(piece) in runs for piece in pieces)
    return len(tokens) if pieces and found == len(pieces) else _RUN * found


def _source(part: HeldOutSpec) -> dict[str, Any]:
    return part.model_dump(exclude={"name", "skip", "tokens", "window", "stride", "chunk"})
