"""The benchmarks run, and the pages say what they measured."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from curlora.continual import load_recipe

ROOT = Path(__file__).parent.parent
SPEED = ROOT / "benchmarks" / "speed"


GPU = ROOT / "benchmarks" / "gpu.py"


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_gpu_script_runs_small_shapes_on_the_cpu(tmp_path):
    out = tmp_path / "gpu.jsonl"
    # All but what is compiled or quantized, and more of the same.
    stages = ["machine", "check", "step", "decode", "adapters", "bandwidth", "attach"]
    command = [sys.executable, GPU, "--tiny", "--out", out, "--only", *stages]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = lines(out)
    assert not [row for row in rows if "failed" in row]
    assert {row["stage"] for row in rows} == set(stages)
    checks = [row for row in rows if row["stage"] == "check"]
    assert all(set(row["of_allowed"]) >= {"forward", "output", "scaled_U", "mixed_batch"} for row in checks)
    steps = [row for row in rows if row["stage"] == "step"]
    assert {(row["model"], row["checkpointing"]) for row in steps} == {
        (model, checkpointing) for model in ("Llama-3.2-3B", "Mistral-7B") for checkpointing in (True, False)
    }
    assert all(set(row["step"]["over"]) == {"torch", "triton", "lora"} for row in steps)
    tables = subprocess.run([sys.executable, GPU, "--tables", out], capture_output=True, text=True).stdout
    for text in (tables, done.stdout):
        assert "| Mistral-7B | 16 | 8 | checkpointing | step |" in text
        assert "| CURLoRA, kernels | 3 x 2 |" in text
        assert f"Kernels held to float64 in {len(checks)} settings" in text


def test_gpu_script_is_of_use_wherever_it_is_cut_off(tmp_path):
    out, said = tmp_path / "gpu.jsonl", []
    command = [sys.executable, GPU, "--tiny", "--out", out]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        for line in process.stdout:
            said.append(line)
            if '"stage": "step"' in line:
                process.send_signal(signal.SIGTERM)
    assert process.returncode == 1
    printed = [json.loads(line) for line in said if line.startswith("{")]
    assert lines(out)[: len(printed)] == printed  # which may have been cut off between the two
    assert any(line.startswith("| Llama-3.2-3B | 16 | 8 | eager | step |") for line in said)


WRONG = """
import os, runpy, sys
os.environ["TRITON_INTERPRET"] = "1"
from curlora.kernels import mixed_batch
launch = mixed_batch.launch
mixed_batch.launch = lambda *arguments: launch(*arguments) * 1.1
script, out = sys.argv[1:]
sys.argv = [script, "--tiny", "--out", out]
runpy.run_path(script, run_name="__main__")
"""


def test_gpu_script_stops_at_a_kernel_that_is_wrong(tmp_path):
    out = tmp_path / "gpu.jsonl"
    done = subprocess.run([sys.executable, "-c", WRONG, GPU, out], capture_output=True, text=True)
    assert done.returncode == 1
    assert "A kernel is wrong, so nothing is measured. mixed_batch: " in done.stderr
    assert {row["stage"] for row in lines(out)} == {"machine", "check"}


def test_an_overhead_is_of_the_same_round(monkeypatch):
    monkeypatch.syspath_prepend(SPEED)
    import measure

    # A machine that gets slower with every round hides nothing.
    seconds = {"floor": [1.0, 2.0, 4.0], "curlora": [1.1, 2.1, 4.1], "lora": [1.4, 2.4, 4.4]}
    over = measure.over_floor(seconds)
    assert over == pytest.approx({"floor": 0, "curlora": 0.1, "lora": 0.4})
    assert measure.interval(seconds, "curlora", "lora") == pytest.approx((0.25, 0.25))


def test_everything_is_called_once_a_round_and_in_changing_order(monkeypatch):
    monkeypatch.syspath_prepend(SPEED)
    import measure

    calls = []
    seconds = measure.in_turn({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=6, warmup=2)
    rounds = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    assert len(rounds) == 8
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(map(tuple, rounds))) > 1
    assert {name: len(times) for name, times in seconds.items()} == {"a": 6, "b": 6, "c": 6}


def test_tables_of_the_pages_are_of_the_raw_results(tmp_path):
    """Only a page with another figure is named."""
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "README.md", tmp_path)
    page = tmp_path / "docs" / "guard.md"
    text = page.read_text(encoding="utf-8")
    assert "**0.381**" in text
    page.write_text(text.replace("**0.381**", "**0.281**"))
    command = [sys.executable, tmp_path / "benchmarks" / "pages.py", "--check"]
    checked = subprocess.run(command, capture_output=True, text=True)
    assert checked.returncode == 1
    assert "guard.md has outdated tables: run make pages." in checked.stderr
    assert checked.stderr.count("outdated tables") == 1


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").rglob("recipe.yaml")), ids=lambda path: path.parent.name)
def test_studies_are_recipes(path, monkeypatch):
    monkeypatch.setenv("CURLORA_DATA_DIR", "data")
    recipe = load_recipe(path)
    assert recipe.guard is not None or path.parent.name == "engine"  # which measures time
    assert any(method.grid for method in recipe.methods)
    assert str(path.relative_to(ROOT)) in path.read_text(encoding="utf-8")  # how it is run
    assert str(path.relative_to(ROOT / "benchmarks")) in (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")


def test_two_processes_train_to_what_one_does():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    script = ROOT / "benchmarks" / "distributed.py"
    done = subprocess.run([*command, script, "--cpu", "fsdp2"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    row = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert row["processes"] == 2
    assert row["largest_difference"] < 1e-12 < 0.01 < row["moved"]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "benchmarks" / "distributed").glob("*.yaml")), ids=lambda path: path.stem
)
def test_accelerate_reads_the_configurations(path):
    config = load_config_from_file(str(path))
    assert config.num_processes == 2
    assert config.mixed_precision == "no"
