"""Plug-ins for methods. To add one, write a file with a subclass of ``Plugin`` and list it in ``PLUGINS``."""

from __future__ import annotations

import inspect
from typing import Any

from curlora.continual.plugins.anchors_plugin import AnchorsPlugin
from curlora.continual.plugins.base import Plugin, TaskContext
from curlora.continual.plugins.ewc import EWC
from curlora.continual.plugins.guard_plugin import GuardPlugin
from curlora.continual.plugins.kl_to_base import KLToBase
from curlora.continual.plugins.probe_plugin import Probe
from curlora.continual.plugins.redraw_plugin import Redraw
from curlora.continual.plugins.replay import Replay
from curlora.continual.plugins.replay_text import ReplayText
from curlora.continual.plugins.scale_back import ScaleBack
from curlora.continual.problems import unknown_names

__all__ = [
    "EWC",
    "PLUGINS",
    "AnchorsPlugin",
    "GuardPlugin",
    "KLToBase",
    "Plugin",
    "Probe",
    "Redraw",
    "Replay",
    "ReplayText",
    "ScaleBack",
    "TaskContext",
    "make_plugin",
]

# In the order in which they act before and after a task: first what changes the model, then what changes its head,
# then what reads both.
PLUGINS: dict[str, type[Plugin]] = {
    "redraw": Redraw,
    "guard": GuardPlugin,
    "scale_back": ScaleBack,
    "probe": Probe,
    "ewc": EWC,
    "anchors": AnchorsPlugin,
    "replay": Replay,
    "replay_text": ReplayText,
    "kl_to_base": KLToBase,
}


def make_plugin(name: str, options: dict[str, Any]) -> Plugin:
    """Make a plug-in by its name.

    Raises:
        ValueError: if the name or an option is unknown, missing or not allowed.
    """
    if name not in PLUGINS:
        raise ValueError(unknown_names("a recipe", [name], sorted(PLUGINS), "plug-in"))
    known = inspect.signature(PLUGINS[name]).parameters
    problems = []
    if unknown := [option for option in options if option not in known]:
        problems.append(unknown_names(f"plug-in {name!r}", unknown, known, "option"))
    for option, parameter in known.items():
        if parameter.default is parameter.empty and option not in options:
            problems.append(f"plug-in {name!r} needs {option}")
    if problems:
        raise ValueError("\n".join(problems))
    try:
        return PLUGINS[name](**options)
    except TypeError as error:
        raise ValueError(f"plug-in {name!r}: {error}") from error
