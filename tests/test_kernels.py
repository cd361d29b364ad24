"""The kernels in Triton's interpreter and in its compiler, on a machine without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is for Linux")
ROOT = Path(__file__).parent.parent
SMALLEST = 99 * 1024  # bytes of shared memory that a program may have, on GPUs from Ampere on


def run(*command, **variables):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), **variables}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-5000:]
    return done.stdout


@pytest.mark.parametrize("parts", [["forward", "backward", "mixed_batch"], ["functional"]], ids="+".join)
def test_in_the_interpreter(parts):
    files = [f"tests/kernels/test_{part}.py" for part in parts]
    assert " passed" in run("-m", "pytest", "-q", "-p", "no:cacheprovider", *files, TRITON_INTERPRET="1")


def test_compiled_for_gpus_that_are_not_there():
    """Compiled to machine code: the interpreter accepts code that the compiler refuses, and shows no resources."""
    lines = run("-m", "tests.kernels.compiled", "80", "90", "--quick", TRITON_INTERPRET="0").splitlines()
    found = [json.loads(line) for line in lines if line.startswith("{")]
    names = {
        "forward._kernel",
        "backward._kernel",
        "backward._add_parts",
        "backward._add_tokens",
        "mixed_batch._kernel",
    }
    assert {(row["for"], row["kernel"]) for row in found} == {(gpu, name) for gpu in (80, 90) for name in names}
    for row in found:
        assert row["shared"] <= SMALLEST
        assert row["stack"] <= 16, "registers are spilled to memory"
        if row["kernel"].endswith("._kernel"):
            assert row["widest"] == 16, "Triton does not see how tiles are aligned, and accesses single entries"
