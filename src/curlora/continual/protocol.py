"""The paper's protocol and the corrected one. Each difference of the paper's reference code is a switch.

The reference is the code and the notebooks of https://github.com/MNoorFawi/curlora.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

__all__ = ["SWITCHES", "Protocol"]

# name: (corrected value, the paper's value, what the paper's value does to the figures)
SWITCHES: dict[str, tuple[str, str, str]] = {
    "readout": (
        "last_token",
        "last_position",
        "The class is read at the last position of right-padded batches. In training this is mostly padding; when "
        "examples are scored one by one it is the text's last token. A head is therefore scored on states that it was "
        "hardly trained on.",
    ),
    "evaluation": (
        "batched",
        "one_by_one",
        "Examples are scored one at a time, so no class is read from padding.",
    ),
    "order": (
        "shuffled",
        "as_given",
        "Examples are trained on in the order of the file, the same in every epoch.",
    ),
    "schedule_length": (
        "batches",
        "examples",
        "The schedule advances once per batch but is sized for one step per example. With 500 warm-up steps, most of a "
        "task is warm-up, and the learning rate never decays.",
    ),
    "heads": (
        "by_seed",
        "fixed",
        "Every head is initialized with seed 1311, whatever the run's seed. Standard deviations over seeds leave out "
        "the variation of heads.",
    ),
    "data": (
        "corrected",
        "reference",
        "Tasks with a reference variant use it. For Sentiment140, neutral tweets count as negative, a third class "
        "never occurs, and all 1,000 evaluation rows are negative, so always answering negative scores 1.00.",
    ),
    "perplexity": (
        "windows",
        "first_chunk",
        "Perplexity is measured on one chunk from the start of the text: little text, with a context that may be "
        "longer or shorter than a window.",
    ),
    "indices": (
        "paper",
        "reference",
        "Columns and rows are drawn with probability proportional to 1 / (p + 0.001), with replacement: almost "
        "uniformly if p is about 1/4096, and with duplicates.",
    ),
    "lora_init": (
        "peft",
        "reference",
        "LoRA's A starts as U(-1, 1)/sqrt(r), where PEFT uses U(-1, 1)/sqrt(n). It is sqrt(n/r) times as large, so the "
        "same learning rate moves the model sqrt(n/r) times as far.",
    ),
}


class Protocol(BaseModel):
    """The switches of a run: which peculiarities of the reference code it has.

    Two more peculiarities need no switch. The dense ``C U R`` that the reference builds in every forward pass gives the
    same outputs. The reference draws its indices from NumPy's global generator and does not save them; here they are
    seeded and saved. Every table shows, under both protocols, that MRPC's majority answer scores 0.684.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    readout: Literal["last_token", "last_position"] = "last_token"
    evaluation: Literal["batched", "one_by_one"] = "batched"
    order: Literal["shuffled", "as_given"] = "shuffled"
    schedule_length: Literal["batches", "examples"] = "batches"
    heads: Literal["by_seed", "fixed"] = "by_seed"
    data: Literal["corrected", "reference"] = "corrected"
    perplexity: Literal["windows", "first_chunk"] = "windows"
    indices: Literal["paper", "reference"] = "paper"
    lora_init: Literal["peft", "reference"] = "peft"

    @classmethod
    def named(cls, name: Literal["corrected", "paper"], **switches: str) -> Protocol:
        """Return the corrected or the paper's protocol with some switches changed."""
        values = {switch: paper if name == "paper" else corrected for switch, (corrected, paper, _) in SWITCHES.items()}
        return cls.model_validate({**values, **switches})

    @property
    def settings(self) -> dict[str, Any]:
        """The switches that are settings of training and scoring."""
        return self.model_dump(include={"readout", "evaluation", "order", "schedule_length", "heads"})

    @property
    def curlora_options(self) -> dict[str, Any]:
        """CURLoRA's options for drawing columns and rows; a method's own options override them."""
        return {"sampling": "reference", "replacement": True} if self.indices == "reference" else {}

    def describe(self) -> dict[str, str]:
        """Return the switches that have the reference's value, with what that does to the figures."""
        values = self.model_dump()
        return {name: text for name, (_, paper, text) in SWITCHES.items() if values[name] == paper}
