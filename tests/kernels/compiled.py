"""Compile the kernels with Triton for a GPU that the machine need not have. Run it without Triton's interpreter:

    python -m tests.kernels.compiled 90

It prints a line of JSON for each kernel and setting: bytes of shared memory, registers, and bytes of the stack, which
holds spilled registers. The launches are the real ones, but the compiled kernels are not run.
"""

import argparse
import contextlib
import json
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from curlora.kernels import backward, forward, mixed_batch, tiles

ALL = [
    (dtype, r, tokens)
    for dtype, ranks in (
        (torch.bfloat16, (5, 8, 16, 32, 64, 128, 256)), (torch.float16, (16,)), (torch.float32, (16, 64, 256))
    )
    for r in ranks
    for tokens in (1, 2048, 20000)
]  # fmt: skip
QUICK = [(torch.bfloat16, 16, 2048), (torch.bfloat16, 128, 2048)]


class Driver:
    """The parts of a Triton driver that compiling needs."""

    def __init__(self, capability):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch  # the key under which Triton caches compiled kernels

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


def compiled():
    """Make launches compile only, and return the list to which they then add ``(function, kernel)``."""
    made = []
    run = JITFunction.run

    def only_compile(self, *args, grid, warmup, **kwargs):
        made.append((self, run(self, *args, grid=grid, warmup=True, **kwargs)))
        return made[-1][1]

    JITFunction.run = only_compile
    return made


def resources(kernel):
    """Return the registers of a thread, the bytes of its stack, and the bytes of its widest memory access."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", said).groups()
    widths = re.findall(r"(?:ld|st)\.global\.v(\d)\.b(\d+)", kernel.asm["ptx"])
    widths += [(1, 128)] * kernel.asm["ptx"].count("cp.async.cg")
    widest = max((int(count) * int(bits) // 8 for count, bits in widths), default=0)
    return {"registers": int(registers), "stack": int(stack), "widest": widest}


def main(capability, settings, m=4096):
    """Compile for a GPU of the given compute capability, and print the resources of each kernel."""
    triton.runtime.driver.set_active(Driver(capability))
    tiles.on = forward.on = backward.on = mixed_batch.on = lambda device: contextlib.nullcontext()
    for module in (forward, backward):
        module.multiprocessors = lambda device: 132
    for dtype, r, tokens in settings:

        def like(*shape, dtype=dtype):
            return torch.empty(shape, dtype=dtype)

        U, factor, index = like(r, r, dtype=torch.float32), like(m, r), torch.zeros(r, dtype=torch.int64)
        output = like(tokens, m)
        for offset in (None, like(r)):
            forward.launch(output, U, factor, index, offset, True)
            mixed_batch.launch(output.unsqueeze(1), U.expand(tokens, r, r), factor, index, offset)
        backward.launch(output, like(tokens, r, dtype=torch.float32), U, factor, index, True)
        for function, kernel in kept:
            found = {"shared": kernel.metadata.shared, **resources(kernel)}
            name = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
            print(
                json.dumps(
                    {"for": capability, "kernel": name, "dtype": str(dtype)[6:], "r": r, "tokens": tokens, **found}
                ),
                flush=True,
            )
        kept.clear()


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("capabilities", type=int, nargs="+", help="80, 86, 89, 90, 100, ...")
    arguments.add_argument("--quick", action="store_true")
    given = arguments.parse_args()
    kept = compiled()
    for capability in given.capabilities:
        main(capability, QUICK if given.quick else ALL)
