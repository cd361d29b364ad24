"""Write the tables and figures of the documentation from the raw results in this folder.

A table without a place on any page is an error. With ``--check`` nothing is written: the pages are named whose tables
are out of date.

    python benchmarks/pages.py            # make pages
    python benchmarks/pages.py --check
"""

import argparse
import sys
from pathlib import Path

import promise
from engine import page as engine
from harness import page as harness
from paper import page as paper
from proof import page as proof
from speed import page as speed
from tables import filled

from demo import page as demo
from guard import page as guard

DOCS = Path(__file__).parent.parent / "docs"
README = DOCS.parent / "README.md"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    tables = {}
    for subject in (demo, engine, guard, harness, paper, promise, proof, speed):
        for name, table in subject.tables().items():
            if name in tables:
                sys.exit(f"Two tables are called {name}: rename that of {subject.__name__}.")
            tables[name] = table
    texts = {page: page.read_text(encoding="utf-8") for page in (README, *sorted(DOCS.glob("*.md")))}
    if nowhere := [name for name in tables if not any(f"<!-- table: {name} -->" in text for text in texts.values())]:
        sys.exit(f"No page has a place for {', '.join(nowhere)}: add <!-- table: {nowhere[0]} --> and <!-- end -->.")
    made = {page: filled(text, tables) for page, text in texts.items()}
    changed = {page: text for page, text in made.items() if text != texts[page]}
    if options.check:
        told = "".join(f"{page.name} has outdated tables: run make pages.\n" for page in changed)
        sys.exit(told or None)
    for page, text in changed.items():
        page.write_text(text, encoding="utf-8")
    for subject in (guard, proof, speed):
        subject.figures(DOCS)


if __name__ == "__main__":
    main()
