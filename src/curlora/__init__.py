"""CURLoRA for PEFT: continual fine-tuning that trains r x r numbers per layer.

Importing this package registers the method with PEFT.
"""

from importlib.metadata import version

from curlora.tuner import CurloraConfig, CurloraLayer, CurloraModel

__all__ = ["CurloraConfig", "CurloraLayer", "CurloraModel", "__version__"]

__version__ = version("curlora")
