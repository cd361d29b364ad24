"""The demo: one more recipe, on a model and texts that need no hub."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from curlora.continual.recipe import Recipe, load_recipe
from curlora.demo import assets

__all__ = ["demo_recipe"]

_QUICK = [
    "title=Three tasks, one after another (quick smoke run; the figures mean nothing)",
    "training.batch_size=8",
    "training.max_length=24",
    "heldout.tokens=128",
    "heldout.window=128",
    "guard.tokens=128",
    "guard.window=128",
    *(f"tasks.{task}.{split}.limit=24" for task in range(3) for split in ("train", "evaluation")),
]


def demo_recipe(quick: bool = False, seed: int = 0) -> Recipe:
    """The recipe ``demo``, with its model and texts fetched and in place.

    Args:
        quick: a smoke run of under a minute, whose figures mean nothing.
        seed: of the run.

    Raises:
        curlora.demo.assets.AssetError: if the model or the texts cannot be had.
    """
    changes = [f"model.name={assets.language_model()}", f"seeds=[{seed}]", *(_QUICK if quick else [])]
    return load_recipe(
        Path(str(resources.files("curlora").joinpath("recipes/demo.yaml"))), changes, folder=assets.demo_texts()
    )
