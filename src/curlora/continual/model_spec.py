"""The base model that a recipe names."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import BaseModel, field_validator
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.quantizers.auto import AutoQuantizationConfig

from curlora.continual.errors import RecipeError
from curlora.hub import no_such_folder

__all__ = ["ModelSpec"]


class ModelSpec(BaseModel, extra="forbid", frozen=True):
    """The base model: a folder or a hub id, and optionally a GGUF file in it.

    ``quantization`` is a ``quantization_config`` of transformers, such as
    ``{quant_method: bitsandbytes, load_in_4bit: true}``.
    """

    name: str
    revision: str | None = None
    gguf_file: str | None = None
    dtype: str = "float32"
    quantization: dict[str, Any] | None = None

    @field_validator("dtype")
    @classmethod
    def _known(cls, value: str) -> str:
        dtype = getattr(torch, value, None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(f"{value!r} is not a floating-point dtype of torch, such as float32 or bfloat16")
        return value

    @field_validator("quantization")
    @classmethod
    def _known_quantization(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None and "quant_method" not in value:
            raise ValueError("quant_method is missing, such as bitsandbytes, torchao or hqq")
        return value

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the model's tokenizer and set a padding token."""
        self._check_folder()
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.name, revision=self.revision, gguf_file=self.gguf_file)
        except (OSError, ValueError, ImportError) as error:
            raise RecipeError(f"model.name: the tokenizer of {self.name} cannot be loaded: {error}") from error
        if tokenizer.pad_token is None:  # any token works, because padding is masked
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
        return tokenizer

    def load_empty(self) -> torch.nn.Module:
        """Make the model from its configuration on the meta device: without weights, and not quantized."""
        self._check_folder()
        try:
            config = AutoConfig.from_pretrained(self.name, revision=self.revision, gguf_file=self.gguf_file)
            with torch.device("meta"):
                return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, self.dtype))
        except (OSError, ValueError, ImportError) as error:
            raise RecipeError(f"model.name: the configuration of {self.name} cannot be loaded: {error}") from error

    def load(self) -> torch.nn.Module:
        """Load a fresh model."""
        given = self.quantization
        self._check_folder()
        try:
            return AutoModelForCausalLM.from_pretrained(
                self.name,
                revision=self.revision,
                gguf_file=self.gguf_file,
                dtype=getattr(torch, self.dtype),
                quantization_config=None if given is None else AutoQuantizationConfig.from_dict(dict(given)),
            )
        except (OSError, ValueError, ImportError, SafetensorError) as error:
            raise RecipeError(f"model.name: {self.name} cannot be loaded: {error}") from error

    def _check_folder(self) -> None:
        if problem := no_such_folder(self.name):
            raise RecipeError(f"model.name: {problem}")
