"""What tests/test_scale.py starts twice: trains in two processes, and leaves behind what came of it.

torchrun --nproc_per_node=2 -m tests.processes ddp|fsdp2 FOLDER
"""

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from curlora import CurloraConfig, ForgettingBudget, Guard, GuardCallback, calibrate
from curlora.guard import Ledger, own_text, perplexity
from tests.models import WORDS, layers, llama, tokens, word_tokenizer

STEPS = 4
SHARDING = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "state_dict_type": "FULL_STATE_DICT"}
SHARDING |= {"reshard_after_forward": True, "cpu_ram_efficient_loading": False}


def base(dtype=torch.float64):
    return llama(initializer_range=0.2).to(dtype)


def fresh(dtype=torch.float64):
    return get_peft_model(base(dtype), CurloraConfig(r=4))


def train(model, accelerator=None):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    if accelerator is not None:
        model, optimizer = accelerator.prepare(model, optimizer)
    for step in range(STEPS):
        ids = tokens(seed=step, batch=8)
        if accelerator is None:
            model(input_ids=ids, labels=ids).loss.backward()
        else:
            ids = ids[accelerator.process_index :: accelerator.num_processes]
            accelerator.backward(model(input_ids=ids, labels=ids).loss)
        optimizer.step()
        optimizer.zero_grad()
    return model


def trainer(model, folder, callbacks=(), **arguments):
    """Transformers' Trainer over 8 rows a step, however many processes share them."""
    processes = PartialState().num_processes if PartialState._shared_state else 1
    rows = [{"input_ids": row, "labels": row} for row in tokens(batch=8 * STEPS)]
    arguments = {"per_device_train_batch_size": 8 // processes, "learning_rate": 0.05, "max_steps": STEPS, **arguments}
    common = dict(report_to="none", disable_tqdm=True, save_strategy="steps", save_steps=STEPS // 2)
    given = TrainingArguments(str(folder), **common, **arguments)
    return Trainer(model, given, train_dataset=rows, callbacks=list(callbacks))


def guarded(model, folder, **arguments):
    """A guarded adapter, what it has cost, and how much of it was kept.

    Nine rows of text in batches of two are shared out unevenly.
    """
    text = tokens(seed=11, batch=9, length=12).unbind()
    calibration = calibrate(model, text, batch_size=2, progress=False)
    callback = GuardCallback(
        Guard(model, calibration, budget=0.02), lambda: perplexity(model, text, batch_size=2), max_rise=0.01
    )
    writing = Writing()
    train = trainer(model, folder, callbacks=[writing, callback], **arguments)
    train.train()
    drifts = [log["drift"] for log in train.state.log_history if "drift" in log]
    again = calibrate(model, text, batch_size=2, progress=False)  # of the model as the trainer has left it, in pieces
    return {
        "U": trained(train.model), "kept": torch.tensor(callback.kept), "drifts": torch.tensor(drifts),
        "end": torch.tensor(callback.guard.drift()), "own text": writing.text,
        "calibrations": [
            torch.stack([getattr(of, part) for of in one.layers.values()])
            for one in (calibration, again) for part in ("left", "right", "start")
        ],
    }  # fmt: skip


class Writing(TrainerCallback):
    """Lets the base write before the first step of a training."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.text = written(kwargs["model"])


def budgeted(model, folder, resume=None, **arguments):
    """An adapter trained under a budget, with columns and rows chosen, calibrated and measured in its own trainer."""
    texts = {
        "words": tokens(seed=11, batch=9, length=12).unbind(),
        "size": lambda: 1 + sum(U.square().sum().item() for U in trained(model).values()),
    }
    callback = ForgettingBudget(0.01, texts=texts, limits={"words": 0.3}, batch_size=2, max_length=12)
    train = trainer(model, folder, callbacks=[callback], **arguments)
    train.train(resume_from_checkpoint=resume)
    outcome = callback.outcome
    return {
        "U": trained(train.model), "indices": indices(train.model),
        "figures": torch.tensor([outcome.predicted, outcome.kept, outcome.learning_rate]),
        "texts": torch.tensor([[text.before, text.after] for text in outcome.texts.values()]),
        "anchors": Ledger.of(train.model.peft_config["default"]).anchors.state_dict(),
    }  # fmt: skip


def penalized(model, folder, **arguments):
    """LoRA trained under a budget, whose penalty and limit both act."""
    texts = {"words": tokens(seed=11, batch=9, length=12).unbind(), "others": tokens(seed=12, batch=5).unbind()}
    callback = ForgettingBudget(0.3, texts=texts, limits={"words": 0.001}, batch_size=2, max_length=12, strength=0.1)
    train = trainer(model, folder, callbacks=[callback], **arguments)
    train.train()
    outcome = callback.outcome
    trained = {name: p.detach().clone() for name, p in train.model.named_parameters() if p.requires_grad}
    return {
        "trained": trained, "figures": torch.tensor([outcome.kept, outcome.learning_rate]),
        "logs": torch.tensor([log["kl_to_base"] for log in train.state.log_history if "loss" in log]),
    }  # fmt: skip


def lora(seed=0):
    model = base()
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))


def written(model):
    """What the base writes. Each process would write something else."""
    words, rank = word_tokenizer(), 0
    words.bos_token = WORDS[3]
    if torch.distributed.is_initialized():
        rank = torch.distributed.get_rank()
    options = {"tokens": 100, "max_length": 8, "batch_size": 4, "cache": None, "progress": False}
    rows = own_text(model, words, seed=rank, **options)
    if torch.distributed.is_initialized():
        everyones = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyones, torch.cat(rows).tolist())
        assert everyones == [everyones[0]] * len(everyones)
    return torch.cat(rows)


def trained(model):
    """``U`` of each layer, whole."""
    whole = {}
    for name, parameter in model.named_parameters():
        if "curlora_U" in name:
            U = parameter.detach()
            whole[name.removeprefix("module.")] = U.full_tensor() if hasattr(U, "full_tensor") else U.clone()
    return whole


def indices(model):
    return torch.stack([layer.basis("default").indices for layer in layers(model)])


def main(kind, folder):
    arguments = {"use_cpu": True}
    plugin = None
    if kind == "fsdp2":
        # Accelerate shards on accelerators only. Gloo can do it as well.
        PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
        PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
        arguments = {"fsdp": True, "fsdp_config": SHARDING}
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=SHARDING["transformer_layer_cls_to_wrap"],
            reshard_after_forward=True,
            cpu_ram_efficient_loading=False,
            state_dict_type="FULL_STATE_DICT",
        )
    accelerator = Accelerator(cpu=kind == "ddp", fsdp_plugin=plugin)
    rank, found = accelerator.process_index, {}

    def differently_seeded(dtype=torch.float64):
        model = base(dtype)
        torch.manual_seed(1000 + rank)
        return get_peft_model(model, CurloraConfig(r=4))

    model = train(differently_seeded(), accelerator)
    plain = accelerator.unwrap_model(model)
    found["parameters"] = {type(p).__name__ for p in plain.parameters()}
    found["U"] = trained(plain)
    found["indices"] = accelerator.gather(indices(plain)[None])

    state = accelerator.get_state_dict(model)
    plain.save_pretrained(folder / "saved", state_dict=state, is_main_process=accelerator.is_main_process)
    accelerator.wait_for_everyone()

    with torch.no_grad():
        before = model.eval()(tokens()).logits
        accelerator.save_state(folder / "state")
        accelerator.wait_for_everyone()
        for U in (p for p in plain.parameters() if p.requires_grad):
            U.mul_(0)
        accelerator.load_state(folder / "state")
        found["after load_state"] = [before, model(tokens()).logits]
        plain.load_adapter(folder / "saved", "second")
        plain.set_adapter("second")
        found["second"] = model(tokens()).logits
        plain.merge_adapter()
        found["merged"] = model(tokens()).logits
        with plain.disable_adapter():  # which unmerges
            found["unmerged"] = model(tokens()).logits

    # U is float32 on a base in half precision.
    model = train(differently_seeded(torch.bfloat16), accelerator)
    plain = accelerator.unwrap_model(model)
    found["dtypes"] = {p.dtype for p in plain.parameters()}
    found["U on bfloat16"] = trained(plain)

    AcceleratorState._reset_state()
    whole = trainer(differently_seeded(), folder / "trainer", **arguments)
    whole.train()
    found["trainer"] = trained(whole.model)
    AcceleratorState._reset_state()
    resumed = trainer(differently_seeded(), folder / "trainer", **arguments)
    resumed.train(resume_from_checkpoint=str(folder / "trainer" / f"checkpoint-{STEPS // 2}"))
    found["resumed"] = trained(resumed.model)

    AcceleratorState._reset_state()
    if kind == "fsdp2":  # Gathered parameters stay after a forward pass, as where there is memory for it.
        arguments["fsdp_config"] = {**SHARDING, "reshard_after_forward": False}
    found["guarded"] = guarded(differently_seeded(), folder / "guarded", logging_steps=1, **arguments)

    AcceleratorState._reset_state()
    arguments |= {"learning_rate": 0.3}
    found["budgeted"] = budgeted(differently_seeded(), folder / "budgeted", **arguments)
    AcceleratorState._reset_state()
    middle = str(folder / "budgeted" / f"checkpoint-{STEPS // 2}")
    found["budgeted, resumed"] = budgeted(differently_seeded(), folder / "budgeted", middle, **arguments)

    AcceleratorState._reset_state()
    arguments |= {"logging_steps": 1, "learning_rate": 0.05}
    if kind == "ddp":
        found["penalized"] = penalized(lora(seed=1000 * rank), folder / "penalized", **arguments)
    else:
        try:
            penalized(lora(), folder / "penalized", **arguments)
        except ValueError as error:
            found["penalized"] = str(error)

    if rank == 0:
        torch.save(found, folder / "found.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    time.sleep(1)  # the other process may still be at the barrier
    # Without destructors: DDP's joins a thread of gloo's with the interpreter's lock in hand, for which that may wait.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
