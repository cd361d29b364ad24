"""Measure what a training step of each method of ``proof/gsm8k/recipe.yaml`` costs: time, and bytes kept for backward.

The model has SmolLM2-135M's shapes and random weights. A batch has eight rows of 202 random tokens, the mean length of
the recipe's rows. A step is the forward and the backward pass, the penalty if there is one, the optimizer's step, and
the guard if there is one. The floor is a step without an adapter, whose gradients flow back through the adapted layers.
All methods run alternately in one process. Each is a line of ``methods.jsonl``.

    python benchmarks/speed/methods.py
"""

import argparse
import statistics
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import measure
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import curlora
from curlora.callbacks import KLToBaseCallback
from models import SHAPE, kept_for_backward, sharing

RECIPE = Path(__file__).parent.parent / "proof" / "gsm8k" / "recipe.yaml"

ROWS, LENGTH, TEXT_LENGTH = 8, 202, 128  # of a batch; and the length of a row of the guard's text
ENTRIES = ["lora", "lora-all-linear", "guarded", "guarded-all-linear", "lora-kl", "lora-all-linear-kl"]
CONFIGS = {"lora": LoraConfig, "curlora": curlora.CurloraConfig}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    methods = {method["name"]: method for method in recipe["methods"]}
    base = smollm2()
    text = torch.randint(0, base.config.vocab_size, (8, TEXT_LENGTH)).unbind()
    steps = {"floor": Floor(base, first=min(methods["lora"]["options"]["layers_to_transform"]))}
    steps |= {name: Step(base, methods[name], text) for name in ENTRIES}
    batch = torch.randint(0, base.config.vocab_size, (ROWS, LENGTH))
    # A penalty's own passes are over before the loss is computed, and keep less.
    kept = {name: kept_for_backward(step.model, partial(step.loss, batch)) for name, step in steps.items()}
    seconds = measure.in_turn({name: partial(step.take, batch) for name, step in steps.items()}, options.rounds, 1)
    options.out.unlink(missing_ok=True)
    for name, step in steps.items():
        relative = [time / floor for time, floor in zip(seconds[name], seconds["floor"], strict=True)]
        measure.add(options.out, {
            "entry": name,
            "parameters": sum(parameter.numel() for parameter in step.trained),
            "kept": kept[name],
            "seconds": round(statistics.median(seconds[name]), 4),
            "of_floor": round(statistics.median(relative), 4),
        })  # fmt: skip


def smollm2():
    config = LlamaConfig(vocab_size=49_152, num_hidden_layers=30, tie_word_embeddings=True, **SHAPE)
    return LlamaForCausalLM(config).requires_grad_(False).eval()


class Floor:
    """A step without an adapter."""

    trained = ()

    def __init__(self, base, first):
        self.model = sharing(base)
        # As with adapters, gradients flow back to the first adapted layer.
        self.model.model.layers[first].register_forward_pre_hook(lambda _, args: (args[0].requires_grad_(), *args[1:]))

    def take(self, batch):
        self.loss(batch).backward()

    def loss(self, batch):
        return self.model(input_ids=batch, labels=batch, use_cache=False).loss


class Step(Floor):
    """A step of a method of the recipe."""

    def __init__(self, base, method, text):
        self.model = get_peft_model(sharing(base), CONFIGS[method["method"]](**method["options"]))
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4)
        self.penalty = None
        for plugin in method.get("plugins", ()):
            if plugin["name"] == "kl_to_base":
                self.penalty = KLToBaseCallback(text, strength=3.0)
            elif plugin["name"] == "guard":
                guard = curlora.Guard(self.model, curlora.calibrate(self.model, text, progress=False), budget=0.005)
                guard.attach(self.optimizer)

    def take(self, batch):
        if self.penalty is not None:
            self.penalty.on_step_begin(None, SimpleNamespace(global_step=0), None, model=self.model)
        super().take(batch)
        self.optimizer.step()
        self.optimizer.zero_grad()


if __name__ == "__main__":
    main()
