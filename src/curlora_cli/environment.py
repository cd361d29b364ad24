"""The versions and devices that an issue should state. None of the packages has to be installed."""

from __future__ import annotations

import os
import platform
from importlib import metadata

__all__ = ["environment"]

# First the packages that train, load and compute every adapter, then those that only some runs use.
_PACKAGES = (
    "curlora", "torch", "transformers", "peft", "accelerate", "numpy", "safetensors", "huggingface_hub", "trl",
    "datasets", "bitsandbytes", "torchao", "hqq", "triton", "ray", "deepspeed",
)  # fmt: skip


def environment() -> dict[str, str]:
    """Return versions, platform, devices and threads by name, in the order in which they are printed."""
    found = {name: _version(name) for name in _PACKAGES}
    found["Python"] = f"{platform.python_version()} ({platform.python_implementation()})"
    found["platform"] = platform.platform()
    found["processors"] = f"{os.cpu_count()} ({platform.machine()})"
    return found | _devices()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> dict[str, str]:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: one of its libraries is missing
        return {"devices": f"unknown: torch cannot be imported ({error})"}
    names = []
    if torch.cuda.is_available():
        built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
        for i in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(i)
            names.append(f"{device.name}, {device.total_memory / 2**30:.0f} GiB, {built_for}")
    if torch.backends.mps.is_available():
        names.append("MPS")
    threads = f"{torch.get_num_threads()} (OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'not set')})"
    return {"devices": "; ".join(names) or "CPU only", "threads": threads}
