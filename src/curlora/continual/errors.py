"""What stops a run, for people."""

__all__ = ["RecipeError", "RecipeWarning", "RunError"]


class RunError(RuntimeError):
    """A run cannot begin or go on; says why and what to do."""


class RecipeError(ValueError):
    """A recipe, or data that it names, is not right; says where and what."""


class RecipeWarning(UserWarning):
    """A recipe can be run, but is not what its author may think."""
