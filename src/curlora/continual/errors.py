"""Errors and warnings of recipes and runs."""

__all__ = ["DataError", "RecipeError", "RecipeWarning", "RunError"]


class RunError(RuntimeError):
    """A run cannot start or continue; the message says why and what to do."""


class DataError(ValueError):
    """Data that a recipe names is invalid; the message says where and what."""


class RecipeError(ValueError):
    """A recipe, or data that it names, is invalid; the message says where and what."""


class RecipeWarning(UserWarning):
    """A recipe can be run, but may not do what its author expects."""
