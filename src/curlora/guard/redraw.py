"""Choose columns and rows for a task: those that the task uses most, relative to general text."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any

import torch
from torch import Tensor, nn

from curlora.errors import GuardError
from curlora.functional import autocast_off
from curlora.guard.calibration import adapter_of, layers_of
from curlora.text.model_pass import backward, pass_over, ready
from curlora.text.processes import sum_over_processes
from curlora.text.progress import Shown, stage
from curlora.text.rows import IGNORED
from curlora.tuner.layer import CurloraLayer
from curlora.tuner.param_wrapper import ParamWrapper
from curlora.tuner.weight import bias_of, read, running_device

__all__ = ["redraw"]

# Relative to the mean. It bounds the score of a column or row that general text does not use at all.
_FLOOR = 0.01
# Relative to the largest gradient of a token in a row. Smaller gradients are rounding errors of float32.
_ROUNDING = 1e-5


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
    """Choose the columns and rows of an untrained adapter for a task, in place of those that were drawn.

    Let ``y0`` be a layer's output without its bias, and ``d`` the gradient of the loss with respect to it. For each of
    its rows of ``W``, an adapter reads an entry of ``y0``. For each of its columns, it acts on the loss through an
    entry of ``W^T d``. This function keeps the ``r`` rows and the ``r`` columns with the largest ratios

        E_task[(y0)_i^2] / E_general[(y0)_i^2]        E_task[(W^T d)_j^2] / E_general[(W^T d)_j^2]

    For the task, ``d`` comes from its loss; for general text, from answers that are drawn from the model's own
    predictions. The CURLoRA paper uses only the weight, and draws by inverted norms.

    Call this before :func:`curlora.guard.calibrate`, because a calibration belongs to the chosen columns and rows. Use
    another part of the general text there: the choice favors columns and rows that this part happens not to use.

    With ``torch.distributed``, general texts and rows are divided among the processes. Batches, also those of the task,
    are expected to be divided already. Every process chooses the same columns and rows.

    Args:
        model: a causal language model with a CURLoRA adapter whose ``U`` is zero. Only the adapter's indices change.
        task: batches of the task; a few hundred examples are enough.
        general: general text, as :func:`curlora.guard.calibrate` takes it.
        tokenizer: the model's tokenizer; needed for texts only.
        loss: returns the loss of a batch of ``task``, a mean over its rows; ``model(**batch).loss`` if ``None``. If the
            model has a new head, fit the head first: with an untrained head the loss says nothing about the task.
        adapter: the adapter's name; the active one if ``None``. Other adapters, of earlier tasks for example, may be
            active as well; the gradients then include them.
        max_length, batch_size: the rows of the general text, see :func:`curlora.guard.calibrate`.
        seed, progress: see :func:`curlora.guard.calibrate`.

    Raises:
        GuardError: if the adapter has been trained or is merged, if it adapts a parameter (``target_parameters``), if
            there is no batch of the task, if an output or a gradient is not finite, and for the reasons of
            ``calibrate``.
    """
    adapter = adapter_of(model, adapter)
    layers = layers_of(model, adapter)
    for name, layer in layers.items():
        if isinstance(layer, ParamWrapper):
            raise GuardError(
                f"{name!r} is a parameter, whose inputs and outputs cannot be observed, so columns and rows cannot be "
                "chosen for a task there. Leave target_parameters out, or keep the columns and rows that were drawn."
            )
        if layer.merged or bool(layer.matrices[adapter].weight.any()):
            raise GuardError(
                f"Layer {name!r} has been trained, or has a merged adapter: choose columns and rows before training, "
                "with nothing merged."
            )
    of_general = {name: _Use(layer) for name, layer in layers.items()}
    with _listening(of_general, layers):
        pass_over(
            model, layers, general, tokenizer, max_length=max_length, batch_size=batch_size, gradients=True,
            seed=seed, progress=progress, doing="scoring columns and rows on general text", begin=lambda mask: None,
            end=lambda: None,
        )  # fmt: skip
    of_task = {name: _Use(layer, mean_loss=True) for name, layer in layers.items()}
    device = running_device(model)
    batches, count = 0, len(task) if isinstance(task, Sized) else None
    with (
        ready(model, layers, gradients=True) as reached,
        _listening(of_task, layers),
        stage(progress, "scoring columns and rows on the task", count) as advance,
    ):
        for batch in task:
            value = _loss(model, batch, device) if loss is None else loss(batch)
            # The gradients of a mean over many tokens are small, and most would be zero in float16.
            scale = _loss_scale(batch)
            for use in of_task.values():
                use.loss_scale = scale
            backward(value, reached, torch.full_like(value, scale))
            batches += 1
            advance(1)
    if not batches:
        raise GuardError("There is no batch of the task, so columns and rows cannot be chosen: pass at least one.")
    everything = [part for use in (*of_general.values(), *of_task.values()) for part in (use.outputs, use.inputs)]
    summed = iter(sum_over_processes(everything, device))
    general_sums = [(next(summed), next(summed)) for _ in layers]
    task_sums = [(next(summed), next(summed)) for _ in layers]
    choices = {}
    for (name, layer), by_general, by_task in zip(layers.items(), general_sums, task_sums, strict=True):
        if all(bool(sums.any()) for sums in by_task):  # a layer that the task does not use keeps its columns and rows
            gathered, added = (
                _most(task_use, general_use, layer.r[adapter], name)
                for task_use, general_use in zip(by_task, by_general, strict=True)
            )
            # gathered indexes the output and added the input; the weight's layout decides which of them are columns.
            choices[name] = (gathered, added) if layer.fan_in_fan_out else (added, gathered)
    for name, sides in choices.items():
        layers[name].redraw(adapter, torch.stack(sides))


def _loss(model: nn.Module, batch: Mapping[str, Any], device: torch.device) -> Tensor:
    moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    value = getattr(model(**moved), "loss", None)
    if not isinstance(value, Tensor):
        raise GuardError("The model returns no loss for a batch of the task: give the batches labels, or pass loss=...")
    return value


def _loss_scale(batch: Any) -> float:
    """Return the number of labels that the mean is over, rounded to a power of two to scale without rounding errors."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    count = int((labels != IGNORED).sum()) if isinstance(labels, Tensor) else 1
    return 2.0 ** round(math.log2(max(1, count)))


class _Use:
    """Sums of squares of each entry of a layer's output and of ``W^T d``.

    Args:
        layer: a ``CurloraLayer``; typed as ``Any``, because PEFT's part of it has no types.
        mean_loss: whether the loss is a mean over the batch. An example's own ``d`` is then larger by the number of
            examples.
    """

    def __init__(self, layer: Any, mean_loss: bool = False) -> None:
        base = layer.get_base_layer()
        self.base, self.mean_loss, self.loss_scale = base, mean_loss, 1.0
        device = running_device(base)
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.outputs = torch.zeros(layer.out_features, dtype=dtype, device=device)
        self.inputs = torch.zeros(layer.in_features, dtype=dtype, device=device)

    def add(self, output: Tensor, gradient: Tensor, examples: int) -> None:
        if not gradient.numel():  # an expert that received no token
            return
        # Leaves out padding, and gradients that are rounding only, such as that of a query with one key to attend to.
        size = gradient.abs().amax(-1)
        seen = (size > _ROUNDING * size.amax(-1, keepdim=True)) | ~size.isfinite()
        seen, output, gradient = seen.flatten(), output.flatten(0, -2), gradient.flatten(0, -2)
        bias = bias_of(self.base)
        output = output[seen] if bias is None else output[seen] - bias.to(output.dtype)
        with read(self.base) as weight, autocast_off(gradient):
            back = weight.input_gradient(gradient[seen])
        back = back.to(self.inputs.dtype) * ((examples if self.mean_loss else 1) / self.loss_scale)
        self.outputs += output.to(self.outputs.dtype).square().sum(0)
        self.inputs += back.square().sum(0)


def _most(task: Tensor, general: Tensor, r: int, name: str) -> Tensor:
    """Return the indices of the ``r`` largest ratios of task to general text, sorted, shape ``(r,)``.

    If the general text does not use the layer, the task alone decides.
    """
    relative = general / general.mean() if bool(general.any()) else torch.ones_like(general)
    score = task / task.mean() / (relative + _FLOOR)
    if not bool(score.isfinite().all()):
        raise GuardError(
            f"Layer {name!r} has outputs or gradients that are not finite, on the task or on general text. Try float32 "
            "or bfloat16."
        )
    return score.topk(r).indices.sort().values


@contextlib.contextmanager
def _listening(uses: Mapping[str, _Use], layers: Mapping[str, CurloraLayer]) -> Iterator[None]:
    """Hook the layers so that they add to ``uses``."""
    outputs: dict[str, Tensor] = {}  # the outputs of base layers, until their adapted layers have run
    # The number of examples in the batch: some blocks flatten all tokens into one dimension for their linear layers.
    examples = None

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
