"""A causal language model that classifies: one backbone, one head per task."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

__all__ = ["TaskClassifier", "last_token"]

# The paper's seed of a fresh head (section 5).
HEAD_SEED = 1311


def last_token(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """The hidden state at the last real token of each sequence, padded on either side.

    Args:
        hidden: shape ``(batch, length, width)``.
        attention_mask: shape ``(batch, length)``, non-zero at real tokens.

    Returns:
        Shape ``(batch, width)``.

    Raises:
        ValueError: if a sequence has no real token.
    """
    if not bool(attention_mask.any(dim=1).all()):
        raise ValueError("a sequence without a single token cannot be classified (empty text?)")
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    last = positions.masked_fill(attention_mask == 0, -1).amax(dim=1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


class TaskClassifier(nn.Module):
    """Runs the backbone of a causal language model and the head of the current task.

    As in the paper each task gets a fresh linear head in place of ``lm_head``; heads of earlier
    tasks are kept, untouched, for later evaluation. ``lm_head`` itself stays on ``model``.

    Args:
        model: a causal language model of transformers, or a PEFT model around one.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.heads = nn.ModuleDict()
        self.task = ""

    def add_head(self, task: str, classes: int) -> None:
        """Add a fresh head for ``task`` and make it current; earlier heads are frozen."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(HEAD_SEED)
            head = nn.Linear(self.language_model.config.hidden_size, classes)
        reference = next(self.model.parameters())
        self.heads.requires_grad_(False)
        # Prefixed: a ModuleDict takes no key that it has an attribute of, such as "type" or "train".
        self.heads[f"head_{task}"] = head.to(reference.device)
        self.task = task

    def head(self, task: str) -> nn.Module:
        """The head of a task."""
        return self.heads[f"head_{task}"]

    @property
    def language_model(self) -> Any:
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Classify a padded batch with the head of the current task.

        Returns:
            ``logits``, shape ``(batch, classes)``, and with ``labels`` the mean cross-entropy ``loss``.
        """
        backbone = self.language_model.base_model
        hidden = backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        pooled = last_token(hidden, attention_mask)
        head = self.head(self.task)
        logits = head(pooled.to(dtype=next(head.parameters()).dtype))
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}
