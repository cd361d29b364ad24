"""The library on an accelerator, on a machine without one: a device that only pretends to be one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Besides the checks for this device: whole runs, which use the device as the machine's accelerator.
RUNS = [
    "tests/continual/test_recipe.py::test_a_run_and_going_on_with_one_more_method",
    "tests/continual/plugins/test_guard_plugin.py::test_the_budget_holds_on_the_guard_text_after_every_task",
    "tests/continual/plugins/test_guard_plugin.py::test_an_adapter_for_each_task_has_a_calibration_and_an_equal_share",
    "tests/continual/plugins/test_guard_plugin.py::test_the_penalty_is_toward_the_base_where_its_weights_were_changed",
    "tests/continual/plugins/test_guard_plugin.py::test_the_penalty_goes_by_the_rows_that_the_base_wrote_one_by_one",
]


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "c++")), reason="the device needs a C++ compiler")
def test_on_an_accelerator():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.accelerator.device", "-p", "no:cacheprovider"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    environment["ACCELERATE_TORCH_DEVICE"] = "pretended"
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"  # ninja is there
    done = subprocess.run(
        [*command, "tests/accelerator/checks.py", *RUNS],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
