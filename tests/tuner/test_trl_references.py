"""TRL's trainers copy the reference from a trained adapter. Before the first step it must equal the policy."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
)

from curlora import CurloraConfig
from tests.models import WORDS, layers, llama, randomize, tokens, word_tokenizer

SAMPLED = dict(beta=0.1, num_generations=2, max_completion_length=6)
TRAINERS = {
    "grpo": (GRPOTrainer, GRPOConfig, SAMPLED),
    "rloo": (RLOOTrainer, RLOOConfig, SAMPLED),
    "dpo": (DPOTrainer, DPOConfig, {}),
    "kto": (KTOTrainer, KTOConfig, {}),
}


def texts(name):
    rng = torch.Generator().manual_seed(0)
    words = lambda count: " ".join(WORDS[i] for i in torch.randint(5, 90, (count,), generator=rng))  # noqa: E731
    columns = {
        "dpo": lambda i: {"chosen": words(3), "rejected": words(3)},
        "kto": lambda i: {"completion": words(3), "label": i % 2 == 0},
    }.get(name, lambda i: {})
    return Dataset.from_list([{"prompt": words(4) + " ", **columns(i)} for i in range(8)])


def trained(method):
    """Return a model with a trained adapter whose columns and rows are not those that its configuration draws."""
    base = llama(initializer_range=0.2)
    if method == "lora":
        return get_peft_model(base, LoraConfig(init_lora_weights=False, target_modules=["q_proj"]))
    model = get_peft_model(base, CurloraConfig(r=4))
    for layer in layers(model):
        layer.redraw("default", torch.arange(8).view(2, 4))
    randomize(model)
    return model


@pytest.mark.parametrize("method", ["curlora", "lora"])
@pytest.mark.parametrize("name", TRAINERS)
def test_the_reference_is_the_policy_at_the_start(name, method, tmp_path):
    trainer_class, config_class, options = TRAINERS[name]
    arguments = config_class(
        output_dir=str(tmp_path), report_to="none", disable_tqdm=True, use_cpu=True, bf16=False, max_steps=1,
        per_device_train_batch_size=4, logging_steps=1, learning_rate=1e-3, **options,
    )  # fmt: skip
    tokenizer = word_tokenizer()
    tokenizer.eos_token = WORDS[-1]
    rewards = {"reward_funcs": lambda completions, **_: [float(len(text)) for text in completions]}
    trainer = trainer_class(
        trained(method), args=arguments, train_dataset=texts(name), processing_class=tokenizer,
        **(rewards if options else {}),
    )  # fmt: skip
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    logits = {}
    for adapter in ("default", "ref"):
        model.set_adapter(adapter)
        logits[adapter] = model(tokens()).logits
    assert torch.equal(logits["ref"], logits["default"])
    model.set_adapter("default")
    trainer.train()
    first = trainer.state.log_history[0]
    assert first.get("kl", 0) == 0
    assert first.get("rewards/margins", 0) == 0
    model.eval()
    assert not torch.equal(model(tokens()).logits, logits["default"])  # the policy has changed
    model.set_adapter("ref")
    assert torch.equal(model(tokens()).logits, logits["ref"])  # the reference has not
