"""Training within a stated budget of forgetting, in any Trainer of transformers or TRL."""

from curlora.budget.callback import ForgettingBudget
from curlora.budget.learning_rate import lora_learning_rate
from curlora.budget.outcome import Outcome

__all__ = ["ForgettingBudget", "Outcome", "lora_learning_rate"]
