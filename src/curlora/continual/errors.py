"""What stops a run, for people."""

__all__ = ["DataError", "RecipeError", "RecipeWarning", "RunError"]


class RunError(RuntimeError):
    """A run cannot begin or go on; says why and what to do."""


class DataError(ValueError):
    """Data that a recipe names is not right; says where and what."""


class RecipeError(ValueError):
    """A recipe, or data that it names, is not right; says where and what."""


class RecipeWarning(UserWarning):
    """A recipe can be run, but is not what its author may think."""
