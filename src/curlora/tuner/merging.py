"""Adding adapters to a layer's weight, and taking them out again."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils.integrations import check_deepspeed_zero3_enabled
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from curlora.functional import autocast_off
from curlora.tuner.basis import Basis
from curlora.tuner.fingerprint import compare
from curlora.tuner.linking_matrix import LinkingMatrix
from curlora.tuner.sharded import laid_out_like, whole
from curlora.tuner.weight import ProbedWeight, StoredWeight, brought, device_of, is_plain, quantization_backend, twin

__all__ = ["MergeMixin"]


class MergeMixin:
    """The part of :class:`curlora.CurloraLayer` that merges.

    Attributes:
        get_apply_tensor_subclass: of a model that torchao has quantized, how to do so again.
        _merged_factors: what each merged adapter added, as two factors: the weight they came from is gone.
        _unmerged: the weight before a merge, or the quantized base layer. In a list, since it is no module of this one.
    """

    name: str
    base_layer: nn.Module
    curlora_U: nn.ModuleDict  # noqa: N815
    fan_in_fan_out: bool
    parameter_name: str | None
    merged: bool
    merged_adapters: list[str]
    get_apply_tensor_subclass: Callable[[], Any] | None
    _merged_factors: dict[str, tuple[Tensor, Tensor]]
    _unmerged: list[Tensor | nn.Module]
    get_base_layer: Callable[[], Any]
    basis: Callable[[str], Basis]
    _read: Callable[[], Any]
    _basis_of: Callable[[StoredWeight | ProbedWeight, Tensor], Basis]

    @property
    def matrices(self) -> Mapping[str, LinkingMatrix]:
        """The trained matrix of each adapter: ``curlora_U``, typed."""
        matrices: Any = self.curlora_U
        return matrices

    def delta_factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """The two factors of an adapter's update, which is their product.

        Returns:
            ``alpha * C @ U``, shape ``(m, r)``, and ``R``, shape ``(r, n)``, for a weight that is stored as ``(m, n)``
            and has nothing merged into it; at least float32. Of experts all with their number first.

        Raises:
            RuntimeError: if the weight's values are others than those that the adapter refers to.
        """
        if adapter_name in self._merged_factors:
            return self._merged_factors[adapter_name]
        basis, U = self.basis(adapter_name), self.matrices[adapter_name]
        with self._read() as weight:
            now = self._basis_of(weight, basis.indices)
            columns, rows = basis.indices.unbind(-2)
            C, R = weight.columns(columns), weight.rows(rows)
        if compare(basis.fingerprint, now.fingerprint) == "other":
            if basis.reader is None:
                raise RuntimeError(
                    f"layer {self.name!r}: the weight has changed since adapter {adapter_name!r} was put on it, so its "
                    "columns and rows are gone. Has another adapter been merged into it? Merge this one first."
                )
            C, R = (basis.reader.mT, basis.factor.mT) if self.fan_in_fan_out else (basis.factor, basis.reader)
        dtype = torch.promote_types(C.dtype, torch.float32)
        with brought(U):
            matrix = whole(U.weight.detach()).to(device=C.device, dtype=dtype)
        with autocast_off(C):
            return U.scaling * (C.to(dtype) @ matrix), R.to(dtype)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """``alpha * C @ U @ R``, dense, in the layout and dtype of the base weight; of a quantized one, float32."""
        left, right = self.delta_factors(adapter_name)
        base = self.get_base_layer()
        device = device_of(base, self.parameter_name)
        left, right = (left, right) if device.type == "meta" else (left.to(device), right.to(device))
        weight = self._plain_weight()
        return _product(left, right).to(left.dtype if weight is None else weight.dtype)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Asked by :func:`peft.convert_to_lora`; :func:`curlora.convert_to_lora` is exact and quicker."""
        return True

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the base weight. A quantized one is quantized anew, by PEFT's backend for it.

        Args:
            safe_merge: refuse to merge if the merged weight would not be finite.
            adapter_names: the adapters; all active ones if ``None``.

        Raises:
            ValueError: with ``safe_merge``, naming the adapter that makes the weight non-finite; or if the base layer
                is quantized in a way that PEFT cannot merge into. The layer is then as it was.
            RuntimeError: if the weights are partitioned by DeepSpeed's ZeRO-3.
        """
        adding = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.curlora_U]
        if not adding:
            return
        if check_deepspeed_zero3_enabled():
            raise RuntimeError(
                f"layer {self.name!r}: the weights are partitioned by ZeRO-3, so that nothing can be merged into them. "
                "Save the adapter, and merge it into the model in one process."
            )
        # C and R belong to the base weight: every update is computed from it before any is added.
        before = list(self.merged_adapters)
        if before:
            self.unmerge()
        merge = self._merge_quantized if self._plain_weight() is None else self._merge_plain
        try:
            merge([*before, *adding], safe_merge)
        except ValueError:
            if before:
                merge(before, False)
            raise

    def unmerge(self) -> None:
        """Give the base layer back as it was, bit for bit; :meth:`merge` keeps it, a weight in the CPU's memory."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        before = self._unmerged.pop()
        if isinstance(before, nn.Module):
            device = device_of(self.get_base_layer())
            self.base_layer = before if device_of(before) == device else before.to(device)  # moved since
        else:
            weight: Any = self._plain_weight()
            weight = weight.data
            if isinstance(before, DTensor) and not isinstance(weight, DTensor):  # gathered by FSDP2 for a forward pass
                before = whole(before)
            before = laid_out_like(before.to(weight.device), weight)
            # Computed in the precision of then: the layer may have been cast since.
            if isinstance(weight, DTensor) or torch.equal(weight, self._plus_merged(before.clone()).to(weight.dtype)):
                # Subtracting would leave rounding behind, in half precision enough to make this another base.
                weight.copy_(before)
            else:  # another method has been merged into it since
                weight -= self._plus_merged(torch.zeros_like(weight))
        self.merged_adapters, self._merged_factors = [], {}

    def _merge_plain(self, adapters: Sequence[str], safe_merge: bool) -> None:
        factors = {adapter: self.delta_factors(adapter) for adapter in adapters}
        weight: Any = self._plain_weight()
        weight = weight.data
        merged = weight.clone() if safe_merge else weight
        # Out of the accelerator's memory, which merging is often meant to save.
        unmerged = weight.clone() if isinstance(weight, DTensor) else weight.to("cpu", copy=True)
        for adapter, pair in factors.items():
            _add_product(merged, *pair)
            if safe_merge and not bool(torch.isfinite(merged).all()):
                raise self._not_finite(adapter)
        if safe_merge:
            weight.copy_(merged)
        self._unmerged, self._merged_factors, self.merged_adapters = [unmerged], factors, list(adapters)

    def _plus_merged(self, weight: Tensor) -> Tensor:
        for pair in self._merged_factors.values():
            _add_product(weight, *pair)
        return weight

    def _merge_quantized(self, adapters: Sequence[str], safe_merge: bool) -> None:
        factors = {adapter: self.delta_factors(adapter) for adapter in adapters}
        base, kind = self.base_layer, type(self.get_base_layer()).__name__
        instead = (
            "Merge into the model in float32, bfloat16 or float16, or serve the adapter unmerged, as it is or as LoRA "
            "(curlora.save_as_lora)."
        )
        try:
            backend = quantization_backend(base, self.get_apply_tensor_subclass)
            if backend is None:
                raise ValueError("PEFT has no way to write it")
            self.base_layer = twin(base)
            weight, broken = backend.get_base_weight(self.base_layer), None
            for adapter, pair in factors.items():
                weight = weight + _product(*pair).to(device=weight.device, dtype=weight.dtype)
                if safe_merge and not bool(torch.isfinite(weight).all()):
                    broken = adapter
                    break
            if broken is None:
                backend.set_base_weight(self, weight)
        except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
            self.base_layer = base
            raise ValueError(
                f"layer {self.name!r} is a {kind}, into whose quantized weight nothing can be merged "
                f"({error}). {instead}"
            ) from error
        if broken is not None:
            self.base_layer = base
            raise self._not_finite(broken)
        self._unmerged, self._merged_factors, self.merged_adapters = [base], factors, list(adapters)

    def _not_finite(self, adapter: str) -> ValueError:
        return ValueError(
            f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken (layer {self.name!r})"
        )

    def _plain_weight(self) -> Tensor | None:
        """The base weight, where it is stored as it is; ``None`` if it is quantized."""
        base = self.get_base_layer()
        if self.parameter_name is None and not is_plain(base):
            return None
        weight: Tensor = getattr(base, self.parameter_name or "weight")
        return weight


def _product(left: Tensor, right: Tensor) -> Tensor:
    with autocast_off(left):
        return left @ right


def _add_product(weight: Tensor, left: Tensor, right: Tensor) -> None:
    delta = _product(left, right)
    weight += laid_out_like(delta.to(device=weight.device, dtype=weight.dtype), weight)
