"""Cache of the outputs of the lowest layers, which no method trains: computed once for each batch.

Hidden states are cached per batch, not per row. A cache per row would also serve other epochs and seeds, but the last
bits of a row depend on its batch: matrix products of another height are summed in another order. A cache per batch
returns exactly what the layers would compute. The same batch occurs again when another method, value of a grid or order
of the tasks trains with the same seed, when anything is scored, and when a general text is read. With
``fixed_batches`` the batches of all epochs and seeds are the same too.
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
from curlora.continual.model_digest import model_digest
from curlora.text.evaluating import evaluating

__all__ = ["FOLDER", "keep_frozen_layers", "layers_below", "layers_below_targets"]

FOLDER = ".frozen_layers"
"""The cache's folder in the run directory. No method can have this name."""

_LEAVE_OUT = "Leave out cache_frozen_layers, or adapt only upper layers (layers_to_transform)."


def layers_below(model: nn.Module) -> int:
    """Return the number of a causal language model's lowest layers that a method does not change.

    Args:
        model: the model with the method applied; it may be on the meta device.

    Raises:
        ValueError: if the decoder's layers are not found, something outside them is trained, the lowest layer is
            trained, or a lower layer draws random numbers in training.
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
    """Return the same as :func:`layers_below` from the names of an adapter's target modules.

    This is for adapters that cannot be applied to a model without weights.

    Args:
        model: the model without the adapter; it may be on the meta device.
        config: the adapter's PEFT configuration.

    Raises:
        ValueError: as :func:`layers_below`, and if the configuration does not name its ``target_modules``.
    """
    decoder, layers = _decoder_of(model)
    if not config.target_modules or config.target_modules == "all-linear":
        raise ValueError(
            f"its layers are not known before it is applied to the model: name its target_modules. {_LEAVE_OUT}"
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
            raise ValueError(f"it trains {name}, which is outside the model's layers. {_LEAVE_OUT}")
        lowest = min(lowest, number)
    if lowest == 0:
        raise ValueError(
            f"it trains the first of the model's {len(layers)} layers, so no layer below can be cached. {_LEAVE_OUT}"
        )
    beside = [child for child in decoder.children() if child is not layers]
    for module in [decoder, *(inner for part in (*beside, *layers[:lowest]) for inner in part.modules())]:
        rates = [value for key, value in vars(module).items() if "drop" in key or isinstance(module, nn.Dropout)]
        if drawn := [rate for rate in rates if isinstance(rate, float) and rate > 0]:
            raise ValueError(
                f"the model's lower layers have a dropout of {drawn[0]:g} in training ({type(module).__name__}), so "
                "their outputs differ each time. Leave out cache_frozen_layers."
            )
    return lowest


def _decoder_of(model: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    language_model: Any = model
    decoder = language_model.get_decoder() if hasattr(model, "get_decoder") else model
    count = getattr(getattr(decoder, "config", None), "num_hidden_layers", None)
    lists = [child for child in decoder.children() if isinstance(child, nn.ModuleList) and len(child) == count]
    if len(lists) != 1:
        raise ValueError(f"the layers of a {type(model).__name__} were not found. Leave out cache_frozen_layers.")
    return decoder, lists[0]


def keep_frozen_layers(model: nn.Module, below: int, directory: Path) -> nn.Module:
    """Make a model read the outputs of its lowest layers from a folder, and add missing ones to it.

    Forward passes that generate, or that ask for more than the last layer's output, run all layers.

    Args:
        model: a causal language model of transformers, without adapters; modified in place.
        below: the number of lowest layers, which must not change from now on.
        directory: the run directory, which several processes may share.

    Returns:
        The model.

    Raises:
        RunError: if the model's upper layers need more from the lower layers than their output.
    """
    decoder, layers = _decoder_of(model)
    folder = directory / FOLDER / f"{below}-{model_digest(model)[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    _check_alone(model, decoder, layers, below)
    _Kept(decoder, layers, below, _Files(folder))
    return model


class _Files:
    """Hidden states in a folder, one file per batch, each written atomically."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, key: str) -> Tensor | None:
        """Return the hidden states of ``key``, memory-mapped, or ``None``."""
        try:
            return load_file(self.folder / f"{key}.safetensors")["states"]
        except (FileNotFoundError, SafetensorError):
            return None

    def __setitem__(self, key: str, states: Tensor) -> None:
        # Several workers may compute the same batch. Each writes its own file, and the last one remains.
        partial = self.folder / f"{key}.{uuid.uuid4().hex}.partial"
        try:
            save_file({"states": states.detach().contiguous()}, partial)
            with partial.open("rb") as stream:
                os.fsync(stream.fileno())
            os.replace(partial, self.folder / f"{key}.safetensors")
        finally:
            partial.unlink(missing_ok=True)


class _Kept:
    """Replaces the ``forward`` of the lowest layers, and is called before each forward pass of the decoder."""

    def __init__(self, decoder: nn.Module, layers: nn.ModuleList, below: int, kept: Any) -> None:
        self.kept = kept
        self.key: str | None = None  # of the current forward pass; None if it runs all layers
        self.states: Tensor | None = None
        self.hook = decoder.register_forward_pre_hook(self._begin, with_kwargs=True)
        for number, layer in enumerate(layers[:below]):
            # The layer itself is not replaced, so names, hooks and devices stay the same.
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
    """Hash everything that determines the lowest layers' output; ``None`` for a pass that needs more than it."""
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
    """Check on a few tokens that the upper layers need nothing from the lower ones but their output."""
    ids = torch.arange(4, device=next(model.parameters()).device)[None]
    forwards = [layer.forward for layer in layers[:below]]
    kept: dict[str, Tensor] = {}
    probe = _Kept(decoder, layers, below, kept)
    try:
        with evaluating(model), torch.no_grad():
            first, second = (model(input_ids=ids, use_cache=False).logits for _ in range(2))
        alike = len(kept) == 1 and torch.equal(first, second)
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError):  # raised by a model's own code
        alike = False
    finally:
        probe.hook.remove()
        for layer, forward in zip(layers, forwards, strict=False):
            layer.forward = forward
    if not alike:
        raise RunError(
            f"The upper layers of a {type(model).__name__} need more from the lower layers than their output. Leave "
            "out cache_frozen_layers."
        )
