"""What stops ``curlora train``, for people."""

__all__ = ["TrainError"]


class TrainError(ValueError):
    """An option, the data, the model or the output folder is not right; says what was found and what to do."""
