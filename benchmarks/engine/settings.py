"""Measure what the cache of frozen layers saves, and what CPU threads and products in bfloat16 change.

Runs ``recipe.yaml`` with several settings. Each run adds a line to ``settings.jsonl``: for each rate and seed the
seconds of training and of the whole run, and the size of the cache. Finished runs are not repeated.

    python benchmarks/engine/settings.py --model DIR
"""

import argparse
import json
import platform
import tempfile
from pathlib import Path

from curlora.continual import load_recipe, run_recipe
from curlora.continual.frozen_layers import FOLDER

HERE = Path(__file__).parent
RESULTS = HERE / "settings.jsonl"
CACHE = "training.cache_frozen_layers=true"
ONE = ["seeds=[0]", "methods.0.learning_rate=5.0e-4"]
VARIANTS = {
    "without the cache": [],
    "with it": [CACHE],
    "with it and `fixed_batches`": [CACHE, "training.fixed_batches=true"],
    "float32, one thread": ONE,
    "float32, two threads": [*ONE, "resources.cpus=2"],
    "bfloat16, one thread": [*ONE, "training.fp32_products=bfloat16"],
    "bfloat16, two threads": [*ONE, "training.fp32_products=bfloat16", "resources.cpus=2"],
}


def processor():
    """Return the processor's name, and whether it has AMX."""
    known = Path("/proc/cpuinfo")
    text = known.read_text() if known.exists() else ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return next(iter(names), platform.processor()) + (" with AMX" if "amx_bf16" in text else "")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder, or a hub id")
    model = parser.parse_args().model
    done = [json.loads(line)["variant"] for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    for name, changes in VARIANTS.items():
        if name in done:
            continue
        with tempfile.TemporaryDirectory() as folder:
            results = run_recipe(load_recipe(HERE / "recipe.yaml", [f"model.name={model}", *changes]), folder)
            cache = sum(path.stat().st_size for path in (Path(folder) / FOLDER).rglob("*.safetensors"))
        seconds = [
            {"method": method.name, "seed": seed.seed, "training": seed.train_seconds, "whole": seed.seconds}
            for method in results.methods
            if method.method != "frozen"
            for seed in method.seeds
        ]
        line = {"variant": name, "seconds": seconds, "cache_bytes": cache, "processor": processor(),
                "environment": results.environment}  # fmt: skip
        with RESULTS.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(name, seconds)


if __name__ == "__main__":
    main()
