"""Measure an adapter's cost on a GPU, relative to the frozen model and to PEFT's LoRA. Takes seven minutes on one GPU.

First each kernel is compared with float64; if one is wrong, nothing is measured. The stages follow, the most important
first: steps and their peak memory, steps of a compiled model, one token with a cache, batches of 64 adapters, ranks,
numbers of tokens, the bandwidth of each kernel, attaching and calibrating, a guarded step, quantized base models. The
models have the shapes of Llama-3.2-3B and Mistral-7B with few layers, random bfloat16 weights (nothing is downloaded),
and adapters on all linear layers. The methods share the frozen weights and run alternately. With each method gradients
flow back to the embeddings.

Each result is written at once as a line of JSON. The tables are printed at the end: after the last stage, after
``--seconds``, at SIGTERM or at Ctrl+C.

    bash benchmarks/gpu.sh                           # without a network; the script lists the files that it needs
    python benchmarks/gpu.py --only check step       # some stages only
    python benchmarks/gpu.py --tables gpu.jsonl      # print the tables of earlier results
    python benchmarks/gpu.py --tiny                  # a test on the CPU, with the kernels in Triton's interpreter
"""

import argparse
import copy
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
sys.path[:0] = [str(HERE / "speed"), str(HERE / "fused")]
TINY = "--tiny" in sys.argv
if TINY:
    os.environ["TRITON_INTERPRET"] = "1"

import backward
import exact
import forward
import measure
import mixed_batch
import timing
import torch
from peft import LoraConfig, get_peft_model
from step import infer, train
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache

import curlora
from curlora import kernels
from models import ALL, adapted

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
LLAMA, MISTRAL = SHAPES
# The adapter of each method, and the backend that computes it.
METHODS = {
    "floor": ("floor", "torch"), "torch": ("curlora", "torch"), "triton": ("curlora", "triton"),
    "lora": ("lora", "torch"),
}  # fmt: skip
TITLES = {"floor": "frozen", "torch": "CURLoRA, PyTorch's operators", "triton": "CURLoRA, kernels", "lora": "LoRA"}


def tiny(few, many):
    return few if TINY else many


def base(name, layers, causal=False):
    shape = {**SHAPES[name], **(SMALL if TINY else {}), "num_hidden_layers": min(layers, tiny(1, layers))}
    vocabulary = tiny(64, 128256) if causal else 8
    config = AutoConfig.for_model(shape.pop("model_type"), vocab_size=vocabulary, tie_word_embeddings=causal, **shape)
    with torch.device(DEVICE):
        kind = AutoModelForCausalLM if causal else AutoModel
        return kind.from_config(config, dtype=torch.bfloat16).requires_grad_(False)


def variants(frozen, r, methods=METHODS):
    return {method: adapted(frozen, METHODS[method][0], r, ALL) for method in methods}


def by(method, call):
    """Return the call, run with the method's backend."""

    def run():
        with kernels.use(METHODS[method][1]):
            call()

    return run


def compared(calls, rounds):
    """Return the floor's seconds, the other methods' overhead over it, and CURLoRA's overhead relative to LoRA's."""
    seconds = measure.in_turn(calls, rounds, warmup=tiny(0, 3))
    over = {name: time for name, time in measure.over_floor(seconds).items() if name != "floor"}
    result = {"floor": statistics.median(seconds["floor"]), "over": over}
    if "lora" in over:
        result["of_lora"] = {n: measure.interval(seconds, n, "lora") for n in ("torch", "triton") if n in over}
    return rounded(result)


def rounded(value):
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {name: rounded(entry) for name, entry in value.items()}
    return [rounded(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def peak(call):
    """Return the peak memory of a call, in bytes above the memory allocated before it."""
    call()
    if DEVICE == "cpu":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


# The stages, in order. Each is a generator of rows.


def machine():
    row = measure.machine() | {"curlora": curlora.__version__, "tiny": TINY}
    if DEVICE == "cuda":
        import triton

        properties = torch.cuda.get_device_properties(0)
        a = torch.randn(8192, 8192, dtype=torch.bfloat16, device=DEVICE)
        large = [torch.empty(2**30, dtype=torch.uint8, device=DEVICE) for _ in range(2)]
        with timing.aside(DEVICE):
            copying = timing.microseconds(lambda _: large[0].copy_(large[1]), [None] * 2, DEVICE)
            product = timing.microseconds(lambda _: a @ a, [None] * 2, DEVICE)
        row |= {"triton": triton.__version__, "multiprocessors": properties.multi_processor_count,
                "memory": properties.total_memory, "copy_bytes_per_second": rounded(2 * 2**30 / copying * 1e6),
                "bfloat16_flops_per_second": rounded(2 * 8192**3 / product * 1e6)}  # fmt: skip
    yield row


def check():
    yield from exact.rows(DEVICE, exact.TINY if TINY else exact.SETTINGS)


def steps(name, layers, r, tokens, checkpointing=False, methods=METHODS, compiled=False, models=None):
    models = models or variants(base(name, layers), r, methods)
    model = models["floor"]
    x = torch.randn(1, tokens, model.config.hidden_size, dtype=torch.bfloat16, device=model.device)
    setting = {"model": name, "layers": model.config.num_hidden_layers, "r": r, "tokens": tokens,
               "checkpointing": checkpointing, "compiled": compiled}  # fmt: skip
    for model in models.values():
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            model.gradient_checkpointing_disable()
    runs = {m: torch.compile(one, dynamic=False, backend=tiny("aot_eager", "inductor")) if compiled else one
            for m, one in models.items()}  # fmt: skip
    calls = {method: by(method, partial(train, run, x)) for method, run in runs.items()}
    began = time.perf_counter()
    result = {"peak": {method: peak(call) for method, call in calls.items()}}
    if compiled:
        result["seconds_to_compile"] = rounded(time.perf_counter() - began)
    result["step"] = compared(calls, tiny(1, 20))
    if not compiled and not checkpointing:
        calls = {method: by(method, partial(infer, run, x)) for method, run in runs.items()}
        result["inference"] = compared(calls, tiny(1, 20))
    yield {**setting, **result}


def step():
    for name in SHAPES:
        models = variants(base(name, 4), 16)
        for checkpointing in (False, True):
            yield from steps(name, 4, 16, tiny(8, 2048), checkpointing, models=models)


def compiled(name=LLAMA):
    torch._dynamo.config.recompile_limit = 64  # four models share the compiled function's cache
    frozen = base(name, 2)
    for checkpointing in tiny((False,), (False, True)):
        yield from steps(name, 2, 16, tiny(8, 2048), checkpointing, compiled=True, models=variants(frozen, 16))
        torch.compiler.reset()


def compiled_larger():
    yield from compiled(MISTRAL)


def profile():
    """Profile a step on the GPU: for each method, the kernels with the most time."""
    if DEVICE == "cpu":
        return
    for method, model in variants(base(LLAMA, 2), 16).items():
        x = torch.randn(1, 2048, model.config.hidden_size, dtype=torch.bfloat16, device=DEVICE)
        call = by(method, partial(train, model, x))
        call()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profiler:
            call()
            torch.cuda.synchronize()
        events = [event for event in profiler.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
        events.sort(key=lambda event: -event.self_device_time_total)
        yield {"method": method, "us": rounded(sum(event.self_device_time_total for event in events)),
               "launches": sum(event.count for event in events),
               "kernels": [[event.key[:90], event.count, rounded(event.self_device_time_total)]
                           for event in events[:25]]}  # fmt: skip


def decode(layers=8, context=512):
    """Measure one token with a cache, at batch size 1. ``merged`` is the adapter merged into the weights."""
    for name in SHAPES:
        frozen = base(name, layers)
        models = variants(frozen, 16)
        merged = get_peft_model(copy.deepcopy(frozen), curlora.CurloraConfig(r=16, target_modules=ALL))
        merged.merge_adapter()
        models["merged"] = merged.get_base_model()
        length, calls = tiny(4, context), {}
        shape = (1, length + 1, frozen.config.hidden_size)
        x = torch.randn(shape, dtype=torch.bfloat16, device=DEVICE)
        for method, model in models.items():
            cache = DynamicCache(config=model.config)
            with torch.no_grad():
                model.eval()(inputs_embeds=x[:, :-1], past_key_values=cache, use_cache=True)
            token = partial(one_token, model, x[:, -1:], cache)
            calls[method] = by(method if method in METHODS else "floor", token)
        setting = {"model": name, "layers": frozen.config.num_hidden_layers, "r": 16, "context": length}
        yield {**setting, "token": compared(calls, tiny(1, 50))}


@torch.no_grad()
def one_token(model, x, cache):
    model(inputs_embeds=x, past_key_values=cache, use_cache=True)
    cache.crop(-1)


def adapters(layers=4, count=64):
    """Measure a batch with a different adapter for each row, beside one adapter for all rows."""
    count = tiny(3, count)
    frozen = base(LLAMA, layers)
    configs = {
        "curlora": curlora.CurloraConfig(r=16, target_modules=ALL, init_weights=False),
        "lora": LoraConfig(r=16, target_modules=ALL, init_lora_weights=False),
    }
    models = {}
    for kind, config in configs.items():
        shared = {id(t): t for t in (*frozen.parameters(), *frozen.buffers())}
        models[kind] = get_peft_model(copy.deepcopy(frozen, shared), config, adapter_name="a0").eval()
        for i in range(1, count):
            models[kind].add_adapter(f"a{i}", config)
    names = [f"a{i}" for i in range(count)]
    for length in tiny((2,), (1, 32)):
        x = torch.randn(count, length, frozen.config.hidden_size, dtype=torch.bfloat16, device=DEVICE)
        calls = {"floor": by("floor", partial(infer, frozen, x))}
        for method in ("torch", "triton", "lora"):
            model = models[METHODS[method][0]]
            calls[f"{method}, one"] = by(method, partial(infer, model, x))
            calls[f"{method}, many"] = by(method, partial(infer_many, model, x, names))
        seconds = measure.in_turn(calls, tiny(1, 15), warmup=tiny(0, 2))
        yield {"model": LLAMA, "layers": frozen.config.num_hidden_layers, "adapters": count, "length": length,
               "seconds": rounded({name: statistics.median(times) for name, times in seconds.items()})}  # fmt: skip


@torch.no_grad()
def infer_many(model, x, names):
    model(inputs_embeds=x, use_cache=False, adapter_names=names)


def ranks():
    frozen = base(LLAMA, 4)
    for r in tiny((20,), (64, 256)):
        yield from steps(LLAMA, 4, r, tiny(8, 2048), models=variants(frozen, r))


def tokens():
    for name in SHAPES:
        models = variants(base(name, 4), 16)
        for count in tiny((4,), (8192, 512, 4096, 1024)):
            yield from steps(name, 4, 16, count, models=models)


def bandwidth():
    sizes = [(2048, 4096, 16), (8192, 4096, 16), (2048, 14336, 16), (512, 4096, 16), (2048, 1024, 16), (2048, 4096, 64),
             (2048, 4096, 256), (64, 4096, 16)]  # fmt: skip
    for size in tiny([(8, 40, 4)], sizes):
        for kernel in (forward, backward, mixed_batch):
            with timing.aside(DEVICE):
                yield kernel.row(*size, torch.bfloat16, DEVICE)


def attach():
    """Measure attaching, a calibration, and steps with and without a guard, on all layers of a model of 3 B."""
    model = base(LLAMA, 28, causal=True)
    measure.synchronize()
    began = time.perf_counter()
    model = get_peft_model(model, curlora.CurloraConfig(r=16, target_modules=ALL))
    measure.synchronize()
    attached = time.perf_counter() - began
    text = torch.randint(0, tiny(64, 128256), (tiny(34, 64), tiny(4, 128)), generator=torch.Generator().manual_seed(0))
    began = time.perf_counter()
    calibration = curlora.calibrate(model, text.unbind(), batch_size=8, progress=False)
    measure.synchronize()
    calibrated = time.perf_counter() - began
    yield {"model": LLAMA, "layers": model.config.num_hidden_layers, "parameters": model.num_parameters(),
           **rounded({"attach": attached, "calibrate": calibrated}), "text": list(text.shape)}  # fmt: skip
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizers = {"plain": torch.optim.AdamW(trained, lr=1e-4), "guarded": torch.optim.AdamW(trained, lr=1e-4)}
    ids = text[: tiny(1, 8)].to(DEVICE)
    model(input_ids=ids, labels=ids).loss.backward()
    guard = curlora.Guard(model, calibration, budget=0.01)
    seconds = {"backward": measure.in_turn({"a": lambda: backward_only(model, ids)}, tiny(1, 5), warmup=1)["a"]}
    for name, optimizer in optimizers.items():
        if name == "guarded":
            guard.attach(optimizer)
        seconds[name] = measure.in_turn({"a": optimizer.step}, tiny(2, 10))["a"]
    yield {"model": LLAMA, "layers": model.config.num_hidden_layers, "tokens": ids.numel(),
           "optimizer": rounded({name: statistics.median(times) for name, times in seconds.items()})}  # fmt: skip


def backward_only(model, ids):
    model(input_ids=ids, labels=ids).loss.backward()


def quantized():
    for kind, quantize in {"nf4": nf4, "hqq": hqq, "int8": int8}.items():
        try:
            frozen = quantize(base(LLAMA, 2))
        except ImportError as error:
            yield {"quantized": kind, "left_out": str(error)}
            continue
        models = {"floor": frozen}
        for method in ("torch", "triton", "lora"):
            config = curlora.CurloraConfig(r=16, target_modules=ALL)
            if method == "lora":
                config = LoraConfig(r=16, target_modules=ALL)
            models[method] = get_peft_model(copy.deepcopy(frozen), config).get_base_model()
        yield from ({"quantized": kind, **row} for row in steps(LLAMA, 2, 16, tiny(8, 2048), models=models))


def nf4(model):
    from bitsandbytes.nn import Linear4bit, Params4bit

    def replaced(layer):
        new = Linear4bit(
            layer.in_features, layer.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
        )
        new.weight = Params4bit(layer.weight.cpu(), requires_grad=False, quant_type="nf4")
        return new.to(DEVICE)

    return by_layer(model, replaced)


def hqq(model):
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=4, group_size=64 if not TINY else 16)
    return by_layer(model, lambda layer: HQQLinear(layer, config, compute_dtype=torch.bfloat16, device=DEVICE))


def int8(model):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())
    return model


def by_layer(model, replaced):
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, replaced(module))
    return model


STAGES = [machine, check, step, compiled, decode, adapters, ranks, tokens, bandwidth, profile, attach, quantized,
          compiled_larger]  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [stage.__name__ for stage in STAGES]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="STAGE", help=", ".join(names))
    parser.add_argument("--without", nargs="+", choices=names, default=[], metavar="STAGE")
    parser.add_argument("--seconds", type=float, default=390, help="time limit; no new measurement starts after it")
    parser.add_argument("--out", type=Path, default=HERE / "gpu.jsonl")
    parser.add_argument("--tables", type=Path, metavar="FILE", help="print tables of these results; measure nothing")
    parser.add_argument("--tiny", action="store_true", help="small shapes, on the CPU")
    options = parser.parse_args()
    if options.tables:
        return print(tables([json.loads(line) for line in options.tables.read_text().splitlines()]))
    if DEVICE == "cuda" and not torch.cuda.is_available():
        sys.exit("No GPU is available. Use --tiny to run small shapes on the CPU.")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    rows, began = [], time.perf_counter()

    def add(row):
        rows.append({**row, "at": round(time.perf_counter() - began, 1)})
        line = json.dumps(rows[-1])
        with options.out.open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)

    try:
        for stage in STAGES:
            if stage.__name__ in options.only and stage.__name__ not in options.without:
                measured(stage, add, began + options.seconds)
    finally:
        print(tables(rows), flush=True)


def measured(stage, add, end):
    """Add the rows of a stage until the time limit. A failed stage is recorded; a wrong kernel ends the program."""
    results = stage()
    try:
        while True:
            if time.perf_counter() > end:
                return add({"stage": stage.__name__, "left_out": "the time is over"})
            row = next(results, None)
            if row is None:
                return None
            add({"stage": stage.__name__, **row})
    except exact.WrongError as error:
        add({"stage": stage.__name__, "wrong": str(error)})
        sys.exit(f"A kernel is wrong, so nothing is measured. {error}")
    except Exception as error:
        traceback.print_exc()
        add({"stage": stage.__name__, "failed": f"{type(error).__name__}: {error}"[:500]})
    finally:
        results.close()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()


# Tables


def tables(rows):
    """Return Markdown tables of the rows."""
    parts = [of(rows) for of in (machine_line, step_table, decode_table, adapters_table, bandwidth_table, rest_lines)]
    return "\n\n".join(part for part in parts if part)


def of_stage(rows, *keys):
    return [row for row in rows if all(key in row for key in keys)]


def table(head, lines):
    if not lines:
        return ""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *lines))


def machine_line(rows):
    lines = []
    for row in of_stage(rows, "device"):
        line = f"{row['device']}; torch {row['torch']}, transformers {row['transformers']}, peft {row['peft']}"
        if "triton" in row:
            copy_rate, product_rate = row["copy_bytes_per_second"] / 1e12, row["bfloat16_flops_per_second"] / 1e12
            line += f", triton {row['triton']}; a copy moves {copy_rate:.2f} TB/s"
            line += f", a bfloat16 product {product_rate:.0f} TFLOP/s"
        lines.append(line)
    checks = of_stage(rows, "of_allowed")
    if checks:
        most = max(max(row["of_allowed"].values()) for row in checks)
        lines.append(
            f"Kernels held to float64 in {len(checks)} settings: at most {most:.2f} of the error that is allowed."
        )
    return "\n".join(lines)


def share(result, method):
    if method not in result["over"]:
        return ""
    return f"{100 * result['over'][method] / result['floor']:.1f} %"


def ratio(result, method):
    low, high = result.get("of_lora", {}).get(method, (None, None))
    return "" if low is None else f"{low:.2f} to {high:.2f}"


def memory(row, method):
    peak = row["peak"]
    if peak.get(method) is None or method == "floor":
        return ""
    return f"{(peak[method] - peak['floor']) / 2**20:.0f}"


def step_table(rows):
    lines = []
    for row in of_stage(rows, "step"):
        how = ", ".join(
            [row[k] for k in ("quantized",) if k in row] + [k for k in ("compiled", "checkpointing") if row[k]]
        ) or "eager"  # fmt: skip
        for kind in ("step", "inference"):
            if kind in row:
                result = row[kind]
                memories = [memory(row, m) if kind == "step" else "" for m in ("torch", "triton", "lora")]
                lines.append([row["model"], f"{row['r']}", f"{row['tokens']:,}", how, kind,
                              f"{1e3 * result['floor']:.2f}", *(share(result, m) for m in ("torch", "triton", "lora")),
                              *(ratio(result, m) for m in ("torch", "triton")), *memories])  # fmt: skip
    return table(
        ["shape", "rank", "tokens", "how", "", "frozen, ms", "PyTorch's operators", "kernels", "LoRA",
         "operators of LoRA's", "kernels of LoRA's", "MiB over the frozen: operators", "kernels", "LoRA"],
        lines)  # fmt: skip


def decode_table(rows):
    lines = []
    for row in of_stage(rows, "token"):
        result = row["token"]
        lines.append([row["model"], f"{row['context']}", f"{1e3 * result['floor']:.2f}",
                      *(share(result, m) for m in ("merged", "torch", "triton", "lora")),
                      *(ratio(result, m) for m in ("torch", "triton"))])  # fmt: skip
    return table(["one token", "context", "frozen, ms", "merged", "PyTorch's operators", "kernels", "LoRA",
                  "operators of LoRA's", "kernels of LoRA's"], lines)  # fmt: skip


def adapters_table(rows):
    lines = []
    for row in of_stage(rows, "adapters"):
        for method in ("torch", "triton", "lora"):
            one, many = (row["seconds"][f"{method}, {how}"] for how in ("one", "many"))
            frozen = row["seconds"]["floor"]
            lines.append([TITLES[method], f"{row['adapters']} x {row['length']}", f"{1e3 * frozen:.2f}",
                          f"{1e3 * one:.2f}", f"{1e3 * many:.2f}", f"{many / one:.2f}"])  # fmt: skip
    return table(["a batch", "rows x tokens", "frozen, ms", "one adapter, ms", "one for each row, ms", "ratio"], lines)


def bandwidth_table(rows):
    lines = []
    for row in of_stage(rows, "kernel"):
        us = row["us"]
        lines.append([row["kernel"], f"{row['tokens']:,}", f"{row['m']:,}", f"{row['r']}", f"{us['copy']:.1f}",
                      f"{us['triton']:.1f}", f"{us['torch']:.1f}", f"{100 * row['of_copy']:.0f} %",
                      f"{row['launch_us']['triton']:.0f}", f"{row['launch_us']['torch']:.0f}"])  # fmt: skip
    return table(["kernel", "tokens", "columns", "rank", "a copy, us", "kernel, us", "operators, us",
                  "of a copy's bandwidth", "to launch: kernel, us", "operators, us"], lines)  # fmt: skip


def rest_lines(rows):
    lines = []
    for row in of_stage(rows, "attach"):
        lines.append(f"{row['model']}, {row['layers']} layers: attached in {row['attach']:.2f} s, calibrated on "
                     f"{row['text'][0]} x {row['text'][1]} tokens in {row['calibrate']:.2f} s.")  # fmt: skip
    for row in of_stage(rows, "optimizer"):
        times = ", ".join(f"{name} {1e3 * seconds:.2f} ms" for name, seconds in row["optimizer"].items())
        lines.append(f"Forward and backward of {row['tokens']:,} tokens, and the optimizer's step alone: {times}.")
    for row in of_stage(rows, "launches"):
        lines.append(
            f"A step of {TITLES[row['method']]}: {row['launches']} launches, {row['us'] / 1e3:.2f} ms on the GPU."
        )
    for row in rows:
        for what in ("failed", "wrong", "left_out"):
            if what in row:
                lines.append(f"{row['stage']}, {what.replace('_', ' ')}: {row[what]}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
