"""Plug-ins for methods. To add one, write a file with a subclass of ``Plugin`` and list it in ``PLUGINS``."""

from __future__ import annotations

import inspect
from typing import Any

from curlora.continual.plugins.anchors_plugin import AnchorsPlugin
from curlora.continual.plugins.base import Plugin, TaskContext
from curlora.continual.plugins.ewc_plugin import EWCPlugin
from curlora.continual.plugins.guard_plugin import GuardPlugin
from curlora.continual.plugins.kl_to_base_plugin import KLToBasePlugin
from curlora.continual.plugins.probe_plugin import ProbePlugin
from curlora.continual.plugins.redraw_plugin import RedrawPlugin
from curlora.continual.plugins.replay_plugin import ReplayPlugin
from curlora.continual.plugins.replay_text_plugin import ReplayTextPlugin
from curlora.continual.plugins.scale_back_plugin import ScaleBackPlugin
from curlora.continual.problems import unknown_names

__all__ = [
    "PLUGINS",
    "AnchorsPlugin",
    "EWCPlugin",
    "GuardPlugin",
    "KLToBasePlugin",
    "Plugin",
    "ProbePlugin",
    "RedrawPlugin",
    "ReplayPlugin",
    "ReplayTextPlugin",
    "ScaleBackPlugin",
    "TaskContext",
    "make_plugin",
]

# In the order in which they act before and after a task: first what changes the model, then what changes its head,
# then what reads both.
PLUGINS: dict[str, type[Plugin]] = {
    "redraw": RedrawPlugin,
    "guard": GuardPlugin,
    "scale_back": ScaleBackPlugin,
    "probe": ProbePlugin,
    "ewc": EWCPlugin,
    "anchors": AnchorsPlugin,
    "replay": ReplayPlugin,
    "replay_text": ReplayTextPlugin,
    "kl_to_base": KLToBasePlugin,
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
