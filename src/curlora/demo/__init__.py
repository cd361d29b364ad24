"""What the demo needs: a small language model and real texts, from packages of the Python index."""

from curlora.demo.run import demo_recipe

__all__ = ["demo_recipe"]
