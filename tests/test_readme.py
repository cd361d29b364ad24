"""What the README tells people to type is right."""

import re
from pathlib import Path

import torch
import yaml

from curlora.continual.recipe_file import load_recipe
from curlora.guard import Ledger
from tests.models import layers, save_base
from tests.train.conftest import TEMPLATE

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def block(language):
    return re.search(rf"```{language}\n(.*?)```", README, re.DOTALL).group(1)


def test_the_recipe_is_one(tmp_path):
    (tmp_path / "recipe.yaml").write_text(block("yaml"))
    recipe = load_recipe(tmp_path / "recipe.yaml", ["training.epochs=3"])
    assert [task.name for task in recipe.tasks] == [part["name"] for part in yaml.safe_load(block("yaml"))["tasks"]]
    assert recipe.training.epochs == 3


def test_the_python_runs(tmp_path, monkeypatch):
    """On the line of data that is shown, with a small local model in the place of the hub's."""
    monkeypatch.setenv("CURLORA_CACHE_DIR", str(tmp_path / "cache"))
    save_base(tmp_path / "base", chat_template=TEMPLATE)
    (tmp_path / "chat.jsonl").write_text(block("json") * 12)
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(tmp_path / "base")), names)
    assert len(Ledger.load("my-adapter").trainings) == 1
    trained = [layer.curlora_U["default"].weight for layer in layers(names["trainer"].model)]
    assert any(U.any() for U in trained)
    for U, layer in zip(trained, layers(names["model"]), strict=True):
        assert torch.equal(U, layer.curlora_U["default"].weight)


def test_the_files_it_points_to_exist():
    root = Path(__file__).parent.parent
    for target in re.findall(r"(?:\]\(|src=\")(?!http)([^)#\"]+)[)#\"]", README):
        assert (root / target).exists(), target
