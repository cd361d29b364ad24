"""The trained matrix ``U`` of one adapter in one layer, with the indices of the columns and rows that it links."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from curlora.functional import autocast_off, check_values, gather, gather_update, linear_update
from curlora.tuner.basis import Basis
from curlora.tuner.fingerprint import LENGTH

__all__ = ["LinkingMatrix", "ParameterMatrix"]


class LinkingMatrix(nn.Module):
    """``U`` of ``W + alpha C U R``, the parameter ``curlora_U.<adapter>.weight``.

    ``U`` belongs to a module with a ``forward``, since Accelerate's offload, FSDP and DeepSpeed's ZeRO-3 load a
    module's parameters when the module is called.

    Args:
        shape: shape of ``U``: ``(r, r)``, or ``(E, r, r)`` for ``E`` experts.
        alpha: the configured factor of the update.
        dtype, device: dtype and device of ``U``.
        dropout: probability with which an entry of ``R x`` is zeroed in training.
        fan_in_fan_out: whether the layer stores ``(in_features, out_features)``. ``U`` is then used transposed.
        random: start at random values instead of zero, for tests.

    Attributes:
        weight: ``U``.
        indices, fingerprint: buffers that are saved with ``U``, see :class:`curlora.tuner.basis.Basis`. They are the
            tensors of ``basis``. If a loader has replaced them, the basis must be read again.
        basis: the columns and rows of the frozen weight at these indices; ``None`` if they were not read yet.
        scaling: the present factor of the update: ``alpha``, as changed by :meth:`CurloraLayer.set_scale` and the like.
    """

    indices: Tensor
    fingerprint: Tensor

    def __init__(
        self,
        shape: tuple[int, ...],
        alpha: float,
        *,
        dtype: torch.dtype,
        device: torch.device,
        dropout: float = 0.0,
        fan_in_fan_out: bool = False,
        random: bool = False,
    ) -> None:
        super().__init__()
        U = torch.zeros(shape, dtype=dtype, device=device)
        self.weight = nn.Parameter(nn.init.normal_(U) if random else U)
        self.register_buffer("indices", torch.zeros(*shape[:-2], 2, shape[-1], dtype=torch.int32, device="meta"))
        self.register_buffer("fingerprint", torch.zeros(LENGTH, dtype=torch.int32, device="meta"))
        self.dropout = nn.Dropout(dropout) if dropout else None
        self.alpha, self.scaling, self.fan_in_fan_out = alpha, alpha, fan_in_fan_out
        self.basis: Basis | None = None
        # The settings of the draw. An adapter with the same settings takes the same basis.
        self.drawn_by: tuple[object, ...] = ()
        # U as the last training within a budget has left it, since TRL rounds it when the next one begins.
        self.trained: Tensor | None = None

    @property
    def r(self) -> int:
        """The rank."""
        return self.weight.shape[-1]

    @property
    def scaled_U(self) -> Tensor:
        """``scaling * U``, which multiplies ``R x``; transposed if the layer stores ``(in_features, out_features)``."""
        U = self.weight.mT if self.fan_in_fan_out else self.weight
        return U if self.scaling == 1 else U * self.scaling

    def forward(
        self, result: Tensor, output: Tensor, basis: Basis, offset: Tensor | None, x: Tensor | None = None
    ) -> Tensor:
        """Add the adapter's update.

        Args:
            result: the tensor to which the update is added, shape ``(..., out_features)``.
            output: the base layer's output, shape ``(..., out_features)``; the same tensor as ``result`` for the first
                adapter.
            basis: the adapter's basis, on the device of ``output``.
            offset: the base layer's bias at ``basis.gathered``, shape ``(r,)``; ``None`` without bias.
            x: the layer's input, shape ``(..., in_features)``; used only if ``basis.reader`` is given.

        Returns:
            A new tensor of ``result``'s shape and dtype.
        """
        if basis.reader is None and result is output and not (self.dropout is not None and self.training):
            return gather_update(output, self.scaled_U, basis.factor, basis.gathered, offset)
        if basis.reader is not None and x is not None:
            z = nn.functional.linear(x, basis.reader.to(x.dtype))
        else:
            z = gather(output, basis.gathered, offset)
        z = z if self.dropout is None else self.dropout(z)
        return linear_update(result, z, self.scaled_U, basis.factor)

    def hold(self, basis: Basis) -> None:
        """Take a basis. Its indices and fingerprint become the buffers that are saved."""
        self.basis = basis
        self._buffers["indices"], self._buffers["fingerprint"] = basis.indices, basis.fingerprint

    @property
    def is_current(self) -> bool:
        """Whether the indices and the fingerprint are still those of the basis."""
        basis, buffers = self.basis, self._buffers
        return basis is not None and buffers["indices"] is basis.indices and buffers["fingerprint"] is basis.fingerprint

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Load, replacing the buffers, which other adapters may share, and a ``U`` on the meta device."""
        for name, present in (*self._buffers.items(), ("weight", self.weight)):
            loaded = state_dict.get(prefix + name)
            if loaded is None or present is None or loaded.shape != present.shape:
                continue
            if name != "weight":
                home = self.weight.device if present.is_meta else present.device
                self._buffers[name] = loaded.to(
                    loaded.device if home.type == "meta" else home, present.dtype, copy=True
                )
            elif present.is_meta and not loaded.is_meta:
                # An assigned tensor would keep the dtype of the file.
                state_dict[prefix + name] = loaded = loaded.to(present.dtype)
                self.weight = nn.Parameter(loaded.clone(), requires_grad=present.requires_grad)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return f"r={self.r}, alpha={self.alpha}"


class ParameterMatrix(LinkingMatrix):
    """``U`` of an update that is added to a parameter instead of an output; shape ``(r, r)`` or ``(E, r, r)``."""

    def forward(self, W: Tensor, basis: Basis) -> Tensor:  # type: ignore[override]
        """Return ``W + alpha C U R`` in ``W``'s dtype and shape, ``(m, n)`` or ``(E, m, n)``."""
        assert basis.reader is not None
        check_values(W, self.weight, basis.factor)
        with autocast_off(W):
            left = (basis.factor.to(self.weight.dtype) @ self.scaled_U).to(W.dtype)
            add = torch.baddbmm if W.ndim == 3 else torch.addmm
            return add(W, left, basis.reader.to(W.dtype))
