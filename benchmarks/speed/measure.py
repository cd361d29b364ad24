"""Time several functions alternately in one process, so that a slower machine slows all of them equally."""

import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch


def in_turn(functions: dict[str, Callable[[], object]], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Return the seconds of each function in each round. The order is random and differs between rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    order = list(functions)
    for number in range(-warmup, rounds):
        random.Random(number).shuffle(order)
        for name in order:
            synchronize()
            began = time.perf_counter()
            functions[name]()
            synchronize()
            if number >= 0:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def over_floor(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Return each method's overhead in seconds: the median over rounds of its time less the floor's in that round."""
    return {
        name: statistics.median(a - b for a, b in zip(times, seconds["floor"], strict=True))
        for name, times in seconds.items()
    }


def beside_floor(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, object]:
    """Return the floor's seconds and the other functions' overhead over it.

    The functions include ``curlora`` and ``lora``. ``of_lora`` is the :func:`interval` of CURLoRA's overhead divided by
    LoRA's.
    """
    seconds = in_turn(functions, rounds)
    return {
        "floor": round(statistics.median(seconds["floor"]), 6),
        "over": {name: round(over, 6) for name, over in over_floor(seconds).items() if name != "floor"},
        "of_lora": [round(end, 3) for end in interval(seconds, "curlora", "lora")],
    }


def interval(seconds: dict[str, list[float]], method: str, rival: str, draws: int = 1000) -> tuple[float, float]:
    """Return the 90 % bootstrap interval, over rounds, of the ratio of two overheads."""
    rng = random.Random(0)
    rounds = len(seconds["floor"])
    ratios = []
    for _ in range(draws):
        chosen = rng.choices(range(rounds), k=rounds)
        over = over_floor({name: [seconds[name][i] for i in chosen] for name in ("floor", method, rival)})
        ratios.append(over[method] / over[rival])
    ratios.sort()
    return ratios[draws // 20], ratios[-draws // 20]


def machine() -> dict[str, object]:
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else processor(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "peft")},
    }


def processor() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def add(path: Path, row: dict[str, object]) -> None:
    line = json.dumps({**row, **machine()})
    print(line, flush=True)
    with path.open("a") as file:
        file.write(line + "\n")
