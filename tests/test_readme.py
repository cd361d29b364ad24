"""What the README tells people to type is right."""

import re
from pathlib import Path

import yaml

from curlora.continual.recipe import load_recipe
from tests.models import llama

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def block(language):
    return re.search(rf"```{language}\n(.*?)```", README, re.DOTALL).group(1)


def test_the_recipe_is_one(tmp_path):
    (tmp_path / "recipe.yaml").write_text(block("yaml"))
    recipe = load_recipe(tmp_path / "recipe.yaml", ["training.epochs=3"])
    assert [task.name for task in recipe.tasks] == [part["name"] for part in yaml.safe_load(block("yaml"))["tasks"]]
    assert recipe.training.epochs == 3


def test_the_python_runs(tmp_path, monkeypatch):
    """With a small local model in the place of the hub's."""
    llama().save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    code = block("python").replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(tmp_path / "base"))
    exec(code, {})
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").exists()


def test_the_files_it_points_to_exist():
    root = Path(__file__).parent.parent
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (root / target).exists(), target
