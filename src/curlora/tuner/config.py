"""The configuration of a CURLoRA adapter."""

from __future__ import annotations

import functools
import json
import math
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError
from peft import PeftConfig, PeftType
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from curlora.sampling import SAMPLINGS
from curlora.tuner.format import check_file, digest_of_options, saved_indices, seal

# Options that describe an adapter's origin and use. They do not change the meaning of its tensors, so the digest leaves
# them out.
_ABOUT = {
    "auto_mapping", "base_model_name_or_path", "digest", "inference_mode", "peft_type", "peft_version", "revision",
    "task_type",
}  # fmt: skip
_CHANGED = "changed"  # users write this in place of the digest
# Saved with the weights if an adapter was trained within a budget: see curlora.guard.ledger.
LEDGER_NAME = "curlora_ledger.safetensors"

# The class of transformers that loads the base model of an adapter, by the adapter's task type.
AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "FEATURE_EXTRACTION": "AutoModel",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}

# Saved as the configuration's ``peft_type``. Without the import, PEFT's whole error is a type that it does not know.
_SAVED_TYPE = "CURLORA: import curlora before you load this adapter, or convert it: curlora convert ADAPTER --to lora"

# Part of the model card.
_HOW_TO_LOAD = """
## How to load the adapter

Install curlora, and import it before you load the adapter. Without the import PEFT stops with a `KeyError`.

```python
import curlora  # makes CURLoRA known to PEFT
from peft import PeftModel
from transformers import {model_class}

model = PeftModel.from_pretrained({model_class}.from_pretrained("{base}"), "this folder or repository")
```

`curlora convert this-folder --to lora --out my-lora` exports the adapter, exactly, as an ordinary LoRA adapter. PEFT,
vLLM and others load that without curlora.
"""


@dataclass
class CurloraConfig(PeftConfig):
    """Configuration of a CURLoRA adapter (https://arxiv.org/abs/2408.14572).

    A targeted weight ``W`` becomes ``W + alpha * W[:, columns] @ U @ W[rows, :]``, in the layout that the layer stores,
    also for transformers' ``Conv1D``. Only ``U``, shape ``(r, r)``, is trained. It starts at zero.

    Args:
        r: rank; each layer has ``r * r`` trainable parameters. The rank may not exceed the smaller side of the weight.
            ``"all-linear"`` lowers it in smaller layers, with a warning.
        alpha: factor on the update (eq. 8). 1 in the paper.
        target_modules: names of the layers to adapt, a regular expression, or ``"all-linear"``. ``None`` selects the
            query, key and value projections of known architectures. Linear layers, embeddings, transformers' ``Conv1D``
            and quantized linear layers can be adapted.
        exclude_modules: names, or a regular expression, of layers to leave out.
        target_parameters: names of parameters to adapt directly, such as experts that are stored as one
            three-dimensional parameter, ``(experts, m, n)``. Each expert gets its own columns, rows and ``U``. On
            architectures for which PEFT does so with LoRA, ``target_modules`` also accepts the former module names of
            the experts.
        sampling: how columns and rows are drawn: ``"inverse"`` (the paper's 1/p), ``"uniform"``, ``"norm"`` (p itself)
            or ``"reference"`` (the author's code, 1/(p + 0.001)). Zero columns and rows are never drawn, except under
            ``"reference"``.
        replacement: whether a column or row may be drawn more than once, as in the author's code.
        seed: seed of the draws. A draw depends only on the seed, the layer's name and its weight. An adapter with the
            same settings as one that the model already has takes that one's columns and rows.
        curlora_dropout: probability with which entries of ``R x`` are zeroed in training.
        bias: which biases are trained: ``"none"``, ``"all"`` or ``"curlora_only"``.
        modules_to_save: further modules to train and save whole, such as a new head.
        trainable_token_indices: indices of tokens whose embeddings are also trained, such as tokens that were added to
            the vocabulary; or a dict from the name of an embedding layer to indices. Each token adds as many trainable
            parameters as the embedding's dimension.
        layers_to_transform: indices of the layers to adapt; all if ``None``. Not allowed if ``target_modules`` is a
            string.
        layers_pattern: name of the model's list of layers, for use with ``layers_to_transform``.
        rank_pattern: ranks by a regular expression that matches the layer's name.
        alpha_pattern: alphas by a regular expression that matches the layer's name.
        ensure_weight_tying: give an embedding and a head that share their weight the same ``U``.
        init_weights: start ``U`` at zero, so that the model is unchanged at first. ``False`` starts it at random, which
            is for tests only.
        digest: digest of the options above, written when the adapter is saved. A saved configuration that does not
            match its digest is refused as damaged. After changing one on purpose, write ``"changed"`` in its place.

    Raises:
        ValueError: if an option has a value that is not allowed.
        TypeError: if ``target_parameters`` is a string.
    """

    r: int = field(default=16, metadata={"help": "Rank; each layer has r * r trainable parameters."})
    alpha: float = field(default=1.0, metadata={"help": "Factor on the update C U R."})
    target_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Layers to adapt: names, a regular expression or 'all-linear'."}
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Layers to leave out: names or a regular expression."}
    )
    target_parameters: list[str] | None = field(
        default=None, metadata={"help": "Parameters to adapt directly, such as experts."}
    )
    sampling: str = field(default="inverse", metadata={"help": f"One of {', '.join(SAMPLINGS)}."})
    replacement: bool = field(default=False, metadata={"help": "Draw columns and rows with replacement."})
    seed: int = field(default=0, metadata={"help": "Seed of the draws."})
    curlora_dropout: float = field(
        default=0.0, metadata={"help": "Probability with which entries of R x are zeroed in training."}
    )
    bias: str = field(default="none", metadata={"help": "'none', 'all' or 'curlora_only'."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train and to save whole."}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None,
        metadata={"help": "Indices of tokens whose embeddings are also trained; or a dict by the embedding's name."},
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers to adapt."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the model's list of layers, for use with layers_to_transform."}
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Ranks by a regular expression that matches the layer's name."}
    )
    alpha_pattern: dict[str, float] = field(
        default_factory=dict, metadata={"help": "Alphas by a regular expression that matches the layer's name."}
    )
    ensure_weight_tying: bool = field(
        default=False, metadata={"help": "Give an embedding and a head that share their weight the same U."}
    )
    init_weights: bool = field(default=True, metadata={"help": "Start U at zero; at random if False, for tests."})
    digest: str | None = field(default=None, metadata={"help": "Digest of the options, written by save_pretrained."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType["CURLORA"]
        # These are not dataclass fields, since they are not saved.
        self.weights_file: Path | None = None  # the adapter's weights, if this configuration was read with them
        self._saved_by: tuple[object, ...] = ()  # the settings of the draws in weights_file
        self.beside: dict[str, bytes] = {}  # further files of the adapter, by name; they are saved with it
        self.target_modules_to_tie: set[str] | None = None  # PEFT's names of tied modules
        self.modules_to_tie: set[str] | None = None
        self._custom_modules: dict[type[nn.Module], type[nn.Module]] = {}
        for name in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, name), (list, tuple)):
                setattr(self, name, set(value))
        for label, r in [("r", self.r), *((f"rank_pattern[{k!r}]", v) for k, v in self.rank_pattern.items())]:
            if not isinstance(r, int) or isinstance(r, bool) or r < 1:
                raise ValueError(f"{label} must be a positive integer, got {r!r}")
        alphas = [("alpha", self.alpha), *((f"alpha_pattern[{k!r}]", v) for k, v in self.alpha_pattern.items())]
        for label, alpha in alphas:
            if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
                raise ValueError(f"{label} must be a finite number, got {alpha!r}")
        if not isinstance(self.replacement, bool):
            raise ValueError(f"replacement must be true or false, got {self.replacement!r}")
        if isinstance(self.target_parameters, str):
            raise TypeError("`target_parameters` must be a list of strings or None.")
        if self.sampling not in SAMPLINGS:
            raise ValueError(f"sampling must be one of {', '.join(map(repr, SAMPLINGS))}, got {self.sampling!r}")
        if self.bias not in ("none", "all", "curlora_only"):
            raise ValueError(f"bias must be 'none', 'all' or 'curlora_only', got {self.bias!r}")
        if not 0 <= self.curlora_dropout < 1:
            raise ValueError(f"curlora_dropout must be at least 0 and less than 1, got {self.curlora_dropout!r}")
        restricted = self.layers_to_transform is not None or self.layers_pattern is not None
        if isinstance(self.target_modules, str) and restricted:
            raise ValueError(
                f"layers_to_transform and layers_pattern have no effect where target_modules is a string, and it is "
                f"{self.target_modules!r}: give a list of names, or put the layers' indices into the expression"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern={self.layers_pattern!r} has no effect without layers_to_transform: give both or "
                "neither"
            )

    @property
    def drawn_by(self) -> tuple[object, ...]:
        """Everything that a draw depends on besides the rank, the layer's name and its weight."""
        return self.sampling, self.replacement, self.seed, self.weights_file

    def rank_of(self, layer: str) -> int:
        """Return a layer's rank: that of the first pattern that matches its name, or ``r``."""
        return self.rank_pattern.get(get_pattern_key(list(self.rank_pattern), layer), self.r)

    def alpha_of(self, layer: str) -> float:
        """Return a layer's alpha: that of the first pattern that matches its name, or ``alpha``."""
        return self.alpha_pattern.get(get_pattern_key(list(self.alpha_pattern), layer), self.alpha)

    def take_over(self, other: CurloraConfig) -> None:
        """Take the alphas, the settings of the draws and the further files of an adapter that replaces this one."""
        drawn = ("sampling", "replacement", "seed", "weights_file", "_saved_by")
        for name in ("alpha", "alpha_pattern", *drawn, "beside"):
            setattr(self, name, getattr(other, name))
        self.__dict__.pop("_saved", None)  # read from the former weights_file

    def saved_draw(self, layer: str) -> tuple[Tensor, Tensor] | None:
        """Return a layer's indices and fingerprint from the weights file, which make drawing unnecessary.

        To draw what is about to be loaded anyway would read every weight in full, twice.

        Returns:
            ``None`` if there is no file, if it has no such layer, or if the settings of the draws were changed since.
        """
        if self.weights_file is None or self._saved_by != self.drawn_by[:-1]:
            return None
        return self._saved.get(layer)

    @functools.cached_property
    def _saved(self) -> dict[str, tuple[Tensor, Tensor]]:
        return {} if self.weights_file is None else saved_indices(self.weights_file)

    def _register_custom_module(self, mapping: dict[type[nn.Module], type[nn.Module]]) -> None:
        """Adapt a type of layer with your own class, as for :class:`peft.LoraConfig`.

        The class must be a subclass of :class:`curlora.CurloraLayer`. It is created as ``cls(base_layer, name)``.
        """
        self._custom_modules.update(mapping)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save the configuration, and write a digest into the weights file, which PEFT has saved before.

        Raises:
            ValueError: if the weights were saved as a pickle. The pickle is deleted.
        """
        folder = Path(save_directory)
        if (weights := folder / SAFETENSORS_WEIGHTS_NAME).exists():
            seal(weights)
        elif (pickled := folder / WEIGHTS_NAME).exists():
            pickled.unlink()
            raise ValueError(
                "A CURLoRA adapter cannot be saved as a pickle, since pickles are never loaded: leave out "
                "safe_serialization=False. Nothing was saved."
            )
        super().save_pretrained(save_directory, **kwargs)
        written = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8")) | {"peft_type": _SAVED_TYPE}
        (folder / CONFIG_NAME).write_text(json.dumps(written, indent=2, sort_keys=True), encoding="utf-8")
        for name, content in self.beside.items():
            (folder / name).write_bytes(content)
        if LEDGER_NAME not in self.beside:  # one that is there belongs to an adapter that was saved there before
            (folder / LEDGER_NAME).unlink(missing_ok=True)
        self.add_how_to_load(folder, kwargs.get("auto_mapping_dict"))

    def add_how_to_load(self, folder: Path, auto_mapping: dict[str, Any] | None = None) -> None:
        """Let the model card of a saved adapter say how to load it, if there is a card that does not say it yet.

        Args:
            folder: the adapter's folder. PEFT writes a card into it, transformers' own ``save_pretrained`` none.
            auto_mapping: the classes of the base model, as PEFT saves them.
        """
        card = folder / "README.md"
        if card.exists() and "import curlora" not in (text := card.read_text(encoding="utf-8")):
            base = self.base_model_name_or_path or "the base model"
            how = _HOW_TO_LOAD.format(base=base, model_class=self._model_class(auto_mapping))
            card.write_text(f"{text.rstrip()}\n{how}", encoding="utf-8")

    def _model_class(self, auto_mapping: dict[str, Any] | None) -> str:
        """Return the class of transformers that loads the base model. PEFT saves its name if there is no task type."""
        if self.task_type is not None:
            return AUTO_CLASSES.get(str(getattr(self.task_type, "value", self.task_type)), "AutoModel")
        return (auto_mapping or self.auto_mapping or {}).get("base_model_class") or "AutoModel"

    def to_dict(self) -> dict[str, Any]:
        """Return the options with their digest."""
        return {**super().to_dict(), "digest": self._digest()}

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> CurloraConfig:
        """Load the configuration of a saved adapter; see :meth:`peft.PeftConfig.from_pretrained`.

        PEFT calls this before it changes the model. So the weights file, in a local folder or downloaded from the hub,
        is checked here: a damaged file is refused while the model is still unchanged.

        A new adapter with the returned configuration takes the columns and rows of the saved one, without reading any
        weight in full. This holds on the same base model, if the settings of the draws were not changed.

        Raises:
            ValueError: if the weights file cannot be read, is damaged or is a pickle, or if the configuration cannot be
                used or does not match its digest.
        """
        weights = cls._weights_of(pretrained_model_name_or_path, subfolder, kwargs)
        is_sealed = weights is not None and check_file(weights)
        where = os.path.join(pretrained_model_name_or_path, subfolder or "")
        try:
            config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        except (AttributeError, TypeError) as error:  # an option has a wrong type
            raise ValueError(
                f"The configuration of the adapter in {where} cannot be used ({error}): it is damaged. Copy or "
                "download it again."
            ) from error
        digest = config.digest
        if digest != _CHANGED and digest != config._digest() and (is_sealed or digest is not None):
            raise ValueError(
                f"The configuration of the adapter in {where} is not the one that was saved with it (its digest "
                f"{'is missing' if digest is None else 'differs'}): copy or download it again. If you changed it on "
                f'purpose, write "digest": "{_CHANGED}" into adapter_config.json.'
            )
        if weights is not None:
            config.weights_file, config._saved_by = weights, config.drawn_by[:-1]
            if (ledger := cls._file_of(pretrained_model_name_or_path, LEDGER_NAME, subfolder, kwargs)) is not None:
                config.beside[LEDGER_NAME] = ledger.read_bytes()
        return config

    @classmethod
    def _weights_of(cls, name: str, subfolder: str | None, kwargs: dict[str, Any]) -> Path | None:
        """Return the path of an adapter's weights file; ``None`` if there is none."""
        weights = cls._file_of(name, SAFETENSORS_WEIGHTS_NAME, subfolder, kwargs)
        if weights is None and (pickled := cls._file_of(name, WEIGHTS_NAME, subfolder, kwargs)) is not None:
            raise ValueError(
                f"{pickled} is a pickle, and CURLoRA adapters are never loaded from pickles. Save the adapter as "
                f"{SAFETENSORS_WEIGHTS_NAME} (the default of save_pretrained)."
            )
        return weights

    @classmethod
    def _file_of(cls, name: str, file: str, subfolder: str | None, kwargs: dict[str, Any]) -> Path | None:
        """Return the path of an adapter's file, in a folder or downloaded from the hub; ``None`` if there is none."""
        folder = Path(os.path.abspath(os.path.join(name, subfolder or "")))
        path = folder / file
        if not folder.is_dir():
            try:
                path = Path(hf_hub_download(name, file, subfolder=subfolder, **cls._split_kwargs(kwargs)[0]))
            except (EntryNotFoundError, HFValidationError, RepositoryNotFoundError):  # PEFT reports it
                return None
        return path if path.exists() else None

    def _digest(self) -> str:
        return digest_of_options({f.name: getattr(self, f.name) for f in fields(self) if f.name not in _ABOUT})
