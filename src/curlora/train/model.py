"""The base model of a training. It is inspected without its weights first, and loaded after all other checks."""

from __future__ import annotations

import copy
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import CONFIG_NAME as PEFT_CONFIG_NAME
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import CONFIG_NAME

from curlora.continual.processes import use_cpu
from curlora.convert import AdapterError, config_of
from curlora.hub import no_such_folder
from curlora.text.rows import longest_row
from curlora.train.errors import TrainError
from curlora.train.history import History, history_of
from curlora.train.options import TrainOptions
from curlora.tuner.config import CurloraConfig

__all__ = ["Base", "find_base"]

_ALPHA = 16  # of LoRA, whatever the rank: the best learning rate then hardly depends on the rank


@dataclass(frozen=True)
class Base:
    """A base model whose weights have not been loaded.

    Args:
        name: the model's folder or hub id.
        config: the model's configuration in transformers.
        tokenizer: the model's tokenizer, which has a padding token.
        adapter: the configuration of the adapter to train: that of ``continue_from``, or a new one.
        continue_from: the adapter whose training is continued, if any.
        quantize: ``"4bit"``, ``"8bit"`` or ``None``.
        bf16: whether training computes in bfloat16.
        history: the adapter's earlier trainings, and what is left of its lifetime's budget.
    """

    name: str
    config: Any
    tokenizer: PreTrainedTokenizerBase
    adapter: CurloraConfig | LoraConfig
    continue_from: str | None
    quantize: str | None
    bf16: bool
    history: History

    @property
    def kind(self) -> str:
        """The adapter's method, as users read it."""
        return "CURLoRA" if self.guarded else "LoRA"

    @property
    def guarded(self) -> bool:
        """Whether the adapter trains under a guard, as CURLoRA does; LoRA trains under a penalty."""
        return isinstance(self.adapter, CurloraConfig)

    @property
    def positions(self) -> int | None:
        """The longest input of the model, in tokens; ``None`` if its configuration does not state it."""
        return longest_row(self.config)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the frozen weights."""
        return torch.bfloat16 if self.bf16 else torch.float32

    def empty(self) -> tuple[Any, Any]:
        """Return two models on the meta device, without weights: the base model, and the base model with the adapter.

        Raises:
            TrainError: if the adapter does not fit the model.
        """
        try:
            with torch.device("meta"):
                plain, base = (AutoModelForCausalLM.from_config(self.config, dtype=self.dtype) for _ in range(2))
                return plain, get_peft_model(base, copy.deepcopy(self.adapter))  # PEFT resolves its names in place
        except (OSError, ValueError) as error:
            raise TrainError(f"The adapter cannot be put on {self.name}: {error}") from error

    def load(self) -> Any:
        """Load the model with its weights, and with the adapter of ``continue_from`` if there is one.

        Raises:
            TrainError: if the model or the adapter cannot be loaded.
        """
        quantized = {"quantization_config": self._quantization()} if self.quantize else {}
        try:
            model = AutoModelForCausalLM.from_pretrained(self.name, dtype=self.dtype, **quantized)
            if self.continue_from is None:
                return model
            return PeftModel.from_pretrained(model, self.continue_from, is_trainable=True)
        except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
            raise TrainError(f"{self.continue_from or self.name} cannot be loaded: {error}") from error

    def _quantization(self) -> BitsAndBytesConfig:
        if self.quantize == "8bit":
            return BitsAndBytesConfig(load_in_8bit=True)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=self.dtype,
            bnb_4bit_use_double_quant=True,
        )


def find_base(options: TrainOptions) -> Base:
    """Find the model that the options name, and read its configuration and tokenizer, but not its weights.

    Raises:
        TrainError: if the model is not found or is not a causal language model, if ``continue_from`` is not a CURLoRA
            or LoRA adapter, if nothing is left of its lifetime's budget, or if ``quantize`` is set and bitsandbytes is
            not installed.
    """
    if options.quantize and importlib.util.find_spec("bitsandbytes") is None:
        raise TrainError("--quantize needs bitsandbytes, which is not installed: pip install bitsandbytes")
    adapter = _adapter(options)
    history = history_of(adapter, options.continue_from, options.lifetime)
    name = options.model or adapter.base_model_name_or_path
    if not name:
        raise TrainError(f"{options.continue_from} does not name its base model: give it with --model.")
    if problem := no_such_folder(name):
        raise TrainError(f"--model {name}: {problem}.")
    if (Path(name).expanduser() / PEFT_CONFIG_NAME).is_file() and not (Path(name) / CONFIG_NAME).is_file():
        raise TrainError(
            f"--model {name} is the folder of an adapter. To train it further, give it with --continue-from. To train "
            "a new one on top of it, merge it into its base model first."
        )
    try:
        config = AutoConfig.from_pretrained(name)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, ImportError) as error:
        raise TrainError(f"--model {name}: its configuration or tokenizer cannot be read: {_first(error)}") from error
    if getattr(config, "is_encoder_decoder", False):
        raise TrainError(
            f"--model {name} is an encoder-decoder ({config.model_type}). curlora train measures forgetting on causal "
            "language models only: choose one of these."
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise TrainError(
            f"--model {name} is of type {config.model_type}, for which transformers has no causal language model: "
            "choose another model."
        )
    if tokenizer.pad_token is None:  # any token will do, since padding is masked
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
    bf16 = options.bf16
    if bf16 is None:
        bf16 = not use_cpu() and (not torch.cuda.is_available() or torch.cuda.is_bf16_supported())
    return Base(name, config, tokenizer, adapter, options.continue_from, options.quantize, bf16, history)


def _adapter(options: TrainOptions) -> CurloraConfig | LoraConfig:
    if options.continue_from is not None:
        try:
            found = config_of(options.continue_from, CurloraConfig, LoraConfig)
        except (AdapterError, OSError) as error:
            raise TrainError(f"--continue-from {options.continue_from}: {_first(error)}") from error
        if isinstance(found, LoraConfig) and options.export == "lora":
            raise TrainError(f"--export lora is for CURLoRA adapters, and {options.continue_from} is a LoRA adapter.")
        found.inference_mode = False
        return found
    kind = options.adapter or "curlora"
    rank = options.RANKS[kind] if options.rank is None else options.rank
    targets: Any = options.target_modules or options.TARGET_MODULES
    if not isinstance(targets, str):
        targets = list(targets)
    try:
        if kind == "lora":
            return LoraConfig(r=rank, lora_alpha=_ALPHA, target_modules=targets, task_type="CAUSAL_LM")
        return CurloraConfig(r=rank, target_modules=targets, seed=options.seed, task_type="CAUSAL_LM")
    except ValueError as error:
        raise TrainError(f"--rank or --target-modules: {error}.") from error


def _first(error: Exception) -> str:
    """Return the first line of a library's error message."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
