"""What a user states about a CURLoRA adapter."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftConfig, PeftType
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from curlora.sampling import SAMPLINGS
from curlora.tuner.saved import SavedDraws


@dataclass
class CurloraConfig(PeftConfig):
    """Configuration of a CURLoRA adapter (https://arxiv.org/abs/2408.14572).

    A targeted weight ``W`` becomes ``W + alpha * W[:, columns] @ U @ W[rows, :]``, in the layout
    the layer stores (so for transformers' ``Conv1D`` too). Only ``U``, shape ``(r, r)``, is
    trained; it starts at zero.

    Args:
        r: rank; ``r * r`` numbers are trained per layer. At most the smaller side of the weight.
        alpha: factor on the update (eq. 8). 1 in the paper.
        target_modules: names of the layers to adapt, a regular expression, or ``"all-linear"``.
            ``None`` takes the query, key and value projections of known architectures.
        exclude_modules: names, or a regular expression, of layers to leave out.
        sampling: how columns and rows are drawn: ``"inverse"`` (the paper's 1/p), ``"uniform"``,
            ``"norm"`` (p itself) or ``"reference"`` (the author's code, 1/(p + 0.001)). Zero columns
            and rows are never drawn, except under ``"reference"``.
        replacement: whether a column or row may be drawn more than once, as in the author's code.
        seed: seed of the draws. They depend on it, on the layer's name and on its weight only.
        bias: which biases are trained: ``"none"``, ``"all"`` or ``"curlora_only"``.
        modules_to_save: further modules to train and save whole, such as a fresh head.
        trainable_token_indices: tokens whose embeddings are trained too, such as some that were added to the
            vocabulary; or by the name of the embedding. Each takes as many numbers as the model is wide.
        layers_to_transform: indexes of the layers to adapt; all if ``None``.
        layers_pattern: name of the model's list of layers, with ``layers_to_transform``.
        rank_pattern: ranks for layers whose names match a regular expression.
        alpha_pattern: alphas for layers whose names match a regular expression.
        init_weights: start ``U`` at zero, so that the model is unchanged at first. ``False`` starts it
            at random, which is for tests only.

    Raises:
        ValueError: if an option is not one of the above.
    """

    r: int = field(default=16, metadata={"help": "Rank; r * r numbers are trained per layer."})
    alpha: float = field(default=1.0, metadata={"help": "Factor on the update C U R."})
    target_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Layers to adapt: names, a regular expression or 'all-linear'."}
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Layers to leave out: names or a regular expression."}
    )
    sampling: str = field(default="inverse", metadata={"help": f"One of {', '.join(SAMPLINGS)}."})
    replacement: bool = field(default=False, metadata={"help": "Draw columns and rows with replacement."})
    seed: int = field(default=0, metadata={"help": "Seed of the draws."})
    bias: str = field(default="none", metadata={"help": "'none', 'all' or 'curlora_only'."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train and to save whole."}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Tokens whose embeddings are trained too; or by the embedding's name."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indexes of the layers to adapt."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the model's list of layers, with layers_to_transform."}
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Ranks for layers that match a regular expression."}
    )
    alpha_pattern: dict[str, float] = field(
        default_factory=dict, metadata={"help": "Alphas for layers that match a regular expression."}
    )

    init_weights: bool = field(default=True, metadata={"help": "Start U at zero; at random if False, for tests."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.CURLORA
        # Where this was read beside an adapter's weights. No field: it is not saved.
        self.saved_draws: SavedDraws | None = None
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        for label, r in [("r", self.r), *((f"rank_pattern[{k!r}]", v) for k, v in self.rank_pattern.items())]:
            if not isinstance(r, int) or isinstance(r, bool) or r < 1:
                raise ValueError(f"{label} must be a positive integer, got {r!r}")
        if self.sampling not in SAMPLINGS:
            raise ValueError(f"sampling must be one of {', '.join(map(repr, SAMPLINGS))}, got {self.sampling!r}")
        if self.bias not in ("none", "all", "curlora_only"):
            raise ValueError(f"bias must be 'none', 'all' or 'curlora_only', got {self.bias!r}")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern says where layers_to_transform counts: give both or neither")

    @property
    def drawn_by(self) -> tuple[object, ...]:
        """All that draws depend on beside the rank, the layer's name and its weight."""
        return self.sampling, self.replacement, self.seed

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> CurloraConfig:
        """Load the configuration of a saved adapter; see :meth:`peft.PeftConfig.from_pretrained`.

        PEFT calls this before it touches the model. So the adapter's weights file, in a local folder or fetched from
        the hub, is looked at here: a damaged one is refused while nothing has changed yet.

        An adapter that is made by the result on the same base, with its draws not changed, has the columns and rows of
        the saved one, and no weight is read in full for it.

        Raises:
            ValueError: if the weights file cannot be read, or is a pickle.
        """
        folder = os.path.join(pretrained_model_name_or_path, subfolder or "")
        if os.path.isdir(folder):
            _check_weights_file(folder)
            config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
            return _with_draws_of(folder, config)
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        for file in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME):
            with contextlib.suppress(EntryNotFoundError):  # PEFT says it if there is neither
                hub_kwargs = cls._split_kwargs(kwargs)[0]
                found = hf_hub_download(pretrained_model_name_or_path, file, subfolder=subfolder, **hub_kwargs)
                _check_weights_file(os.path.dirname(found))
                return _with_draws_of(os.path.dirname(found), config)
        return config


def _with_draws_of(folder: str, config: CurloraConfig) -> CurloraConfig:
    path = os.path.abspath(os.path.join(folder, SAFETENSORS_WEIGHTS_NAME))
    if os.path.exists(path):
        config.saved_draws = SavedDraws(path, config.drawn_by)
    return config


def _check_weights_file(folder: str) -> None:
    path = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
    if os.path.exists(path):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"The adapter file {path} cannot be read ({error}). It is incomplete or damaged: copy or "
                "download it again, or save the adapter anew."
            ) from error
    elif os.path.exists(pickled := os.path.join(folder, WEIGHTS_NAME)):
        raise ValueError(
            f"{pickled} is a pickle, which CURLoRA adapters never are. Save the adapter as "
            f"{SAFETENSORS_WEIGHTS_NAME} (the default of save_pretrained)."
        )
