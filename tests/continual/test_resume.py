"""A run that is interrupted at any point resumes and gives bit-identical results."""

import glob
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from curlora import storage
from curlora.continual.errors import RunError
from curlora.continual.launch import run_recipe
from curlora.continual.recipe_file import load_recipe
from curlora.continual.results import ResultsError, RunResults
from curlora.report import render
from tests.continual.streams import Cut, figures

# Dropout and a plug-in with random draws: every random generator must continue where it stopped.
CHANGES = {
    "methods": [
        {"name": "frozen", "method": "frozen"},
        {
            "name": "lora",
            "method": "lora",
            "learning_rate": 0.01,
            "options": {"r": 4, "target_modules": ["q_proj"], "lora_dropout": 0.2},
            "plugins": [{"name": "replay", "examples": 6}, {"name": "ewc", "strength": 1.0, "examples": 5}],
        },
        {
            "name": "cur",
            "method": "curlora",
            "learning_rate": 0.3,
            "options": {"r": 4},
            "plugins": [{"name": "anchors", "examples": 5}],
        },
        {
            "name": "each",
            "method": "lora",
            "learning_rate": 0.01,
            "options": {"r": 2, "target_modules": ["q_proj"], "lora_dropout": 0.2},
            "adapter_per_task": True,
            "plugins": [{"name": "kl_to_base", "strength": 1.0, "tokens": 16}],
        },
    ],
    "guard": {"name": "more words", "path": "more.txt", "tokens": 50, "window": 16},
    "training": {
        "epochs": 2,
        "batch_size": 4,
        "head_learning_rate": 0.05,
        "logging_steps": 1,
        "checkpoint_steps": 3,
        "forward_transfer": True,
        "max_grad_norm": 0.01,
    },
}


@pytest.fixture
def recipe(recipe_path):
    content = {**yaml.safe_load(recipe_path.read_text()), **CHANGES}
    recipe_path.write_text(yaml.safe_dump(content))
    return load_recipe(recipe_path)


def weights(directory):
    """Return all trained weights, by file."""
    return {
        str(path.relative_to(directory)): {name: value.numpy().tobytes() for name, value in load_file(path).items()}
        for path in sorted(directory.glob("*/seed-*/**/*.safetensors"))
    }


def test_cut_off_at_one_write_after_another(recipe, tmp_path, monkeypatch):
    whole = run_recipe(recipe, tmp_path / "whole")
    calls = {"count": 0, "at": None}

    def wrap(function):
        def cut(*arguments, **options):
            if calls["count"] == calls["at"]:
                raise Cut
            calls["count"] += 1
            return function(*arguments, **options)

        return cut

    # Files, folders and marks are written to the disk with these functions.
    monkeypatch.setattr(storage.os, "replace", wrap(os.replace))
    monkeypatch.setattr(storage, "mark_complete", wrap(storage.mark_complete))
    monkeypatch.setattr(storage.shutil, "rmtree", wrap(shutil.rmtree))
    out = tmp_path / "cut"
    cuts, steps = 0, 0
    for step in [1, 2, 3, 4, 5, 7, 3, 8, 2, 6, 9, 1, 10, 4, 12, 5, 11] + [13] * 30:
        calls.update(count=0, at=step)
        try:
            results = run_recipe(recipe, out)
            break
        except Cut:
            cuts += 1
            steps += step
    assert cuts > 8
    assert figures(results) == figures(whole)
    assert weights(out) == weights(tmp_path / "whole")
    left = {path.name for path in out.glob("*/seed-0/*")}
    assert left == {"result.json", "heads.safetensors", "adapter"}


def files_in(folder):
    """List a folder that another process may be changing: pathlib fails if a folder is removed meanwhile."""
    return set(glob.glob("**/*", root_dir=folder, recursive=True))


KILLS = os.environ.get("CURLORA_KILLS", "")
long = pytest.mark.skipif(not KILLS, reason="takes several minutes: set CURLORA_KILLS=20 to kill a study twenty times")


@pytest.mark.parametrize("workers", [None, pytest.param(2, marks=long)])
def test_killed_at_random_moments(workers, recipe, recipe_path, tmp_path):
    options = []
    if workers:
        pytest.importorskip("ray", reason="needs Ray")
        content = yaml.safe_load(recipe_path.read_text())
        content["methods"][2]["learning_rate"] = {"grid": [0.2, 0.3]}
        content["resources"] = {"cpus": 1}
        recipe_path.write_text(yaml.safe_dump(content))
        recipe = load_recipe(recipe_path)
        options = ["--workers", str(workers)]
    whole = run_recipe(recipe, tmp_path / "whole")
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "curlora_cli", "run", str(recipe_path), "--out", str(out), *options]
    environment = {**os.environ, "COLUMNS": "100"}
    chance = random.Random(20)
    kills = 0
    for _ in range(int(KILLS or 4)):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
        deadline = time.monotonic() + 900
        before = {"recipe.json", *files_in(out)}
        while process.poll() is None and files_in(out) <= before:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        try:  # it has begun to write, so it may be killed at any moment
            process.wait(chance.uniform(0, 2.0))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
    assert kills >= 2
    after = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert after.returncode == 0, after.stderr
    assert figures(RunResults.load(out / "results.json")) == figures(whole)
    assert weights(out) == weights(tmp_path / "whole")
    assert (out / "report.html").exists()
    assert "cur" in after.stdout


@pytest.mark.parametrize("options", [[], ["--workers", "2"]], ids=["one process", "workers"])
def test_ctrl_c_says_how_to_go_on(options, recipe_path, tmp_path):
    if options:
        pytest.importorskip("ray", reason="needs Ray")
    out = tmp_path / "run"
    command = [sys.executable, "-m", "curlora_cli", "run", str(recipe_path), "--out", str(out), *options]
    process = subprocess.Popen(
        [*command, "--set", "training.epochs=2000", "--set", "training.checkpoint_steps=5"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # As from a terminal. Where tests run in the background of a shell, it has been told to ignore the signal.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 900
    while not glob.glob("frozen/*/checkpoints/*/checkpoint-*", root_dir=out):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=900)
    assert process.returncode == 130
    assert "Interrupted. Run the same command again to resume from the last checkpoint" in " ".join(stderr.split())
    assert "Traceback" not in stderr
    assert glob.glob("frozen/*/checkpoints/*/checkpoint-*", root_dir=out)


def test_at_most_a_checkpoint_interval_is_lost(recipe, tmp_path, monkeypatch):
    """Interrupted after 8 steps with a checkpoint every 3, the run resumes at step 6."""
    from curlora.continual.trainer import TaskTrainer

    steps = []
    original = TaskTrainer.training_step

    def counted(self, *arguments, **options):
        steps.append(self.state.global_step)
        if len(steps) == 9:
            raise Cut
        return original(self, *arguments, **options)

    monkeypatch.setattr(TaskTrainer, "training_step", counted)
    with pytest.raises(Cut):
        run_recipe(recipe, tmp_path / "run")
    monkeypatch.setattr(
        TaskTrainer, "training_step", lambda self, *a, **o: steps.append(self.state.global_step) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        run_recipe(recipe, tmp_path / "run")
    assert steps == [*range(9), 6]


def test_what_is_finished_can_be_looked_at_while_the_rest_runs(recipe, tmp_path, monkeypatch):
    def cut(self, part):
        raise Cut

    out = tmp_path / "run"
    with pytest.raises(ResultsError, match="run holds no results: there is no such folder"):
        RunResults.load(out / "results.json")
    with monkeypatch.context() as patch:
        patch.setattr("curlora.continual.method_run.MethodRun._score", cut)
        with pytest.raises(Cut):
            run_recipe(recipe, out)
    with pytest.raises(ResultsError, match="run holds no results: no method of its run has finished yet"):
        RunResults.load(out / "results.json")
    with monkeypatch.context() as patch:
        patch.setattr(
            "curlora.continual.trainer.TaskTrainer.train_or_go_on",
            lambda self: 1 / 0 if list(self.model.backbone_parameters()) else None,
        )
        with pytest.raises(ZeroDivisionError):
            run_recipe(recipe, out)
    so_far = RunResults.load(out / "results.json")
    assert [method.name for method in so_far.methods] == ["frozen"]
    assert so_far.missing == ["lora, seed 0", "cur, seed 0", "each, seed 0"]
    assert "3 of 4 runs were not finished yet" in render([so_far])


def test_a_damaged_state_is_named_and_nothing_is_lost(recipe, tmp_path, monkeypatch):
    def cut(*_):
        raise Cut

    with monkeypatch.context() as patch:
        patch.setattr("curlora.continual.method_run.MethodRun._score", cut)
        with pytest.raises(Cut):
            run_recipe(recipe, tmp_path / "run")
    (state,) = (tmp_path / "run").glob("frozen/seed-0/weights-1/state.safetensors")
    whole = state.read_bytes()
    state.write_bytes(whole[:20])
    with pytest.raises(RunError, match=r"frozen/seed-0 holds an interrupted run.*Remove that folder"):
        run_recipe(recipe, tmp_path / "run")
    state.write_bytes(whole)
    run_recipe(recipe, tmp_path / "run")


@pytest.fixture
def small_disk(tmp_path):
    """A disk of one megabyte."""
    mount = tmp_path / "disk"
    mount.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)], capture_output=True)
    if done.returncode:
        pytest.skip("a small file system cannot be mounted here (it takes root)")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


@pytest.mark.parametrize("left", [0, 90_000])
def test_a_full_disk_is_one_message_and_nothing_is_lost(recipe, small_disk, tmp_path, left):
    whole = run_recipe(recipe, tmp_path / "whole")
    out = small_disk / "run"
    run_recipe(recipe.model_copy(update={"methods": recipe.methods[:1]}), out)
    kept = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    ballast = small_disk / "ballast"
    free = shutil.disk_usage(small_disk).free
    ballast.write_bytes(b"0" * max(0, free - left))
    with pytest.raises(RunError, match="is full. Finished work is not lost"):
        run_recipe(recipe, out)
    changed = {path for path, content in kept.items() if path.read_bytes() != content}
    assert changed <= {out / "recipe.json", out / "results.json"}  # only results.json grows
    ballast.unlink()
    assert figures(run_recipe(recipe, out)) == figures(whole)


def test_an_unreadable_folder_is_one_message(recipe, recipe_path):
    command = [sys.executable, "-m", "curlora_cli", "run", str(recipe_path), "--out", "/proc/nowhere/run"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "cannot be used as a run directory" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_newest_complete_folder(tmp_path):
    for name in ("checkpoint-5", "checkpoint-10", "checkpoint-40", "checkpoint-x"):
        (tmp_path / name).mkdir()
    assert storage.newest(tmp_path, "checkpoint-") is None
    storage.mark_complete(tmp_path / "checkpoint-5")
    storage.mark_complete(tmp_path / "checkpoint-10")
    assert storage.newest(tmp_path, "checkpoint-") == tmp_path / "checkpoint-10"
    assert storage.newest(Path(tmp_path / "none"), "checkpoint-") is None
