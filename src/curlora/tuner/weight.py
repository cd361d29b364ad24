"""The weight of a frozen layer, read whatever it is stored as.

An adapter needs little of it, and once: the norms of its columns and rows, and the columns and rows that are drawn.
Plain numbers are read where they lie. A quantized weight is dequantized where its library offers that, one layer at a
time. Of any other layer that is linear only what it does is known: it is applied to the identity, some rows at a time.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from peft.tuners.tuners_utils import _get_in_out_features
from peft.utils.integrations import dequantize_bnb_weight, dequantize_module_weight, gather_params_ctx
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from curlora.sampling import squared_norms

__all__ = ["check_adaptable", "device_of", "features", "is_plain", "read", "unpacked"]

_CHUNK_ELEMENTS = 1 << 22  # of the identity, and of what a layer makes of it, at a time
_GLANCED_AT = 64  # rows, evenly spaced


def features(layer: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear layer."""
    inputs, outputs = _get_in_out_features(layer)
    assert inputs is not None  # as check_adaptable has seen
    assert outputs is not None
    return inputs, outputs


def is_plain(layer: nn.Module) -> bool:
    """Whether the weight is stored as it is, in half precision at least."""
    weight = getattr(layer, "weight", None)
    if not isinstance(layer, (nn.Linear, Conv1D)) or not isinstance(weight, Tensor):
        return False
    known = isinstance(weight, (nn.Parameter, DTensor)) or type(weight) is Tensor
    # torchao's tensors say the dtype that they stand for.
    known = known and not type(weight).__module__.startswith("torchao.") and not _is_bitsandbytes(weight)
    return known and weight.dtype.is_floating_point and weight.dtype.itemsize >= 2


def _is_bitsandbytes(weight: Tensor) -> bool:
    return type(weight).__name__ in ("Params4bit", "Int8Params")


def unpacked(weight: Any) -> Any:
    """A weight that bitsandbytes has packed anew for its passes of inference, as it was before; any other as it is.

    It does so with 4-bit weights on processors with AVX512-BF16, rounds the scales to bfloat16, and notes it in the
    state alone: whoever dequantizes the weight then is not told and gets other numbers.
    """
    state: Any = getattr(weight, "quant_state", None)
    if not getattr(state, "packing_format_for_cpu", False):
        return weight
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    state = copy.copy(state)
    state.original_nested = False  # or the scales would be quantized, and rounded once more
    data, state = _convert_weight_packed_for_cpu_inverse(weight.data, state)
    state.absmax = state.absmax.T.reshape(-1).float()
    return type(weight)(
        data, requires_grad=False, quant_state=state, blocksize=state.blocksize,
        compress_statistics=weight.compress_statistics, quant_type=state.quant_type, quant_storage=data.dtype,
        bnb_quantized=True,
    )  # fmt: skip


def device_of(layer: nn.Module) -> torch.device:
    """Where the layer's weight lies."""
    for name in ("weight", "qweight", "W_q"):
        tensor = getattr(layer, name, None)
        if isinstance(tensor, Tensor):
            return tensor.device
    return next(itertools.chain(layer.parameters(), layer.buffers())).device


def check_adaptable(layer: nn.Module, name: str) -> None:
    """Raise ``TypeError`` with a sentence if ``layer`` cannot carry a CURLoRA adapter."""
    linear = isinstance(layer, (nn.Linear, Conv1D)) or (
        not list(layer.children())
        and any(hasattr(layer, inputs) and hasattr(layer, outputs) for inputs, outputs in (
            ("in_features", "out_features"), ("infeatures", "outfeatures")
        ))
    )  # fmt: skip
    if not linear:
        raise TypeError(
            f"Target module {name!r} is a {type(layer).__name__}, which is not supported. CURLoRA adapts "
            "torch.nn.Linear, transformers.pytorch_utils.Conv1D and quantized linear layers; narrow target_modules to "
            "those."
        )
    if isinstance(layer, Conv1D) and not is_plain(layer):
        raise TypeError(
            f"Target module {name!r} is a {type(layer).__name__} whose weight is stored as {layer.weight.dtype}. "
            "CURLoRA reads weights of transformers' Conv1D in float64, float32, bfloat16 and float16."
        )
    if isinstance(layer, NonDynamicallyQuantizableLinear):
        raise TypeError(
            f"Target module {name!r} is the output projection of a torch.nn.MultiheadAttention, which reads its weight "
            "and never calls it: an adapter there would do nothing. Narrow target_modules to other layers."
        )


@contextmanager
def read(layer: nn.Module, name: str = "") -> Iterator[StoredWeight | ProbedWeight]:
    """Read a layer's weight: for as long as this lasts, since it may be dequantized or gathered for it.

    Args:
        layer: a frozen linear layer without adapters.
        name: its name, for errors.

    Raises:
        TypeError: if it can be neither read nor applied.
    """
    with gather_params_ctx(list(layer.parameters(recurse=False)), modifier_rank=None):
        dense = _dense(layer)
        if dense is None:
            yield ProbedWeight(layer, name)
        else:
            yield StoredWeight(dense, exact=is_plain(layer), stores_outputs_last=isinstance(layer, Conv1D))


def _dense(layer: nn.Module) -> Tensor | None:
    if is_plain(layer):
        weight: Any = layer.weight
        return weight.full_tensor().detach() if isinstance(weight, DTensor) else weight.detach()
    try:
        weight = _dequantized(layer).detach()
    except (AttributeError, NotImplementedError, TypeError, ValueError):
        return None
    inputs, outputs = features(layer)
    whole = weight.shape == (outputs, inputs) and weight.dtype.is_floating_point and weight.dtype.itemsize >= 2
    return weight if whole else None


def _dequantized(layer: nn.Module) -> Tensor:
    weight: Any = getattr(layer, "weight", None)
    if type(weight).__name__ == "Int8Params":
        # bitsandbytes keeps the scales with the weight until the layer runs, with its state from then on. By way of
        # dequantize_module_weight, which puts the weight into the layer anew, they would be lost.
        scales: Any = weight.SCB if weight.SCB is not None else layer.state.SCB
        return dequantize_bnb_weight(weight, state=SimpleNamespace(SCB=scales))
    if type(weight).__name__ == "Params4bit":
        return dequantize_bnb_weight(unpacked(weight))
    return dequantize_module_weight(layer)


class StoredWeight:
    """A weight of which the numbers are at hand, shape ``(m, n)`` as stored."""

    def __init__(self, weight: Tensor, *, exact: bool, stores_outputs_last: bool) -> None:
        self.weight, self.exact, self.stores_outputs_last = weight, exact, stores_outputs_last
        self.dtype = weight.dtype

    def squared_norms(self) -> tuple[Tensor, Tensor]:
        """Of columns and rows, as :func:`curlora.sampling.squared_norms`."""
        return squared_norms(self.weight)

    def glance(self) -> object:
        """Tells this weight from others and from what it was before, by some of its rows; not to be relied on for more.

        A change of a few numbers past autograd's notice (through ``.data``) may go unseen.
        """
        rng = torch.Generator("cpu").manual_seed(0)
        count = min(_GLANCED_AT, len(self.weight))
        rows = torch.linspace(0, len(self.weight) - 1, count, dtype=torch.float32, device="cpu").long()
        # Random numbers, not ones, so that rows and columns that change places are noticed.
        left, right = (
            torch.randn(size, dtype=torch.float32, device="cpu", generator=rng).to(self.weight.device)
            for size in (count, self.weight.shape[1])
        )
        version = None if self.weight.is_inference() else self.weight._version
        return self.dtype, version, float(left @ (self.rows(rows).float() @ right))

    def columns(self, index: Tensor) -> Tensor:
        """``W[:, index]``, shape ``(m, r)``."""
        return self.weight.index_select(1, index.to(self.weight.device))

    def rows(self, index: Tensor) -> Tensor:
        """``W[index, :]``, shape ``(r, n)``."""
        return self.weight.index_select(0, index.to(self.weight.device))

    def input_gradient(self, d: Tensor) -> Tensor:
        """What ``d`` at the layer's output, shape ``(tokens, outputs)``, is at its input, ``(tokens, inputs)``."""
        weight = self.weight.to(d.dtype)
        return d @ (weight.T if self.stores_outputs_last else weight)


class ProbedWeight:
    """A weight that is known by what its layer does: ``W x = layer(x) - layer(0)``."""

    exact = False

    def __init__(self, layer: nn.Module, name: str) -> None:
        self.layer, self.name = layer, name
        inputs, outputs = features(layer)
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
                "with its weight, which an adapter would have to know. Leave it out with exclude_modules."
            )

    def squared_norms(self) -> tuple[Tensor, Tensor]:
        """Of columns and rows, float64 on the CPU.

        Raises:
            TypeError: if the layer is not linear. One of a kind that is not known might do more than multiply.
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
                f"Target module {self.name!r} is a {type(self.layer).__name__} that is not linear: what it does is not "
                "the product with a weight, and so it has no columns and rows. Leave it out with exclude_modules."
            )
        return torch.cat(columns), rows

    def glance(self) -> object:
        """Equal to nothing: to read the weight would take as long as to draw from it."""
        return object()

    def columns(self, index: Tensor) -> Tensor:
        """``W[:, index]``, shape ``(m, r)``."""
        return self._apply(index.to(self.device)).T

    def rows(self, index: Tensor) -> Tensor:
        """``W[index, :]``, shape ``(r, n)``."""
        index = index.to(self.device)
        return torch.cat([chunk.index_select(1, index) for chunk in self._chunks()]).T

    def input_gradient(self, d: Tensor) -> Tensor:
        """What ``d`` at the layer's output, shape ``(tokens, outputs)``, is at its input, ``(tokens, inputs)``."""
        return torch.cat([d @ chunk.T.to(d.dtype) for chunk in self._chunks()], dim=1)

    def _chunks(self) -> Iterator[Tensor]:
        """Columns of ``W``, some at a time, each as a row."""
        for index in torch.arange(self.shape[1], device=self.device).split(max(1, _CHUNK_ELEMENTS // max(self.shape))):
            yield self._apply(index)

    @torch.no_grad()
    def _apply(self, index: Tensor) -> Tensor:
        one_hot = torch.zeros(len(index), self.shape[1], dtype=self.inputs_dtype, device=self.device)
        one_hot[torch.arange(len(index), device=self.device), index.long()] = 1
        return self.layer.forward(one_hot) - self.offset  # without its hooks

    @torch.no_grad()
    def _input_dtype(self) -> tuple[torch.dtype, Tensor]:
        """What the layer takes, and what it makes of zero: its scales tell, as a rule."""
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
            f"Target module {self.name!r} is a {type(self.layer).__name__} whose weight cannot be read, and which "
            f"cannot be applied on {self.device} either ({error}). Load the base model where it can run, or leave the "
            "layer out with exclude_modules."
        ) from error
