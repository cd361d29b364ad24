"""Checks before any weights are loaded: every text fits the model, and every method can be applied to it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from curlora.continual.answers import OwnText, PromptList
from curlora.continual.encoding import Encoded
from curlora.continual.errors import RecipeWarning, RunError
from curlora.continual.frozen_layers import layers_below, layers_below_targets
from curlora.continual.heldout import HeldOut
from curlora.continual.methods import Method
from curlora.continual.methods.peft import Peft
from curlora.continual.problems import unknown_names
from curlora.text.rows import longest_row
from curlora.tuner.layer import CurloraLayer

__all__ = ["Adapted", "check_stream", "check_texts"]

# Options that say how a LoRA adapter starts.
_OF_A_START = {"init_lora_weights", "corda_config", "loftq_config", "lora_ga_config"}


@dataclass(frozen=True)
class Adapted:
    """A model on the meta device with a method applied to it, ready for the last task.

    Args:
        model: the model; ``None`` if the method cannot be applied to a model without weights.
        trained: the number of trainable parameters over all tasks, without heads.
        unknown: why there is no model.
        below: the number of the model's lowest layers that the method does not change; 0 unless asked for.
    """

    model: nn.Module | None = None
    trained: int | None = None
    unknown: str = ""
    below: int = 0


def check_stream(
    methods: Sequence[Method],
    texts: Sequence[HeldOut],
    stream: Sequence[Encoded],
    load_empty: Callable[[], Any],
    seed: int,
    *,
    unwritten: Sequence[PromptList | OwnText] = (),
    frozen_layers: bool = False,
) -> dict[str, Adapted]:
    """Check a whole run with the model on the meta device, applying each method to it.

    A method that reads the weights when it starts, such as PiSSA, is not checked.

    Args:
        methods: the run's methods.
        texts: the held-out texts and the guard's text.
        stream: the tasks.
        load_empty: returns the model on the meta device.
        seed: the run's seed.
        unwritten: texts that the base model is to write.
        frozen_layers: whether each method must leave some of the model's lowest layers unchanged; they are counted.

    Returns:
        The model with each method, by the method's name. Methods with the same options share one model.

    Raises:
        RunError: naming every text and task that is longer than the model has positions, and every method that cannot
            be applied to the model.
    """
    problems = _too_long(load_empty().config, texts, stream, unwritten)
    found: dict[str, Adapted] = {}
    adapted: dict[str, Adapted] = {}
    for method in methods:
        options = f"{method.kind} {method.describe()}"
        try:
            if options not in found:
                found[options] = _put_on(method, load_empty, len(stream), seed)
                if frozen_layers:
                    found[options] = replace(found[options], below=_below(method, found[options], load_empty, seed))
            adapted[method.name] = found[options]
        except ValueError as error:
            problems.append(f"method {method.name!r} cannot be applied to this model: {error}")
    if problems:
        raise RunError("\n".join(problems))
    return adapted


def check_texts(config: Any, texts: Sequence[HeldOut], stream: Sequence[Encoded]) -> None:
    """Check that no text is longer than the model has positions.

    Args:
        config: the model's transformers configuration.
        texts, stream: see :func:`check_stream`.

    Raises:
        RunError: naming every text and task that is longer.
    """
    if problems := _too_long(config, texts, stream):
        raise RunError("\n".join(problems))


def _too_long(
    config: Any, texts: Sequence[HeldOut], stream: Sequence[Encoded], unwritten: Sequence[PromptList | OwnText] = ()
) -> list[str]:
    positions = longest_row(config)
    if positions is None:
        return []
    problems = [
        f"The text {text.name!r} has windows of {text.longest} tokens, but the model has only {positions} positions. "
        f"Set its window to {positions} or less."
        for text in texts
        if text.longest > positions
    ]
    for text in unwritten:
        option, rows = (
            ("max_length", text.max_length)
            if isinstance(text, OwnText)
            else (f"max_new_tokens, or shorten its longest prompt, of {text.longest_prompt} tokens", text.longest)
        )
        if rows > positions:
            problems.append(
                f"The base model would write rows of {rows} tokens for the text {text.name!r}, but it has only "
                f"{positions} positions. Lower its {option}."
            )
    for part in stream:
        if part.generation is not None and (problem := part.generation.problem_of_positions(positions)):
            problems.append(problem)
        longest = max(len(row["input_ids"]) for row in (*part.train, *part.evaluation))
        if longest > positions:
            problems.append(
                f"Task {part.task.name!r} has a text of {longest} tokens, but the model has only {positions} "
                f"positions. Lower max_length from {part.settings.max_length} to {positions} or less."
            )
    return problems


def _put_on(method: Method, load_empty: Callable[[], nn.Module], tasks: int, seed: int) -> Adapted:
    if isinstance(method, Peft) and method.changes_the_base:
        return _put_on_as_lora(method, load_empty, tasks, seed)
    base = load_empty()
    layers = {name: module for name, module in base.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    _check_targets(method.options.get("target_modules"), base, list(layers))
    try:
        model = method.apply(base, seed)
        trained = _trained(model)
        for task in range(1, tasks):
            method.begin_task(model, task, seed)
            if method.adapter(task) != method.adapter(task - 1):
                trained += _trained(model)
    except ValueError as error:
        listed = "" if "inear layers" in str(error) else f" Linear layers of this model: {_last_parts(layers)}."
        raise ValueError(f"{error}{listed if 'arget modules' in str(error) else ''}") from error
    except Exception as error:
        first = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        # Operators without an implementation on the meta device raise these; a wrong option raises something else.
        if isinstance(error, RuntimeError) and (type(error) is RuntimeError or "meta" in str(error)):
            return Adapted(unknown=f"reads the model's weights when it starts ({first})")
        raise ValueError(first) from error
    _check_ranks(method, model)
    if method.trains_backbone and not trained:
        raise ValueError("with these options it trains no parameter")
    return Adapted(model, trained)


def _put_on_as_lora(method: Peft, load_empty: Callable[[], nn.Module], tasks: int, seed: int) -> Adapted:
    """Check a method that starts from a decomposition of the weights, with LoRA's own start, which has its shapes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RecipeWarning)
        options = {key: value for key, value in method.options.items() if key not in _OF_A_START}
        found = _put_on(replace(method, options=options), load_empty, tasks, seed)
    if above := [str(one.message) for one in caught if issubclass(one.category, RecipeWarning)]:
        raise ValueError(f"{above[0].partition(': ')[2]} A decomposition of the weights has no more directions.")
    return found


def _below(method: Method, adapted: Adapted, load_empty: Callable[[], nn.Module], seed: int) -> int:
    if adapted.model is not None:
        return layers_below(adapted.model)
    assert isinstance(method, Peft)  # only an adapter of PEFT reads the weights when it starts
    return layers_below_targets(load_empty(), method.configuration(seed))


def _check_targets(targets: Any, base: nn.Module, layers: Sequence[str]) -> None:
    """Check that each target is a module of the model. PEFT accepts the list if one of them is."""
    if not isinstance(targets, (list, tuple)) or any(p.ndim > 2 for p in base.parameters()):  # fused experts
        return
    names = [name for name, _ in base.named_modules()]
    unknown = [one for one in targets if not any(name == one or name.endswith(f".{one}") for name in names)]
    if unknown:
        said = unknown_names("the model", unknown, _last_parts(layers).split(", "), "module")
        listed = "" if " It has " in said else f" Linear layers of this model: {_last_parts(layers)}."
        raise ValueError(f"target_modules: {said}{listed}")


def _check_ranks(method: Method, model: nn.Module) -> None:
    above: dict[str, int] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, CurloraLayer):
            smaller = min(layer.weight_shape[-2:])
        elif isinstance(layer, LoraLayer):
            smaller = min(layer.in_features, layer.out_features)
        else:
            continue
        if any(r > smaller for r in layer.r.values()):
            above[name] = smaller
    if not above:
        return
    named = [f"{name.removeprefix('base_model.model.')} ({smaller})" for name, smaller in above.items()]
    some = ", ".join(named[:3]) + (", ..." if len(named) > 3 else "")
    found = f"its rank is larger than the smaller side of {len(above)} layer(s): {some}."
    if method.kind == "curlora":
        raise ValueError(f"{found} Choose a smaller r, or set one for these layers in rank_pattern.")
    warnings.warn(
        f"method {method.name!r}: {found} The rank of their updates cannot exceed that side: a smaller r is enough.",
        RecipeWarning,
        stacklevel=2,
    )


def _trained(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _last_parts(names: Iterable[str]) -> str:
    return ", ".join(sorted({name.rpartition(".")[2] for name in names})) or "none"
