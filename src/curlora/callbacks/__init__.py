"""Callbacks against forgetting for any Trainer of transformers: the plug-ins of recipes, without a recipe."""

from curlora.callbacks.ewc import EWCCallback
from curlora.callbacks.kl_to_base import KLToBaseCallback
from curlora.callbacks.penalty import PenaltyCallback
from curlora.callbacks.replay import replay
from curlora.callbacks.scale_back import ScaleBackCallback

__all__ = ["EWCCallback", "KLToBaseCallback", "PenaltyCallback", "ScaleBackCallback", "replay"]
