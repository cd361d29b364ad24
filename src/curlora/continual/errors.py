"""What stops a run, for people."""

__all__ = ["DataError", "RunError"]


class RunError(RuntimeError):
    """A run cannot begin or go on; says why and what to do."""


class DataError(ValueError):
    """Data that a recipe names is not right; says where and what."""
