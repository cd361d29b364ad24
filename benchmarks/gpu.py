"""What an adapter costs on a GPU, beside PEFT's LoRA and over the frozen model: everything that one card tells in minutes.

First every kernel is held to float64; if one is wrong, nothing is measured. Then, the most important first: steps of
training and their peak memory, compiled ones, generation with a cache, batches of 64 adapters, ranks, numbers of tokens,
the bandwidth of each kernel, attaching and calibrating, a guarded step, quantized bases. Models have the shapes of
Llama-3.2-3B and Mistral-7B with random bfloat16 weights (nothing is downloaded), some of their layers, and adapters on
all linear layers. Methods share the frozen weights and take turns; gradients flow to the embeddings in each.

Each result is a line of JSON in gpu.jsonl as soon as it is there, and the tables are printed last, also when the script is
ended before by SIGTERM or Ctrl+C.

    bash benchmarks/gpu.sh                      # on a machine with a GPU and without a network
    python benchmarks/gpu.py                    # where everything is installed
    python benchmarks/gpu.py --only step kernels
    python benchmarks/gpu.py --tables           # of what gpu.jsonl holds
    python benchmarks/gpu.py --tiny             # on the CPU, kernels in Triton's interpreter, to see that it runs
"""

import argparse
import contextlib
import copy
import functools
import json
import os
import signal
import statistics
import sys
import time
import traceback
from functools import partial
from pathlib import Path

HERE = Path(__file__).parent
# Not the folder of this script itself, in which transformers would take kernels/ for the package of that name.
sys.path[:1] = [str(HERE / "speed"), str(HERE / "kernels")]
TINY = "--tiny" in sys.argv
if TINY:
    os.environ["TRITON_INTERPRET"] = "1"

import measure
import torch
from peft import LoraConfig, get_peft_model
from step import train
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache

import curlora
from curlora import kernels
from curlora.functional import gather_update, gather_update_by_row
from models import ALL, adapted
from tables import tables

RESULTS = HERE / "gpu.jsonl"
DEVICE = "cpu" if TINY else "cuda"
SHAPES = {
    "Llama-3.2-3B": dict(
        model_type="llama", hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
        num_key_value_heads=8, head_dim=128),
    "Mistral-7B": dict(
        model_type="mistral", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, sliding_window=None),
}  # fmt: skip
SMALL = dict(hidden_size=96, intermediate_size=128, num_attention_heads=3, num_key_value_heads=1, head_dim=32)
# A method of models.adapted, and how it computes.
METHODS = {"floor": ("floor", "torch"), "torch": ("curlora", "torch"), "triton": ("curlora", "triton"), "lora": ("lora", "torch")}
