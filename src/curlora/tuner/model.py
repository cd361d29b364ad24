"""The tuner: puts CURLoRA layers into a model and checks what is loaded into them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.error import NoMatchingPeftModuleError
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from curlora.tuner.config import CurloraConfig
from curlora.tuner.layer import CurloraLayer, CurloraLinear
from curlora.tuner.loading import check, has_no_numbers
from curlora.tuner.mixed_batch import adapter_names_passed
from curlora.tuner.weighted import add_weighted_adapter


def _with_keys(targets: list[str] | str) -> list[str] | str:
    """PEFT's default targets, with the key projection that the paper adapts beside query and value."""
    key_of = {"q_proj": "k_proj", "query": "key", "query_proj": "key_proj", "q": "k"}
    if isinstance(targets, str):
        return targets.replace("(q_proj|v_proj)", "(q_proj|k_proj|v_proj)")
    return [*targets, *(k for q, k in key_of.items() if q in targets and k not in targets)]


class CurloraModel(BaseTuner):
    """A model with CURLoRA adapters; made by :func:`peft.get_peft_model` from a :class:`CurloraConfig`.

    Args:
        model: the base model.
        config: the adapter's configuration.
        adapter_name: the adapter's name.
        low_cpu_mem_usage: create ``U`` on the meta device, for loading into.
    """

    prefix = "curlora_"
    tuner_layer_cls = CurloraLayer
    target_module_mapping: ClassVar[dict[str, Any]] = {
        model_type: _with_keys(targets)
        for model_type, targets in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.items()
    }

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
        if isinstance(target, CurloraLayer):
            target.update_layer(adapter_name, peft_config)
            return
        layer = CurloraLinear(target, current_key)
        quantization = getattr(getattr(self.model, "hf_quantizer", None), "quantization_config", None)
        layer.get_apply_tensor_subclass = getattr(quantization, "get_apply_tensor_subclass", None)
        layer.set_adapter(adapter_name)
        layer.update_layer(adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """An adapter is made where its base layer is, and a layer that is put back, maybe quantized, is left alone."""
        setattr(parent, child_name, new_module)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter to every targeted layer, or to none: on an error the model is left as it was."""
        if "." in adapter_name or hasattr(nn.ParameterDict, adapter_name):
            raise ValueError(f"torch cannot hold an adapter that is called {adapter_name!r}. Choose another name.")
        trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except NoMatchingPeftModuleError as error:
            linear = [name for name, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))]
            # One that is adapted already is inside of the layer that carries its name.
            names = {name.removesuffix(".base_layer").rpartition(".")[2] for name in linear}
            present = ", ".join(sorted(names)) or "none"
            raise NoMatchingPeftModuleError(f"{error} Linear layers of this model: {present}.") from None
        except BaseException:
            _withdraw(model, adapter_name)
            for parameter, requires_grad in trained:
                parameter.requires_grad_(requires_grad)
            raise

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Train ``U`` in float32 on a half-precision base. The factor stays the base's own numbers."""
        if not autocast_adapter_dtype:
            return
        for layer in adapted_layers(self.model, adapter_name).values():
            U = layer.curlora_U[adapter_name]
            if U.dtype in (torch.float16, torch.bfloat16):
                layer.curlora_U[adapter_name] = nn.Parameter(U.detach().float(), requires_grad=U.requires_grad)

    @contextmanager
    def _enable_peft_forward_hooks(
        self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> Iterator[None]:
        """Entered by PEFT around ``forward`` and ``generate``: batches with an adapter for each row."""
        if adapter_names is None:
            yield
            return
        present = {name for module in self.modules() if isinstance(module, CurloraLayer) for name in module.r}
        with adapter_names_passed(self.model, adapter_names, present, kwargs.get("num_beams")):
            yield

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "linear",
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Add an adapter that is the weighted sum of others; call it on the :class:`peft.PeftModel`.

        The new adapter is not active and not trained. Weights and alphas go into its ``U``; its own alpha is 1.

        Args:
            adapters: names of adapters of this model.
            weights: one for each; may be negative.
            adapter_name: the new adapter's name.
            combination_type: ``"cat"`` puts the adapters side by side, is exact for any, and has the sum of their
                ranks. ``"linear"`` is exact too, and keeps the rank, where they have the same columns and rows in every
                layer that they share: adapters with the same ``seed``, ``r`` and ``sampling`` have. So must they for
                ``"ties"``, ``"dare_linear"``, ``"dare_ties"`` and ``"magnitude_prune"``, PEFT's own, applied to ``U``.
            density: share of the numbers of ``U`` to keep, in [0, 1]; for the last four.
            majority_sign_method: ``"total"`` or ``"frequency"``, for ``"ties"`` and ``"dare_ties"``.

        Raises:
            ValueError: if an adapter is unknown or the new name is taken; if the weights are not as many; if the
                adapters cannot be combined this way; if one is merged, trained biases, or saves the same module whole
                as another. The model is then as it was.
        """
        add_weighted_adapter(self, adapters, weights, adapter_name, combination_type, density, majority_sign_method)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        layers = adapted_layers(model, adapter_name)
        try:
            check(layers, adapter_name, remapped)
        except Exception:
            # With low_cpu_mem_usage the adapter is there for this load alone, and has no numbers without it.
            if has_no_numbers(layers, adapter_name):
                _withdraw(model, adapter_name)
                model.peft_config.pop(adapter_name, None)
            raise
        return remapped


def adapted_layers(model: nn.Module, adapter_name: str) -> dict[str, CurloraLayer]:
    """The layers that hold an adapter, by name."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, CurloraLayer) and adapter_name in layer.curlora_U
    }


def _withdraw(model: nn.Module, adapter_name: str) -> None:
    """Take an adapter off a model; a layer without another becomes what it was."""
    for name, layer in adapted_layers(model, adapter_name).items():
        if len(layer.curlora_U) > 1:
            layer.delete_adapter(adapter_name)
        else:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.base_layer)
