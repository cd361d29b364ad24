"""A small recipe on a small local model, for tests of whole runs."""


def figures(results):
    """Return all results except times."""
    hidden = {"seeds": {"__all__": {"seconds", "train_seconds"}}}
    return [method.model_dump(exclude=hidden) for method in results.methods]


class Cut(BaseException):
    """Simulates a power failure."""
