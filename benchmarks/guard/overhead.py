"""Measure what the guard adds to plain CURLoRA: the time of a step, memory, and the calibration.

Two adapters on one model take steps alternately, and one of them is guarded. Prints the median ratio of their times.

    python benchmarks/guard/overhead.py --model DIR
"""

import argparse
import statistics
import time

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import curlora


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder, or a hub id")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--targets", nargs="+", default=["q_proj", "k_proj", "v_proj"], help="or all-linear")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{torch.cuda.get_device_name() if device == 'cuda' else 'CPU'}, {torch.get_num_threads()} threads")
    base = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).to(device)
    targets = options.targets[0] if options.targets == ["all-linear"] else options.targets
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(0, base.config.vocab_size, (64, 128), generator=generator)
    batch = text[:4, :128].to(device)
    for r in options.ranks:
        model = get_peft_model(base, curlora.CurloraConfig(r=r, target_modules=targets), adapter_name="plain")
        model.add_adapter("guarded", curlora.CurloraConfig(r=r, target_modules=targets))
        optimizers = {}
        for name in ("plain", "guarded"):
            model.set_adapter(name)
            trained = [p for n, p in model.named_parameters() if f"curlora_U.{name}" in n]
            optimizers[name] = torch.optim.AdamW(trained, lr=1e-4)
        model.set_adapter("guarded")
        began = time.perf_counter()
        calibration = curlora.calibrate(model, text.unbind(), progress=False)
        seconds = time.perf_counter() - began
        guard = curlora.Guard(model, calibration, budget=0.01)
        guard.attach(optimizers["guarded"])
        whole, alone = {"plain": [], "guarded": []}, {"plain": [], "guarded": []}
        for _ in range(options.steps + 2):
            for name in whole:
                model.set_adapter(name)
                began = time.perf_counter()
                model(input_ids=batch, labels=batch).loss.backward()
                synchronize(device)
                stepped = time.perf_counter()
                optimizers[name].step()
                synchronize(device)
                ended = time.perf_counter()
                optimizers[name].zero_grad()
                whole[name].append(ended - began)
                alone[name].append(ended - stepped)
        held = sum(getattr(stack, side).nbytes for stack in guard._stacks() for side in _HELD)
        step = [b / a for a, b in zip(whole["plain"][2:], whole["guarded"][2:], strict=True)]
        extra = statistics.median(alone["guarded"][2:]) - statistics.median(alone["plain"][2:])
        print(
            f"r {r}, {guard.parameter_count:,} parameters: step {statistics.median(step):.3f} x plain "
            f"({statistics.median(whole['plain'][2:]):.3f} s), of which the guard {1000 * extra:.1f} ms; "
            f"{held / 2**20:.1f} MiB held; calibration over {text.numel():,} tokens {seconds:.0f} s"
        )
        base = model.unload()


_HELD = ("left", "right", "left_inverse", "right_inverse", "start")


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
