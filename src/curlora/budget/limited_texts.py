"""The texts that a budget limits: their limits, their rows of tokens, and the measurement of each."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy
from torch import nn

from curlora.budget.start import Start
from curlora.budget.work import WRITTEN
from curlora.errors import GuardError
from curlora.guard.ledger import TextOutcome
from curlora.guard.share import as_share
from curlora.text.own_text import own_text
from curlora.text.perplexity import perplexity
from curlora.text.processes import rank_and_count
from curlora.text.progress import Shown, part_of, stage
from curlora.text.rows import Rows, Texts, digest, named_texts, rows_of

__all__ = ["OWN_TEXT", "LimitedTexts"]

OWN_TEXT = "own text"
_logger = logging.getLogger(__name__)
_CHANGED = 0.01  # a larger difference between two measurements of one text is not due to rounding


class LimitedTexts:
    """Reads texts, measures a model on them, and compares the measurements with the texts' limits.

    Args:
        limit: the limit of a text that has none in ``limits``, as a relative rise of perplexity.
        texts, limits, tokens, max_length, batch_size, seed: see :class:`curlora.ForgettingBudget`.

    Attributes:
        rows: the texts' rows of tokens by name, after :meth:`read`. A measurement of the user's own has none.

    Raises:
        GuardError: if a limit is not a share between 0 and 1 or belongs to no text, or a text is missing or has the
            wrong type.
    """

    def __init__(
        self,
        limit: float,
        texts: Mapping[str, Texts] | Texts | None,
        limits: Mapping[str, float],
        *,
        tokens: int,
        max_length: int,
        batch_size: int,
        seed: int,
    ) -> None:
        self.texts = {OWN_TEXT: None} if texts is None else named_texts(texts)
        if not isinstance(limits, Mapping):
            raise GuardError(f"limits must be a mapping from names of texts to limits, got {limits!r:.80}.")
        given = {name: as_share(f"limits[{name!r}]", value) for name, value in limits.items()}
        if unknown := sorted(set(given) - set(self.texts)):
            raise GuardError(f"limits has {unknown[0]!r}, which is none of the texts: {sorted(self.texts)}.")
        self.limits = {name: given.get(name, limit) for name in self.texts}
        self.tokens, self.max_length, self.batch_size, self.seed = tokens, max_length, batch_size, seed
        self.rows: dict[str, Rows] = {}
        self._shown: Shown = False
        self._measured: dict[str, float] = {}  # by worst_share

    def read(self, model: nn.Module, tokenizer: Any, shown: Shown) -> None:
        """Read the rows of each text, or let the model write them.

        Args:
            model: the model that trains.
            tokenizer: its tokenizer; ``None`` if all texts are rows of tokens or measurements.
            shown: how to show the progress of this and of later measurements.

        Raises:
            GuardError: if a text cannot be read, or there is no tokenizer where one is needed.
        """
        self._shown, self._measured = shown, {}
        texts = {name: text for name, text in self.texts.items() if not callable(text)}
        texts = texts or {OWN_TEXT: None}  # with measurements only, the restraint still needs a text
        if tokenizer is None and any(text is None for text in texts.values()):
            raise GuardError(
                "The model cannot write the text that forgetting is measured on without its tokenizer: pass "
                "processing_class=tokenizer to the trainer, or give texts."
            )
        for name, text in texts.items():
            if isinstance(text, str) and rank_and_count()[0] == 0:  # a Path says so itself
                _logger.warning("The text %r is read from the file %s.", name, text)
        tokens, length = self.tokens, self.max_length
        writing = part_of(shown, WRITTEN * tokens)
        self.rows = {
            name: own_text(model, tokenizer, tokens=tokens, max_length=length, seed=self.seed, progress=writing)
            if text is None
            else rows_of(name, text, tokenizer, tokens=tokens, max_length=length)
            for name, text in texts.items()
        }

    def measure(self, model: nn.Module, names: Iterable[str] | None = None) -> dict[str, float]:
        """Return the perplexity of each text, or the value of the user's measurement.

        Args:
            model: the model.
            names: the names of the texts; all if ``None``.
        """
        return {name: self._measure(model, name) for name in (self.texts if names is None else names)}

    def worst_share(self, model: nn.Module, start: Start) -> float:
        """Measure all texts, and return the largest share of its limit that a text has used since ``start``."""
        # The number of measurements until all limits hold is unknown, so progress counts only the first as work.
        again = bool(self._measured)
        self._measured = {name: self._measure(model, name, again) for name in self.texts}
        # A measurement of the user's own that is negative means nothing, and counts as over its limit.
        rises = {
            name: value / start.base[name] - 1 if value >= 0 else math.nan for name, value in self._measured.items()
        }
        shares = [rise / start.limits[name] for name, rise in rises.items()]
        return float(numpy.max(shares))  # the built-in max would overlook a measurement that is not a number

    def outcomes(self, start: Start) -> dict[str, TextOutcome]:
        """Return what :meth:`worst_share` has measured last, for each text."""
        return {
            name: TextOutcome(
                before=(before := start.base[name]),
                after=now,
                rise=now / before - 1,
                limit=start.limits[name],
                tokens=sum(map(len, self.rows.get(name, []))),
                sha256=digest(self.rows[name]) if name in self.rows else None,
            )
            for name, now in self._measured.items()
        }

    def limits_from(
        self, base: Mapping[str, float], spent: Mapping[str, float], lifetime: float | None, known: bool
    ) -> dict[str, float]:
        """Return each text's limit for a training that begins, as a relative rise since before the first training.

        Args:
            base: the measurements of the base model.
            spent: the measurements of the model as it is.
            lifetime: the limit over all trainings, if there is one.
            known: whether the adapter's history says what earlier trainings have cost. If not, the user is told.

        Raises:
            GuardError: if a measurement is not a positive, finite number, or the lifetime's budget is used up.
        """
        limits: dict[str, float] = {}
        for name, before in base.items():
            if not (before > 0 and math.isfinite(before) and math.isfinite(spent[name])):
                raise GuardError(
                    f"The measure of {name!r} must be a positive, finite number. It is {before} for the base model and "
                    f"{spent[name]} before this training. Check the text or the measurement."
                )
            used = max(0.0, spent[name] / before - 1)
            stated = self.limits[name]
            limits[name] = used + stated
            if used > stated and lifetime is None and not known:
                warnings.warn(
                    f"The adapter has been trained before: the measure of {name!r} has already risen by {used:.2%} "
                    f"since the base model. This training may add {stated:.2%}. To limit both together, give lifetime.",
                    stacklevel=5,
                )
            if lifetime is not None:
                if used >= lifetime:
                    raise GuardError(
                        f"The lifetime's budget is used up: the measure of {name!r} has risen by {used:.2%} since the "
                        f"adapter's first training, and {lifetime:.2%} is allowed. Give a larger lifetime to "
                        "train further."
                    )
                limits[name] = min(limits[name], lifetime)
        return limits

    def stated(self) -> dict[str, Any]:
        """Return the limit of each text and the digest of its rows, which is ``None`` for a measurement."""
        return {
            name: [limit, digest(self.rows[name]) if name in self.rows else None] for name, limit in self.limits.items()
        }

    def check_stated(self, began_with: Mapping[str, Any]) -> list[str]:
        """Check that a training that resumes has the texts and limits that it began with.

        Args:
            began_with: what :meth:`stated` returned when it began.

        Returns:
            The texts that the base model has written anew, as on another machine. Nobody could give them again, so
            forgetting is counted on the new ones.

        Raises:
            GuardError: if another text or limit differs.
        """
        now = self.stated()
        differing = sorted(name for name in began_with.keys() | now.keys() if began_with.get(name) != now.get(name))
        rewritten = [
            name
            for name in differing
            if self.texts.get(name, "") is None and name in began_with and began_with[name][0] == now[name][0]
        ]
        if began_with and differing != rewritten:
            names = ", ".join(repr(name) for name in differing if name not in rewritten)
            raise GuardError(
                f"The training that resumes began with another limit or another text for {names}: it had "
                f"{_limits_of(began_with)}, and now there are {_limits_of(now)}. Give it the same texts and limits."
            )
        return rewritten

    def check_same(self, earlier: Mapping[str, TextOutcome], lifetime: float | None) -> None:
        """Check that each text that earlier trainings have measured is measured again.

        Raises:
            GuardError: if one is not, and a lifetime counts on it.
        """
        digests = {digest(rows) for rows in self.rows.values()}
        for name, text in earlier.items():
            if name not in self.texts and text.sha256 in digests:
                continue  # the same text under another name
            if name not in self.texts:
                problem = "is not among the texts of this training"
            elif self.texts[name] is None:
                continue  # the base model has written it: another sample of it, as on another machine, says as much
            elif text.sha256 is not None and text.sha256 != digest(self.rows.get(name, [])):
                problem = "is another text now, or is cut into other rows"
            else:
                continue
            found = (
                f"The text {name!r}, on which an earlier training of this adapter was measured, {problem}. What this "
                "training forgets of it would not be noticed"
            )
            if lifetime is None:
                warnings.warn(f"{found}.", stacklevel=5)
            else:
                raise GuardError(
                    f"{found}, and the lifetime's budget of {lifetime:.2%} counts on it. Give the same text under the "
                    "same name, with the same tokens and max_length. Further texts may be added."
                )

    def check_unchanged(
        self,
        earlier: Mapping[str, TextOutcome],
        newest: Collection[str],
        base: Mapping[str, float],
        spent: Mapping[str, float],
        lifetime: float | None,
    ) -> None:
        """Compare the measurements with those at the end of the last training, of the same text.

        They differ if the base model or the adapter has been changed where no fingerprint sees it: in the embeddings,
        in layers without an adapter, in the adapter's ``alpha``, or by another precision.

        Args:
            earlier: the outcomes of earlier trainings.
            newest: the names of those that the last training has measured; the adapter has not moved since.
            base, spent: the measurements of the base model, and of the model as it is.
            lifetime: the limit over all trainings, if there is one.

        Raises:
            GuardError: if they differ, and a lifetime counts on them.
        """
        for name, text in earlier.items():
            if name not in self.rows or text.sha256 is None or text.sha256 != digest(self.rows[name]):
                continue
            before = base[name] / text.before
            after = spent[name] / base[name] / (1 + text.rise)
            changed = [("base model", before), ("adapter", after if name in newest else 1.0)]
            what, ratio = next((one for one in changed if abs(one[1] - 1) > _CHANGED), (None, 1.0))
            if what is None:
                continue
            found = (
                f"The {what} is not what it was at the end of the adapter's last training: the perplexity of {name!r}"
                f"{'' if what == 'base model' else ' relative to the base model'} differs by {ratio - 1:+.1%}"
            )
            if lifetime is not None:
                raise GuardError(
                    f"{found}. So the lifetime's budget of {lifetime:.2%} cannot be counted. Use the model and the "
                    "adapter as they were, in the same precision."
                )
            warnings.warn(f"{found}. Forgetting is counted from the base model as it is now.", stacklevel=5)

    def _measure(self, model: nn.Module, name: str, again: bool = False) -> float:
        text, rows = self.texts[name], self.rows.get(name, Rows([]))
        shown = part_of(self._shown, 0 if again else sum(map(len, rows)), f"measuring {name}")
        if callable(text):
            with stage(shown, f"measuring {name}", None):
                found: Any = text()
            try:
                return float(found)
            except (TypeError, ValueError) as error:
                raise GuardError(f"The measurement {name!r} returned {found!r:.60}, not a number.") from error
        return perplexity(model, rows, max_length=self.max_length, batch_size=self.batch_size, progress=shown)


def _limits_of(stated: Mapping[str, Any]) -> str:
    return ", ".join(f"{name!r} (limit {limit:.2%})" for name, (limit, _) in stated.items())
