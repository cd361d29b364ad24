"""The paper's protocol and the honest one: what the paper's reference code does otherwise, each a switch.

The reference is the code and the notebooks of https://github.com/MNoorFawi/curlora.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

__all__ = ["SWITCHES", "Protocol"]

# name: (honest value, the paper's value, what the paper's does to the numbers)
SWITCHES: dict[str, tuple[str, str, str]] = {
    "readout": (
        "last_token",
        "last_position",
        "The class is read at the last position of right-padded batches: in training mostly from padding, in scoring "
        "one by one from the text's last token, so that a head is scored on states that it was hardly trained on.",
    ),
    "evaluation": (
        "batched",
        "one_by_one",
        "Examples are scored one at a time, so that no padding is read there.",
    ),
    "order": (
        "shuffled",
        "as_given",
        "Examples are trained on in the order of the file, the same in every epoch.",
    ),
    "schedule_length": (
        "batches",
        "examples",
        "The schedule is stepped once a batch but sized for one step an example, so that with 500 warm-up steps most "
        "of a task is warm-up, and the learning rate is never brought down again.",
    ),
    "heads": (
        "by_seed",
        "fixed",
        "Every head starts from seed 1311, whatever the run's: deviations over seeds leave out what heads add to them.",
    ),
    "data": (
        "corrected",
        "reference",
        "Tasks that give a reference variant use it: for Sentiment140, neutral merged into negative, a third class "
        "that never occurs, and evaluation on 1,000 rows that are all negative, where always answering negative scores "
        "1.00.",
    ),
    "perplexity": (
        "windows",
        "first_chunk",
        "Perplexity is of one chunk from the start of the text: of little text, in a context that may be longer or "
        "shorter than the windows'.",
    ),
    "indices": (
        "paper",
        "reference",
        "Columns and rows are drawn by 1 / (p + 0.001), with replacement: nearly uniformly where p is about 1/4096, "
        "and with duplicates.",
    ),
    "lora_start": (
        "peft",
        "reference",
        "LoRA's A starts as U(-1, 1)/sqrt(r) where PEFT has U(-1, 1)/sqrt(n): sqrt(n/r) times as large, so that the "
        "same learning rate moves the model as many times as far.",
    ),
}


class Protocol(BaseModel):
    """Which of the reference's peculiarities a run has.

    Two more of them change nothing that could be switched. The dense ``C U R`` that the reference builds in every
    forward pass gives the same numbers. Its indices come from NumPy's global generator and are not saved; here they are
    seeded and saved. That MRPC's majority answer scores 0.684 is in every table, under either protocol.
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
    lora_start: Literal["peft", "reference"] = "peft"

    @classmethod
    def named(cls, name: Literal["honest", "paper"], **switches: str) -> Protocol:
        """The honest or the paper's protocol, with some switches set otherwise."""
        values = {switch: paper if name == "paper" else honest for switch, (honest, paper, _) in SWITCHES.items()}
        return cls.model_validate({**values, **switches})

    @property
    def settings(self) -> dict[str, Any]:
        """The switches that are settings of the training and scoring."""
        return self.model_dump(include={"readout", "evaluation", "order", "schedule_length", "heads"})

    @property
    def curlora_options(self) -> dict[str, Any]:
        """How columns and rows are drawn, unless a method's own options say."""
        return {"sampling": "reference", "replacement": True} if self.indices == "reference" else {}

    def describe(self) -> dict[str, str]:
        """The switches that are set as the reference has them, with what that does to the numbers."""
        values = self.model_dump()
        return {name: text for name, (_, paper, text) in SWITCHES.items() if values[name] == paper}
