"""Errors and warnings of recipes and runs."""

__all__ = ["RecipeError", "RecipeWarning", "RunError"]


class RunError(RuntimeError):
    """A run cannot start or continue; the message says why and what to do."""


class RecipeError(ValueError):
    """A recipe, or data that it names, is invalid; the message says where and what."""


class RecipeWarning(UserWarning):
    """A recipe can be run, but may not do what its author expects."""
