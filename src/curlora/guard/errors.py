"""What the guard refuses."""

__all__ = ["GuardError"]


class GuardError(ValueError):
    """A calibration or a guard cannot be made, or does not belong to the model."""
