"""Progress of the guard's own work: as a bar in the terminal, or reported to a function."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from curlora.guard.processes import rank_and_count

__all__ = ["Advance", "Shown", "part_of", "stage"]

Advance = Callable[[float], None]
"""A function that is called with the amount of work done since the last call."""

Shown = bool | Callable[[str, float | None], AbstractContextManager[Advance]]
"""Whether to show progress bars, or a function that shows them.

The function is called with the name and the total work of each stage; the total is ``None`` if it is unknown. It
returns a context manager that is open during the stage and yields an :data:`Advance`.
"""


@contextlib.contextmanager
def stage(shown: Shown, text: str, total: float | None) -> Iterator[Advance]:
    """Show the progress of a stage, in the first process only.

    Args:
        shown: whether to show a bar, or a function that shows it.
        text: the name of the stage, beginning with a small letter.
        total: the total work; ``None`` if it is unknown.

    Yields:
        A function to call with the amount of work done since the last call.
    """
    if rank_and_count()[0]:
        shown = False
    if callable(shown):
        with shown(text, total) as advance:
            yield advance
    else:
        from rich.progress import Progress  # here, because it would slow down the import of curlora

        with Progress(transient=True, disable=not shown) as bars:
            task = bars.add_task(text[:1].upper() + text[1:], total=total)
            yield lambda units: bars.advance(task, units)


def part_of(shown: Shown, work: float, name: str | None = None) -> Shown:
    """Return ``shown`` with the units of its stages scaled, so that every stage amounts to ``work``.

    A stage that ends before its total, or whose total is unknown, reports the rest when it ends.

    Args:
        shown: whether to show bars, or a function that shows them.
        work: the work of each stage, in units that all stages share.
        name: the name to show in place of the stages' own names.
    """
    if not callable(shown):
        return shown

    @contextlib.contextmanager
    def show(text: str, total: float | None) -> Iterator[Advance]:
        done = 0.0
        with shown(name or text, work) as advance:

            def told(units: float) -> None:
                nonlocal done
                share = min(work * units / total, work - done) if total else 0.0
                done += share
                advance(share)

            yield told
            advance(work - done)

    return show
