"""Small random models that tests share."""

import torch
from peft import get_peft_model
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from curlora import CurloraConfig, CurloraLayer

VOCABULARY = 100
WORDS = [f"w{i}" for i in range(VOCABULARY - 2)]
_LLAMA = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)


def llama(seed=0, **kwargs):
    torch.manual_seed(seed)
    config = LlamaConfig(**_LLAMA, num_key_value_heads=2, attention_bias=True, **kwargs)
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # transformers initializes them with zeros, which would hide errors
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


def multimodal(seed=0):
    """Return a small model of text and images. What is stated of its text is in a configuration of its own."""
    torch.manual_seed(seed)
    text = dict(_LLAMA, num_key_value_heads=2, head_dim=8, max_position_embeddings=64)
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    config = Gemma3Config(
        text_config=text, vision_config=vision | {"patch_size": 14}, mm_tokens_per_image=4, image_token_index=98,
        boi_token_index=97, eoi_token_index=96,
    )  # fmt: skip
    return Gemma3ForConditionalGeneration(config).eval()


def classifier(kind=LlamaForSequenceClassification, seed=0):
    """Return a small classifier with a new head for three labels."""
    torch.manual_seed(seed)
    return kind(LlamaConfig(**_LLAMA, num_labels=3, pad_token_id=0)).eval()


BASES = {"llama": llama, "gpt2": gpt2}


def tokens(seed=0, batch=2, length=7):
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def curlora(base, seed=7, adapter_name="default", **config):
    """Return ``base`` with an adapter whose ``U`` is not zero."""
    model = get_peft_model(base, CurloraConfig(**{"r": 4, **config}), adapter_name=adapter_name).eval()
    randomize(model, adapter_name, seed)
    return model


def randomize(model, adapter_name="default", seed=7):
    rng = torch.Generator().manual_seed(seed)
    for layer in layers(model):
        if adapter_name not in layer.curlora_U:
            continue
        U = layer.curlora_U[adapter_name].weight
        U.data.copy_(torch.randn(U.shape, generator=rng) * 3)


def layers(model):
    return [module for module in model.modules() if isinstance(module, CurloraLayer)]


def word_tokenizer():
    """Return a tokenizer with one token for each word of ``WORDS``."""
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    model = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="[PAD]", unk_token="[UNK]")


def save_base(folder, chat_template=None):
    """Save a small model with a tokenizer that has an end-of-text token, in place of one from the hub."""
    llama(initializer_range=0.2).save_pretrained(folder)
    tokenizer = word_tokenizer()
    tokenizer.eos_token, tokenizer.chat_template = WORDS[-1], chat_template
    tokenizer.save_pretrained(folder)


def word_examples(seed, train=30, evaluation=21):
    """Return a learnable task: which of two words ends a sentence of two to seven words."""
    rng = torch.Generator().manual_seed(seed)
    signs = [WORDS[seed], WORDS[seed + 1]]

    def examples(count):
        rows = []
        for i in range(count):
            words = [WORDS[j] for j in torch.randint(20, 90, (i % 6 + 1,), generator=rng)]
            label = int(torch.randint(0, 2, (), generator=rng))
            rows.append((" ".join([*words, signs[label]]), label))
        return rows

    return examples(train), examples(evaluation)
