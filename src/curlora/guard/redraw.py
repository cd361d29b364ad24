"""Columns and rows for a task: those that it uses most, for what general text uses of them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any

import torch
from torch import Tensor, nn

from curlora.functional import autocast_off
from curlora.guard.calibration import adapter_of, layers_of
from curlora.guard.errors import GuardError
from curlora.guard.model_pass import backward, pass_over, ready
from curlora.guard.processes import sum_over_processes
from curlora.guard.progress import Shown, stage
from curlora.tuner.layer import CurloraLayer
from curlora.tuner.param_wrapper import ParamWrapper
from curlora.tuner.weight import device_of, read

__all__ = ["redraw"]

# Of the mean: what general text does not use at all is not worth infinitely much.
_FLOOR = 0.01
# Of the largest gradient of a token in a row: what is smaller is float32's rounding.
_ROUNDING = 1e-5
_IGNORED = -100


def redraw(
    model: nn.Module,
    task: Iterable[Any],
    general: Iterable[str] | Iterable[Tensor] | Iterable[Mapping[str, Tensor]],
    tokenizer: Any = None,
    *,
    loss: Callable[[Any], Tensor] | None = None,
    adapter: str | None = None,
    max_length: int = 128,
    batch_size: int = 8,
    seed: int = 0,
    progress: Shown = True,
) -> None:
    """Draw the columns and rows of an untrained adapter anew, for a task.

    With ``y0`` a layer's output and ``d`` the gradient with respect to it, an adapter reads entries of ``y0``, one for
    each of its rows of ``W``, and acts on the loss through entries of ``W^T d``, one for each of its columns. Taken are
    the ``r`` of each with the largest

        E_task[(y0)_i^2] / E_general[(y0)_i^2]        E_task[(W^T d)_j^2] / E_general[(W^T d)_j^2]

    where the task's ``d`` is of its loss, and general text's of answers drawn from the model's own predictions. The
    paper draws from the weight alone, by inverted norms. Do this before :func:`curlora.guard.calibrate`, whose moments
    are of the columns and rows that there are; best on another part of the general text, since what this part happens
    not to use is preferred.

    Where ``torch.distributed`` runs, general texts and rows are shared out over the processes, and batches are taken to
    be shared out already, the task's among them; every process draws the same.

    Args:
        model: with a CURLoRA adapter whose ``U`` is zero; a causal language model. It is changed in its indices alone.
        task: batches of the task; a few hundred examples are enough.
        general: general text, as :func:`curlora.guard.calibrate` takes it.
        tokenizer: of the model; for texts.
        loss: of one of ``task``'s batches, a mean over its rows; ``model(**batch).loss`` if ``None``. Of a model with a
            new head this is the loss of a head that has been fitted first, or it says nothing of the task.
        adapter: the adapter's name; the active one if ``None``. Others may be active beside it, of earlier tasks for
            instance: gradients are then those of the model with them.
        max_length, batch_size, seed, progress: as :func:`curlora.guard.calibrate` has them; the first two of the
            general text.

    Raises:
        GuardError: if the adapter has been trained or is merged, if there is no batch of the task, if a gradient is not
            finite, and as ``calibrate``.
    """
    adapter = adapter_of(model, adapter)
    layers = layers_of(model, adapter)
    for name, layer in layers.items():
        if isinstance(layer, ParamWrapper):
            raise GuardError(
                f"{name!r} is a parameter, whose experts' inputs and outputs are not seen: columns and rows cannot be "
                "chosen for a task there. Leave target_parameters out, or keep those that were drawn."
            )
        if layer.merged or bool(layer.matrices[adapter].weight.any()):
            raise GuardError(f"Layer {name!r} has been trained, or has a merged adapter: columns and rows come before.")
    of_general = {name: _Use(layer) for name, layer in layers.items()}
    with _listening(of_general, layers):
        pass_over(
            model, layers, general, tokenizer, max_length=max_length, batch_size=batch_size, gradients=True,
            seed=seed, progress=progress, doing="what the text uses", begin=lambda mask: None, end=lambda: None,
        )  # fmt: skip
    of_task = {name: _Use(layer, mean_loss=True) for name, layer in layers.items()}
    device = next(model.parameters()).device
    batches, count = 0, len(task) if isinstance(task, Sized) else None
    with (
        ready(model, layers, gradients=True) as reached,
        _listening(of_task, layers),
        stage(progress, "what the task uses", count) as advance,
    ):
        for batch in task:
            value = _loss(model, batch, device) if loss is None else loss(batch)
            # Of a mean over many tokens most gradients would be zero in float16.
            scale = _loss_scale(batch)
            for use in of_task.values():
                use.loss_scale = scale
            backward(value, reached, torch.full_like(value, scale))
            batches += 1
            advance(1)
    if not batches:
        raise GuardError("There is no batch of the task to see by what it uses")
    everything = [part for use in (*of_general.values(), *of_task.values()) for part in (use.outputs, use.inputs)]
    summed = iter(sum_over_processes(everything, device))
    general_sums = [(next(summed), next(summed)) for _ in layers]
    task_sums = [(next(summed), next(summed)) for _ in layers]
    choices = {}
    for (name, layer), by_general, by_task in zip(layers.items(), general_sums, task_sums, strict=True):
        if all(bool(sums.any()) for sums in by_task):  # a layer that the task does not use keeps what it has
            gathered, added = (
                _most(task_use, general_use, layer.r[adapter], name)
                for task_use, general_use in zip(by_task, by_general, strict=True)
            )
            # The gathered entries are of the output, the others of the input; which are columns is the layout's.
            choices[name] = (gathered, added) if layer.fan_in_fan_out else (added, gathered)
    for name, sides in choices.items():
        layers[name].redraw(adapter, torch.stack(sides))


def _loss(model: nn.Module, batch: Mapping[str, Any], device: torch.device) -> Tensor:
    moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    value = getattr(model(**moved), "loss", None)
    if not isinstance(value, Tensor):
        raise GuardError("The model gives no loss for a batch of the task: has it labels? Or pass a loss of your own.")
    return value


def _loss_scale(batch: Any) -> float:
    """A power of two, so that nothing else is rounded: about as many as the mean is over."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    count = int((labels != _IGNORED).sum()) if isinstance(labels, Tensor) else 1
    return 2.0 ** round(math.log2(max(1, count)))


class _Use:
    """Sums of squares, by entry of a layer's output and of ``W^T d``.

    Args:
        layer: a CurloraLayer, of which PEFT's part has no types.
        mean_loss: whether ``d`` is of a mean over a batch, and an example's own ``d`` so many times as large.
    """

    def __init__(self, layer: Any, mean_loss: bool = False) -> None:
        base = layer.get_base_layer()
        self.base, self.mean_loss, self.loss_scale = base, mean_loss, 1.0
        device = device_of(base)
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.outputs = torch.zeros(layer.out_features, dtype=dtype, device=device)
        self.inputs = torch.zeros(layer.in_features, dtype=dtype, device=device)

    def add(self, output: Tensor, gradient: Tensor, examples: int) -> None:
        if not gradient.numel():  # of an expert that no token goes to
            return
        # Padding is not; nor what is rounding alone, such as the gradient of a query that has one key to attend to.
        size = gradient.abs().amax(-1)
        seen = (size > _ROUNDING * size.amax(-1, keepdim=True)) | ~size.isfinite()
        seen, output, gradient = seen.flatten(), output.flatten(0, -2), gradient.flatten(0, -2)
        bias = getattr(self.base, "bias", None)
        output = output[seen] if bias is None else output[seen] - bias.to(output.dtype)
        with read(self.base) as weight, autocast_off(gradient):
            back = weight.input_gradient(gradient[seen])
        back = back.to(self.inputs.dtype) * ((examples if self.mean_loss else 1) / self.loss_scale)
        self.outputs += output.to(self.outputs.dtype).square().sum(0)
        self.inputs += back.square().sum(0)


def _most(task: Tensor, general: Tensor, r: int, name: str) -> Tensor:
    """Those with the largest ratio; by the task alone where the general text does not use the layer."""
    relative = general / general.mean() if bool(general.any()) else torch.ones_like(general)
    score = task / task.mean() / (relative + _FLOOR)
    if not bool(score.isfinite().all()):
        raise GuardError(f"Layer {name!r} has outputs or gradients that are not finite, of the task or of the text.")
    return score.topk(r).indices.sort().values


@contextlib.contextmanager
def _listening(uses: Mapping[str, _Use], layers: Mapping[str, CurloraLayer]) -> Iterator[None]:
    """While it lasts the layers add to ``uses``."""
    outputs: dict[str, Tensor] = {}  # base layers', until their layers have run
    examples = None  # of the batch that is running: some blocks give their linear layers all tokens in one dimension

    with contextlib.ExitStack() as stack:
        for name, layer in layers.items():

            def base_hook(module: nn.Module, inputs: Any, output: Tensor, name: str = name) -> None:
                outputs[name] = output.detach()

            def layer_hook(module: nn.Module, inputs: Any, output: Tensor, name: str = name) -> None:
                nonlocal examples
                if output.ndim > 2:
                    examples = len(output)
                y0, count = outputs.pop(name), examples or len(output)
                output.register_hook(lambda gradient: uses[name].add(y0, gradient.detach(), count))

            stack.callback(layer.base_layer.register_forward_hook(base_hook).remove)
            stack.callback(layer.register_forward_hook(layer_hook).remove)
        yield
