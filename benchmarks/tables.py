"""Make tables of raw results, and insert them into pages."""

import functools
import json
import re


@functools.cache
def lines(path):
    """Return the lines of a JSON Lines file; an empty list if it does not exist yet."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def table(header, rows):
    if not rows:
        return "Not measured yet."
    cells = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in cells)


def filled(text, tables):
    """Return a page's text with new tables between ``<!-- table: NAME -->`` and ``<!-- end -->``."""

    def fill(match):
        return f"{match[1]}\n{tables[match[2]]}\n{match[3]}"

    return re.sub(r"(<!-- table: (\w+) -->)\n.*?(<!-- end -->)", fill, text, flags=re.DOTALL)
