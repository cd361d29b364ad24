"""The demo's two recipes, whose model and texts do not come from the Hugging Face Hub."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from curlora.continual.recipe import Recipe
from curlora.continual.recipe_file import load_recipe
from curlora.demo import assets

__all__ = ["demo_recipe"]

_QUICK = [
    "title=The same task learned by LoRA and within a budget (quick smoke run; the figures mean nothing)",
    "training.max_length=24",
    "guard.tokens=256",
    "guard.max_length=32",
    "tasks.0.train.limit=24",
    "tasks.0.evaluation.limit=8",
    "heldout.3.max_new_tokens=8",
    *(f"heldout.{text}.{key}=128" for text in range(3) for key in ("tokens", "window")),
]
_QUICK_FULL = [
    "title=Three tasks, one after another (quick smoke run; the figures mean nothing)",
    "training.batch_size=8",
    "training.max_length=24",
    "heldout.tokens=128",
    "heldout.window=128",
    "guard.tokens=128",
    "guard.window=128",
    *(f"tasks.{task}.{split}.limit=24" for task in range(3) for split in ("train", "evaluation")),
]


def demo_recipe(quick: bool = False, seed: int = 0, *, full: bool = False) -> Recipe:
    """Fetch the demo's model and texts, and return the recipe ``demo`` that uses them.

    Args:
        quick: shorten it to a smoke run of less than a minute, whose figures mean nothing.
        seed: seed of the run.
        full: return the recipe ``demo-full`` instead: three tasks one after another.

    Raises:
        curlora.demo.assets.AssetError: if the model or the texts cannot be obtained.
    """
    quickly = _QUICK_FULL if full else _QUICK
    changes = [f"model.name={assets.language_model()}", f"seeds=[{seed}]", *(quickly if quick else [])]
    name = "demo-full" if full else "demo"
    path = Path(str(resources.files("curlora").joinpath(f"recipes/{name}.yaml")))
    return load_recipe(path, changes, folder=assets.demo_texts())
