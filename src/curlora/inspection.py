"""Summary of a saved adapter: what it holds, and how much it changes each layer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from rich.console import RenderableType
from rich.table import Column, Table
from rich.text import Text
from safetensors import SafetensorError, safe_open

from curlora.convert import AdapterError, adapter_config, load_with_base
from curlora.guard import GuardError, Ledger
from curlora.guard.ledger import OTHER_LEDGER, belongs_to
from curlora.tuner.config import CurloraConfig
from curlora.tuner.format import present_name
from curlora.tuner.model import adapted_layers
from curlora.tuner.weight import read

__all__ = ["AdapterSummary", "LayerSummary", "adapter_tables", "inspect_adapter"]

_U = ".curlora_U.weight"


@dataclass(frozen=True)
class LayerSummary:
    """One adapted layer.

    Args:
        name: the layer's name in the base model.
        r: rank.
        norm: Frobenius norm of ``U``; of all experts together.
        change: ``||dW|| / ||W||`` in Frobenius norms; ``None`` if the base model was not loaded.
    """

    name: str
    r: int
    norm: float
    change: float | None = None


@dataclass(frozen=True)
class AdapterSummary:
    """A saved adapter.

    Args:
        base: the base model that the adapter names; ``None`` if it names none.
        config: the adapter's configuration.
        layers: the adapted layers, in the model's order.
        parameters: number of trained parameters, in ``U`` and in everything else that is saved with the adapter.
        bytes: size of the weights file in bytes.
        ledger: the forgetting that was allowed and measured in each training; ``None`` without a budget.
        ledger_fits: whether the ledger was written for this adapter.
    """

    base: str | None
    config: CurloraConfig
    layers: list[LayerSummary]
    parameters: int
    bytes: int
    ledger: Ledger | None = None
    ledger_fits: bool = True


def inspect_adapter(adapter: str | Path, base: str | None = None, *, with_base: bool = False) -> AdapterSummary:
    """Summarize a saved adapter.

    If the base model is loaded, the summary has the relative change of each weight. The change is computed from
    ``(r, r)`` matrices: ``||dW||^2 = sum((L^T L) * (R R^T))`` for ``dW = L R``.

    Args:
        adapter: the adapter's folder.
        base: the base model's folder or hub id; the one that the adapter names if ``None``.
        with_base: whether to load the base model. It is always loaded if ``base`` is given.

    Raises:
        AdapterError: if the folder holds no CURLoRA adapter, or the adapter is damaged or does not fit the base model.
        OSError: if a file cannot be read.
    """
    path = Path(adapter) / SAFETENSORS_WEIGHTS_NAME
    config = adapter_config(str(adapter))
    if not path.exists():
        raise AdapterError(
            f"{adapter} has a configuration but no {SAFETENSORS_WEIGHTS_NAME}: it is incomplete. Copy or download it "
            "again."
        )
    layers, parameters = [], 0
    try:
        with safe_open(path, framework="pt") as file:
            for stored in file.keys():  # noqa: SIM118  # not a dict
                tensor, key = file.get_tensor(stored), present_name(stored)
                name = key.removeprefix("base_model.model.").removesuffix(_U)
                if key.endswith(_U):
                    layers.append(LayerSummary(name, tensor.shape[-1], float(tensor.double().norm())))
                if ".curlora_" not in key or key.endswith(_U):
                    parameters += tensor.numel()
    except SafetensorError as error:
        raise AdapterError(
            f"{path} cannot be read ({error}). It is incomplete or damaged: copy or download it again."
        ) from error
    layers.sort(key=lambda layer: [int(part) if part.isdigit() else part for part in layer.name.split(".")])
    if base or with_base:
        changes = _changes(str(adapter), base)
        layers = [LayerSummary(one.name, one.r, one.norm, changes[one.name]) for one in layers]
    try:
        ledger = Ledger.load(adapter)
    except GuardError as error:
        raise AdapterError(str(error)) from error
    fits = ledger is None or belongs_to(ledger, path)
    size, base_name = path.stat().st_size, config.base_model_name_or_path
    return AdapterSummary(base_name, config, layers, parameters, size, ledger, fits)


@torch.no_grad()
def _changes(adapter: str, base: str | None) -> dict[str, float]:
    model = load_with_base(adapter, base)
    changes = {}
    for name, layer in adapted_layers(model.base_model.model, "default").items():
        left, right = (factor.double() for factor in layer.delta_factors("default"))
        square = ((left.mT @ left) * (right @ right.mT)).sum().clamp_min(0)
        adapted: Any = layer  # PEFT's base class has no types
        with read(adapted.get_base_layer(), name, adapted.parameter_name) as weight:
            changes[name] = float((square / weight.squared_norms()[0].sum()).sqrt())
    return changes


def adapter_tables(summary: AdapterSummary) -> list[RenderableType]:
    """Return the summary as tables for the terminal."""
    ranks = sorted({layer.r for layer in summary.layers})
    config = summary.config
    facts = Table(show_header=False, box=None)
    for name, value in (
        ("base model", summary.base or "not named"),
        (
            "layers",
            f"{len(summary.layers)} ({', '.join(sorted({one.name.rpartition('.')[2] for one in summary.layers}))})",
        ),
        ("rank", ", ".join(map(str, ranks))),
        ("alpha", f"{config.alpha:g}" + (" and by layer" if config.alpha_pattern else "")),
        ("drawn by", f"{config.sampling}, seed {config.seed}"),
        ("trained parameters", f"{summary.parameters:,}"),
        ("file", f"{summary.bytes:,} bytes"),
    ):
        facts.add_row(Text(name, style="bold"), Text(value))
    by_layer = Table("layer", *(Column(head, justify="right") for head in ("r", "||U||", "||dW|| / ||W||")))
    for one in summary.layers:
        change = "" if one.change is None else f"{one.change:.2e}"
        by_layer.add_row(Text(one.name), str(one.r), f"{one.norm:.3g}", change)
    if summary.ledger is None:
        return [facts, by_layer]
    return [
        facts,
        by_layer,
        *([] if summary.ledger_fits else [Text(OTHER_LEDGER, style="bold red")]),
        *_ledger_tables(summary.ledger),
    ]


def _ledger_tables(ledger: Ledger) -> list[RenderableType]:
    of_trainings = ("steps", "learning rate", "allowed, nats", "predicted, nats", "kept")
    trainings = Table("training", *(Column(head, justify="right") for head in of_trainings))
    of_texts = ("tokens", "SHA-256", "perplexity before", "after", "rise", "allowed")
    texts = Table("training", "text", *(Column(head, justify="right") for head in of_texts))
    for number, training in enumerate(ledger.trainings, 1):
        trainings.add_row(
            str(number), f"{training.steps:,}", f"{training.learning_rate:.2g}", f"{training.allowed:.4f}",
            f"{training.predicted:.4f}", f"{training.kept:.0%}",
        )  # fmt: skip
        for name, text in training.texts.items():
            texts.add_row(
                str(number), Text(name), f"{text.tokens:,}" if text.tokens else "", (text.sha256 or "")[:8],
                f"{text.before:.2f}", f"{text.after:.2f}", f"{text.rise:+.2%}", f"{text.limit:.2%}",
            )  # fmt: skip
    facts = Table(show_header=False, box=None)
    if ledger.lifetime is not None:
        facts.add_row(Text("lifetime's budget", style="bold"), f"{ledger.lifetime:.2%}, {ledger.left:.2%} of it left")
    calibration = ledger.calibration
    for name, value in (
        ("earlier tasks held", str(len(ledger.anchors))),
        ("calibrated on", f"{calibration.tokens:,} tokens in {calibration.rows:,} rows"),
        ("base model's fingerprint", calibration.base[:16]),
    ):
        facts.add_row(Text(name, style="bold"), value)
    return [trainings, texts, facts]
