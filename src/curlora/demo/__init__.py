"""The demo: recipes on a small language model and real texts, which come from packages on PyPI."""

from curlora.demo.comparison import comparison_table
from curlora.demo.replies import replies, replies_table
from curlora.demo.run import demo_recipe

__all__ = ["comparison_table", "demo_recipe", "replies", "replies_table"]
