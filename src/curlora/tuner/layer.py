"""The adapted layer: a frozen layer and, for each adapter, a trained ``U`` with the columns and rows that it links."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from curlora import sampling
from curlora._compat import execution_device
from curlora.tuner.basis import Basis, problem_of_indices
from curlora.tuner.config import CurloraConfig
from curlora.tuner.fingerprint import compare
from curlora.tuner.linking_matrix import LinkingMatrix
from curlora.tuner.merging import MergeMixin
from curlora.tuner.weight import ProbedWeight, StoredWeight, device_of, is_readable, read

__all__ = ["CurloraLayer"]


class CurloraLayer(MergeMixin, nn.Module, BaseTunerLayer):
    """Base class of a frozen layer with CURLoRA adapters.

    An adapter changes the layer's weight ``W``, as the layer stores it, to
    ``W + alpha * W[:, columns] @ U @ W[rows, :]``. The subclass :class:`CurloraLinear` adds the update to the layer's
    output, and ``ParamWrapper`` adds it to a parameter.

    Args:
        base_layer: the layer to adapt.
        name: the layer's name in the model. Draws depend on it, and errors print it.

    Attributes:
        curlora_U: a :class:`curlora.tuner.linking_matrix.LinkingMatrix` for each adapter, by the adapter's name.
        parameter_name: name of the base layer's parameter that is ``W``; ``None`` if ``W`` is the layer's own weight.
        fan_in_fan_out: whether ``W`` is stored as ``(in_features, out_features)``.
    """

    adapter_layer_names = ("curlora_U",)
    # peft.helpers.disable_input_dtype_casting sets this flag. It has no effect: inputs are never cast here.
    cast_input_dtype_enabled = True
    parameter_name: str | None = None
    fan_in_fan_out = False
    matrix_class: type[LinkingMatrix] = LinkingMatrix

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        self.curlora_U = nn.ModuleDict()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        # For a model quantized by torchao: PEFT quantizes the weight again with it after a merge.
        self.get_apply_tensor_subclass: Callable[[], Any] | None = None
        self._merged_factors: dict[str, tuple[Tensor, Tensor]] = {}
        self._unmerged: list[Tensor | nn.Module] = []
        self._base_was_loaded = False
        self.register_load_state_dict_post_hook(_refresh_after_load)

    @property
    def r(self) -> Mapping[str, int]:
        """The rank of each adapter."""
        return _OfEach(self.matrices, "r")

    @property
    def alpha(self) -> Mapping[str, float]:
        """The configured factor of each adapter's update."""
        return _OfEach(self.matrices, "alpha")

    @property
    def scaling(self) -> Mapping[str, float]:
        """The present factor of each adapter's update, which :meth:`set_scale` changes."""
        return _OfEach(self.matrices, "scaling")

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the base weight as the layer stores it."""
        raise NotImplementedError

    # Adapters

    def update_layer(self, adapter_name: str, config: CurloraConfig, tied_to: LinkingMatrix | None = None) -> None:
        """Add an adapter, or reset an existing one. Its columns and rows are drawn, and ``U`` is zero.

        If the layer already has an adapter with the same settings, the new adapter takes its columns and rows, as long
        as the weight still has the same values there, and even if they were chosen or loaded since: TRL adds a
        reference in this way, and copies only parameters. On the meta device (PEFT's ``low_cpu_mem_usage``) nothing is
        drawn: the indices are loaded with the adapter's weights.

        Args:
            adapter_name: the adapter's name.
            config: the adapter's configuration.
            tied_to: the matrix of a layer with the same weight. The new adapter shares its ``U`` and its indices.

        Raises:
            RuntimeError: if an adapter is merged into the weight.
            ValueError: if the rank does not fit the weight, or columns and rows cannot be drawn from it.
        """
        if self.merged:
            raise RuntimeError(
                f"layer {self.name!r}: cannot add adapter {adapter_name!r} while {self.merged_adapters} "
                "is merged into the weight from which its columns and rows would be drawn. Unmerge first."
            )
        r = config.rank_of(self.name)
        base = self.get_base_layer()
        device = device_of(base, self.parameter_name)
        if device.type == "meta" and is_readable(base, self.parameter_name):
            device = execution_device(base)
        U = self.matrix_class(
            (*self.weight_shape[:-2], r, r),
            config.alpha_of(self.name),
            dtype=torch.float32 if (weight := self._plain_weight()) is None else weight.dtype,
            device=device,
            dropout=config.curlora_dropout,
            fan_in_fan_out=self.fan_in_fan_out,
            random=not config.init_weights,
        )
        U.drawn_by = (r, *config.drawn_by)
        if tied_to is not None:
            U.weight = tied_to.weight
        if not U.weight.is_meta:
            self._hold(U, self._draw(config, U, tied_to))
        self.curlora_U[adapter_name] = U
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def basis(self, adapter_name: str, device: torch.device | None = None) -> Basis:
        """Return an adapter's basis. It is read from the weight again if other indices were loaded into the adapter.

        Args:
            adapter_name: the adapter's name.
            device: the device of the returned basis; its present device if ``None``.

        Raises:
            ValueError: if the adapter was made on another base model, or its indices do not fit the weight.
            RuntimeError: if the indices or the weight have no values, or other indices were loaded while an adapter is
                merged into the weight.
        """
        U = self.matrices[adapter_name]
        if torch.compiler.is_compiling() and U.basis is not None:
            return U.basis
        # nn.DataParallel makes replicas for a forward pass. Their buffers are copies, but the basis is still theirs.
        if not U.is_current and not getattr(self, "_is_replica", False):
            self.refresh(adapter_name)
        assert U.basis is not None
        return U.basis if device is None else U.basis.to(device)

    def refresh(self, adapter_name: str, *, base_changed: bool = False) -> None:
        """Update an adapter's basis to the indices and the base weight that are now present.

        Args:
            adapter_name: the adapter's name.
            base_changed: whether the weight was replaced. It is then read even if the indices are the same.

        Raises:
            ValueError: if the adapter was made on another base model, or its indices do not fit the weight. Every later
                use of the adapter raises the error again.
            RuntimeError: if the indices have no values, or other indices were loaded while an adapter is merged into
                the weight.
        """
        U = self.matrices[adapter_name]
        if U.indices.is_meta or U.fingerprint.is_meta:
            if U.basis is None:
                raise RuntimeError(
                    f"layer {self.name!r}: adapter {adapter_name!r} has no values (it is on the meta device). Load its "
                    "weights first."
                )
            return  # the indices are offloaded, and the basis is not
        known = None if U.basis is None or base_changed else U.basis.to(U.indices.device)
        if known and torch.equal(U.indices, known.indices) and torch.equal(U.fingerprint, known.fingerprint):
            U.hold(known)  # the same values, moved or assigned anew
            return
        if self.merged:
            raise RuntimeError(
                f"layer {self.name!r}: other indices were loaded into adapter {adapter_name!r} while "
                f"{self.merged_adapters} is merged into the weight that they point into. Unmerge, then load again."
            )
        problem = problem_of_indices(U.indices, U.r, self.weight_shape)
        if problem is not None:
            raise ValueError(
                f"layer {self.name!r}: adapter {adapter_name!r} cannot be used: {problem}. Load it onto the model it "
                "was trained on, with its own configuration."
            )
        basis = self.read_basis(U.indices)
        if compare(U.fingerprint, basis.fingerprint) == "other":
            U.basis = None
            raise ValueError(
                f"layer {self.name!r}: the loaded adapter {adapter_name!r} was made on another base model, or on "
                "this one before its weights changed or were rounded. Load it onto the model it was trained on."
            )
        self._hold(U, basis)

    def redraw(self, adapter_name: str, indices: Tensor) -> None:
        """Give an adapter that has not been trained other columns and rows.

        Args:
            adapter_name: the adapter's name.
            indices: integers, shape ``(2, r)``: the column indices, then the row indices; for experts ``(E, 2, r)``.

        Raises:
            RuntimeError: if an adapter is merged into the weight, or if ``U`` is not zero: it was trained with the
                present columns and rows.
            ValueError: if the indices do not fit the weight.
        """
        if self.merged:
            raise RuntimeError(f"layer {self.name!r}: {self.merged_adapters} is merged into the weight. Unmerge first.")
        U = self.matrices[adapter_name]
        if bool(U.weight.any()):
            raise RuntimeError(
                f"layer {self.name!r}: adapter {adapter_name!r} has been trained with its present columns and rows. "
                "Choose others before training, or add a new adapter."
            )
        indices = indices.to(device=U.indices.device, dtype=torch.int32, copy=True)
        problem = problem_of_indices(indices, U.r, self.weight_shape)
        if problem is not None:
            raise ValueError(f"layer {self.name!r}: {problem}")
        self._hold(U, self.read_basis(indices))

    def read_basis(self, indices: Tensor) -> Basis:
        """Read columns and rows of the base weight.

        Args:
            indices: int32, shape ``(2, r)``: the column indices, then the row indices; for experts ``(E, 2, r)``.
        """
        with self._read() as weight:
            return self._basis_of(weight, indices)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set an adapter's scaling to ``scale`` times its configured alpha."""
        if adapter in self.curlora_U:
            self.matrices[adapter].scaling = scale * self.matrices[adapter].alpha

    def scale_layer(self, scale: float) -> None:
        """Multiply the present scaling of every active adapter by ``scale``."""
        for adapter in self._active():
            self.matrices[adapter].scaling *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of every active adapter by ``scale``; reset it to the configured alpha if ``None``."""
        for adapter in self._active():
            U = self.matrices[adapter]
            U.scaling = U.alpha if scale is None else U.scaling / scale

    # Overrides of torch's and PEFT's methods

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CurloraLayer:
        """Implement ``to``, ``half`` and the like. Bases are converted as well, and shared bases stay shared."""
        current = {name: U.basis for name, U in self.matrices.items() if U.is_current and U.basis is not None}
        super()._apply(fn, recurse)
        moved: dict[int, Basis] = {}
        for name, basis in current.items():
            if not self.matrices[name].indices.is_meta:
                self.matrices[name].hold(moved.setdefault(id(basis), basis.map(fn)))
        return self

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move an adapter for PEFT's ``low_cpu_mem_usage``, whose own method would round ``U`` to the base's dtype."""
        home = device or device_of(self.get_base_layer(), self.parameter_name)
        if adapter_name in self.curlora_U and home.type != "meta":
            U = self.matrices[adapter_name]
            if not U.weight.is_meta:
                U.to(home)

    def train(self, mode: bool = True) -> CurloraLayer:
        """Set the training mode, and check adapters that were loaded without ``load_state_dict``.

        transformers' ``model.load_adapter`` sets tensors one by one and then calls ``eval``.

        Raises:
            ValueError: if such an adapter was made on another base model.
        """
        self._refresh_where_needed()
        super().train(mode)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        self._base_was_loaded = any(key.startswith(f"{prefix}base_layer.") for key in state_dict)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _refresh_where_needed(self, base_changed: bool = False) -> None:
        if not is_readable(self.get_base_layer(), self.parameter_name):
            return
        refused = []
        for name, U in self.matrices.items():
            if not U.indices.is_meta and (base_changed or not U.is_current):
                try:
                    self.refresh(name, base_changed=base_changed)
                except ValueError as error:
                    refused.append(error)
        if refused:
            raise refused[0]

    # Reading and drawing, for subclasses

    def _read(self) -> Any:
        return read(self.get_base_layer(), self.name, self.parameter_name)

    def _basis_of(self, weight: StoredWeight | ProbedWeight, indices: Tensor) -> Basis:
        raise NotImplementedError

    def _select(self, norms: tuple[Tensor, Tensor], config: CurloraConfig, r: int, name: str) -> Tensor:
        """Draw indices by the squared norms of all columns and rows: int32, shape ``(2, r)``."""
        return torch.stack(
            sampling.select(
                norms, r, sampling=config.sampling, replacement=config.replacement, seed=config.seed, name=name
            )
        )

    def _draw(self, config: CurloraConfig, U: LinkingMatrix, tied_to: LinkingMatrix | None) -> Basis:
        """Return the basis of a new adapter.

        The indices come from the first of these that applies: a layer with the same weight (``tied_to``), an adapter of
        this layer with the same settings, the weights file that is about to be loaded, a new draw.
        """
        with self._read() as weight:
            if tied_to is not None:
                return self._basis_of(weight, tied_to.indices)
            others = (other.basis for other in self.matrices.values() if other.drawn_by == U.drawn_by)
            alike = next((basis for basis in others if basis is not None), None)
            if alike is not None and torch.equal(
                self._basis_of(weight, alike.indices).fingerprint.cpu(), alike.fingerprint.cpu()
            ):
                return alike
            saved = config.saved_draw(self.name)
            if saved is not None and problem_of_indices(saved[0], U.r, self.weight_shape) is None:
                basis = self._basis_of(weight, saved[0])
                if compare(saved[1], basis.fingerprint) != "other":  # on another base model, draw new ones
                    return basis
            return self._basis_of(weight, self._select(weight.squared_norms(), config, U.r, self.name))

    def _hold(self, U: LinkingMatrix, basis: Basis) -> None:
        """Give ``U`` a basis. If another adapter has the same one, ``U`` shares its tensors."""
        for other in self.matrices.values():
            alike = other.basis if other.is_current else None
            if alike is not None and alike.key == basis.key and alike.factor.device == basis.factor.device:
                # The base weight may have been replaced. Then the same indices are another basis.
                basis = alike if torch.equal(alike.factor, basis.factor) else basis
                break
        U.hold(basis)

    def _active(self) -> list[str]:
        return [adapter for adapter in self.active_adapters if adapter in self.curlora_U]


class _OfEach(Mapping[str, Any]):
    """Live view of one attribute of each adapter's matrix, by the adapter's name."""

    def __init__(self, matrices: Mapping[str, LinkingMatrix], attribute: str) -> None:
        self.matrices, self.attribute = matrices, attribute

    def __getitem__(self, adapter: str) -> Any:
        return getattr(self.matrices[adapter], self.attribute)

    def __iter__(self) -> Iterator[str]:
        return iter(self.matrices)

    def __len__(self) -> int:
        return len(self.matrices)

    def __repr__(self) -> str:
        return repr(dict(self))


def _refresh_after_load(layer: CurloraLayer, incompatible_keys: Any) -> None:
    """Update the bases after any ``load_state_dict`` to the indices and the base weight that are now present."""
    base_was_loaded, layer._base_was_loaded = layer._base_was_loaded, False
    layer._refresh_where_needed(base_was_loaded and not layer.merged)
