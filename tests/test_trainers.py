"""Trainers that know nothing of CURLoRA train it: transformers' and TRL's."""

import math

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from curlora import CurloraConfig
from tests.models import WORDS, curlora, llama, tokens, word_tokenizer

CONFIG = dict(r=4, seed=3)


def base():
    return llama(initializer_range=0.2)


@pytest.fixture
def tokenizer():
    tokenizer = word_tokenizer()
    tokenizer.eos_token = WORDS[-1]
    return tokenizer


@pytest.fixture
def arguments(tmp_path):
    arguments = dict(output_dir=str(tmp_path / "out"), report_to="none", disable_tqdm=True, use_cpu=True, bf16=False)
    return arguments | dict(per_device_train_batch_size=4, learning_rate=0.05, max_steps=4, save_steps=2)


def texts(**lengths):
    rng = torch.Generator().manual_seed(0)
    words = lambda count: " ".join(WORDS[i] for i in torch.randint(5, 90, (count,), generator=rng))  # noqa: E731
    return Dataset.from_list([{column: words(count) + " " for column, count in lengths.items()} for _ in range(16)])


def state(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_only_U_moved(before, after):
    assert before.keys() == after.keys()
    for name in after:
        moved = not torch.equal(before[name], after[name])
        assert moved == name.endswith(".curlora_U.default.weight"), name


def log_probabilities(model, batch):
    """Of each completion."""
    ids = batch["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=batch["attention_mask"]).logits
    each = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return (each * batch["completion_mask"][:, 1:]).sum(1)


def test_the_trainer_takes_the_steps_that_a_loop_takes_and_goes_on_from_a_checkpoint(arguments):
    rows = tokens(batch=16)

    def trainer():
        model = get_peft_model(base(), CurloraConfig(**CONFIG))
        dataset = [{"input_ids": row, "labels": row} for row in rows]
        return Trainer(model, TrainingArguments(**arguments, lr_scheduler_type="constant"), train_dataset=dataset)

    whole = trainer()
    batches = [batch["input_ids"] for batch in whole.get_train_dataloader()]
    before = state(whole.model)
    whole.train()
    assert_only_U_moved(before, state(whole.model))

    loop = get_peft_model(base(), CurloraConfig(**CONFIG)).train()
    U = [p for p in loop.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(U, lr=0.05, weight_decay=0)
    torch.manual_seed(42)
    for ids in batches:
        loop(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(U, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for name, value in state(whole.model).items():
        assert torch.allclose(value, state(loop)[name], atol=1e-6), name

    resumed = trainer()
    resumed.train(resume_from_checkpoint=f"{arguments['output_dir']}/checkpoint-2")
    for name, value in state(whole.model).items():
        assert torch.equal(value, state(resumed.model)[name]), name


@pytest.mark.parametrize("checkpointing", [True, False])
def test_sft_trainer(checkpointing, arguments, tokenizer):
    """Given a configuration, or a model that has the adapter already; the checkpoint is an adapter like any other."""
    results = []
    for wrapped in (False, True):
        model = get_peft_model(base(), CurloraConfig(**CONFIG)) if wrapped else base()
        trainer = SFTTrainer(
            model,
            SFTConfig(**arguments, gradient_checkpointing=checkpointing),
            train_dataset=texts(prompt=4, completion=3),
            processing_class=tokenizer,
            peft_config=None if wrapped else CurloraConfig(**CONFIG),
        )
        before = state(trainer.model)
        trainer.train()
        assert_only_U_moved(before, state(trainer.model))
        results.append(state(trainer.model))
    one, two = results
    assert all(torch.equal(one[name], two[name]) for name in one)
    loaded = PeftModel.from_pretrained(base(), f"{arguments['output_dir']}/checkpoint-4").eval()
    assert torch.equal(loaded(tokens()).logits, trainer.model.eval()(tokens()).logits)


def test_dpo_trainer_compares_with_the_frozen_model(arguments, tokenizer):
    trainer = DPOTrainer(
        base(),
        args=DPOConfig(**arguments | {"max_steps": 24}, logging_steps=1),
        train_dataset=texts(prompt=4, chosen=3, rejected=2),
        processing_class=tokenizer,
        peft_config=CurloraConfig(**CONFIG),
    )
    before = state(trainer.model)
    trainer.train()
    assert_only_U_moved(before, state(trainer.model))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)  # U is zero: the two are one
    assert max(losses[-4:]) < 0.99 * math.log(2)

    batch = next(iter(trainer.get_train_dataloader()))
    reference = torch.cat(trainer.compute_ref_log_probs(trainer.model, batch))
    frozen = log_probabilities(base(), batch)
    assert torch.allclose(reference, frozen, atol=1e-5)
    assert not torch.allclose(log_probabilities(trainer.model, batch), frozen, atol=1e-3)


def test_dpo_trainer_compares_with_an_adapter_that_has_been_trained(arguments, tokenizer):
    """With the line that the documentation adds: the copy that TRL makes passes by what is not called a weight."""
    trainer = DPOTrainer(
        curlora(base(), **CONFIG),
        args=DPOConfig(**arguments),
        train_dataset=texts(prompt=4, chosen=3, rejected=2),
        processing_class=tokenizer,
    )
    set_peft_model_state_dict(trainer.model, get_peft_model_state_dict(trainer.model), adapter_name="ref")
    before = state(trainer.model)
    trainer.train()
    assert_only_U_moved(before, state(trainer.model))
    batch = next(iter(trainer.get_train_dataloader()))
    reference = torch.cat(trainer.compute_ref_log_probs(trainer.model, batch))
    start = curlora(base(), **CONFIG)
    assert torch.allclose(reference, log_probabilities(start, batch), atol=1e-4)
    assert not torch.allclose(reference, log_probabilities(base(), batch), atol=1e-1)
