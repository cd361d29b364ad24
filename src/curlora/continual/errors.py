"""What stops a run, for people."""

__all__ = ["RunError"]


class RunError(RuntimeError):
    """A run cannot begin or go on; says why and what to do."""
