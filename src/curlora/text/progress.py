"""Progress: of a whole run, of a part of it whose work is estimated, and of the stages of the guard's own work."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol

from curlora.text.processes import rank_and_count

__all__ = ["Advance", "NullProgress", "Portion", "Progress", "Shown", "part_of", "stage"]

Advance = Callable[[float], None]
"""A function that is called with the amount of work done since the last call."""

Shown = bool | Callable[[str, float | None], AbstractContextManager[Advance]]
"""Whether to show progress bars, or a function that shows them.

The function is called with the name and the total work of each stage; the total is ``None`` if it is unknown. It
returns a context manager that is open during the stage and yields an :data:`Advance`.
"""


class Progress(Protocol):
    """Interface that is told of a run's progress."""

    def stage(self, text: str) -> None:
        """Called when a stage of the run starts."""

    def advance(self, units: float) -> None:
        """Called when ``units`` more of the run's work are done."""


class NullProgress:
    """A progress that reports nothing."""

    def stage(self, text: str) -> None: ...

    def advance(self, units: float) -> None: ...


class Portion:
    """A part of a run whose work is only estimated: it reports the estimate in total, whatever is done.

    Args:
        advance: called with the amount of work done since the last call.
        work: the estimate.
    """

    def __init__(self, advance: Advance, work: float = 0.0) -> None:
        self._report, self.left = advance, work

    def advance(self, units: float) -> None:
        """Report more work, as much as is left of the estimate at most."""
        units = min(units, self.left)
        self.left -= units
        self._report(units)

    def end(self) -> None:
        """Report all that is left of the estimate."""
        self.advance(self.left)


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
        from rich.progress import Progress as Bars  # here, because it would slow down the import of curlora

        with Bars(transient=True, disable=not shown) as bars:
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
        with shown(name or text, work) as advance:
            part = Portion(advance, work)
            yield lambda units: part.advance(work * units / total if total else 0.0)
            part.end()

    return show
