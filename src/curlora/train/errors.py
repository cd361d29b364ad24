"""The error of ``curlora train``."""

__all__ = ["TrainError"]


class TrainError(ValueError):
    """An option, the data, the model or the output folder cannot be used. Says what was found and what to do."""
