"""A whole recipe on two processes gives the same results as on one."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import yaml

from curlora.continual import processes
from curlora.continual.errors import RunError
from curlora.continual.launch import run_recipe
from curlora.continual.recipe_file import load_recipe
from curlora.continual.results import RunResults

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
TORCHRUN += ["-m", "curlora_cli", "run"]


@pytest.fixture
def recipe(recipe_path):
    """30 examples do not divide evenly into batches of 4, nor these among two processes."""
    content = yaml.safe_load(recipe_path.read_text())
    plugins = [{"name": "ewc", "strength": 1.0, "examples": 5}, {"name": "replay", "examples": 5}]
    content["methods"][1]["plugins"] = plugins
    content["training"] = {"epochs": 2, "batch_size": 4, "head_learning_rate": 0.05, "gradient_accumulation_steps": 2}
    content["training"]["checkpoint_steps"] = 5
    content["heldout"]["stride"] = 8
    content["training"]["evaluation_batch_size"] = 4
    split = {"prompt": "sentence", "completion": "sentence"}
    # Sometimes correct, whatever the model generates.
    digit = {"generate": {"max_new_tokens": 3}, "normalize": r"w(\d)"}
    content["tasks"].append({
        "name": "said", "kind": "completion", "score": digit,
        "train": {"path": "second-train.jsonl", **split}, "evaluation": {"path": "second-eval.jsonl", **split},
    })  # fmt: skip
    recipe_path.write_text(yaml.safe_dump(content))
    return load_recipe(recipe_path)


def test_two_processes(recipe, recipe_path, tmp_path):
    one = run_recipe(recipe, tmp_path / "one")
    command = [*TORCHRUN, str(recipe_path), "--out", str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("After the last task") == 1  # only one process prints
    two = RunResults.load(tmp_path / "two" / "results.json")
    assert two.environment["processes"] == "2"
    assert (tmp_path / "two" / "report.html").exists()
    for a, b in zip(one.methods, two.methods, strict=True):
        (s,), (t,) = a.seeds, b.seeds
        assert (t.steps, t.train_tokens, b.trainable_parameters) == (s.steps, s.train_tokens, a.trainable_parameters)
        assert t.losses == [(step, pytest.approx(loss, rel=1e-4)) for step, loss in s.losses]
        assert t.accuracy == s.accuracy
        # The tokenizer has no end-of-text token.
        assert t.scores[-1][-1].unfinished == s.scores[-1][-1].unfinished == 1
        assert 0 < s.accuracy[-1][-1] < 1
        for before, after in zip(s.text(), t.text(), strict=True):
            assert after.perplexity == pytest.approx(before.perplexity, rel=1e-5)
            assert after.drift == pytest.approx(before.drift, rel=1e-2, abs=1e-6)


def test_a_batch_that_cannot_be_shared_out_is_one_message(recipe_path, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "process_state", lambda: SimpleNamespace(num_processes=2))
    with pytest.raises(RunError, match="A batch_size of 3 cannot be divided evenly among 2 processes"):
        run_recipe(load_recipe(recipe_path, ["training.batch_size=3"]), tmp_path / "run")
    assert not (tmp_path / "run" / "recipe.json").exists()
