"""CURLoRA for PEFT: continual fine-tuning that trains r x r parameters per layer.

Importing this package registers the method with PEFT.
"""

from importlib.metadata import version

from curlora.budget import ForgettingBudget
from curlora.convert import convert_to_lora, save_as_lora
from curlora.guard import Calibration, Guard, GuardCallback, calibrate, redraw
from curlora.tuner import CurloraConfig, CurloraLayer, CurloraModel

__all__ = [
    "Calibration",
    "CurloraConfig",
    "CurloraLayer",
    "CurloraModel",
    "ForgettingBudget",
    "Guard",
    "GuardCallback",
    "__version__",
    "calibrate",
    "convert_to_lora",
    "redraw",
    "save_as_lora",
]

__version__ = version("curlora")
