"""What earlier trainings of an adapter have cost, and what is left of its lifetime's budget."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft import PeftConfig

from curlora.errors import GuardError
from curlora.guard.ledger import OTHER_LEDGER, Ledger, TextOutcome, belongs_to
from curlora.train.errors import TrainError
from curlora.train.folder import RECORD
from curlora.train.outcome import Budget
from curlora.tuner.config import CurloraConfig

__all__ = ["History", "history_of"]


@dataclass(frozen=True)
class History:
    """The earlier trainings of an adapter.

    Args:
        lifetime: the largest allowed rise of perplexity over all trainings; ``None`` without such a limit.
        risen: the largest rise of a text so far; 0 if none has risen.
        texts: the names of the texts that were measured.
    """

    lifetime: float | None = None
    risen: float = 0.0
    texts: tuple[str, ...] = ()

    @property
    def left(self) -> float | None:
        """The rest of the lifetime's budget; ``None`` if there is no such budget, NaN if a rise is not a number."""
        return None if self.lifetime is None else self.lifetime - self.risen

    @classmethod
    def of(cls, lifetime: float | None, texts: Mapping[str, TextOutcome]) -> History:
        """Return the history with these outcomes of texts."""
        return cls(lifetime, float(numpy.max([0.0, *(text.rise for text in texts.values())])), tuple(texts))


def history_of(adapter: PeftConfig, folder: str | None, lifetime: float | None) -> History:
    """Return an adapter's history: from its ledger, or from the record of ``curlora train`` for an adapter without one.

    Args:
        adapter: the adapter's configuration.
        folder: the adapter's folder or hub id; ``None`` for a new adapter.
        lifetime: the lifetime that the user gives for this training, in place of an earlier one.

    Raises:
        TrainError: if the ledger is damaged, or if nothing is left of the lifetime's budget.
    """
    found = History()
    if folder is not None:
        try:
            found = _of_ledger(adapter) if isinstance(adapter, CurloraConfig) else _of_record(folder)
        except GuardError as error:
            raise TrainError(f"--continue-from {folder}: {error}") from error
    found = replace(found, lifetime=found.lifetime if lifetime is None else lifetime)
    if found.left is not None and not found.left > 0:
        raise TrainError(
            f"The lifetime's budget is used up: perplexity has risen by {found.risen:.2%} since the adapter's first "
            f"training, and {found.lifetime:.2%} is allowed. Give a larger --lifetime to train further."
        )
    return found


def _of_ledger(adapter: CurloraConfig) -> History:
    ledger = Ledger.of(adapter)
    if ledger is None:
        return History()
    if adapter.weights_file is not None and not belongs_to(ledger, adapter.weights_file):
        raise GuardError(OTHER_LEDGER)
    return History.of(ledger.lifetime, ledger.last_measured)


def _of_record(folder: str) -> History:
    """Read ``training.json``, which is there if ``curlora train`` has made the adapter.

    Raises:
        TrainError: if ``folder`` is a hub id, and the hub cannot be asked whether there is such a file; or if the file
            cannot be read.
    """
    path = Path(folder) / RECORD
    if not path.parent.is_dir():
        try:
            path = Path(hf_hub_download(folder, RECORD))
        except LocalEntryNotFoundError as error:
            raise TrainError(
                f"--continue-from {folder}: it is unknown what earlier trainings have cost, because {RECORD} is not in "
                "the cache and the hub cannot be reached. Connect to the hub, or download the whole repository."
            ) from error
        except EntryNotFoundError:
            return History()
    try:
        budget = Budget.model_validate(json.loads(path.read_text(encoding="utf-8"))["outcome"]["budget"])
    except FileNotFoundError:
        return History()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainError(
            f"--continue-from {folder}: its {RECORD} is not the record of a finished training, so it is unknown what "
            "earlier trainings have cost. Restore the file. If you remove it, earlier trainings count as nothing."
        ) from error
    return History.of(budget.lifetime, budget.texts)
