"""A recipe with a general text, for plug-ins that need one."""

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from tests.models import word_tokenizer


@pytest.fixture
def guarded_path(recipe_path):
    """CURLoRA without a guard, and with a budget that it would exceed, on text that the model itself wrote."""
    content = yaml.safe_load(recipe_path.read_text())
    model = AutoModelForCausalLM.from_pretrained(recipe_path.parent / "model")
    model.lm_head.weight.data *= 30  # sharpens the model's predictions
    model.save_pretrained(recipe_path.parent / "model")
    torch.manual_seed(0)
    rows = model.generate(
        torch.full((6, 1), 5), do_sample=True, max_new_tokens=64, min_new_tokens=64, suppress_tokens=[0, 1]
    )
    (recipe_path.parent / "guard.txt").write_text(word_tokenizer().decode(rows[:, 1:].flatten()))
    content["guard"] = {"name": "more words", "path": "guard.txt", "skip": 64, "tokens": 256, "window": 64}
    cur = {"name": "cur", "method": "curlora", "learning_rate": 0.5, "options": {"r": 4}}
    guard = {"name": "guard", "max_perplexity_increase": 0.002, "damping": 0.01}
    content["methods"] = [cur, {**cur, "name": "guarded", "plugins": [guard]}]
    recipe_path.write_text(yaml.safe_dump(content))
    return recipe_path
