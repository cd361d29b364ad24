"""What each of the demo's methods has learned, and what it has forgotten of each text."""

from __future__ import annotations

from rich.console import RenderableType
from rich.table import Column, Table
from rich.text import Text

from curlora.continual.results import RunResults

__all__ = ["comparison_table"]


def comparison_table(results: RunResults) -> RenderableType:
    """A row for each method: the loss on the task, and of each text the rise of perplexity and the KL divergence.

    Args:
        results: of a run with one task that generates.
    """
    columns = [Column(Text(name), justify="right") for name in ("loss on\nthe task", *results.heldout)]
    title = "Learned, in nats per token, and forgotten: rise of perplexity, KL from the base model in nats per token"
    table = Table("method", *columns, title=title)
    for method in results.methods:
        seed = method.seeds[0]
        cells = [f"{seed.scores[-1][0].loss:.3f}"]
        cells += [f"{seed.lost(name, 'rise'):+.1%}\n{seed.lost(name):.3f}" for name in results.heldout]
        table.add_row(Text(method.label), *cells)
    return table
