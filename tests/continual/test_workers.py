"""A run on several workers gives the same results as in one process, even if workers die."""

import contextlib
import glob
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from curlora.continual import load_recipe, run_recipe
from curlora.continual.errors import RecipeError, RunError
from curlora.continual.workers import _Combined
from tests.continual.streams import figures

pytest.importorskip("ray", reason="needs Ray")
from ray.cluster_utils import Cluster

STUDY = [
    "training.logging_steps=1", "training.checkpoint_steps=1", "resources={cpus: 1}",
    "methods.1.learning_rate={grid: [0.01, 0.02]}",
]  # fmt: skip


class Heard:
    """A progress that sums the reported work."""

    def __init__(self):
        self.units = self.total = 0.0

    def __call__(self, total):
        self.total = total
        return self

    def stage(self, text): ...

    def advance(self, units):
        self.units += units


ALONE = []


def of_one_process(recipe_path, folder):
    """Return the figures of the study in one process; it runs once for all tests here."""
    if not ALONE:
        ALONE.append(figures(run_recipe(load_recipe(recipe_path, STUDY), folder)))
    return ALONE[0]


def workers():
    """Return the processes that run a job."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.read_bytes().startswith(b"ray::_work"):
                found.append(int(path.parent.name))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_workers_of_which_some_are_killed_give_what_one_process_gives(recipe_path, tmp_path, monkeypatch):
    # Without an address this machine is used, whatever cluster there is.
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    killed, over, heard = [], threading.Event(), Heard()

    def kill():
        while not over.wait(0.02) and len(killed) < 2:
            # pathlib's glob fails if a folder is removed meanwhile.
            if glob.glob("*/seed-0*/checkpoints/*/checkpoint-*/complete", root_dir=tmp_path / "shared"):
                for process in workers()[:1]:
                    with contextlib.suppress(ProcessLookupError):  # it has already exited
                        os.kill(process, signal.SIGKILL)
                        killed.append(process)
                time.sleep(1)

    watcher = threading.Thread(target=kill)
    watcher.start()
    try:
        shared = run_recipe(load_recipe(recipe_path, STUDY), tmp_path / "shared", heard, workers=2)
    finally:
        over.set()
        watcher.join()
    assert killed
    assert figures(shared) == of_one_process(recipe_path, tmp_path / "alone")
    assert shared.environment["threads"] == "1"
    assert heard.units == pytest.approx(heard.total)
    assert not list((tmp_path / "shared").rglob("checkpoints"))


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_cluster_of_which_one_machine_is_lost(recipe_path, tmp_path):
    """Two machines with a GPU each run a job each. The jobs of the lost one resume on the other."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    machines = [cluster.add_node(num_cpus=1, num_gpus=1) for _ in range(2)]
    over, most = threading.Event(), [0]

    def lose():
        while not over.wait(0.02):
            most[0] = max(most[0], len(workers()))
            begun = glob.glob("*/seed-0*/checkpoints/*/checkpoint-*/complete", root_dir=tmp_path / "shared")
            if begun and most[0] == 2 and len(machines) == 2:
                cluster.remove_node(machines.pop(), allow_graceful=False)

    watcher = threading.Thread(target=lose)
    watcher.start()
    try:
        shared = run_recipe(load_recipe(recipe_path, STUDY), tmp_path / "shared", address=cluster.address)
    finally:
        over.set()
        watcher.join()
        cluster.shutdown()
    assert len(machines) == 1
    assert figures(shared) == of_one_process(recipe_path, tmp_path / "alone")


def test_what_is_wrong_is_said_as_by_one_process(recipe_path, tmp_path):
    content = yaml.safe_load(recipe_path.read_text())
    content["methods"][2]["options"] = {"r": 4, "target_modules": ["missing"]}
    recipe_path.write_text(yaml.safe_dump(content))
    with pytest.raises((RunError, RecipeError), match="missing"):
        run_recipe(load_recipe(recipe_path, ["training.epochs=1"]), tmp_path / "run", workers=1)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        (
            ["resources={gpus: 1}"],
            {"workers": 1},
            r"give each method 1 CPUs and 1 GPUs, but Ray has only 1 CPUs and 0 GPUs",
        ),
        ([], {"workers": 0}, "1 or more workers, got 0"),
        ([], {"address": "127.0.0.1:1"}, r"Ray cluster at 127.0.0.1:1 cannot be used"),
    ],
)
def test_where_there_is_no_room(changes, options, message, recipe_path, tmp_path):
    with pytest.raises(RunError, match=message):
        run_recipe(load_recipe(recipe_path, changes), tmp_path / "run", **options)
    assert not (tmp_path / "run" / "base.json").exists()


def test_without_ray(recipe_path, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RunError, match=r"pip install ray"):
        run_recipe(load_recipe(recipe_path), tmp_path / "run", workers=1)


def test_progress_does_not_count_twice():
    heard = []

    class Listener:
        def stage(self, text): ...

        def advance(self, units):
            heard.append(units)

    combined = _Combined(Listener())
    for folder, stage, units in [("a", None, 0), ("a", "", 3), ("b", None, 0), ("b", "", 1),
                                 ("a", None, 0), ("a", "", 2), ("a", "", 2)]:  # fmt: skip
        combined.hear(folder, stage, units)
    assert sum(heard) == 3 + 1 + 1
