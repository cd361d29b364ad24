"""A method of a recipe, with its options and plug-ins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, Field, model_validator

from curlora.continual.methods import Method, make_method
from curlora.continual.plugins import PLUGINS, Plugin, make_plugin
from curlora.continual.protocol import Protocol

__all__ = ["MethodSpec"]


class MethodSpec(BaseModel, extra="forbid", frozen=True):
    """A method, ``frozen``, ``full`` or an adapter of PEFT with the options of its configuration, and its plug-ins.

    With ``adapter_per_task`` each task trains its own adapter beside those of earlier tasks. ``training`` overrides
    settings for this method. ``{grid: [...]}`` in place of any value but a name stands for several methods, one for
    each value; ``grid`` then holds one method's values.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+(@[A-Za-z0-9_.,=+-]+)?$")]
    method: str
    label: str | None = None
    options: dict[str, Any] = {}
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    adapter_per_task: bool = False
    plugins: list[dict[str, Any]] = []
    training: dict[str, Any] = {}
    grid: dict[str, Any] = {}

    @model_validator(mode="after")
    def _complete(self) -> MethodSpec:
        problems = []
        try:
            self._make([], Protocol())
        except ValueError as error:
            problems.append(str(error))
        for plugin in self.plugins:
            try:
                self._plugin(plugin)
            except ValueError as error:
                problems.append(str(error))
        if {"guard", "scale_back"} <= {str(plugin.get("name")) for plugin in self.plugins}:
            problems.append("plugins: guard and scale_back each keep a limit of their own: leave one of them out")
        if problems:
            raise ValueError("\n".join(problems))
        self.make(Protocol())
        return self

    def make(self, protocol: Protocol) -> Method:
        """Make the method under a protocol.

        Raises:
            ValueError: if the method, a plug-in or one of their options is unknown, missing or not allowed.
        """
        acting = list(PLUGINS)
        return self._make(
            [self._plugin(one) for one in sorted(self.plugins, key=lambda one: acting.index(one["name"]))], protocol
        )

    def _make(self, plugins: Sequence[Callable[[], Plugin]], protocol: Protocol) -> Method:
        return make_method(
            self.method,
            self.name,
            self.label or self.name,
            self.learning_rate or 0.0,
            {**(protocol.curlora_options if self.method == "curlora" else {}), **self.options},
            plugins,
            lora_init=protocol.lora_init,
            adapter_per_task=self.adapter_per_task,
            training=self.training,
            grid=self.grid,
        )

    def _plugin(self, plugin: dict[str, Any]) -> Callable[[], Plugin]:
        if not isinstance(plugin.get("name"), str):
            raise ValueError(f"plugins: a plug-in needs a name, such as guard: {plugin}")
        name, rest = plugin["name"], {key: value for key, value in plugin.items() if key != "name"}
        if [other.get("name") for other in self.plugins].count(name) > 1:
            raise ValueError(f"plugins: {name!r} is listed twice")
        made = make_plugin(name, rest)
        if made.only_for not in (None, self.method):
            raise ValueError(f"plug-in {name!r} is only for method {made.only_for!r}, not for {self.method!r}")
        if self.adapter_per_task and made.holds_trained:
            raise ValueError(
                f"plug-in {name!r} protects what earlier tasks have trained. With adapter_per_task later tasks do not "
                "change that: leave the plug-in out"
            )
        return lambda: make_plugin(name, rest)
