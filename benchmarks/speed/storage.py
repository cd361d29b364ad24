"""Compare the file sizes of CURLoRA and LoRA adapters for common models. The models are on the meta device.

python benchmarks/speed/storage.py
"""

import argparse
import tempfile
from pathlib import Path

import measure
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

import curlora
from models import ALL, QKV

RESULTS = Path(__file__).with_suffix(".jsonl")
# The models' shapes, from their published config.json.
LLAMA = dict(model_type="llama", vocab_size=128256, hidden_act="silu")
MODELS = {
    "SmolLM2-135M": LLAMA | dict(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152),
    "GPT-2 Large": dict(model_type="gpt2", n_embd=1280, n_layer=36, n_head=20),
    "Llama-3.2-3B": LLAMA | dict(
        hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24, num_key_value_heads=8,
        head_dim=128),
    "Mistral-7B": dict(
        model_type="mistral", vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128),
    "Llama-3.1-70B": LLAMA | dict(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8),
}  # fmt: skip
GPT2 = {"query, key, value": ["c_attn"], "all linear layers": ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"]}
OTHERS = {"query, key, value": QKV, "all linear layers": ALL}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    arguments.out.unlink(missing_ok=True)
    for name, shape in MODELS.items():
        settings = dict(shape)
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        for label, targets in (GPT2 if name == "GPT-2 Large" else OTHERS).items():
            for r in (16, 64):
                row = {"model": name, "targets": label, "r": r}
                for method, adapter in (
                    ("curlora", curlora.CurloraConfig(r=r, target_modules=targets)),
                    ("lora", LoraConfig(r=r, target_modules=targets)),
                ):
                    with torch.device("meta"):
                        model = get_peft_model(AutoModelForCausalLM.from_config(config), adapter)
                    row[method] = {
                        "numbers": sum(p.numel() for p in model.parameters() if p.requires_grad),
                        "bytes": size_on_disk(model),
                    }
                measure.add(arguments.out, row)


def size_on_disk(model):
    """Return the bytes of a file with the names, shapes and dtypes that PEFT saves."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter_model.safetensors"
        save_file({name: torch.zeros(t.shape, dtype=t.dtype) for name, t in state.items()}, path)
        return path.stat().st_size


if __name__ == "__main__":
    main()
