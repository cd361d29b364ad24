"""Reading of a frozen layer's weight, in any format in which it is stored.

An adapter needs only the norms of the columns and rows, and the drawn columns and rows. Unquantized weights are read in
place. Quantized weights are dequantized one layer at a time, if their library can do so. If a layer cannot be
dequantized, its weight is recovered by applying the layer to the identity, some rows at a time.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from peft.utils.integrations import dequantize_module_weight, gather_params_ctx
from peft.utils.quantization_utils import QuantizationBackend, resolve_quantization_backend
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from curlora._compat import execution_device, in_out_features, offloaded_bias, shallow_twin, unpacked_4bit
from curlora.sampling import squared_norms
from curlora.tuner.sharded import whole

__all__ = [
    "ProbedWeight",
    "StoredWeight",
    "bias_of",
    "brought",
    "check_adaptable",
    "device_of",
    "fan_in_fan_out",
    "is_plain",
    "is_readable",
    "quantization_backend",
    "read",
    "running_device",
    "twin",
]

_CONVOLUTIONS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
)  # fmt: skip
_CHUNK_ELEMENTS = 1 << 22  # the most elements of a chunk of the identity, and of the layer's output for it


def is_plain(layer: nn.Module) -> bool:
    """Return whether the weight is stored unquantized, with at least 16 bits."""
    weight = getattr(layer, "weight", None)
    if not isinstance(layer, (nn.Linear, Conv1D, nn.Embedding)) or not isinstance(weight, Tensor):
        return False
    known = isinstance(weight, (nn.Parameter, DTensor)) or type(weight) is Tensor
    # torchao's quantized tensors report the dtype of their dequantized values.
    known = known and not type(weight).__module__.startswith("torchao.") and not _is_bitsandbytes(weight)
    return known and weight.dtype.is_floating_point and weight.dtype.itemsize >= 2


def _is_bitsandbytes(weight: Tensor) -> bool:
    return type(weight).__name__ in ("Params4bit", "Int8Params")


def twin(layer: nn.Module) -> Any:
    """Return a copy of a layer that shares its weight, so that the copy's weight can be replaced.

    A 4-bit weight that bitsandbytes has repacked for inference is in its original packing in the copy.
    """
    other = shallow_twin(layer)
    if isinstance(getattr(other, "weight", None), nn.Parameter):
        other.weight = unpacked_4bit(layer.weight)
    if hasattr(layer, "state"):  # bitsandbytes keeps the scales of 8-bit weights there
        other.state = copy.copy(layer.state)
    return other


def quantization_backend(layer: nn.Module, get_apply_tensor_subclass: Any) -> QuantizationBackend | None:
    """Return PEFT's backend to read and write a quantized layer's weight; ``None`` if PEFT cannot merge into the layer.

    Args:
        layer: the quantized layer.
        get_apply_tensor_subclass: for a layer quantized by torchao, the function that quantizes its weight again.

    Raises:
        ValueError: if the layer is quantized by torchao and ``get_apply_tensor_subclass`` is ``None``.
    """
    backend = resolve_quantization_backend(layer, get_apply_tensor_subclass=get_apply_tensor_subclass)
    return backend if backend is not None and backend.supports_merge else None


def fan_in_fan_out(layer: nn.Module) -> bool:
    """Return whether the weight is stored as ``(in_features, out_features)``."""
    return isinstance(layer, (Conv1D, nn.Embedding))


def device_of(layer: nn.Module, parameter: str | None = None) -> torch.device:
    """Return the device of the layer's weight, or of the given parameter."""
    for name in ("weight", "qweight", "W_q") if parameter is None else (parameter,):
        tensor = getattr(layer, name, None)
        if isinstance(tensor, Tensor):
            return tensor.device
    return next(itertools.chain(layer.parameters(), layer.buffers())).device


def running_device(module: nn.Module) -> torch.device:
    """Return the device on which a layer or a model runs, also if Accelerate has offloaded it.

    That is the device of its first parameter that has values, or to which Accelerate's hook brings its first ones.
    """
    for part in module.modules():
        if has_offloaded_params(part):
            return execution_device(part)
        for parameter in part.parameters(recurse=False):
            if not parameter.is_meta:
                return parameter.device
    return device_of(module)


def check_adaptable(layer: nn.Module, name: str) -> None:
    """Raise ``TypeError`` if ``layer`` cannot have a CURLoRA adapter. The message says why."""
    kind = type(layer).__name__
    linear = isinstance(layer, (nn.Linear, Conv1D, nn.Embedding)) or (
        not list(layer.children())
        and any(hasattr(layer, inputs) and hasattr(layer, outputs) for inputs, outputs in (
            ("in_features", "out_features"), ("infeatures", "outfeatures")
        ))
    )  # fmt: skip
    if isinstance(layer, _CONVOLUTIONS):
        raise TypeError(
            f"Target module {name!r} is a {kind}, which is not supported: its kernel is not a matrix, so it has no "
            "columns and rows to draw. Leave it out with exclude_modules, or adapt it with LoRA."
        )
    if not linear:
        raise TypeError(
            f"Target module {name!r} is a {kind}, which is not supported. CURLoRA adapts torch.nn.Linear, "
            "torch.nn.Embedding, transformers.pytorch_utils.Conv1D and quantized linear layers: restrict "
            "target_modules to those. Name parameters of other modules, such as experts, in target_parameters."
        )
    if isinstance(layer, (Conv1D, nn.Embedding)) and not is_plain(layer):
        raise TypeError(
            f"Target module {name!r} is a {kind} whose weight is stored as {layer.weight.dtype}. CURLoRA reads the "
            "weights of such layers in float64, float32, bfloat16 and float16. Load the model in one of these, or "
            "leave the layer out with exclude_modules."
        )
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        raise TypeError(
            f"Target module {name!r} is an Embedding with max_norm={layer.max_norm}, which changes its weight in every "
            "forward pass, so an adapter cannot refer to its rows. Leave it out with exclude_modules."
        )
    if isinstance(layer, NonDynamicallyQuantizableLinear):
        raise TypeError(
            f"Target module {name!r} is the output projection of a torch.nn.MultiheadAttention, which reads its weight "
            "and never calls it, so an adapter there would have no effect. Restrict target_modules to other layers."
        )


@contextmanager
def read(layer: nn.Module, name: str = "", parameter: str | None = None) -> Iterator[StoredWeight | ProbedWeight]:
    """Read a layer's weight inside this context. An offloaded, quantized or partitioned weight is only available there.

    Args:
        layer: a frozen layer without adapters.
        name: the layer's name, for errors.
        parameter: name of the layer's parameter to read, shape ``(m, n)``, or ``(E, m, n)`` for experts; the layer's
            weight, in any format, if ``None``.

    Raises:
        TypeError: if the weight can neither be read nor recovered by applying the layer.
        RuntimeError: if the weight is on the meta device and not offloaded by Accelerate.
    """
    with brought(layer, parameter), gather_params_ctx(list(layer.parameters(recurse=False)), modifier_rank=None):
        if device_of(layer, parameter).type == "meta":
            raise RuntimeError(f"The weight of layer {name!r} is on the meta device and has no values. Load it first.")
        if parameter is not None:
            yield StoredWeight(whole(getattr(layer, parameter).detach()))
        elif (dense := _dense(layer)) is None:
            yield ProbedWeight(layer, name)
        else:
            yield StoredWeight(dense, exact=is_plain(layer), fan_in_fan_out=fan_in_fan_out(layer))


def is_readable(layer: nn.Module, parameter: str | None = None) -> bool:
    """Return whether the weight has values, or is offloaded by Accelerate, whose hook can load them."""
    return device_of(layer, parameter).type != "meta" or has_offloaded_params(layer)


def brought(module: nn.Module, parameter: str | None = None) -> AbstractContextManager[None]:
    """Return a context in which parameters that Accelerate has offloaded have values."""
    offloaded = device_of(module, parameter).type == "meta" and has_offloaded_params(module)
    return align_module_device(module) if offloaded else nullcontext()


def bias_of(layer: nn.Module) -> Tensor | None:
    """Return the layer's bias. An offloaded bias is loaded without the weight."""
    bias = getattr(layer, "bias", None)
    if isinstance(bias, Tensor) and bias.is_meta:
        bias = offloaded_bias(layer)
    return bias if isinstance(bias, Tensor) else None


def _dense(layer: nn.Module) -> Tensor | None:
    if is_plain(layer):
        weight: Any = layer.weight
        return whole(weight.detach())
    try:
        weight = _dequantized(layer).detach()
    except (AttributeError, NotImplementedError, TypeError, ValueError):
        return None
    inputs, outputs = in_out_features(layer)
    complete = weight.shape == (outputs, inputs) and weight.dtype.is_floating_point and weight.dtype.itemsize >= 2
    return weight if complete else None


def _dequantized(layer: nn.Module) -> Tensor:
    backend = resolve_quantization_backend(layer, get_apply_tensor_subclass=object)  # only used for writing
    return dequantize_module_weight(layer) if backend is None else backend.get_base_weight(twin(layer))


class StoredWeight:
    """A weight with known values, shape ``(m, n)`` as stored; ``(E, m, n)`` for experts.

    Args:
        weight: the values.
        exact: whether these are stored values; ``False`` for the dequantized values of a quantized weight.
        fan_in_fan_out: whether the weight is stored as ``(in_features, out_features)``.
    """

    def __init__(self, weight: Tensor, *, exact: bool = True, fan_in_fan_out: bool = False) -> None:
        self.weight, self.exact, self.fan_in_fan_out = weight, exact, fan_in_fan_out
        self.shape, self.dtype = weight.shape, weight.dtype

    def squared_norms(self) -> tuple[Tensor, Tensor]:
        """Return :func:`curlora.sampling.squared_norms`, for experts with a first dimension ``E``."""
        if self.weight.ndim == 2:
            return squared_norms(self.weight)
        columns, rows = zip(*(squared_norms(expert) for expert in self.weight), strict=True)
        return torch.stack(columns), torch.stack(rows)

    def columns(self, index: Tensor) -> Tensor:
        """Return ``W[:, index]``, shape ``(m, r)``; for experts ``(E, m, r)`` with an index of shape ``(E, r)``."""
        index = index.to(self.weight.device)
        if index.ndim == 1:
            return self.weight.index_select(1, index)
        return torch.take_along_dim(self.weight, index.long()[:, None, :], dim=2)

    def rows(self, index: Tensor) -> Tensor:
        """Return ``W[index, :]``, shape ``(r, n)``; for experts ``(E, r, n)`` with an index of shape ``(E, r)``."""
        index = index.to(self.weight.device)
        if index.ndim == 1:
            return self.weight.index_select(0, index)
        return torch.take_along_dim(self.weight, index.long()[:, :, None], dim=1)

    def input_gradient(self, d: Tensor) -> Tensor:
        """Return the gradient at the layer's input, shape ``(tokens, inputs)``.

        ``d`` is the gradient at the output, shape ``(tokens, outputs)``.
        """
        weight = self.weight.to(d.dtype)
        return d @ (weight.T if self.fan_in_fan_out else weight)


class ProbedWeight:
    """A weight that is recovered from its layer's outputs: ``W x = layer(x) - layer(0)``.

    Args:
        layer: the layer.
        name: the layer's name, for errors.

    Raises:
        TypeError: if the layer cannot be applied, or adds more than its bias.
    """

    exact = False

    def __init__(self, layer: nn.Module, name: str) -> None:
        self.layer, self.name = layer, name
        inputs, outputs = in_out_features(layer)
        self.shape = torch.Size((outputs, inputs))
        self.device = device_of(layer)
        self.inputs_dtype, zero = self._input_dtype()
        self.offset = zero[0]
        self.dtype = zero.dtype
        bias = getattr(layer, "bias", None)
        rest = self.offset.float() - (0 if bias is None else bias.detach().float())
        if not rest.norm() <= 0.01 * self.offset.float().norm():
            raise TypeError(
                f"Target module {name!r} is a {type(layer).__name__} that adds something of its own to the product "
                "with its weight, besides the bias, and CURLoRA cannot account for it. Leave it out with "
                "exclude_modules."
            )

    def squared_norms(self) -> tuple[Tensor, Tensor]:
        """Return the squared norms of the columns, shape ``(n,)``, and rows, shape ``(m,)``; float64 on the CPU.

        They are also used to check the layer, since an unknown type of layer may do more than multiply.

        Raises:
            TypeError: if the layer is not linear.
        """
        columns, rows = [], torch.zeros(self.shape[0], dtype=torch.float64, device="cpu")
        rng = torch.Generator("cpu").manual_seed(0)
        x = 10 * torch.randn(4, self.shape[1], dtype=torch.float64, device="cpu", generator=rng)
        product = torch.zeros(4, self.shape[0], dtype=torch.float64, device="cpu")
        done = 0
        for chunk in self._chunks():
            some = chunk.to(device="cpu", dtype=torch.float64)
            product += x[:, done : done + len(some)] @ some
            done += len(some)
            columns.append(some.square().sum(1))
            rows += some.square().sum(0)
        with torch.no_grad():
            found = self.layer.forward(x.to(self.device, self.inputs_dtype)) - self.offset
        if not (found.cpu().double() - product).norm() <= 0.1 * product.norm():  # activations may be rounded
            raise TypeError(
                f"Target module {self.name!r} is a {type(self.layer).__name__} that is not linear: its output is not "
                "the product with a weight, so it has no columns and rows. Leave it out with exclude_modules."
            )
        return torch.cat(columns), rows

    def columns(self, index: Tensor) -> Tensor:
        """Return ``W[:, index]``, shape ``(m, r)``."""
        return self._apply(index.to(self.device)).T

    def rows(self, index: Tensor) -> Tensor:
        """Return ``W[index, :]``, shape ``(r, n)``."""
        index = index.to(self.device)
        return torch.cat([chunk.index_select(1, index) for chunk in self._chunks()]).T

    def input_gradient(self, d: Tensor) -> Tensor:
        """Return the gradient at the layer's input, shape ``(tokens, inputs)``.

        ``d`` is the gradient at the output, shape ``(tokens, outputs)``.
        """
        return torch.cat([d @ chunk.T.to(d.dtype) for chunk in self._chunks()], dim=1)

    def _chunks(self) -> Iterator[Tensor]:
        """Yield the columns of ``W`` in chunks, as rows: shape ``(columns of the chunk, m)``."""
        for index in torch.arange(self.shape[1], device=self.device).split(max(1, _CHUNK_ELEMENTS // max(self.shape))):
            yield self._apply(index)

    @torch.no_grad()
    def _apply(self, index: Tensor) -> Tensor:
        one_hot = torch.zeros(len(index), self.shape[1], dtype=self.inputs_dtype, device=self.device)
        one_hot[torch.arange(len(index), device=self.device), index.long()] = 1
        return self.layer.forward(one_hot) - self.offset  # forward() does not run the layer's hooks

    @torch.no_grad()
    def _input_dtype(self) -> tuple[torch.dtype, Tensor]:
        """Return a dtype of inputs that the layer accepts, usually that of its scales, and its output for zeros."""
        stored = [t.dtype for t in itertools.chain(self.layer.parameters(), self.layer.buffers())]
        likely = [getattr(self.layer, "compute_dtype", None), *stored, torch.get_default_dtype(), torch.float16]
        error: Exception | None = None
        for dtype in dict.fromkeys(likely):
            if dtype is None or not dtype.is_floating_point or dtype.itemsize < 2:
                continue
            try:
                return dtype, self.layer.forward(torch.zeros(1, self.shape[1], dtype=dtype, device=self.device))
            except (RuntimeError, NotImplementedError, TypeError, ValueError) as found:
                error = found
        raise TypeError(
            f"Target module {self.name!r} is a {type(self.layer).__name__} whose weight cannot be read, and the layer "
            f"cannot be applied on {self.device} either ({error}). Load the base model on a device where it can run, "
            "or leave the layer out with exclude_modules."
        ) from error
