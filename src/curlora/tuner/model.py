"""The tuner: adds CURLoRA layers to a model, and checks adapters before they are loaded."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND, TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from curlora._compat import convert_expert_names, refuse_what_reads_the_weight
from curlora.tuner.config import CurloraConfig
from curlora.tuner.format import ENTRIES, present_name
from curlora.tuner.layer import CurloraLayer
from curlora.tuner.linear import CurloraLinear
from curlora.tuner.loading import check
from curlora.tuner.mixed_batch import adapter_names_passed
from curlora.tuner.param_wrapper import ParamWrapper
from curlora.tuner.weighted import check_combinable, check_same_indices, combination, combined_config, side_by_side

__all__ = ["CurloraModel", "adapted_layers", "swap_adapter"]


def _with_keys(targets: list[str] | str) -> list[str] | str:
    """Return PEFT's default targets plus the key projection, since the paper adapts query, key and value."""
    key_of = {"q_proj": "k_proj", "query": "key", "query_proj": "key_proj", "q": "k"}
    if isinstance(targets, str):
        return targets.replace("(q_proj|v_proj)", "(q_proj|k_proj|v_proj)")
    return [*targets, *(k for q, k in key_of.items() if q in targets and k not in targets)]


class CurloraModel(BaseTuner):
    """A model with CURLoRA adapters. :func:`peft.get_peft_model` creates it from a :class:`CurloraConfig`.

    Args:
        model: the base model.
        config: the adapter's configuration.
        adapter_name: the adapter's name.
        low_cpu_mem_usage: create the adapter on the meta device, to load its weights afterwards. No base weight is read
            then.
    """

    prefix = "curlora_"
    tuner_layer_cls = CurloraLayer
    target_module_mapping: ClassVar[dict[str, Any]] = {
        model_type: _with_keys(targets)
        for model_type, targets in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.items()
    }

    # Adding adapters

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter to every targeted layer. On an error no layer gets one, and the model is unchanged.

        Raises:
            ValueError: if torch cannot use the adapter's name as the name of a module, or an option does not fit.
            NoMatchingPeftModuleError: if the targets match no module. The message lists the model's linear layers.
        """
        if "." in adapter_name or hasattr(nn.ModuleDict, adapter_name):
            raise ValueError(f"torch cannot hold an adapter that is called {adapter_name!r}. Choose another name.")
        config = self.peft_config[adapter_name]
        # With "all-linear" the user has not chosen the layers, so a rank that is too high for a layer is lowered.
        all_linear = _is_all_linear(config.target_modules)
        self._lowered: dict[str, int] | None = {} if all_linear else None
        trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        convert_expert_names(config, model)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except NoMatchingPeftModuleError as error:
            linear = [name for name, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))]
            # The base layer of an adapted layer has the suffix ".base_layer".
            names = {name.removesuffix(".base_layer").rpartition(".")[2] for name in linear}
            present = ", ".join(sorted(names)) or "none"
            raise NoMatchingPeftModuleError(f"{error} Linear layers of this model: {present}.") from None
        except BaseException:
            _withdraw(model, adapter_name)
            _set_trained(model, trained)
            raise
        self._trained_before = trained  # by name: references would keep the parameters alive that FSDP replaces
        if self._lowered:
            some = ", ".join(f"{name} ({r})" for name, r in list(self._lowered.items())[:3])
            warnings.warn(
                f"The rank was lowered from {config.r} to the smaller side of the weight in {len(self._lowered)} "
                f"layer(s): {some}{', ...' if len(self._lowered) > 3 else ''}",
                stacklevel=3,
            )
        _warn_of_experts_left_out(model, config, all_linear)

    def _create_and_replace(
        self,
        peft_config: CurloraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        refuse_what_reads_the_weight(peft_config, self.model, parent, target_name)
        current_key = current_key.removeprefix("base_model.model.")  # PeftMixedModel adds this prefix
        tied_to = None
        if self._check_tied_module_exists(peft_config, current_key):
            tied_to = self.model.get_input_embeddings().curlora_U[adapter_name]
        # A wrapper that already has this adapter adapts another parameter of the module. Wrap it once more.
        nested = isinstance(target, ParamWrapper) and adapter_name in target.curlora_U
        if isinstance(target, CurloraLayer) and not nested:
            target.update_layer(adapter_name, peft_config, tied_to)
            return
        layer = _new_layer(peft_config, target, current_key, parameter_name)
        lowered: dict[str, int] | None = getattr(self, "_lowered", None)
        smaller = min(layer.weight_shape[-2:])
        if lowered is not None and peft_config.rank_of(layer.name) > smaller:
            peft_config.rank_pattern[layer.name] = lowered[layer.name] = smaller
        quantization = getattr(getattr(self.model, "hf_quantizer", None), "quantization_config", None)
        layer.get_apply_tensor_subclass = getattr(quantization, "get_apply_tensor_subclass", None)
        if isinstance(layer, CurloraLinear) and not isinstance(self, CurloraModel):
            layer.shared = True
        layer.set_adapter(adapter_name)
        layer.update_layer(adapter_name, peft_config, tied_to)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Set the module without moving it, unlike PEFT's method.

        Adapters are created on the base layer's device, and a base layer that is put back may be quantized.
        """
        setattr(parent, child_name, new_module)

    def _prepare_adapter_config(self, peft_config: CurloraConfig, model_config: dict[str, Any]) -> CurloraConfig:
        if peft_config.target_modules is None and peft_config.target_parameters:
            known = self.target_module_mapping.get(model_config["model_type"])
            peft_config.target_modules = known if isinstance(known, str) else set(known or ())
            return peft_config
        prepared: CurloraConfig = super()._prepare_adapter_config(peft_config, model_config)
        return prepared

    def _check_new_adapter_config(self, config: CurloraConfig) -> None:
        super()._check_new_adapter_config(config)
        wanted = set(config.target_parameters or ())
        for name, other in self.peft_config.items():
            others = set(getattr(other, "target_parameters", None) or ())
            if other is not config and wanted and others and wanted != others:
                raise ValueError(
                    "When using multiple adapters with `target_parameters`, all adapters must target the same set of "
                    f"parameters, but got {sorted(wanted)} for the new adapter and {sorted(others)} for adapter "
                    f"'{name}'."
                )

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Train ``U`` in float32 on a half-precision base. The basis stays in the base model's dtype."""
        if not autocast_adapter_dtype:
            return
        for layer in adapted_layers(self.model, adapter_name).values():
            U = layer.matrices[adapter_name]
            if U.weight.dtype in (torch.float16, torch.bfloat16):
                U.weight.data = U.weight.data.float()

    # Using adapters

    @contextmanager
    def _enable_peft_forward_hooks(
        self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> Iterator[None]:
        """Pass ``adapter_names`` to the layers. PEFT enters this context around ``forward`` and ``generate``."""
        if adapter_names is None:
            yield
            return
        present = {name for module in self.modules() if isinstance(module, CurloraLayer) for name in module.curlora_U}
        with adapter_names_passed(self.model, adapter_names, present, CurloraLayer, kwargs.get("num_beams")):
            yield

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        _untie(self.model, adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            _untie(self.model, adapter_names)
        unloaded: nn.Module = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        return unloaded

    @torch.no_grad()
    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "linear",
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Add an adapter that is the weighted sum of others. Call this method on the :class:`peft.PeftModel`.

        The new adapter is not active and not trainable. Its ``U`` contains the weights and the present scalings (alpha,
        unless ``set_scale`` changed it), and its own alpha is 1.

        Args:
            adapters: names of adapters of this model.
            weights: one for each adapter; may be negative.
            adapter_name: the new adapter's name.
            combination_type: how to combine the adapters.

                - ``"cat"`` concatenates them. It is exact for any adapters, and the rank is the sum of their ranks.
                - ``"linear"`` adds them. It is exact too and keeps the rank.
                - ``"ties"``, ``"dare_linear"``, ``"dare_ties"`` and ``"magnitude_prune"`` are PEFT's methods, applied
                  to ``U``.

                All but ``"cat"`` require the same columns and rows in every layer that the adapters share. Adapters
                with the same ``seed``, ``r``, ``sampling`` and ``replacement`` have them.
            density: fraction of the entries of ``U`` to keep, in [0, 1]; required for the last four types.
            majority_sign_method: ``"total"`` or ``"frequency"``, for ``"ties"`` and ``"dare_ties"``.

        Raises:
            ValueError: if an adapter is unknown or the new name is taken, if there is not one weight for each adapter,
                if the adapters cannot be combined in this way, or if one of them is merged, trained biases or
                embeddings of tokens, adapts parameters, or saves the same module whole as another. The model is
                unchanged then.
        """
        if len(adapters) == 1 and combination_type == "cat":
            combination_type = "linear"  # the same result for one adapter, and PEFT does so too
        combine = combination(combination_type, density, majority_sign_method)
        layers = {name: layer for name, layer in self.model.named_modules() if isinstance(layer, CurloraLayer)}
        layers = {name: layer for name, layer in layers.items() if any(one in layer.curlora_U for one in adapters)}
        wrappers = [module for module in self.model.modules() if isinstance(module, ModulesToSaveWrapper)]
        check_combinable(self.peft_config, adapters, weights, adapter_name, layers, wrappers)

        combined: dict[str, tuple[Tensor, Tensor]] = {}
        for name, layer in layers.items():
            here = [(one, weight) for one, weight in zip(adapters, weights, strict=True) if one in layer.curlora_U]
            matrices = [layer.matrices[one].weight.detach() for one, _ in here]
            scales = [weight * layer.scaling[one] for one, weight in here]
            bases = {one: layer.basis(one) for one, _ in here}
            if combine is None:
                combined[name] = side_by_side(matrices, scales, [basis.indices for basis in bases.values()])
            else:
                check_same_indices(name, {one: basis.key for one, basis in bases.items()}, combination_type)
                scaled = torch.tensor(scales, dtype=matrices[0].dtype, device=matrices[0].device)
                combined[name] = combine(matrices, scaled), bases[here[0][0]].indices
            rank, most = len(combined[name][0]), min(layer.weight_shape)
            if rank > most:
                raise ValueError(
                    f"combination_type={combination_type!r} gives layer {name!r} rank {rank}, the sum of the adapters' "
                    f"ranks, which is above the {most} that its weight allows. Combine fewer adapters."
                )

        configs = [self.peft_config[one] for one in adapters]
        self.peft_config[adapter_name] = combined_config(configs, {name: len(U) for name, (U, _) in combined.items()})
        try:
            # This draws columns and rows, which are replaced below.
            self.inject_adapter(self.model, adapter_name, autocast_adapter_dtype=False)
        except BaseException:
            del self.peft_config[adapter_name]
            raise
        for name, (U, indices) in combined.items():
            layers[name].redraw(adapter_name, indices)
            layers[name].matrices[adapter_name].weight = nn.Parameter(U, requires_grad=False)
        for wrapper in wrappers:
            for owner in set(adapters) & set(wrapper.modules_to_save):
                wrapper.modules_to_save[adapter_name].load_state_dict(wrapper.modules_to_save[owner].state_dict())

    # Saving and loading

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """Return the tensors to save. A caller's state dict may have only parameters; the buffers are then added."""
        state = dict(state_dict)
        # If FSDP gathers the state dict, it is empty in the processes that save nothing.
        for name, layer in adapted_layers(model, adapter_name).items() if state else ():
            prefix = f"{name.removeprefix('_fsdp_wrapped_module.')}.curlora_U.{adapter_name}."
            if f"{prefix}weight" not in state:
                raise ValueError(
                    f"The state dict that is to be saved lacks {prefix}weight, the U of adapter {adapter_name!r} in "
                    "this layer. Pass a state dict with all parameters of the adapter, or pass none."
                )
            for entry in ENTRIES[1:]:
                state.setdefault(prefix + entry, getattr(layer.matrices[adapter_name], entry))
        selected: dict[str, Tensor] = super()._get_adapter_state_dict(
            model, config, adapter_name, state, unwanted_adapter_names
        )
        return selected

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Rename the tensors to the model's names and check them.

        If they do not fit, an adapter that was created for them is removed again.
        """
        state_dict = {present_name(key): tensor for key, tensor in state_dict.items()}
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        layers = adapted_layers(model, adapter_name)
        made_for_it = getattr(config, "weights_file", None) is not None and not any(
            _trained(layer, adapter_name) for layer in layers.values()
        )
        made_for_it = made_for_it or any(layer.matrices[adapter_name].weight.is_meta for layer in layers.values())
        afterwards = f"Adapter {adapter_name!r} is as it was before the load."
        try:
            check(layers, adapter_name, remapped, "The model is as it was." if made_for_it else afterwards)
        except Exception:
            if made_for_it:
                _roll_back(model, adapter_name)
            raise
        return remapped


def adapted_layers(model: nn.Module, adapter_name: str) -> dict[str, CurloraLayer]:
    """Return the layers that hold an adapter, by name."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, CurloraLayer) and adapter_name in layer.curlora_U
    }


@torch.no_grad()
def swap_adapter(model: nn.Module, state_dict: dict[str, Tensor], adapter_name: str, config: CurloraConfig) -> None:
    """Replace an adapter's values by a new state dict, for :func:`peft.utils.hotswap.hotswap_adapter`.

    ``U`` is changed in place, so that a compiled model is not compiled again if alpha is the same. In layers that the
    state dict does not have, ``U`` is set to zero. The adapter's configuration takes over the alphas, the settings of
    the draws, and the ledger.

    Args:
        model: the model with the adapter; may be compiled.
        state_dict: the new adapter's tensors.
        adapter_name: name of the adapter to replace.
        config: the new adapter's configuration.

    Raises:
        ValueError: if the state dict does not fit the adapter or the model. The adapter is unchanged then.
    """
    model = getattr(model, "_orig_mod", model)
    layers = adapted_layers(model, adapter_name)
    # PEFT has inserted the adapter's name into the keys. Remove it, rename keys of version 1, and insert it again.
    inside = f".curlora_U.{adapter_name}."
    state = {
        present_name(key.removesuffix(f".{adapter_name}").replace(inside, ".curlora_U.")).replace(
            ".curlora_U.", inside
        ): tensor
        for key, tensor in state_dict.items()
    }
    left_out = {name for name in layers if not any(key.startswith(f"{name}{inside}") for key in state)}
    swapped = {name: layer for name, layer in layers.items() if name not in left_out}
    check(swapped, adapter_name, state, f"Adapter {adapter_name!r} is as it was.")
    for name in left_out:
        layers[name].matrices[adapter_name].weight.zero_()
    for name, layer in swapped.items():
        prefix = f"{name}.curlora_U.{adapter_name}."
        U = layer.matrices[adapter_name]
        U.load_state_dict({entry: state[prefix + entry] for entry in ENTRIES})
        layer.refresh(adapter_name)
        U.alpha = U.scaling = config.alpha_of(layer.name)
        U.drawn_by = (U.r, *config.drawn_by)
    if (present := getattr(model, "peft_config", {}).get(adapter_name)) is not None:
        present.take_over(config)


def _new_layer(config: CurloraConfig, target: nn.Module, name: str, parameter_name: str | None) -> CurloraLayer:
    if parameter_name is not None:
        return ParamWrapper(target, name, parameter_name)
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    for kind, layer_class in config._custom_modules.items():
        if isinstance(base, kind):
            make: Any = layer_class
            custom: CurloraLayer = make(target, name)
            return custom
    return CurloraLinear(target, name)


def _is_all_linear(targets: Any) -> bool:
    return isinstance(targets, str) and targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND


# Names of a block's projections in the architectures that keep experts as parameters.
_OF_EXPERTS = {"gate_proj", "up_proj", "down_proj", "gate_up_proj", "w1", "w2", "w3", "input_linear", "output_linear"}


def _warn_of_experts_left_out(model: nn.Module, config: CurloraConfig, all_linear: bool) -> None:
    """Warn if experts are three-dimensional parameters, which module names and ``"all-linear"`` do not reach."""
    stacks = [
        name for name, parameter in model.named_parameters()
        if parameter.ndim == 3 and "expert" in name and ".curlora_" not in name
    ]  # fmt: skip
    targets = config.target_modules if isinstance(config.target_modules, (set, list)) else ()
    meant = all_linear or any(target.rpartition(".")[2] in _OF_EXPERTS for target in targets)
    if stacks and meant and not config.target_parameters:
        leaves = sorted({name.rpartition(".")[2] for name in stacks})
        warnings.warn(
            f"The experts of this model are parameters, which target_modules does not reach: {', '.join(leaves)} "
            f"are left out ({len(stacks)} parameters, such as {stacks[0]!r}). Name them in target_parameters to adapt "
            "them.",
            stacklevel=4,
        )


def _trained(layer: CurloraLayer, adapter_name: str) -> bool:
    U = layer.matrices[adapter_name].weight
    return not U.is_meta and bool(U.any())


def _untie(model: nn.Module, adapter_names: Sequence[str] | None) -> None:
    """Give each layer that shares its weight with another module its own copy: a merge into it would change both.

    Args:
        model: the base model.
        adapter_names: the adapters that will be merged; each layer's active ones if ``None``.
    """
    owners: Counter[int] = Counter()
    for module in model.modules():
        owners.update(id(parameter) for parameter in module.parameters(recurse=False))
    for layer in model.modules():
        if not isinstance(layer, CurloraLinear) or layer.merged:
            continue
        names = layer.active_adapters if adapter_names is None else adapter_names
        if any(name in layer.curlora_U for name in names):
            base: Any = layer.get_base_layer()
            weight = getattr(base, "weight", None)
            if isinstance(weight, nn.Parameter) and owners[id(weight)] > 1:
                owners[id(weight)] -= 1
                base.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)


def _withdraw(model: nn.Module, adapter_name: str) -> None:
    """Remove an adapter from a model. A layer without other adapters becomes its base layer again."""
    for name, layer in adapted_layers(model, adapter_name).items():
        if len(layer.curlora_U) > 1:
            layer.delete_adapter(adapter_name)
        else:
            model.set_submodule(name, layer.base_layer)


def _roll_back(model: nn.Module, adapter_name: str) -> None:
    """Remove an adapter that was created for weights that were then refused."""
    tuner = getattr(model, "base_model", None)
    if isinstance(tuner, CurloraModel) and len(tuner.peft_config) > 1:
        model.delete_adapter(adapter_name)
        return
    _withdraw(model, adapter_name)
    for name, module in list(model.named_modules()):
        if isinstance(module, AuxiliaryTrainingWrapper):  # wraps a module that is saved whole, or trained tokens
            model.set_submodule(name, module.original_module)
    model.peft_config.pop(adapter_name, None)
    if isinstance(tuner, CurloraModel):
        del tuner.model.peft_config
        _set_trained(tuner.model, tuner._trained_before)


def _set_trained(model: nn.Module, trained: Mapping[str, bool]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained.get(name, parameter.requires_grad))
