"""Merging of adapters into a layer's weight, and unmerging."""

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


class _NotFiniteError(ValueError):
    """An adapter that makes the merged weight non-finite."""


class MergeMixin:
    """The methods of :class:`curlora.CurloraLayer` that merge and unmerge.

    Attributes:
        get_apply_tensor_subclass: for a model quantized by torchao, the function with which PEFT quantizes a merged
            weight again.
        _merged_factors: the two factors of each merged update. They are kept because they cannot be read from the
            merged weight.
        _unmerged: the weight before the merge, or the quantized base layer. It is in a list so that it is not
            registered as a submodule.
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
        """The trained matrix of each adapter: ``curlora_U`` with types."""
        matrices: Any = self.curlora_U
        return matrices

    def delta_factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """Return the two factors whose product is an adapter's update of the unmerged weight.

        Returns:
            ``alpha * C @ U``, shape ``(m, r)``, and ``R``, shape ``(r, n)``, for a weight stored as ``(m, n)``. Both
            are at least float32. For ``E`` experts both have a first dimension ``E``.

        Raises:
            RuntimeError: if the weight no longer has the values that the adapter refers to.
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
                    f"layer {self.name!r}: the weight has changed since adapter {adapter_name!r} was put on it, so the "
                    "adapter's columns and rows are gone. If another adapter was merged into the weight, merge this "
                    "one first."
                )
            C, R = (basis.reader.mT, basis.factor.mT) if self.fan_in_fan_out else (basis.factor, basis.reader)
        dtype = torch.promote_types(C.dtype, torch.float32)
        with brought(U):
            matrix = whole(U.weight.detach()).to(device=C.device, dtype=dtype)
        with autocast_off(C):
            return U.scaling * (C.to(dtype) @ matrix), R.to(dtype)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """Return the dense update ``alpha * C @ U @ R`` in the layout and dtype of the base weight.

        It is float32 if the base weight is quantized.
        """
        left, right = self.delta_factors(adapter_name)
        base = self.get_base_layer()
        device = device_of(base, self.parameter_name)
        left, right = (left, right) if device.type == "meta" else (left.to(device), right.to(device))
        weight = self._plain_weight()
        return _product(left, right).to(left.dtype if weight is None else weight.dtype)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return ``True``, for :func:`peft.convert_to_lora`. :func:`curlora.convert_to_lora` is exact and faster."""
        return True

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the base weight. PEFT's backend quantizes a quantized weight again.

        Args:
            safe_merge: refuse to merge if the merged weight would not be finite.
            adapter_names: the adapters; all active ones if ``None``.

        Raises:
            ValueError: if ``safe_merge`` is set and an adapter, which the message names, makes the weight non-finite;
                or if PEFT cannot merge into the base layer's quantization. The layer is unchanged then.
            RuntimeError: if the weights are partitioned by DeepSpeed's ZeRO-3, or the weight no longer has the values
                that an adapter refers to.
        """
        adding = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.curlora_U]
        if not adding:
            return
        if check_deepspeed_zero3_enabled():
            raise RuntimeError(
                f"layer {self.name!r}: the weights are partitioned by ZeRO-3, so adapters cannot be merged into them. "
                "Save the adapter, and merge it into the model in a single process without ZeRO-3."
            )
        # C and R belong to the base weight, so all updates are computed before any of them is added.
        before = list(self.merged_adapters)
        if before:
            self.unmerge()
        merge = self._merge_quantized if self._plain_weight() is None else self._merge_plain
        try:
            merge([*before, *adding], safe_merge)
        except BaseException:
            if before:
                merge(before, False)
            raise

    def unmerge(self) -> None:
        """Restore the base layer bit for bit, from the copy that :meth:`merge` keeps in CPU memory.

        For a quantized layer :meth:`merge` keeps the layer itself, and for a sharded weight a copy on its device.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        (before,) = self._unmerged
        if isinstance(before, nn.Module):
            device = device_of(self.get_base_layer())
            self.base_layer = before if device_of(before) == device else before.to(device)  # moved after the merge
        else:
            weight: Any = self._plain_weight()
            weight = weight.data
            if isinstance(before, DTensor) and not isinstance(weight, DTensor):  # gathered by FSDP2 for a forward pass
                before = whole(before)
            before = laid_out_like(before.to(weight.device), weight)
            # The merge is repeated in the copy's dtype: the layer may have been cast since.
            if isinstance(weight, DTensor) or _equal(weight, self._plus_merged(before.clone()).to(weight.dtype)):
                # Subtracting would leave rounding errors. In half precision the adapter would then be refused, as on
                # another base model.
                weight.copy_(before)
            else:  # another method has merged into the weight since
                weight -= self._plus_merged(torch.zeros_like(weight))
        self._unmerged, self.merged_adapters, self._merged_factors = [], [], {}

    def _merge_plain(self, adapters: Sequence[str], safe_merge: bool) -> None:
        factors = {adapter: self.delta_factors(adapter) for adapter in adapters}
        weight: Any = self._plain_weight()
        weight = weight.data
        merged = weight.clone() if safe_merge else weight
        # The copy is kept on the CPU, since merging is often meant to save the accelerator's memory.
        unmerged = weight.clone() if isinstance(weight, DTensor) else weight.to("cpu", copy=True)
        try:
            for adapter, pair in factors.items():
                _add_product(merged, *pair)
                if safe_merge and not bool(torch.isfinite(merged).all()):
                    raise self._not_finite(adapter)
            if safe_merge:
                weight.copy_(merged)
        except BaseException:  # such as a lack of memory after the first of two adapters
            weight.copy_(unmerged)
            raise
        self._unmerged, self._merged_factors, self.merged_adapters = [unmerged], factors, list(adapters)

    def _plus_merged(self, weight: Tensor) -> Tensor:
        for pair in self._merged_factors.values():
            _add_product(weight, *pair)
        return weight

    def _merge_quantized(self, adapters: Sequence[str], safe_merge: bool) -> None:
        factors = {adapter: self.delta_factors(adapter) for adapter in adapters}
        base, kind = self.base_layer, type(self.get_base_layer()).__name__
        instead = (
            "Merge into the model in float32, bfloat16 or float16, or serve the adapter unmerged, as CURLoRA or as "
            "LoRA (curlora.save_as_lora)."
        )
        try:
            backend = quantization_backend(base, self.get_apply_tensor_subclass)
            if backend is None:
                raise ValueError("PEFT cannot write such a weight")
            self.base_layer = twin(base)
            weight = backend.get_base_weight(self.base_layer)
            for adapter, pair in factors.items():
                weight = weight + _product(*pair).to(device=weight.device, dtype=weight.dtype)
                if safe_merge and not bool(torch.isfinite(weight).all()):
                    raise self._not_finite(adapter)
            backend.set_base_weight(self, weight)
        except BaseException as error:
            self.base_layer = base
            refused = isinstance(error, (AttributeError, NotImplementedError, TypeError, ValueError))
            if isinstance(error, _NotFiniteError) or not refused:
                raise
            raise ValueError(
                f"layer {self.name!r} is a {kind}, and adapters cannot be merged into its quantized weight "
                f"({error}). {instead}"
            ) from error
        self._unmerged, self._merged_factors, self.merged_adapters = [base], factors, list(adapters)

    def _not_finite(self, adapter: str) -> ValueError:
        return _NotFiniteError(
            f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken (layer {self.name!r})"
        )

    def _plain_weight(self) -> Tensor | None:
        """Return the base weight; ``None`` if it is quantized."""
        base = self.get_base_layer()
        if self.parameter_name is None and not is_plain(base):
            return None
        weight: Tensor = getattr(base, self.parameter_name or "weight")
        return weight


def _product(left: Tensor, right: Tensor) -> Tensor:
    with autocast_off(left):
        return left @ right


def _equal(a: Tensor, b: Tensor) -> bool:
    """Return whether all values are the same. NaN is the same as NaN, so that an adapter with NaN can be unmerged."""
    # torch.equal needs no memory, so it is asked first.
    return torch.equal(a, b) or torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def _add_product(weight: Tensor, left: Tensor, right: Tensor) -> None:
    delta = _product(left, right)
    weight += laid_out_like(delta.to(device=weight.device, dtype=weight.dtype), weight)
