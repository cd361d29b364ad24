"""Errors of data."""

__all__ = ["DataError", "EncodingError", "LayoutError"]


class DataError(ValueError):
    """Data is invalid; the message says where and what.

    Args:
        problem: where the problem is, and what was found.
        remedy: what to set in a recipe. ``curlora train``, which has other options, leaves it out.
    """

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(f"{problem}. {remedy}" if remedy else problem)
        self.problem = problem


class LayoutError(DataError):
    """The columns of a table match no layout of conversations."""


class EncodingError(DataError):
    """A file is not text in the encoding that it is read in."""
