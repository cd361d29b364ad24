"""Models with SmolLM2-135M's shapes and random weights: one for each method, all sharing the frozen weights."""

import copy
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import LlamaConfig, LlamaModel

import curlora
from curlora import CurloraLayer, sampling

QKV = ["q_proj", "k_proj", "v_proj"]
ALL = [*QKV, "o_proj", "gate_proj", "up_proj", "down_proj"]
SHAPE = dict(hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3)
TARGETS = {"query, key, value": QKV, "all linear layers": ALL}


def smollm2(layers: int = 30) -> LlamaModel:
    """Return the model without its embedding table: inputs are embeddings, outputs are the last hidden states."""
    return LlamaModel(LlamaConfig(vocab_size=8, num_hidden_layers=layers, **SHAPE)).requires_grad_(False)


class DenseCUR(nn.Module):
    """CURLoRA as in its author's code: ``x Wᵀ + x (C U R)ᵀ``, which computes ``C U R`` again in every step.

    This is a re-implementation of the formula, for comparison.
    """

    def __init__(self, base: nn.Linear, r: int, name: str) -> None:
        super().__init__()
        self.base = base
        columns, rows = sampling.select(sampling.squared_norms(base.weight), r, seed=0, name=name)
        self.register_buffer("C", base.weight[:, columns].clone())
        self.register_buffer("R", base.weight[rows].clone())
        self.U = nn.Parameter(torch.zeros(r, r))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + linear(x, self.C @ self.U @ self.R)


def dense(model: nn.Module, r: int, targets: list[str]) -> nn.Module:
    for name, module in list(model.named_modules()):
        if name.rpartition(".")[2] in targets:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, DenseCUR(module, r, name))
    return model


def held(model: nn.Module) -> list[Tensor]:
    """Return all tensors of a model: parameters, buffers, and the adapters' columns and rows, which are neither."""
    layers = [module for module in model.modules() if isinstance(module, CurloraLayer)]
    bases = [layer.basis(name) for layer in layers for name in layer.curlora_U]
    drawn = [tensor for basis in bases for tensor in basis.tensors]
    return [*model.parameters(), *model.buffers(), *drawn]


def kept_for_backward(model: nn.Module, run: Callable[[], object]) -> int:
    """Return the bytes that autograd keeps while ``run`` is called, without the model's own tensors."""
    own = {tensor.untyped_storage().data_ptr() for tensor in held(model)}
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(kept.values())


def sharing(base: nn.Module) -> nn.Module:
    """Return a copy of a model that shares its weights."""
    return copy.deepcopy(base, {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())})


def adapted(base: nn.Module, method: str, r: int, targets: list[str]) -> nn.Module:
    """Return a new model for the method. It shares the frozen weights with ``base``."""
    model = sharing(base)
    if method == "floor":
        return model
    if method == "reference":
        return dense(model, r, targets)
    # If a layer's smaller side is below the rank, the layer gets that side as its rank, with every method.
    sides = {
        name.rpartition(".")[2]: min(module.weight.shape)
        for name, module in base.named_modules() if isinstance(module, nn.Linear)
    }  # fmt: skip
    ranks = {name: sides[name] for name in targets if sides[name] < r}
    common = dict(r=r, target_modules=targets, rank_pattern=ranks)
    lora = dict(common, lora_alpha=r, alpha_pattern=ranks)
    config = {
        "curlora": lambda: curlora.CurloraConfig(**common),
        "lora": lambda: LoraConfig(**lora),
        "dora": lambda: LoraConfig(**lora, use_dora=True),
    }[method]()
    return get_peft_model(model, config).get_base_model()
