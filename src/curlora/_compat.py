"""Everything that leans on what other libraries do not promise, each with what happens where it is gone.

A name is here because it is private, or because something is changed that belongs to another library. Whoever updates
PEFT, transformers or bitsandbytes reads this file; ``tests/test_compat.py`` has each with the name and without.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import inspect
import json
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_MIXED_MODEL_MAPPING
from peft.tuners.lora import LoraModel
from torch import Tensor, nn
from transformers import TrainerCallback

__all__ = [
    "add_peft_type",
    "attention_implementation",
    "brought_bias",
    "callbacks_around",
    "check_whoever_reads",
    "convert_expert_names",
    "copy_into",
    "execution_device",
    "explain_unreadable_configurations",
    "in_out_features",
    "refuse_what_reads_the_weight",
    "scale_base_rate",
    "shallow_twin",
    "support_hotswapping",
    "support_mixed_models",
    "tie_as_lora_does",
    "transformed_by_torch_func",
    "unpacked_4bit",
]


def add_peft_type(name: str) -> None:
    """Give PEFT's closed ``PeftType`` enum one more member, which :func:`peft.utils.register_peft_method` asks for.

    Without the enum's own tables, nothing can be registered, and importing curlora fails with Python's words.
    """
    if name in PeftType.__members__:
        raise ImportError(f"this PEFT already has a method called {name}; curlora cannot be registered beside it")
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member


def explain_unreadable_configurations() -> None:
    """Let PEFT say in a sentence what is wrong with an ``adapter_config.json`` before it knows whose it is.

    It looks there for the method's name; where there is none, Python's words would be all that is said, and stay it
    without this function of PEFT's.
    """
    read: Any = getattr(PeftConfig, "_get_peft_type", None)
    if read is None:
        return

    @classmethod  # type: ignore[misc]
    @functools.wraps(read.__func__)
    def get_peft_type(cls: Any, model_id: Any, **kwargs: Any) -> Any:
        try:
            found = read.__func__(cls, model_id, **kwargs)
        except KeyError as error:
            raise ValueError(
                f"The configuration of the adapter in {model_id} has no peft_type: it is damaged."
            ) from error
        except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
            raise ValueError(
                f"The adapter_config.json in {model_id} is no JSON object ({error}): copy or download it again."
            ) from error
        if found not in list(PeftType):
            raise ValueError(
                f"The configuration of the adapter in {model_id} has peft_type {found!r}, which this PEFT does not "
                "know: it is damaged, or of a method that has to be imported first."
            )
        return found

    PeftConfig._get_peft_type = get_peft_type


def check_whoever_reads(config_class: Any) -> None:
    """Let ``PeftConfig.from_pretrained`` read a CURLoRA adapter as ``config_class.from_pretrained`` does.

    transformers' ``load_adapter`` calls the former, which only makes a ``config_class`` of the options: the digests
    would not be looked at. Where it is no classmethod any more, they are not.
    """
    read: Any = getattr(PeftConfig.from_pretrained, "__func__", None)
    if read is None:
        return

    @classmethod  # type: ignore[misc]
    @functools.wraps(read)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            config = read(cls, *args, **kwargs)
        except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
            if issubclass(cls, config_class):
                raise
            raise ValueError(
                f"The adapter_config.json in {args[0] if args else kwargs} cannot be used ({error!r}): it is damaged, "
                "or of a method that has to be imported first."
            ) from error
        if isinstance(config, config_class) and not issubclass(cls, config_class):
            return config_class.from_pretrained(*args, **kwargs)
        return config

    PeftConfig.from_pretrained = from_pretrained


def in_out_features(layer: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear layer. PEFT knows those of each quantization library.

    Without it: by the attributes that most such layers have.
    """
    found = _attribute("peft.tuners.tuners_utils", "_get_in_out_features")
    inputs, outputs = found(layer) if found is not None else (None, None)
    for first, second in (
        ("in_features", "out_features"), ("num_embeddings", "embedding_dim"), ("infeatures", "outfeatures"),
        ("nx", "nf"),
    ):  # fmt: skip
        if inputs is None and hasattr(layer, first) and hasattr(layer, second):
            inputs, outputs = getattr(layer, first), getattr(layer, second)
    if inputs is None or outputs is None:
        raise TypeError(f"a {type(layer).__name__} does not say how many inputs and outputs it has")
    return int(inputs), int(outputs)


def execution_device(layer: nn.Module) -> torch.device:
    """Where a layer runs whose weights a hook of Accelerate's brings. Without that hook: on the CPU."""
    device = getattr(getattr(layer, "_hf_hook", None), "execution_device", None)
    return torch.device("cpu" if device is None else device)


def attention_implementation(config: Any) -> str:
    """How a model of transformers computes attention: ``"eager"``, ``"sdpa"`` and so on. Without its name, the last."""
    return getattr(config, "_attn_implementation", None) or "sdpa"


def brought_bias(layer: nn.Module) -> Tensor | None:
    """A bias that a hook of Accelerate's keeps elsewhere, without bringing the weight; ``None`` without that hook."""
    kept: Any = getattr(getattr(layer, "_hf_hook", None), "weights_map", None)
    if kept is None:
        return None
    bias: Tensor = kept["bias"]
    return bias.to(execution_device(layer))


def shallow_twin(module: nn.Module) -> Any:
    """The same parameters and buffers in a module of its own, in which others may be put in their place.

    Without torch's own tables: a deep copy, which takes the memory of the weights once more.
    """
    if not (hasattr(module, "_parameters") and hasattr(module, "_buffers")):
        return copy.deepcopy(module)
    twin: Any = copy.copy(module)
    twin._parameters, twin._buffers = dict(module._parameters), dict(module._buffers)
    return twin


def copy_into(tensors: list[Tensor], values: list[Tensor]) -> None:
    """Copy each value into its tensor: many small ones in one call. Without that call, one by one."""
    foreach = getattr(torch, "_foreach_copy_", None)
    if foreach is not None:
        foreach(tensors, values)
        return
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


def tie_as_lora_does(model_class: Any) -> None:
    """Give the tuner what PEFT has for LoRA to tie the adapters of weights that are shared (``ensure_weight_tying``).

    What it does to the configuration does not depend on the method. Without it PEFT warns that nothing is tied.
    """
    for name in ("_add_modules_to_save_to_tie", "_add_targets_to_tie"):
        method = getattr(LoraModel, name, None)
        if method is not None:
            setattr(model_class, name, method)


def unpacked_4bit(weight: Any) -> Any:
    """A weight that bitsandbytes has packed anew for its passes of inference, as it was before; any other as it is.

    It does so with 4-bit weights on processors with AVX512-BF16, rounds the scales to bfloat16, and notes it in the
    state alone: whoever dequantizes the weight then is not told and gets other values.

    Without bitsandbytes' inverse: an error, since the values cannot be had.
    """
    state: Any = getattr(weight, "quant_state", None)
    if not getattr(state, "packing_format_for_cpu", False):
        return weight
    inverse = _attribute("bitsandbytes.functional", "_convert_weight_packed_for_cpu_inverse")
    if inverse is None:
        raise ValueError(
            "bitsandbytes has packed the 4-bit weight for inference, and this version of it cannot unpack it. Load the "
            "model anew and add the adapter before it is used."
        )
    state = copy.copy(state)
    state.original_nested = False  # or the scales would be quantized, and rounded once more
    data, state = inverse(weight.data, state)
    state.absmax = state.absmax.T.reshape(-1).float()
    return type(weight)(
        data, requires_grad=False, quant_state=state, blocksize=state.blocksize,
        compress_statistics=weight.compress_statistics, quant_type=state.quant_type, quant_storage=data.dtype,
        bnb_quantized=True,
    )  # fmt: skip


# Blocks whose fused kernels read these modules' weights and never call them.
_READ_AND_NOT_CALLED = ("out_proj", "conv1d")


def refuse_what_reads_the_weight(config: PeftConfig, model: nn.Module, parent: nn.Module, target_name: str) -> None:
    """Raise ``ValueError`` for a module of a Mamba block that its fused kernels never call, as PEFT does for LoRA.

    PEFT goes by the model's type, for methods that it knows; the block's own name tells hybrid models too.
    Without PEFT's check: by the block's name alone.
    """
    check = _attribute("peft.tuners.tuners_utils", "_check_lora_target_modules_mamba")
    refused = "mamba" in type(parent).__name__.lower() and target_name in _READ_AND_NOT_CALLED
    if check is not None and not refused:
        as_lora = copy.copy(config)
        as_lora.peft_type = PeftType.LORA
        try:
            check(as_lora, model, target_name)
        except ValueError:
            refused = True
    if refused:
        raise ValueError(
            f"Module {target_name!r} of a {type(parent).__name__} is incompatible with Mamba-based models: their fused "
            "kernels read its weight and never call it, so an adapter there would not be trained. Take it out of "
            "target_modules."
        )


def convert_expert_names(config: Any, model: nn.Module) -> None:
    """Name experts' parameters where their modules of old are named, as PEFT does for LoRA on the same architectures.

    transformers 5 keeps experts as parameters of three dimensions, so that ``gate_proj``, ``w1`` and the like are no
    modules any more, and ``"all-linear"`` does not see them. The rank stays the one that is asked for.
    Without PEFT's conversion nothing is renamed, and :class:`curlora.CurloraModel` warns of experts that are left out.
    """
    convert = _attribute("peft.utils.transformers_weight_conversion", "_convert_peft_config_moe")
    if convert is None or not hasattr(getattr(model, "config", None), "model_type"):
        return
    as_lora = copy.copy(config)
    as_lora.lora_alpha, as_lora.rank_pattern, as_lora.alpha_pattern = 1, {}, {}
    convert(as_lora, model)
    config.target_modules = as_lora.target_modules
    if as_lora.target_parameters:
        config.target_parameters = sorted(as_lora.target_parameters)


def support_mixed_models(config_class: type, model_class: Any, layer_class: type) -> None:
    """Let :class:`peft.PeftMixedModel` hold CURLoRA adapters beside those of other methods.

    Its lists of methods are closed. Without them it refuses CURLoRA, in its own words.
    """
    mixed: Any = _module("peft.tuners.mixed.model")
    names = ("COMPATIBLE_TUNER_TYPES", "PREFIXES", "Layers", "Configs", "MixedModel")
    if mixed is None or not all(hasattr(mixed, name) for name in names):
        return
    mixed.COMPATIBLE_TUNER_TYPES = (*mixed.COMPATIBLE_TUNER_TYPES, PeftType["CURLORA"])
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING[PeftType["CURLORA"]] = mixed.MixedModel
    package: Any = _module("peft.tuners.mixed")
    package.COMPATIBLE_TUNER_TYPES = mixed.COMPATIBLE_TUNER_TYPES
    mixed.PREFIXES.append(model_class.prefix)
    mixed.Layers = (*mixed.Layers, layer_class)
    mixed.Configs = mixed.Configs | config_class
    create = mixed.MixedModel._create_and_replace

    @functools.wraps(create)
    def create_and_replace(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(config, config_class):
            model_class._create_and_replace(self, config, *args, **kwargs)
        else:
            create(self, config, *args, **kwargs)

    mixed.MixedModel._create_and_replace = create_and_replace


def support_hotswapping(config_class: type, swap: Callable[..., None]) -> None:
    """Let :func:`peft.utils.hotswap.hotswap_adapter` swap CURLoRA adapters, of which it knows LoRA's tensors alone.

    Without its parts it refuses CURLoRA, in its own words.

    Args:
        config_class: of the adapters.
        swap: called as ``swap(model, state_dict, adapter_name, config)``.
    """
    hotswap: Any = _module("peft.utils.hotswap")
    names = ("CONFIG_KEYS_TO_CHECK", "hotswap_adapter_from_state_dict")
    if hotswap is None or not all(hasattr(hotswap, name) for name in names):
        return
    hotswap.CONFIG_KEYS_TO_CHECK[PeftType["CURLORA"]] = ["r", "rank_pattern", "curlora_dropout"]
    from_state_dict = hotswap.hotswap_adapter_from_state_dict

    @functools.wraps(from_state_dict)
    def swap_or_lora(model: Any, state_dict: dict[str, Tensor], adapter_name: str, config: Any, **kwargs: Any) -> None:
        if isinstance(config, config_class):
            swap(model, state_dict, adapter_name, config)
        else:
            from_state_dict(model, state_dict, adapter_name, config, **kwargs)

    hotswap.hotswap_adapter_from_state_dict = swap_or_lora

    prepare = getattr(hotswap, "prepare_model_for_compiled_hotswap", None)
    if prepare is None:
        return

    @functools.wraps(prepare)
    def prepare_lora(model: Any, *args: Any, config: Any = None, **kwargs: Any) -> None:
        configs = [config, *getattr(model, "peft_config", {}).values()]
        if any(isinstance(one, config_class) for one in configs):
            raise ValueError(
                "CURLoRA adapters need no preparing: they are swapped for ones of the same rank, in place. Compile the "
                "model and call hotswap_adapter."
            )
        prepare(model, *args, config=config, **kwargs)

    hotswap.prepare_model_for_compiled_hotswap = prepare_lora


def _module(name: str) -> Any:
    with contextlib.suppress(ImportError):
        return importlib.import_module(name)
    return None


def _attribute(module: str, name: str) -> Any:
    """What a library has under a private name; ``None`` if it is not there."""
    return getattr(_module(module), name, None)


def transformed_by_torch_func() -> bool:
    """Whether a transform of ``torch.func`` is under way, for which a registered operator needs rules of its own.

    Without torch's own word, everything is computed as if one always were: by PyTorch's operators.
    """
    try:
        return bool(torch._C._are_functorch_transforms_active())
    except AttributeError:
        return True


def callbacks_around(callback: TrainerCallback) -> list[TrainerCallback] | None:
    """A Trainer's list of callbacks, asked for by one of them while it is called.

    transformers hands a callback no way to the others, and those of trackers stand before any of a user's. Where the
    caller's variables are not as they were, ``None``: the callback then stays where it is.
    """
    frame = inspect.currentframe()
    while frame is not None:
        callbacks = getattr(frame.f_locals.get("self"), "callbacks", None)
        if isinstance(callbacks, list) and any(one is callback for one in callbacks):
            return callbacks
        frame = frame.f_back
    return None


def scale_base_rate(optimizer: torch.optim.Optimizer, scheduler: Any, group: int, rate: float) -> None:
    """Give a group of an optimizer's parameters another base rate, after its scheduler was made.

    A scheduler multiplies its base rates, and remembers the last result under a private name, which is read for logs
    alone. Where that is gone, the first log shows the rate of before.
    """
    parameters, scheduler = optimizer.param_groups[group], getattr(scheduler, "scheduler", scheduler)
    base = parameters.get("initial_lr", parameters["lr"])
    parameters["lr"] = parameters["lr"] * (rate / base) if base else rate
    parameters["initial_lr"] = rate
    if isinstance(bases := getattr(scheduler, "base_lrs", None), list):
        bases[group] = rate
    if isinstance(last := getattr(scheduler, "_last_lr", None), list):
        last[group] = parameters["lr"]
