"""The demo: a small language model and real texts, from packages of the Python index, and what is shown with them."""

from curlora.demo.comparison import comparison_table
from curlora.demo.replies import replies, replies_table
from curlora.demo.run import demo_recipe

__all__ = ["comparison_table", "demo_recipe", "replies", "replies_table"]
