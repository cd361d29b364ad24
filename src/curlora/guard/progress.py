"""What the guard is doing at the moment: as a bar on the screen, or told to whoever shows it in their own way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from curlora.guard.processes import rank_and_count

__all__ = ["Advance", "Shown", "part_of", "stage"]

Advance = Callable[[float], None]
"""To be told how much more has been done."""

Shown = bool | Callable[[str, float | None], AbstractContextManager[Advance]]
"""Whether to show bars; or what is told of each stage, when it begins and ends, its name and how much there is to do.

That is ``None`` where nobody knows beforehand.
"""


@contextlib.contextmanager
def stage(shown: Shown, text: str, total: float | None) -> Iterator[Advance]:
    """Something that takes a while. Of several processes the first one shows it.

    Args:
        shown: how.
        text: what it is, beginning with a small letter.
        total: how much there is to do; ``None`` if that is not known.
    """
    if rank_and_count()[0]:
        shown = False
    if callable(shown):
        with shown(text, total) as advance:
            yield advance
    else:
        from rich.progress import Progress  # not at the top: whoever imports curlora would wait for it

        with Progress(transient=True, disable=not shown) as bars:
            task = bars.add_task(text[:1].upper() + text[1:], total=total)
            yield lambda units: bars.advance(task, units)


def part_of(shown: Shown, work: float, name: str | None = None) -> Shown:
    """The same, told that each stage is ``work``, whatever units it counts in itself; all of it when the stage ends.

    Args:
        shown: how.
        work: of each stage, in whatever units all of them have together.
        name: of the stages, instead of their own.
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
