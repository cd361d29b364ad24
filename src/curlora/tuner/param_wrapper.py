"""The adapted parameter: experts stored as one three-dimensional tensor, or a matrix that is not a layer's weight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from curlora.tuner.basis import Basis
from curlora.tuner.config import CurloraConfig
from curlora.tuner.layer import CurloraLayer
from curlora.tuner.linking_matrix import LinkingMatrix, ParameterMatrix
from curlora.tuner.weight import ProbedWeight, StoredWeight

__all__ = ["ParamWrapper"]


class ParamWrapper(CurloraLayer):
    """A module in which one parameter is replaced by ``W + alpha C U R`` while it runs.

    In a parameter of shape ``(E, m, n)`` each expert ``e`` has its own columns, rows and ``U``:
    ``W[e] + alpha C[e] U[e] R[e]``. The sum is dense, as in PEFT's LoRA for parameters: the outputs of single experts
    are not visible from outside, so ``R x`` cannot be gathered from them. Wrappers of several parameters of one module
    are nested. PEFT recognizes the class by its name.

    Args:
        base_layer: the module, or the wrapper of another of its parameters.
        name: the parameter's full name.
        parameter_name: the parameter's name in the module.

    Raises:
        TypeError: if the parameter is not a floating-point matrix or stack of matrices of at least 16 bits.
    """

    matrix_class = ParameterMatrix

    def __init__(self, base_layer: nn.Module, name: str, parameter_name: str) -> None:
        super().__init__(base_layer, name)
        self.parameter_name: str = parameter_name
        weight = self.get_param()
        if weight.ndim not in (2, 3) or not weight.is_floating_point() or weight.element_size() < 2:
            raise TypeError(
                f"Target parameter {name!r} is {weight.dtype} of shape {tuple(weight.shape)}. CURLoRA adapts matrices "
                "and stacks of matrices (of experts) in float64, float32, bfloat16 and float16. Take it out of "
                "target_parameters."
            )

    def get_param(self) -> Tensor:
        """The frozen parameter."""
        weight: Tensor = getattr(self.get_base_layer(), self.parameter_name)
        return weight

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return tuple(self.get_param().shape)

    def update_layer(self, adapter_name: str, config: CurloraConfig, tied_to: LinkingMatrix | None = None) -> None:
        if config.curlora_dropout:
            raise ValueError(
                f"curlora_dropout={config.curlora_dropout} cannot be applied to the parameter {self.name!r}, since R x "
                "is not computed for parameters. Set curlora_dropout to 0, or leave target_parameters out."
            )
        super().update_layer(adapter_name, config, tied_to)

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Return the module's output with the updates of all active adapters added to its parameter."""
        if adapter_names is not None:
            raise ValueError(
                f"layer {self.name!r}: a ParamWrapper does not support mixed adapter batches. Use one adapter for the "
                "whole batch."
            )
        if self.disable_adapters and self.merged:
            self.unmerge()
        adapters = self._active()
        if self.disable_adapters or self.merged or not adapters:
            return self.base_layer(*args, **kwargs)
        with self._parametrized(adapters):
            return self.base_layer(*args, **kwargs)

    @contextmanager
    def _parametrized(self, adapters: Sequence[str]) -> Iterator[None]:
        base, weight = self.get_base_layer(), self.get_param()
        if weight.is_meta:
            raise RuntimeError(
                f"The parameter {self.name!r} is on the meta device and has no values. An offloaded parameter, which a "
                "hook loads when its module runs, cannot be adapted: keep the experts on a device."
            )
        pairs = [(self.matrices[adapter], self.basis(adapter, weight.device)) for adapter in adapters]
        trained = weight.requires_grad
        parametrize.register_parametrization(base, self.parameter_name, _Updated(pairs), unsafe=True)
        parametrizations: Any = base.parametrizations
        parametrizations[self.parameter_name].original.requires_grad_(trained)
        try:
            with parametrize.cached():
                yield
        finally:
            own = parametrizations[self.parameter_name]
            if len(own) == 1:
                parametrize.remove_parametrizations(base, self.parameter_name, leave_parametrized=False)
            else:  # keep the user's own parametrizations
                del own[len(own) - 1]

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the module without this wrapper and the wrappers inside it. PEFT calls this method."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        inner = self.base_layer
        if isinstance(inner, ParamWrapper):
            return inner.unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        return inner

    def _select(self, norms: tuple[Tensor, Tensor], config: CurloraConfig, r: int, name: str) -> Tensor:
        if norms[0].ndim == 1:
            return super()._select(norms, config, r, name)
        experts = enumerate(zip(*norms, strict=True))
        return torch.stack(
            [super(ParamWrapper, self)._select(of_one, config, r, f"{name}.{e}") for e, of_one in experts]
        )

    def _basis_of(self, weight: StoredWeight | ProbedWeight, indices: Tensor) -> Basis:
        columns, rows = indices.unbind(-2)
        return Basis.taken(indices, rows, weight.columns(columns).contiguous(), weight.rows(rows).contiguous())


class _Updated(nn.Module):
    """The parametrization ``W + sum_i alpha_i C_i U_i R_i``.

    It keeps the matrices in a list, so that they are not registered as submodules a second time.
    """

    def __init__(self, pairs: Sequence[tuple[LinkingMatrix, Basis]]) -> None:
        super().__init__()
        self.pairs = pairs

    def forward(self, W: Tensor) -> Tensor:
        for U, basis in self.pairs:
            W = U(W, basis)
        return W
