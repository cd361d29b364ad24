"""Small random models that tests share."""

import torch
from peft import get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from curlora import CurloraConfig, CurloraLayer

VOCABULARY = 100


def llama(seed=0, **kwargs):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        **kwargs,
    )
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # transformers starts them at zero, which would hide errors
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def gpt2(seed=0):
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0, n_positions=64
    )
    model = GPT2LMHeadModel(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


BASES = {"llama": llama, "gpt2": gpt2}


def tokens(seed=0, batch=2, length=7):
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def curlora(base, seed=7, adapter_name="default", **config):
    """``base`` with an adapter whose ``U`` is not zero."""
    model = get_peft_model(base, CurloraConfig(**{"r": 4, **config}), adapter_name=adapter_name).eval()
    randomize(model, adapter_name, seed)
    return model


def randomize(model, adapter_name="default", seed=7):
    rng = torch.Generator().manual_seed(seed)
    for layer in layers(model):
        U = layer.curlora_U[adapter_name]
        U.data.copy_(torch.randn(U.shape, generator=rng) * 3)


def layers(model):
    return [module for module in model.modules() if isinstance(module, CurloraLayer)]
