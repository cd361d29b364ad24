"""The tables of the engine's costs, from ``overhead.jsonl`` and ``settings.jsonl``."""

from pathlib import Path

from tables import lines, table

HERE = Path(__file__).parent
CACHES = ["without the cache", "with it", "with it and `fixed_batches`"]
PRODUCTS = ["float32, one thread", "float32, two threads", "bfloat16, one thread", "bfloat16, two threads"]


def tables():
    runs = {row["variant"]: row for row in lines(HERE / "settings.jsonl")}
    return {"engine_overhead": overhead(), "frozen_layers": frozen_layers(runs), "products": products(runs)}


def overhead():
    """Times of the engine relative to a bare loop, and the share of padding in its batches."""
    rows = [
        [f"{row['examples']}", f"{row['training']['ratio']:.2f}", f"{row['scoring']['ratio']:.2f}",
         *(f"{row['padding'][order]:.1%}" for order in ("grouped", "as given"))]
        for row in lines(HERE / "overhead.jsonl")
    ]  # fmt: skip
    return table(["texts", "training", "scoring", "padding, grouped by length", "in the order of the file"], rows)


def frozen_layers(runs):
    """Seconds of training of each rate and seed, in the order in which they ran, and the size of the cache."""
    known = [runs[name] for name in CACHES if name in runs]
    header = ["", *(f"{name_of(one)}, seed {one['seed']}" for one in known[0]["seconds"])] if known else [""]
    rows = [
        [run["variant"], *(f"{one['training']:.0f}" for one in run["seconds"]),
         f"{run['cache_bytes'] / 2**20:.0f} MiB" if run["cache_bytes"] else ""]
        for run in known
    ]  # fmt: skip
    return table([*header, "the cache"], rows)


def name_of(one):
    return "rate " + one["method"].rpartition("=")[2]


def products(runs):
    """Seconds of training, and of the whole run with its scoring."""
    rows = [
        [name, *(f"{runs[name]['seconds'][0][part]:.0f}" for part in ("training", "whole"))]
        for name in PRODUCTS
        if name in runs
    ]
    return table(["products of float32, threads", "training", "with scoring"], rows)
