"""Continual fine-tuning: a stream of tasks, the methods that learn it, and what is measured."""

from curlora.continual.launch import run_recipe
from curlora.continual.recipe import Recipe
from curlora.continual.recipe_file import load_recipe
from curlora.continual.results import RunResults
from curlora.continual.run import run_stream
from curlora.continual.stream import Stream

__all__ = ["Recipe", "RunResults", "Stream", "load_recipe", "run_recipe", "run_stream"]
