"""A causal language model for a stream of tasks: one backbone, and a head for each classification task."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn

from curlora.text.rows import IGNORED

__all__ = ["HEAD_SEED", "Answers", "TaskModel"]

# The paper's seed for new heads (section 5).
HEAD_SEED = 1311


class Answers(NamedTuple):
    """The model's logits at the ``n`` labelled positions of one task in a batch."""

    rows: Tensor
    """The row of the batch of each position, shape ``(n,)``."""
    logits: Tensor
    """The logits, shape ``(n, classes)`` or ``(n, vocabulary)``."""
    targets: Tensor
    """The labels, shape ``(n,)``."""


class TaskModel(nn.Module):
    """Answers each row of a batch with the head of its task, or with the language model itself.

    As in the paper, each classification task gets a new linear head in place of ``lm_head``. The heads of earlier tasks
    are kept frozen for later evaluation. ``lm_head`` stays on ``model`` and answers completion and chat tasks.

    Args:
        model: a causal language model of transformers, or a PEFT model around one.
    """

    # The loss is divided by the number of labels of a whole step, over all devices and accumulation steps.
    accepts_loss_kwargs = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.heads = nn.ModuleDict()
        self._begun_with: set[str] = set()

    def begin(self, task: int, classes: int | None, seed: int = HEAD_SEED) -> None:
        """Begin a task: freeze the heads of other tasks, and add a new one unless ``classes`` is ``None``.

        If the task has its own adapter, it is added after this.

        Args:
            task: the task's number in the stream.
            classes: the number of outputs of its head.
            seed: seed of the head's initialization.
        """
        self._begun_with |= self._trained_now()
        self.heads.requires_grad_(False)
        if classes is None:
            return
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            head = nn.Linear(self.language_model.config.get_text_config().hidden_size, classes)
        self.heads[str(task)] = head.to(next(self.model.parameters()).device)

    @property
    def language_model(self) -> Any:
        """The transformers model, with the adapters in it."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that this task trains or earlier tasks have trained, by name, without heads."""
        names = self._begun_with | self._trained_now()
        return {name: p for name, p in self.named_parameters() if name in names}

    def _trained_now(self) -> set[str]:
        return {f"model.{name}" for name, p in self.model.named_parameters() if p.requires_grad}

    def backbone_parameters(self) -> Iterator[nn.Parameter]:
        """Return the trainable parameters without the heads."""
        return (p for p in self.model.parameters() if p.requires_grad)

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Called by the Trainer."""
        self._checkpoint("activation_checkpointing_enable", options)

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """Called by the Trainer of earlier versions of transformers."""
        self._checkpoint("gradient_checkpointing_enable", options)

    def _checkpoint(self, name: str, options: dict[str, Any]) -> None:
        getattr(self.language_model, name)(**options)
        if isinstance(self.model, PeftModel):  # a checkpointed block gives gradients only if its inputs need them
            self.language_model.enable_input_require_grads()

    @torch.no_grad()
    def states(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, task: Tensor) -> Tensor:
        """Return the hidden states that heads classify, shape ``(batch, width)``, for rows with one label each."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        return self.language_model.base_model(**inputs).last_hidden_state[labels != IGNORED]

    # Python code assigns the rows of a batch to heads. Compiling it would give a new graph for each task and number of
    # rows, so only the language model is compiled.
    @torch.compiler.disable(recursive=False)
    def answers(
        self,
        labels: Tensor,
        task: Tensor,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        states: Tensor | None = None,
    ) -> list[Answers]:
        """Compute the logits at labelled positions; see :class:`curlora.continual.batches.Collator`.

        Args:
            labels: labels, -100 at positions without one, shape ``(batch, length)``.
            task: the number of each row's task, shape ``(batch,)``.
            input_ids, attention_mask: tokens and mask, shape ``(batch, length)``.
            states: instead of these two, the result of :meth:`states`, for rows of one task with a head; ``labels``
                then has shape ``(batch, 1)``.

        Returns:
            One entry for each task in the batch.
        """
        if states is not None:
            head = self.heads[str(int(task[0]))]
            return [Answers(torch.arange(len(labels), device=labels.device), head(states), labels[:, 0])]
        assert input_ids is not None
        assert attention_mask is not None
        headed = torch.tensor([str(number) in self.heads for number in task.tolist()], device=task.device)
        found = []
        for rows in (headed.nonzero()[:, 0], (~headed).nonzero()[:, 0]):
            if not len(rows):
                continue
            inputs = {"input_ids": input_ids[rows], "attention_mask": attention_mask[rows], "use_cache": False}
            row, position = (labels[rows] != IGNORED).nonzero(as_tuple=True)
            targets = labels[rows][row, position]
            if headed[rows[0]]:
                states = self.language_model.base_model(**inputs).last_hidden_state[row, position]
                for number in task[rows].unique().tolist():
                    chosen = task[rows][row] == number  # empty if the task has only filler rows without labels
                    head = self.heads[str(number)]
                    logits = head(states[chosen].to(next(head.parameters()).dtype))
                    found.append(Answers(rows[row[chosen]], logits, targets[chosen]))
            else:
                # The vocabulary is large, so logits are computed only from the first labelled position on.
                kept = input_ids.shape[1] - int(position.min()) if len(position) else 1
                logits = self.language_model(**inputs, logits_to_keep=kept).logits
                logits = logits[row, position - (input_ids.shape[1] - kept)]
                found.append(Answers(rows[row], logits, targets))
        return found

    @torch.compiler.disable(recursive=False)
    def forward(
        self,
        labels: Tensor,
        task: Tensor,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        states: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """Compute the loss, and in evaluation mode the score of each row.

        Args:
            labels, task, input_ids, attention_mask, states: see :meth:`answers`.
            num_items_in_batch: the divisor of the sum of losses; the number of labels if ``None``.

        Returns:
            ``loss``: cross-entropy in nats. ``scores``, only in evaluation mode, shape ``(batch, 3)``: the sum of a
            row's losses, the number of its labels, and 1 if every label has the highest logit, else 0.
        """
        answers = self.answers(labels, task, input_ids, attention_mask, states)
        losses = [
            nn.functional.cross_entropy(answer.logits.float(), answer.targets, reduction="none") for answer in answers
        ]
        count = sum(len(answer.targets) for answer in answers) if num_items_in_batch is None else num_items_in_batch
        result = {"loss": torch.stack([loss.sum() for loss in losses]).sum() / count}
        if not self.training:
            scores = losses[0].new_zeros(len(labels), 3)
            scores[:, 2] = 1
            for answer, loss in zip(answers, losses, strict=True):
                scores[:, 0].index_add_(0, answer.rows, loss.detach())
                scores[:, 1].index_add_(0, answer.rows, torch.ones_like(loss))
                scores[answer.rows[answer.logits.argmax(-1) != answer.targets], 2] = 0
            result["scores"] = scores
        return result
