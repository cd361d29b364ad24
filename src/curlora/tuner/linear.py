"""The adapted linear layer: a gather from the base layer's output, and two skinny products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from curlora._compat import in_out_features
from curlora.tuner.basis import Basis
from curlora.tuner.layer import CurloraLayer
from curlora.tuner.mixed_batch import check_adapter_names, update_rows
from curlora.tuner.weight import ProbedWeight, StoredWeight, bias_of, brought, check_adaptable, fan_in_fan_out, is_plain

__all__ = ["CurloraLinear"]


class CurloraLinear(CurloraLayer):
    """An adapted ``nn.Linear``, ``nn.Embedding``, transformers' ``Conv1D``, or a quantized linear layer.

    With ``n`` inputs and ``m`` outputs, ``nn.Linear`` and quantized layers store the weight as ``(m, n)``. There the
    rows are gathered from the output, and the columns are the basis's factor. ``nn.Embedding`` and ``Conv1D`` store
    ``(n, m)``. There the columns are gathered, and the rows are the factor.

    Training and inference use only the base layer's output, so the base layer may be quantized in any way. The input is
    multiplied by ``R`` only if the layer also has an adapter of another method.

    Attributes:
        shared: whether other methods may merge into the weight, as in a :class:`peft.PeftMixedModel`.

    Raises:
        TypeError: if ``base_layer`` is of a type that cannot be adapted.
    """

    shared = False

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__(base_layer, name)
        base = self.get_base_layer()
        check_adaptable(base, name)
        self.fan_in_fan_out = fan_in_fan_out(base)
        self.in_features, self.out_features = in_out_features(base)
        self._is_embedding = isinstance(base, nn.Embedding)
        self._has_bias = isinstance(getattr(base, "bias", None), Tensor)
        if self._is_embedding and base is not base_layer:
            raise TypeError(
                f"Target module {name!r} is an Embedding that already has an adapter of another method. Use one method "
                "for it, or leave it out with exclude_modules."
            )

    @property
    def weight_shape(self) -> tuple[int, ...]:
        shape = self.out_features, self.in_features
        return shape[::-1] if self.fan_in_fan_out else shape

    def forward(self, x: Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Tensor:
        """Return the base layer's output plus the updates of all active adapters, shape ``(..., out_features)``.

        If ``adapter_names`` has one name for each row of ``x``, each row gets the update of its own adapter instead.
        """
        if adapter_names is not None:
            check_adapter_names(x, adapter_names, self.merged)
        if self.disable_adapters and self.merged:
            self.unmerge()
        output: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return output
        if adapter_names is not None:
            return self._update_rows(output, adapter_names)
        result = output
        for adapter in self.active_adapters:
            if adapter in self.curlora_U:
                basis = self.basis(adapter, output.device)
                result = self.curlora_U[adapter](result, output, basis, self._offset(basis), x)
        return result

    def _update_rows(self, output: Tensor, adapter_names: Sequence[str]) -> Tensor:
        present = {name: self.basis(name, output.device) for name in set(adapter_names) if name in self.curlora_U}
        if any(basis.reader is not None for basis in present.values()):
            raise ValueError(
                f"layer {self.name!r}: adapter_names cannot be passed, since the layer has adapters of two methods. "
                "Leave adapter_names out, or use a model with CURLoRA adapters only."
            )
        scaled_U = {}
        for name in present:
            with brought(self.curlora_U[name]):
                scaled_U[name] = self.matrices[name].scaled_U
        offsets = {id(basis): self._offset(basis) for basis in present.values()}
        return update_rows(output, adapter_names, present, scaled_U, offsets)

    def _offset(self, basis: Basis) -> Tensor | None:
        """Return the base layer's bias at the gathered outputs, which is not part of ``R x``; ``None`` without bias."""
        bias = bias_of(self.get_base_layer()) if self._has_bias else None
        return None if bias is None else bias.index_select(0, basis.gathered)

    def _basis_of(self, weight: StoredWeight | ProbedWeight, indices: Tensor) -> Basis:
        columns, rows = indices
        last = self.fan_in_fan_out
        factor = (weight.rows(rows).T if last else weight.columns(columns)).contiguous()
        reader = None
        if (self.shared or self.base_layer is not self.get_base_layer()) and not self._is_embedding:
            reader = (weight.columns(columns).T if last else weight.rows(rows)).contiguous()
        exact = is_plain(self.get_base_layer())
        return Basis.taken(indices, columns if last else rows, factor, reader, exact=exact)
