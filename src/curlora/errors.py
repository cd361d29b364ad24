"""The guard's exception."""

__all__ = ["GuardError"]


class GuardError(ValueError):
    """Raised if the guard cannot work: bad input, or a calibration or ledger that does not belong to the model."""
