"""The demo's table of what each method learned, and what it forgot on each text."""

from __future__ import annotations

from rich.console import RenderableType
from rich.table import Column, Table
from rich.text import Text

from curlora.continual.results import RunResults

__all__ = ["comparison_table"]


def comparison_table(results: RunResults) -> RenderableType:
    """Return a table with a row for each method.

    A row holds the loss on the task in nats per token. For each held-out text it holds the relative rise of perplexity
    and, below it, the KL divergence from the base model in nats per token.

    Args:
        results: the results of a run with one generation task.
    """
    columns = [Column(Text(name), justify="right") for name in ("loss on\nthe task", *results.heldout)]
    title = "Loss on the task (nats per token); rise of perplexity, and KL from the base model (nats per token)"
    table = Table("method", *columns, title=title)
    for method in results.methods:
        seed = method.seeds[0]
        cells = [f"{seed.scores[-1][0].loss:.3f}"]
        cells += [f"{seed.lost(name, 'rise'):+.1%}\n{seed.lost(name):.3f}" for name in results.heldout]
        table.add_row(Text(method.label), *cells)
    return table
