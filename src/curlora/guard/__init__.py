"""The guard: what general text uses of a model, and training that leaves it alone as far as a user asks for."""

from curlora.guard.calibration import Calibration, Moments
from curlora.guard.collect import calibrate, windows
from curlora.guard.errors import GuardError
from curlora.guard.guard import Guard

__all__ = ["Calibration", "Guard", "GuardError", "Moments", "calibrate", "windows"]
