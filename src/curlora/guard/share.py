"""Limits on a rise of perplexity, which are shares: 0.01 for 1 %."""

from __future__ import annotations

import contextlib
import math
from numbers import Real
from typing import Any

from curlora.errors import GuardError

__all__ = ["as_share"]


def as_share(name: str, value: Any) -> float:
    """Return a limit as a share, given as a number or as per cent such as ``"1%"``.

    >>> as_share("limit", "1%"), as_share("limit", 0.01)
    (0.01, 0.01)

    Raises:
        GuardError: if it is not between 0 and 1.
    """
    if isinstance(value, str) and value.strip().endswith("%"):
        with contextlib.suppress(ValueError):  # raised as a GuardError below
            value = float(value.strip()[:-1]) / 100
    share = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not (share > 0 and math.isfinite(share)):
        raise GuardError(f'{name} must be a positive share, such as 0.01 or "1%" for 1 %, got {value!r}.')
    if share >= 1:
        raise GuardError(
            f"{name}={share:g} would let perplexity rise by {share:.0%}, which limits nothing. For {share:g} % give "
            f"{share / 100:g}."
        )
    return share
