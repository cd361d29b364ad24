"""Errors and warnings of recipes and runs."""

__all__ = ["DataError", "EncodingError", "LayoutError", "RecipeError", "RecipeWarning", "RunError"]


class RunError(RuntimeError):
    """A run cannot start or continue; the message says why and what to do."""


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


class RecipeError(ValueError):
    """A recipe, or data that it names, is invalid; the message says where and what."""


class RecipeWarning(UserWarning):
    """A recipe can be run, but may not do what its author expects."""
