"""A pytest plugin that registers the device "pretended" of device.cpp, for the whole process.

With the environment variable ``ACCELERATE_TORCH_DEVICE`` Accelerate uses it as the machine's accelerator.
"""

import contextlib
import sys
import tempfile
import types
from pathlib import Path

import torch
from torch.utils.cpp_extension import load

# The build has its own folder: in torch's folder, an interrupted build would leave a lock that blocks all later builds.
with tempfile.TemporaryDirectory() as folder:
    source = str(Path(__file__).with_name("device.cpp"))
    _C = load("pretended_device", [source], extra_cflags=["-O0"], build_directory=folder)


def _register():
    _C.register()
    torch.utils.rename_privateuse1_backend("pretended")
    module = types.ModuleType("torch.pretended")
    vars(module).update(
        is_available=lambda: True,
        is_initialized=lambda: True,
        device_count=lambda: 1,
        current_device=lambda: 0,
        set_device=lambda device: None,
        device=lambda device: contextlib.nullcontext(),
        synchronize=lambda device=None: None,
        empty_cache=lambda: None,
        manual_seed=lambda seed: None,
        manual_seed_all=lambda seed: None,
        get_rng_state=lambda device=None: torch.get_rng_state(),
        set_rng_state=lambda state, device=None: None,
        _is_in_bad_fork=lambda: False,
        get_amp_supported_dtype=lambda: [torch.bfloat16, torch.float16],
    )
    torch._register_device_module("pretended", module)
    sys.modules[module.__name__] = module
    torch.utils.generate_methods_for_privateuse1_backend()


_register()


@contextlib.contextmanager
def counted():
    """A context that counts the operators that the device runs, and how often it is waited for."""
    counts = types.SimpleNamespace(operators=-_C.operators(), waits=-_C.waits())
    yield counts
    counts.operators += _C.operators()
    counts.waits += _C.waits()
