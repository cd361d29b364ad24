"""Compare ``U`` after ten steps in several processes with ``U`` after the same batches in one process.

On GPUs, with each of the configurations in benchmarks/distributed:

    accelerate launch --config_file benchmarks/distributed/fsdp2.yaml benchmarks/distributed.py

On CPUs, with gloo (DDP and FSDP2):

    torchrun --nproc_per_node 2 benchmarks/distributed.py --cpu fsdp2

Prints a line of JSON with the largest difference between two entries of ``U``, and the largest change of an entry from
its start. Exits with status 1 if the difference is more than rounding explains.
"""

import argparse
import json
import sys

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import curlora
from curlora import CurloraLayer
from curlora.tuner.sharded import whole

STEPS, ROWS, LENGTH, VOCABULARY = 10, 16, 32, 128
# Sums over rows are in another order. Adam's first steps have a fixed length, so a gradient near zero makes a large
# difference if rounding changes its sign.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", choices=["ddp", "fsdp2"])
    options = parser.parse_args()
    dtype = torch.float64 if options.cpu else torch.float32
    accelerator = on_cpus(options.cpu) if options.cpu else Accelerator()
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        rows = ROWS // accelerator.num_processes
        AcceleratorState().deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = rows
    alone = trained(adapted(dtype).to(accelerator.device))
    together = trained(adapted(dtype), accelerator)
    moved = max(float(U.abs().max()) for U in alone.values())
    difference = max(float((together[name] - U).abs().max()) for name, U in alone.items())
    if accelerator.is_main_process:
        print(json.dumps({
            "by": options.cpu or accelerator.distributed_type.value, "processes": accelerator.num_processes,
            "device": str(accelerator.device), "dtype": str(dtype)[6:], "steps": STEPS,
            "largest_difference": difference, "moved": moved,
        }), flush=True)  # fmt: skip
    accelerator.end_training()
    if not difference <= TOLERANCE[dtype] * moved:
        sys.exit(f"U differs between one and several processes by {difference}; training changed it by {moved}.")


def adapted(dtype):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    base = LlamaForCausalLM(config).to(dtype)
    return get_peft_model(base, curlora.CurloraConfig(r=8, target_modules="all-linear"), autocast_adapter_dtype=False)


def trained(model, accelerator=None):
    """Return the whole ``U`` of each layer after the steps, in every process."""
    names = [name for name, module in model.named_modules() if isinstance(module, CurloraLayer)]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    plain = model
    if accelerator is not None:
        model, optimizer = accelerator.prepare(model, optimizer)
        plain = accelerator.unwrap_model(model)
    for step in range(STEPS):
        rng = torch.Generator().manual_seed(step)
        ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=rng).to(plain.device)
        if accelerator is None:
            model(input_ids=ids, labels=ids).loss.backward()
        else:
            ids = ids[accelerator.process_index :: accelerator.num_processes]
            accelerator.backward(model(input_ids=ids, labels=ids).loss)
        optimizer.step()
        optimizer.zero_grad()
    return {name: entire(plain.get_submodule(name).curlora_U["default"].weight) for name in names}


def entire(U):
    if not hasattr(U, "ds_id"):
        return whole(U.detach()).clone()
    from deepspeed.zero import GatheredParameters

    with GatheredParameters([U]):
        return U.detach().clone()


def on_cpus(kind):
    if kind == "ddp":
        return Accelerator(cpu=True)
    # Accelerate shards on accelerators only, although gloo can shard on CPUs.
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        reshard_after_forward=True, cpu_ram_efficient_loading=False, state_dict_type="FULL_STATE_DICT",
    )  # fmt: skip
    return Accelerator(fsdp_plugin=plugin)


if __name__ == "__main__":
    main()
