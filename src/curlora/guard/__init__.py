"""The guard: measure what general text uses of a model, and keep training from changing it beyond a stated budget."""

from curlora.errors import GuardError
from curlora.guard.anchors import Anchors
from curlora.guard.calibration import Calibration, KroneckerFactors
from curlora.guard.callback import GuardCallback
from curlora.guard.collect import calibrate
from curlora.guard.guard import Guard
from curlora.guard.learning_rate import learning_rate
from curlora.guard.ledger import Ledger, TextOutcome, TrainingRecord
from curlora.guard.redraw import redraw
from curlora.guard.scale_back import scale_to_limit
from curlora.text.own_text import own_text
from curlora.text.perplexity import perplexity

__all__ = [
    "Anchors",
    "Calibration",
    "Guard",
    "GuardCallback",
    "GuardError",
    "KroneckerFactors",
    "Ledger",
    "TextOutcome",
    "TrainingRecord",
    "calibrate",
    "learning_rate",
    "own_text",
    "perplexity",
    "redraw",
    "scale_to_limit",
]
