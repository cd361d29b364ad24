"""What the lowest layers of a model put out where no method trains them: computed once for each batch, and kept.

The states are kept batch by batch, as they were computed. By row they would serve every epoch and seed too, but the
last bits of a row depend on the batch it is in: matrix products of another height are summed up in another order. So
what is kept is exactly what the layers would give, and a batch is met again whenever another method, value of a grid
or order of the tasks trains with the same seed, whenever anything is scored, and whenever a general text is read.
"""

from __future__ import annotations

import functools
import hashlib
import os
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from curlora.continual.errors import RunError

__all__ = ["FOLDER", "keep_frozen_layers", "layers_below", "layers_below_targets"]

FOLDER = ".frozen_layers"
"""In the run directory; no method can be called so."""

_LEAVE_OUT = "Leave out cache_frozen_layers, or adapt upper layers alone (layers_to_transform)."


def layers_below(model: nn.Module) -> int:
    """How many of a causal language model's lowest layers a method leaves as they are.

    Args:
        model: with the method on it, also on the meta device.

    Raises:
        ValueError: if the decoder's layers are not found, if something below them is trained, if none is left, or if
            one of them draws random numbers in training.
    """
    decoder, layers = _decoder_of(model.get_base_model() if isinstance(model, PeftModel) else model)
    numbers = {id(module): number for number, layer in enumerate(layers) for module in layer.modules()}
    changed = [
        (name, numbers.get(id(module)))
        for name, module in decoder.named_modules()
        if isinstance(module, BaseTunerLayer) or any(p.requires_grad for p in module.parameters(recurse=False))
    ]
    return _lowest(decoder, layers, changed)


def layers_below_targets(model: nn.Module, config: Any) -> int:
    """The same for an adapter that cannot be put on a model without weights, by the names of what it adapts.

    Args:
        model: without the adapter, also on the meta device.
        config: the adapter's, of PEFT.

    Raises:
        ValueError: as :func:`layers_below`, and if the configuration does not say its ``target_modules``.
    """
    decoder, layers = _decoder_of(model)
    if not config.target_modules or config.target_modules == "all-linear":
        raise ValueError(
            f"its layers are not known before it is put on the model: say its target_modules. {_LEAVE_OUT}"
        )
    numbers = {id(module): number for number, layer in enumerate(layers) for module in layer.modules()}
    names = {id(module): name for name, module in model.named_modules()}
    changed = [
        (name, numbers.get(id(module)))
        for name, module in decoder.named_modules()
        if check_target_module_exists(config, names[id(module)])
    ]
    return _lowest(decoder, layers, changed)


def _lowest(decoder: nn.Module, layers: nn.ModuleList, changed: Iterable[tuple[str, int | None]]) -> int:
    lowest = len(layers)
    for name, number in changed:
        if number is None:
            raise ValueError(f"it trains {name}, which is in none of the model's layers. {_LEAVE_OUT}")
        lowest = min(lowest, number)
    if lowest == 0:
        raise ValueError(f"it trains the first of the model's {len(layers)} layers: none is below. {_LEAVE_OUT}")
    beside = [child for child in decoder.children() if child is not layers]
    for module in [decoder, *(inner for part in (*beside, *layers[:lowest]) for inner in part.modules())]:
        rates = [value for key, value in vars(module).items() if "drop" in key or isinstance(module, nn.Dropout)]
        if drawn := [rate for rate in rates if isinstance(rate, float) and rate > 0]:
            raise ValueError(
                f"the model's lower layers have a dropout of {drawn[0]:g} in training ({type(module).__name__}), and "
                "so other outputs each time. Leave out cache_frozen_layers."
            )
    return lowest


def _decoder_of(model: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    language_model: Any = model
    decoder = language_model.get_decoder() if hasattr(model, "get_decoder") else model
    count = getattr(getattr(decoder, "config", None), "num_hidden_layers", None)
    lists = [child for child in decoder.children() if isinstance(child, nn.ModuleList) and len(child) == count]
    if len(lists) != 1:
        raise ValueError(f"the layers of a {type(model).__name__} are not found. Leave out cache_frozen_layers.")
    return decoder, lists[0]


def keep_frozen_layers(model: nn.Module, below: int, directory: Path) -> nn.Module:
    """Let a model take from a folder what its lowest layers put out, and add to the folder what is not there.

    Passes that generate, and any that ask for more than the last layer's output, run all layers as ever.

    Args:
        model: a causal language model of transformers, without adapters; it is changed.
        below: how many of its layers stay as they are from now on.
        directory: the run directory, which several processes may share.

    Returns:
        The model.

    Raises:
        RunError: if the model's upper layers need more of the lower ones than what these put out.
    """
    decoder, layers = _decoder_of(model)
    folder = directory / FOLDER / str(below)
    folder.mkdir(parents=True, exist_ok=True)
    _check_alone(model, decoder, layers, below)
    _Kept(decoder, layers, below, _Files(folder))
    return model


class _Files:
    """States in a folder, each in a file of its own that appears whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, key: str) -> Tensor | None:
        """Mapped into memory, and read as it is used."""
        try:
            return load_file(self.folder / f"{key}.safetensors")["states"]
        except (FileNotFoundError, SafetensorError):
            return None

    def __setitem__(self, key: str, states: Tensor) -> None:
        # Several workers may have computed the same: each writes for itself, and the last one stays.
        partial = self.folder / f"{key}.{uuid.uuid4().hex}.partial"
        try:
            save_file({"states": states.detach().contiguous()}, partial)
            with partial.open("rb") as stream:
                os.fsync(stream.fileno())
            os.replace(partial, self.folder / f"{key}.safetensors")
        finally:
            partial.unlink(missing_ok=True)


class _Kept:
    """Stands before each of the lowest layers, and hears of each pass."""

    def __init__(self, decoder: nn.Module, layers: nn.ModuleList, below: int, kept: Any) -> None:
        self.kept = kept
        self.key: str | None = None  # of the pass that is running; none if it runs as ever
        self.states: Tensor | None = None
        self.hook = decoder.register_forward_pre_hook(self._begin, with_kwargs=True)
        for number, layer in enumerate(layers[:below]):
            # The layer itself stays where it is: names, hooks and device are its own.
            layer.forward = functools.partial(self._run, layer.forward, number == below - 1)

    def _begin(self, decoder: nn.Module, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> None:
        self.key = _key(arguments, options)
        self.states = None if self.key is None else self.kept.get(self.key)

    def _run(self, forward: Callable[..., Any], last: bool, *arguments: Any, **options: Any) -> Any:
        if self.key is None:
            return forward(*arguments, **options)
        hidden = arguments[0] if arguments else options["hidden_states"]
        if self.states is not None:
            return self.states.to(hidden.device) if last else hidden
        output = forward(*arguments, **options)
        if last:
            self.kept[self.key] = output
        return output


def _key(arguments: tuple[Any, ...], options: Mapping[str, Any]) -> str | None:
    """Of all that decides what the lowest layers put out; none for a pass that wants more of them than that."""
    if options.get("use_cache") is not False:
        return None
    digest = hashlib.sha256()
    for name, value in [*enumerate(arguments), *sorted(options.items())]:
        if isinstance(value, Tensor) and not value.is_floating_point():
            kind = value.device.type
            autocast = (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            digest.update(f"{name} {value.dtype} {tuple(value.shape)} {kind} {autocast}".encode())
            digest.update(value.cpu().numpy().tobytes())
        elif value is not None and value is not False:  # embeddings, outputs of all layers, ...
            return None
    return digest.hexdigest()


def _check_alone(model: Any, decoder: nn.Module, layers: nn.ModuleList, below: int) -> None:
    """Check on a few tokens that the upper layers go by the lower ones' output alone, and by nothing beside it."""
    ids = torch.arange(4, device=next(model.parameters()).device)[None]
    forwards = [layer.forward for layer in layers[:below]]
    kept: dict[str, Tensor] = {}
    probe = _Kept(decoder, layers, below, kept)
    training = model.training
    try:
        model.eval()
        with torch.no_grad():
            first, second = (model(input_ids=ids, use_cache=False).logits for _ in range(2))
        alike = len(kept) == 1 and torch.equal(first, second)
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError):  # whatever a model's code says
        alike = False
    finally:
        model.train(training)
        probe.hook.remove()
        for layer, forward in zip(layers, forwards, strict=False):
            layer.forward = forward
    if not alike:
        raise RunError(
            f"The upper layers of a {type(model).__name__} need more of the lower ones than what these put out. Leave "
            "out cache_frozen_layers."
        )
