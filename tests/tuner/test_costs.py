"""The cost of an adapter's training step over that of the frozen model, in bytes saved for backward and in FLOPs.

Both counts are exact and the same on every machine. The model has SmolLM2-135M's shapes and random weights. The adapter
is on all linear layers, with rank 16, and the batch has 4 x 128 tokens. The floor is the frozen model with gradients
that flow to its first layer. Unless stated otherwise, an adapter's step is an ordinary training step, in which nothing
before the first adapter needs a gradient.
"""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from curlora import CurloraConfig
from tests.models import layers

SMOLLM2 = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)
TOKENS = 4 * 128


def cost_of_a_step(adapter, config=SMOLLM2, to_embeddings=False):
    """Return the bytes saved for backward, without tensors that the model holds anyway, and the FLOPs of one step."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).requires_grad_(False)
    if adapter is not None:
        model = get_peft_model(model, adapter).get_base_model()
    held = [tensor for layer in layers(model) for tensor in layer.basis("default").tensors]
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), *held)}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    embedded = model.get_input_embeddings()(torch.arange(TOKENS).view(4, -1)).requires_grad_(
        to_embeddings or adapter is None
    )
    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            hidden = model.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        hidden.sum().backward()
    return sum(kept.values()), counter.get_total_flops()


@pytest.fixture(scope="module")
def costs():
    adapters = {
        "floor": None,
        "curlora": CurloraConfig(r=16, target_modules="all-linear"),
        "lora": LoraConfig(r=16, target_modules="all-linear"),
    }
    return {name: cost_of_a_step(adapter) for name, adapter in adapters.items()}


@pytest.mark.parametrize(("count", "share"), [(0, 0.04), (1, 1 / 3)], ids=["bytes", "flops"])
def test_overhead_over_the_floor_against_lora(costs, count, share):
    floor, curlora, lora = (costs[name][count] for name in ("floor", "curlora", "lora"))
    assert 0 < curlora - floor <= share * (lora - floor), f"{curlora - floor} against LoRA's {lora - floor}"


@pytest.mark.parametrize(("r", "width", "depth"), [(4, 192, 2), (16, 192, 1), (16, 384, 3)])
def test_overhead_is_what_the_formulas_say(r, width, depth):
    """The formulas of docs/complexity.md, with gradients that flow to the embeddings in both models."""
    config = LlamaConfig(
        vocab_size=TOKENS, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=depth,
        num_attention_heads=3, num_key_value_heads=1,
    )  # fmt: skip
    floor, adapted = (
        cost_of_a_step(adapter, config, to_embeddings=True)
        for adapter in (None, CurloraConfig(r=r, target_modules="all-linear"))
    )
    outputs = [width, width // 3, width // 3, width, 2 * width, 2 * width, width] * depth
    assert adapted[0] - floor[0] == sum(4 * TOKENS * r for _ in outputs)
    padded = r + -r % 16
    assert adapted[1] - floor[1] == sum(2 * TOKENS * (m * r + m * padded + 3 * r * r) for m in outputs)
