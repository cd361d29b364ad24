"""One adapted layer: a frozen linear layer, and per adapter a trained ``U`` with its indices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from curlora import sampling
from curlora.alone import alone
from curlora.functional import autocast_off, gather_update, gather_update_
from curlora.tuner.config import CurloraConfig
from curlora.tuner.fingerprint import LENGTH, compare, fingerprint
from curlora.tuner.loading import follow
from curlora.tuner.merging import merge, unmerge
from curlora.tuner.mixed_batch import check_adapter_names, update_rows
from curlora.tuner.saved import problem_of_indices
from curlora.tuner.sharded import whole
from curlora.tuner.weight import ProbedWeight, StoredWeight, check_adaptable, device_of, features, is_plain, read


class CurloraLayer(nn.Module, BaseTunerLayer):
    """A frozen linear layer with CURLoRA adapters: ``nn.Linear``, transformers' ``Conv1D`` or a quantized one.

    With ``W`` the weight as the layer stores it, an adapter makes the layer act as if it were
    ``W + alpha * W[:, columns] @ U @ W[rows, :]``. An ``nn.Linear`` stores ``(m, n)`` for ``n``
    inputs and ``m`` outputs, a ``Conv1D`` stores ``(n, m)``: so in the first the rows, and in the
    second the columns, are gathered from the output, and the other side is kept as ``factor``. Nothing but the output
    of the base layer is used in training and inference, so that it may be quantized in any way.

    Args:
        base_layer: the layer to adapt.
        name: the layer's name in the model; draws depend on it and errors print it.

    Raises:
        TypeError: if ``base_layer`` is of a type that cannot be adapted.
    """

    adapter_layer_names = ("curlora_U",)
    other_param_names = ("curlora_indices", "curlora_fingerprint", "curlora_factor", "curlora_gathered")
    # peft.helpers.disable_input_dtype_casting switches it off. No input is cast here.
    cast_input_dtype_enabled = True

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        base = self.get_base_layer()
        check_adaptable(base, name)
        self.stores_outputs_last = isinstance(base, Conv1D)
        self.in_features, self.out_features = features(base)
        # Of a model that torchao has quantized: how to do so again, after a merge.
        self.get_apply_tensor_subclass: Callable[[], Any] | None = None

        self.r: dict[str, int] = {}
        self.alpha: dict[str, float] = {}
        # Saved: U; the indices, columns above rows, int32 (2, r); the fingerprint of the factor.
        self.curlora_U = nn.ParameterDict()
        self.curlora_indices = BufferDict(persistent=True)
        self.curlora_fingerprint = BufferDict(persistent=True)
        # Rebuilt from the base: W[:, columns], or W[rows, :].T in a Conv1D; (out_features, r). And the indices of the
        # other side, which are gathered from the output: int64, with which PyTorch is quickest.
        self.curlora_factor = BufferDict(persistent=False)
        self.curlora_gathered = BufferDict(persistent=False)

        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        # The indices that each factor was taken at, as bytes: adapters drawn alike have the same.
        self.draws: dict[str, bytes] = {}
        # What the last draw was made by, and its indices.
        self._last_draw: tuple[tuple[object, ...], Tensor] | None = None
        # The buffers of each adapter as they were last looked at, and whose are in a state dict that is being loaded.
        self._noted: dict[str, tuple[Tensor, Tensor]] = {}
        self._brought: list[str] = []
        # Of an adapter that is being loaded, what was read to see that it fits: indices, factor and fingerprint.
        self.just_read: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        # What each merged adapter added, as two factors: the weight they came from is gone.
        self.merged_factors: dict[str, tuple[Tensor, Tensor]] = {}
        # The weight before a merge into it.
        self.unmerged_weight: Tensor | None = None
        # The base layer before a merge into it, if it is quantized. In a list: it is no module of this one.
        self.unmerged_base: list[nn.Module] = []
        self.register_load_state_dict_post_hook(_rebuild_after_load)

    def update_layer(self, adapter_name: str, config: CurloraConfig) -> None:
        """Add an adapter, or draw an existing one anew: indices from the weight, ``U`` zero.

        Raises:
            RuntimeError: if an adapter is merged into the weight that would be drawn from.
            ValueError: if the rank does not fit the weight, or it cannot be drawn from.
        """
        if self.merged:
            raise RuntimeError(
                f"layer {self.name!r}: cannot add adapter {adapter_name!r} while {self.merged_adapters} "
                "is merged into the weight, whose columns and rows it would be drawn from. Unmerge first."
            )
        r = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), self.name), config.r)
        alpha = config.alpha_pattern.get(get_pattern_key(list(config.alpha_pattern), self.name), config.alpha)
        base = self.get_base_layer()
        device = device_of(base)
        if device.type == "meta":  # shapes only; real indices come with a saved adapter
            dtype = base.weight.dtype if is_plain(base) else torch.float32
            indices, current = (torch.zeros(*shape, dtype=torch.int32, device="meta") for shape in ((2, r), (LENGTH,)))
            factor = torch.zeros(self.out_features, r, dtype=dtype, device="meta")
            self._add(adapter_name, alpha, indices, factor, current, dtype, config)
            return
        with read(base, self.name) as weight:
            draw = self._draw(config, r, weight)
            self._add(adapter_name, alpha, *draw, weight.dtype if weight.exact else torch.float32, config)

    @property
    def weight_shape(self) -> tuple[int, int]:
        """Of the base weight, as the layer stores it."""
        shape = self.out_features, self.in_features
        return shape[::-1] if self.stores_outputs_last else shape

    def take(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Read the selected side that is kept: ``W[:, columns]``, or ``W[rows, :].T`` in a ``Conv1D``.

        Args:
            indices: shape ``(2, r)``, columns above rows.

        Returns:
            The factor, shape ``(out_features, r)``, contiguous, in the weight's dtype, or that in which a quantized
            layer computes; and its :func:`curlora.tuner.fingerprint.fingerprint`.
        """
        with read(self.get_base_layer(), self.name) as weight:
            return self._take(weight, indices)

    def sides(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """Which outputs an adapter gathers, and the directions that it adds along.

        Returns:
            ``index``, integers of shape ``(r,)``, and ``factor``, shape ``(out_features, r)``, as
            :func:`curlora.functional.gather_update` takes them.
        """
        gathered, factor = self._held("curlora_gathered"), self._held("curlora_factor")
        return gathered._buffers[adapter_name], factor._buffers[adapter_name]

    def redraw(self, adapter_name: str, indices: Tensor) -> None:
        """Give an adapter that has not been trained other columns and rows.

        Args:
            adapter_name: the adapter.
            indices: integers of shape ``(2, r)``, columns above rows.

        Raises:
            RuntimeError: if an adapter is merged into the weight, or ``U`` is not zero, and so belongs to those it has.
        """
        if self.merged:
            raise RuntimeError(f"layer {self.name!r}: {self.merged_adapters} is merged into the weight. Unmerge first.")
        if self.curlora_U[adapter_name].any():
            raise RuntimeError(
                f"layer {self.name!r}: adapter {adapter_name!r} has been trained with the columns and rows that it has"
            )
        self.curlora_indices[adapter_name].copy_(indices)
        self.rebuild(adapter_name)

    def delta_factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """The two factors of an adapter's update, which is their product.

        Returns:
            ``alpha * C @ U``, shape ``(m, r)``, and ``R``, shape ``(r, n)``, for a weight that is stored as ``(m, n)``
            and has nothing merged into it; at least float32.
        """
        columns, rows = self.curlora_indices[adapter_name]
        with read(self.get_base_layer(), self.name) as weight:
            C, R = weight.columns(columns), weight.rows(rows)
        dtype = torch.promote_types(C.dtype, torch.float32)
        U = whole(self.curlora_U[adapter_name].detach()).to(device=C.device, dtype=dtype)
        with autocast_off(C):
            return self.alpha[adapter_name] * (C.to(dtype) @ U), R.to(dtype)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """``alpha * C @ U @ R``, dense, in the layout and dtype of the base weight; of a quantized one, float32."""
        left, right = self.merged_factors.get(adapter_name) or self.delta_factors(adapter_name)
        base = self.get_base_layer()
        device = device_of(base)
        left, right = left.to(device), right.to(device)
        with autocast_off(left):
            return (left @ right).to(base.weight.dtype if is_plain(base) else left.dtype)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Asked by :func:`peft.convert_to_lora`; :func:`curlora.convert_to_lora` is exact and quicker."""
        return True

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the base weight. A quantized one is quantized anew, as PEFT does it for LoRA.

        Args:
            safe_merge: refuse to merge if the merged weight would not be finite.
            adapter_names: the adapters; all active ones if ``None``.

        Raises:
            ValueError: with ``safe_merge``, naming the adapter that makes the weight non-finite; or if the base layer
                is quantized in a way that PEFT cannot merge into.
            RuntimeError: if the weights are partitioned by DeepSpeed's ZeRO-3.
        """
        merge(self, adapter_names, safe_merge)

    def unmerge(self) -> None:
        """Give the base layer back as it was, bit for bit; :meth:`merge` keeps it, a weight in the CPU's memory."""
        unmerge(self)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.r.pop(adapter_name, None)
        self.alpha.pop(adapter_name, None)
        self.draws.pop(adapter_name, None)
        self._noted.pop(adapter_name, None)
        self.just_read.pop(adapter_name, None)

    def forward(self, x: Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Tensor:
        """The base layer's output plus the update of every active adapter; shape ``(..., out_features)``.

        With ``adapter_names``, one per row of ``x``, each row gets the update of its own adapter instead.
        """
        if adapter_names is not None:
            check_adapter_names(self, x, adapter_names)
        if self.disable_adapters and self.merged:
            self.unmerge()
        output = self._held("base_layer")(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return output
        if adapter_names is not None:
            return update_rows(self, output, adapter_names)
        adapters = [adapter for adapter in self.active_adapters if adapter in self.r]
        if not adapters:
            return output
        in_place = alone(output)  # by itself: an argument of a call would be one more reference
        return self.update(output, adapters, in_place)

    def update(self, output: Tensor, adapters: Sequence[str], in_place: bool = False) -> Tensor:
        """``output`` of the base layer, shape ``(..., out_features)``, plus the update of one or more adapters."""
        index, factor, mixing = self._combined(adapters)
        add = gather_update_ if in_place else gather_update
        return add(output, mixing, factor, index, self.offset(index))

    def offset(self, index: Tensor) -> Tensor | None:
        """The base layer's bias at ``index``, which is no part of ``R x``; ``None`` without a bias."""
        bias = getattr(self._held("base_layer"), "bias", None)
        return None if bias is None else bias.index_select(0, index)

    def mixing(self, adapter_name: str) -> Tensor:
        """``alpha * U``, transposed in a ``Conv1D``: what :func:`curlora.functional.gather_update` takes."""
        # As an item: ZeRO-3 gathers what is asked for so. Replicas of nn.DataParallel have attributes in their place.
        parameters = self._held("curlora_U")._parameters
        U = parameters[adapter_name] if adapter_name in parameters else self.curlora_U[adapter_name]
        U = U.T if self.stores_outputs_last else U
        return U if self.alpha[adapter_name] == 1 else U * self.alpha[adapter_name]

    def _held(self, name: str) -> Any:
        """A module of the layer, past nn.Module's own lookup of attributes, which takes as long as a small product."""
        return self._modules[name]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CurloraLayer:
        """Behind ``to``, ``half`` and the like: what adapters hold together stays one."""
        owner: dict[int, str] = {}
        first = {adapter: owner.setdefault(id(factor), adapter) for adapter, factor in self.curlora_factor.items()}
        replaced = self._replaced()
        super()._apply(fn, recurse)
        for adapter, other in first.items():
            self._share(adapter, other)
        self._noted = {a: buffers for a, buffers in self._saved_buffers().items() if a not in replaced}
        self.just_read.clear()
        return self

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Behind PEFT's ``low_cpu_mem_usage``, which would also round ``U`` to the precision of the base."""
        if adapter_name not in self.curlora_U:
            return
        U = self.curlora_U[adapter_name]
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        moved = self.curlora_U[adapter_name]
        if moved.dtype != U.dtype:
            self.curlora_U[adapter_name] = nn.Parameter(U.detach().to(moved.device), requires_grad=U.requires_grad)

    def train(self, mode: bool = True) -> CurloraLayer:
        """As of any module; what was put into the layer past ``load_state_dict`` is looked at now.

        The ``load_adapter`` that transformers puts on its models sets tensors one by one, then calls ``eval``.

        Raises:
            ValueError: if such an adapter was made on another base.
        """
        replaced = self._replaced()
        if replaced:
            follow(self, replaced)
            self._noted = self._saved_buffers()
        super().train(mode)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Behind ``load_state_dict``: with a base layer every adapter is looked at, else those that are loaded."""
        names = [key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)]
        base = any(name.startswith("base_layer.") for name in names)
        if base:
            self.just_read.clear()
        loaded = {name.rpartition(".")[2] for name in names if name.startswith("curlora_")}
        self._brought = [adapter for adapter in self.curlora_U if base or adapter in loaded]
        for adapter in loaded & set(self.curlora_U):
            U, key = self.curlora_U[adapter], f"{prefix}curlora_U.{adapter}"
            # To a U without numbers the loaded one is assigned, and not copied: it would bring its own precision.
            if key in state_dict and U.device.type == "meta":
                state_dict[key] = state_dict[key].to(U.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _saved_buffers(self) -> dict[str, tuple[Tensor, Tensor]]:
        return {a: (indices, self.curlora_fingerprint[a]) for a, indices in self.curlora_indices.items()}

    def _replaced(self) -> list[str]:
        """Adapters whose saved buffers are others than those that were last looked at."""
        return [
            a for a, buffers in self._saved_buffers().items()
            if any(now is not noted for now, noted in zip(buffers, self._noted.get(a, (None, None)), strict=True))
        ]  # fmt: skip

    def _share(self, adapter_name: str, other: str) -> None:
        """An adapter that was drawn as another one holds what is rebuilt together with it."""
        self.curlora_factor[adapter_name] = self.curlora_factor[other]
        self.curlora_gathered[adapter_name] = self.curlora_gathered[other]

    def extra_repr(self) -> str:
        return ", ".join(f"{adapter}: r={r}, alpha={self.alpha[adapter]}" for adapter, r in self.r.items())

    def _combined(self, adapters: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Index, factor and mixing for ``gather_update``. Several adapters act as one of the summed rank."""
        if len(adapters) == 1:
            return *self.sides(adapters[0]), self.mixing(adapters[0])
        index, factor, mixings = zip(*((*self.sides(one), self.mixing(one)) for one in adapters), strict=True)
        return torch.cat(index), torch.cat(factor, dim=1), torch.block_diag(*mixings)

    def _draw(
        self, config: CurloraConfig, r: int, weight: StoredWeight | ProbedWeight
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Indices, factor and fingerprint: of an adapter that is about to be loaded, or drawn from the norms.

        What was drawn alike from the same weight just before is not drawn again.
        """
        saved = config.saved_draws
        if saved is not None and saved.drawn_by == config.drawn_by and (draw := saved.of(self.name)) is not None:
            indices, made_on = draw
            if problem_of_indices(indices, r, self.weight_shape) is None:
                factor, current = self._take(weight, indices)
                if compare(made_on, current) != "other":  # of which there are other columns and rows to draw
                    return indices, factor, current
        drawn_by = r, *config.drawn_by, weight.glance()
        if self._last_draw is None or self._last_draw[0] != drawn_by:
            columns, rows = sampling.select(
                weight.squared_norms(), r,
                sampling=config.sampling, replacement=config.replacement, seed=config.seed, name=self.name,
            )  # fmt: skip
            self._last_draw = drawn_by, torch.stack([columns, rows])
        indices = self._last_draw[1]
        return indices, *self._take(weight, indices)

    def _add(
        self,
        adapter_name: str,
        alpha: float,
        indices: Tensor,
        factor: Tensor,
        current: Tensor,
        dtype: torch.dtype,
        config: CurloraConfig,
    ) -> None:
        r = indices.shape[1]
        U = torch.zeros(r, r, dtype=dtype, device=factor.device)
        self.curlora_U[adapter_name] = nn.Parameter(U if config.init_weights else nn.init.normal_(U))
        self.curlora_indices[adapter_name] = indices.to(factor.device, copy=True)
        self.keep(adapter_name, factor, current)
        self.r[adapter_name], self.alpha[adapter_name] = r, alpha
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _take(self, weight: StoredWeight | ProbedWeight, indices: Tensor) -> tuple[Tensor, Tensor]:
        columns, rows = indices
        factor = (weight.rows(rows).T if self.stores_outputs_last else weight.columns(columns)).contiguous()
        return factor, fingerprint(factor, exact=is_plain(self.get_base_layer()))

    def rebuild(self, adapter_name: str) -> None:
        """Take the factor and its fingerprint from the base weight, at the adapter's indices."""
        self.keep(adapter_name, *self.take(self.curlora_indices[adapter_name]))

    def took_at(self, adapter_name: str, indices: Tensor) -> bool:
        """Whether the adapter's factor was taken at these indices."""
        return self.draws[adapter_name] == _bytes(indices)

    def refuse(self, adapter_name: str, saved: Tensor) -> None:
        """Leave an adapter of another base with the fingerprint of that, as something that has not been looked at."""
        self.curlora_fingerprint[adapter_name] = saved
        self._noted.pop(adapter_name, None)

    def keep(self, adapter_name: str, factor: Tensor, current: Tensor) -> None:
        """Hold an adapter's factor, which was taken at the indices that the adapter now has, and its fingerprint."""
        indices = self.curlora_indices[adapter_name].detach()
        # Without values, alike is only what has the same name.
        draw = adapter_name.encode() if indices.device.type == "meta" else _bytes(indices)
        # A thousand adapters that were drawn alike hold one factor, and one copy of what is gathered.
        for other, drawn in self.draws.items():
            if drawn == draw and other != adapter_name and torch.equal(self.curlora_factor[other], factor):
                self._share(adapter_name, other)
                break
        else:
            self.curlora_factor[adapter_name] = factor
            gathered = indices[0 if self.stores_outputs_last else 1]
            self.curlora_gathered[adapter_name] = gathered.to(torch.int64, copy=True)
        self.draws[adapter_name] = draw
        self.curlora_fingerprint[adapter_name] = current.to(factor.device)
        self._noted[adapter_name] = self.curlora_indices[adapter_name], self.curlora_fingerprint[adapter_name]


class CurloraLinear(CurloraLayer):
    """What a model holds. PEFT knows by the word in its name that another adapter's ``"all-linear"`` means it too."""


def _bytes(indices: Tensor) -> bytes:
    return indices.detach().to(device="cpu", dtype=torch.int32).numpy().tobytes()


def _rebuild_after_load(layer: CurloraLayer, incompatible_keys: Any) -> None:
    """After any ``load_state_dict`` the factors follow the indices and the base weight now present."""
    brought, layer._brought = layer._brought, []
    follow(layer, brought)
