"""Time a kernel, PyTorch's operators and a copy of the same bytes, on a GPU or in Triton's interpreter."""

import contextlib
import functools
import itertools
import json
import statistics
import time

import torch

HELD = 256 << 20  # bytes of all inputs, through which the calls cycle: more than any cache holds


@functools.cache
def stream():
    """Return the one stream for all calls: a CUDA graph must be captured on the stream that autograd recorded."""
    return torch.cuda.Stream()


def aside(device):
    return torch.cuda.stream(stream()) if device == "cuda" else contextlib.nullcontext()


def problem(tokens, m, r, dtype, device, rows=None):
    """Return the inputs of one call as a layer has them: ``U`` in float32, the others in the layer's dtype."""
    U = torch.randn(*(() if rows is None else (rows,)), r, r, device=device) / r**0.5
    return {
        "output": torch.randn(tokens, m, dtype=dtype, device=device),
        "scaled_U": U,
        "factor": torch.randn(m, r, dtype=dtype, device=device) / r**0.5,
        "index": torch.randint(0, m, (r,), device=device),
        "offset": torch.randn(r, dtype=dtype, device=device),
    }


def problems(tokens, m, r, dtype, device, rows=None):
    """Return so many inputs that no call finds its inputs in the cache."""
    one = tokens * m * dtype.itemsize
    count = max(2, min(64, HELD // max(one, 1) + 1)) if device == "cuda" else 2
    return [problem(tokens, m, r, dtype, device, rows) for _ in range(count)]


def microseconds(call, inputs, device, rounds=7):
    """Return the median time of one call. On a GPU a CUDA graph of many calls is replayed, to exclude the launches."""
    if device != "cuda":
        times = []
        for one in inputs:
            began = time.perf_counter()
            call(one)
            times.append(time.perf_counter() - began)
        return 1e6 * statistics.median(times)
    for one in inputs[:2]:
        call(one)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    calls = max(20, len(inputs))
    with torch.cuda.graph(graph, stream=stream()):
        for one in itertools.islice(itertools.cycle(inputs), calls):
            call(one)
    graph.replay()
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / calls)
    return statistics.median(times)


def to_launch(call, inputs, device, calls=50):
    """Return the CPU time of launching one call, in microseconds, without waiting for the GPU."""
    for one in inputs[:2]:
        call(one)
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    for one in itertools.islice(itertools.cycle(inputs), calls):
        call(one)
    seconds = time.perf_counter() - began
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e6 * seconds / calls


def compared(calls, inputs, device):
    """Return the microseconds of each call and of a copy, and the kernel's share of the copy's bandwidth.

    Like a copy, a kernel reads the layer's output (or its gradient) once and writes as many bytes.
    """
    target = torch.empty_like(inputs[0]["output"])
    times = {name: microseconds(call, inputs, device) for name, call in calls.items()}
    times["copy"] = microseconds(lambda one: target.copy_(one["output"]), inputs, device)
    return {
        "us": {name: round(time, 2) for name, time in times.items()},
        "of_copy": round(times["copy"] / times["triton"], 3),
        "launch_us": {name: round(to_launch(call, inputs[:2], device, 50 if device == "cuda" else 2), 1)
                      for name, call in calls.items()},
    }  # fmt: skip


def main(row, description):
    """Run from the command line, and print a line of JSON for each size."""
    import argparse

    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 512, 2048, 8192])
    parser.add_argument("--widths", type=int, nargs="+", default=[1024, 4096, 14336])
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for tokens, m, r in itertools.product(options.tokens, options.widths, options.ranks):
        with aside(device):
            print(json.dumps(row(tokens, m, r, getattr(torch, options.dtype), device)), flush=True)
