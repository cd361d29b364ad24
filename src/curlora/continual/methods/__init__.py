"""The methods of a stream. To add one, write a file with a subclass of ``Method`` and extend ``make_method``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from curlora.continual.methods.base import Method
from curlora.continual.methods.frozen import Frozen
from curlora.continual.methods.full import Full
from curlora.continual.methods.peft import Peft, peft_types
from curlora.continual.plugins import Plugin
from curlora.continual.problems import unknown_names

__all__ = ["Frozen", "Full", "Method", "Peft", "make_method"]


def make_method(
    method: str,
    name: str,
    label: str,
    learning_rate: float = 0.0,
    options: dict[str, Any] | None = None,
    plugins: Sequence[Callable[[], Plugin]] = (),
    lora_init: str = "peft",
    adapter_per_task: bool = False,
    training: dict[str, Any] | None = None,
    grid: dict[str, Any] | None = None,
) -> Method:
    """Make a method: ``"frozen"``, ``"full"``, or an adapter of PEFT such as ``"lora"`` or ``"curlora"``.

    Raises:
        ValueError: if there is no such method, or an option is unknown or not allowed.
    """
    fields: dict[str, Any] = dict(
        name=name, label=label, learning_rate=learning_rate, options=options or {}, plugins=plugins,
        training=training or {}, grid=grid or {},
    )  # fmt: skip
    if adapter_per_task and method in ("frozen", "full"):
        raise ValueError(f"adapter_per_task is for adapters, but the method {method} has none")
    if method == "frozen":
        return Frozen(**fields)
    if learning_rate <= 0:
        raise ValueError("learning_rate is missing")
    if method == "full":
        return Full(**fields)
    if method not in peft_types():
        known = ["frozen", "full", *sorted(peft_types())]
        raise ValueError(f"{unknown_names('a recipe', [method], known, 'method')}")
    return Peft(peft_type=method, lora_init=lora_init, adapter_per_task=adapter_per_task, **fields)
