"""Docstrings name other objects as Sphinx does (``:class:`curlora.Guard```); on the site these are links."""

import re

import griffe

_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):`~?([\w.]+)`")
# Functions that have the name of their module are found in it alone.
_SHADOWED = {
    "curlora.redraw": "curlora.guard.redraw.redraw",
    "curlora.guard.learning_rate": "curlora.guard.learning_rate.learning_rate",
    "curlora.guard.own_text": "curlora.text.own_text.own_text",
}


class Roles(griffe.Extension):
    """Turn roles into references that mkdocs-autorefs resolves; an object that has no entry stays plain code."""

    def on_object(self, *, obj, **kwargs):
        """Called with each object that is read."""
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(lambda match: _reference(obj, match[1]), obj.docstring.value)


def _reference(obj, name):
    try:
        identifier = _SHADOWED.get(name) or (name if "." in name else obj.resolve(name))
    except griffe.NameResolutionError:
        identifier = name
    return f'<autoref identifier="{identifier}" optional><code>{name}</code></autoref>'
