"""All uses of other libraries' private names, and all changes to other libraries' objects.

Each function says what happens if a future version no longer has the name. Check this file when PEFT, transformers or
bitsandbytes is updated. ``tests/test_compat.py`` runs each function with the private name and without it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_MIXED_MODEL_MAPPING
from peft.tuners.lora import LoraModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

__all__ = [
    "add_peft_type",
    "attention_implementation",
    "callbacks_around",
    "check_digests_on_read",
    "convert_expert_names",
    "copy_into",
    "execution_device",
    "in_out_features",
    "offloaded_bias",
    "read_configurations",
    "refuse_what_reads_the_weight",
    "require_hooks",
    "scale_base_rate",
    "shallow_twin",
    "support_hotswapping",
    "support_mixed_models",
    "tie_like_lora",
    "transformed_by_torch_func",
    "unpacked_4bit",
    "use_one_gpu",
]


def add_peft_type(name: str) -> None:
    """Add a member to PEFT's closed ``PeftType`` enum. :func:`peft.utils.register_peft_method` requires one.

    Without the enum's internal tables the method cannot be registered, and importing curlora fails with Python's error.

    Raises:
        ImportError: if PEFT already has a method of this name.
    """
    if name in PeftType.__members__:
        raise ImportError(
            f"The installed PEFT already has a method called {name}, so curlora cannot register its own. Use PEFT's "
            "method, or install a version of PEFT without it."
        )
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member


def read_configurations(is_adapter: Callable[[Path], bool]) -> None:
    """Make PEFT read a CURLoRA adapter's ``adapter_config.json``, and explain one that names no such adapter.

    PEFT reads the method's name from this file first. A CURLoRA adapter is saved with a sentence behind the name, which
    PEFT shows where curlora was not imported. If the file names no method, PEFT only raises Python's error. The adapter
    is then known by its weights, in the same folder; errors about adapters of other methods stay PEFT's. If
    ``PeftConfig.from_json_file`` is no longer a classmethod, CURLoRA adapters cannot be loaded.

    Args:
        is_adapter: whether a file holds the weights of a CURLoRA adapter.
    """
    read: Any = getattr(PeftConfig.from_json_file, "__func__", None)
    if read is None:
        return

    def damaged(path: Any, problem: str) -> ValueError | None:
        if not is_adapter(Path(path).with_name(SAFETENSORS_WEIGHTS_NAME)):
            return None
        return ValueError(
            f"{path} does not configure the CURLoRA adapter whose weights are beside it ({problem}): it is "
            "damaged. Copy or download it again."
        )

    @classmethod  # type: ignore[misc]
    @functools.wraps(read)
    def from_json_file(cls: Any, path_json_file: Any, **kwargs: Any) -> Any:
        try:
            options = read(cls, path_json_file, **kwargs)
        except (TypeError, ValueError) as error:  # no JSON, or no object
            if found := damaged(path_json_file, str(error)):
                raise found from error
            raise
        kind = options.get("peft_type") if isinstance(options, dict) else None
        if isinstance(kind, str) and kind.partition(":")[0] == "CURLORA":
            return options | {"peft_type": "CURLORA"}
        if found := damaged(path_json_file, f"its peft_type is {kind!r}"):
            raise found
        return options

    PeftConfig.from_json_file = from_json_file


def check_digests_on_read(config_class: Any, is_adapter: Callable[[Path], bool]) -> None:
    """Make ``PeftConfig.from_pretrained`` read a CURLoRA adapter as ``config_class.from_pretrained`` does.

    transformers' ``load_adapter`` calls ``PeftConfig.from_pretrained``, which only builds a ``config_class`` from the
    options and would not check the digests. If it is no longer a classmethod, nothing is changed and the digests are
    not checked there.

    Args:
        config_class: configuration class of the adapters.
        is_adapter: whether a file holds the weights of a CURLoRA adapter.
    """
    read: Any = getattr(PeftConfig.from_pretrained, "__func__", None)
    if read is None:
        return

    @classmethod  # type: ignore[misc]
    @functools.wraps(read)
    def from_pretrained(
        cls: Any, pretrained_model_name_or_path: Any, subfolder: str | None = None, **kwargs: Any
    ) -> Any:
        if issubclass(cls, config_class):
            return read(cls, pretrained_model_name_or_path, subfolder, **kwargs)
        try:
            config = read(cls, pretrained_model_name_or_path, subfolder, **kwargs)
            ours = isinstance(config, config_class)
        except (AttributeError, TypeError):  # an option has a wrong type, and config_class explains it
            ours = is_adapter(Path(pretrained_model_name_or_path, subfolder or "", SAFETENSORS_WEIGHTS_NAME))
            if not ours:
                raise
        return config_class.from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs) if ours else config

    PeftConfig.from_pretrained = from_pretrained


def in_out_features(layer: nn.Module) -> tuple[int, int]:
    """Return ``(in_features, out_features)`` of a linear layer, of any quantization library that PEFT knows.

    Without PEFT's function the numbers are read from the attributes that most such layers have.

    Raises:
        TypeError: if the layer has no such attributes.
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
        raise TypeError(
            f"a {type(layer).__name__} does not say how many inputs and outputs it has: it has none of the attributes "
            "in_features/out_features, num_embeddings/embedding_dim, infeatures/outfeatures or nx/nf"
        )
    return int(inputs), int(outputs)


def execution_device(layer: nn.Module) -> torch.device:
    """Return the device on which Accelerate's hook runs an offloaded layer; the CPU without that hook."""
    device = getattr(getattr(layer, "_hf_hook", None), "execution_device", None)
    return torch.device("cpu" if device is None else device)


def attention_implementation(config: Any) -> str:
    """Return a transformers model's attention implementation, such as ``"eager"`` or ``"sdpa"``.

    Without transformers' private attribute, return ``"sdpa"``.
    """
    return getattr(config, "_attn_implementation", None) or "sdpa"


def offloaded_bias(layer: nn.Module) -> Tensor | None:
    """Return a bias that Accelerate has offloaded, without loading the weight; ``None`` without Accelerate's hook."""
    kept: Any = getattr(getattr(layer, "_hf_hook", None), "weights_map", None)
    if kept is None:
        return None
    bias: Tensor = kept["bias"]
    return bias.to(execution_device(layer))


def shallow_twin(module: nn.Module) -> Any:
    """Return a copy of a module with the same parameters and buffers, in which they can be replaced.

    Without torch's internal tables, return a deep copy, which takes the memory of the weights a second time.
    """
    if not (hasattr(module, "_parameters") and hasattr(module, "_buffers")):
        return copy.deepcopy(module)
    twin: Any = copy.copy(module)
    twin._parameters, twin._buffers = dict(module._parameters), dict(module._buffers)
    return twin


def copy_into(tensors: list[Tensor], values: list[Tensor]) -> None:
    """Copy each value into its tensor, in one call of ``torch._foreach_copy_``. Without it, copy one by one."""
    foreach = getattr(torch, "_foreach_copy_", None)
    if foreach is not None:
        foreach(tensors, values)
        return
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


def tie_like_lora(model_class: Any) -> None:
    """Give the tuner LoRA's methods that tie the adapters of shared weights (``ensure_weight_tying``).

    These methods change only the configuration, in the same way for every PEFT method. Without them PEFT warns that
    nothing is tied.
    """
    for name in ("_add_modules_to_save_to_tie", "_add_targets_to_tie"):
        method = getattr(LoraModel, name, None)
        if method is not None:
            setattr(model_class, name, method)


def use_one_gpu(arguments: TrainingArguments) -> None:
    """Make a Trainer in one process use one GPU, where it would divide each batch among all that it sees.

    Without the private attribute nothing is changed, and batches are as many times as large as there are GPUs.
    """
    if arguments.n_gpu > 1 and hasattr(arguments, "_n_gpu"):
        arguments._n_gpu = 1


def unpacked_4bit(weight: Any) -> Any:
    """Return a 4-bit weight that bitsandbytes has repacked for inference in its original packing; any other unchanged.

    On CPUs with AVX512-BF16 bitsandbytes repacks 4-bit weights for forward passes in inference. It rounds the scales to
    bfloat16 and records the packing only in ``quant_state``. Dequantizing a repacked weight returns other values,
    without an error.

    Raises:
        ValueError: if the weight is repacked and this bitsandbytes has no function to unpack it.
    """
    state: Any = getattr(weight, "quant_state", None)
    if not getattr(state, "packing_format_for_cpu", False):
        return weight
    inverse = _attribute("bitsandbytes.functional", "_convert_weight_packed_for_cpu_inverse")
    if inverse is None:
        raise ValueError(
            "bitsandbytes has packed the 4-bit weight for inference, and this version of bitsandbytes cannot unpack "
            "it. Load the model anew and add the adapter before the model is used."
        )
    state = copy.copy(state)
    state.original_nested = False  # otherwise the scales would be quantized, and so rounded a second time
    data, state = inverse(weight.data, state)
    state.absmax = state.absmax.T.reshape(-1).float()
    return type(weight)(
        data, requires_grad=False, quant_state=state, blocksize=state.blocksize,
        compress_statistics=weight.compress_statistics, quant_type=state.quant_type, quant_storage=data.dtype,
        bnb_quantized=True,
    )  # fmt: skip


# Modules of Mamba blocks. The fused kernels read their weights and never call the modules.
_READ_AND_NOT_CALLED = ("out_proj", "conv1d")


def refuse_what_reads_the_weight(config: PeftConfig, model: nn.Module, parent: nn.Module, target_name: str) -> None:
    """Raise ``ValueError`` for a module of a Mamba block that the block's fused kernels never call.

    PEFT checks this by the model's type, for the methods that it knows. The block's class name is checked as well,
    which covers hybrid models. Without PEFT's check only the class name is used.
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
    """Replace former module names of experts by the names of their parameters, as PEFT does for LoRA.

    transformers 5 keeps experts as three-dimensional parameters. ``gate_proj``, ``w1`` and the like are no longer
    modules there, and ``"all-linear"`` does not reach them. The conversion leaves the rank unchanged.

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
    """Let :class:`peft.PeftMixedModel` hold CURLoRA adapters together with adapters of other methods.

    Its lists of methods are closed, so CURLoRA is added to them. Without these lists PEFT refuses CURLoRA with its own
    error.
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


def require_hooks(owner: type, names: Sequence[str]) -> None:
    """Check that a class still has the private methods that a subclass overrides. Else it would never call them.

    Raises:
        ImportError: if one is missing.
    """
    if missing := [name for name in names if not hasattr(owner, name)]:
        raise ImportError(
            f"{owner.__module__}.{owner.__name__} has no {missing[0]}, which runs of recipes override: install a "
            "version of transformers that docs/compatibility.md lists."
        )


def support_hotswapping(config_class: type, swap: Callable[..., None]) -> None:
    """Let :func:`peft.utils.hotswap.hotswap_adapter`, which knows only LoRA's tensors, swap CURLoRA adapters.

    Without the private names used here PEFT refuses CURLoRA with its own error.

    Args:
        config_class: configuration class of the adapters.
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
                "CURLoRA adapters need no preparing: hotswap_adapter swaps adapters of the same rank in place. Compile "
                "the model and call hotswap_adapter."
            )
        prepare(model, *args, config=config, **kwargs)

    hotswap.prepare_model_for_compiled_hotswap = prepare_lora


def _module(name: str) -> Any:
    with contextlib.suppress(ImportError):
        return importlib.import_module(name)
    return None


def _attribute(module: str, name: str) -> Any:
    """Return a module's attribute; ``None`` if the module or the attribute does not exist."""
    return getattr(_module(module), name, None)


def transformed_by_torch_func() -> bool:
    """Return whether a ``torch.func`` transform is active. Registered operators would need extra rules under one.

    Without torch's private function, return ``True``, so that PyTorch's own operators are always used.
    """
    try:
        return bool(torch._C._are_functorch_transforms_active())
    except AttributeError:
        return True


def callbacks_around(callback: TrainerCallback) -> list[TrainerCallback] | None:
    """Return the Trainer's list of callbacks while one of them, ``callback``, is being called.

    transformers gives a callback no access to the others, and puts the callbacks of trackers before the user's. So the
    list is read from the caller's frame. If no frame has it, return ``None``; the callback then keeps its place.
    """
    for caller in _callers():
        if _calls(caller, callback):
            callbacks: list[TrainerCallback] = caller.callbacks
            return callbacks
    return None


def when_the_card_is_written(callback: TrainerCallback, then: Callable[[], None]) -> None:
    """Call ``then`` when the Trainer that is about to push has written its model card.

    The Trainer writes the card after ``on_push_begin``, and calls no callback before it uploads the folder. So its
    method is wrapped, once. Without a Trainer in the callers' frames, ``then`` is not called.
    """
    trainer = next(
        (caller for caller in _callers() if _calls(getattr(caller, "callback_handler", None), callback)), None
    )
    if trainer is None or "create_model_card" in vars(trainer):
        return
    create = trainer.create_model_card

    def create_once(*args: Any, **kwargs: Any) -> None:
        del trainer.create_model_card
        create(*args, **kwargs)
        then()

    trainer.create_model_card = create_once


def hold_uploads(callback: TrainerCallback) -> Callable[[], None]:
    """Keep the trackers that transformers integrates from uploading the checkpoints that are saved from now on.

    Args:
        callback: a callback of the same Trainer, which is being called.

    Returns:
        A function that lets them upload again.
    """
    trackers = [
        one
        for one in callbacks_around(callback) or []
        if type(one).__module__ == "transformers.integrations.integration_utils" and "on_save" not in vars(one)
    ]
    for one in trackers:
        vars(one)["on_save"] = lambda *_, **__: None

    def let_upload() -> None:
        for one in trackers:
            vars(one).pop("on_save", None)

    return let_upload


def _callers() -> Iterator[Any]:
    """Yield the objects whose methods are being called, from the innermost outwards."""
    frame = inspect.currentframe()
    while frame is not None:
        if "self" in frame.f_locals:
            yield frame.f_locals["self"]
        frame = frame.f_back


def _calls(handler: Any, callback: TrainerCallback) -> bool:
    callbacks = getattr(handler, "callbacks", None)
    return isinstance(callbacks, list) and any(one is callback for one in callbacks)


def scale_base_rate(optimizer: torch.optim.Optimizer, scheduler: Any, group: int, rate: float) -> None:
    """Change the base learning rate of one parameter group of an optimizer that already has a scheduler.

    A scheduler multiplies its base rates and stores the last result under a private name, which is used only for logs.
    Without that name the first log shows the previous rate.

    Args:
        optimizer: its current rate and ``initial_lr`` are changed.
        scheduler: a scheduler of torch, or Accelerate's wrapper of one.
        group: index of the parameter group.
        rate: the new base rate.
    """
    parameters, scheduler = optimizer.param_groups[group], getattr(scheduler, "scheduler", scheduler)
    base = parameters.get("initial_lr", parameters["lr"])
    parameters["lr"] = parameters["lr"] * (rate / base) if base else rate
    parameters["initial_lr"] = rate
    if isinstance(bases := getattr(scheduler, "base_lrs", None), list):
        bases[group] = rate
    if isinstance(last := getattr(scheduler, "_last_lr", None), list):
        last[group] = parameters["lr"]
