"""The page holds the figures, needs no network, and draws in a real browser."""

import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from curlora.report import format_size, format_time, render, write_report
from tests.results import make_results

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)


class Tables(HTMLParser):
    """Rows of cells of every table, by the table's id."""

    def __init__(self, html):
        super().__init__()
        self.tables, self.table, self.cell = {}, None, None
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        if tag == "table":
            self.table = self.tables.setdefault(dict(attributes)["id"], [])
        elif tag == "tr":
            self.table.append([])
        elif tag in ("td", "th"):
            self.cell = ""

    def handle_data(self, data):
        if self.cell is not None:
            self.cell += data

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.table[-1].append(self.cell.strip())
            self.cell = None


def test_the_tables_hold_the_figures():
    tables = Tables(render(make_results())).tables
    assert tables["summary"][2] == [
        "LoRA", "0.825", "+0.010", "20.20", "21.40", "+5.9 %", "1,290,240", "4.94 MiB", "40 s",
    ]  # fmt: skip
    matrix = tables["matrix"]
    assert matrix[1] == ["always the majority class", "", "0.500", "0.500", "0.500"]
    assert matrix[2] == ["Frozen <heads>", "reviews", "0.740", "", ""]
    assert matrix[7] == ["", "tweets", "0.790", "0.805", "0.880"]


def test_names_are_escaped():
    assert "<heads>" not in render(make_results())


def test_the_page_needs_no_network():
    html = render(make_results())
    assert not re.search(r"<script|<link|<img|@import|url\(\s*['\"]?http", html)
    assert not re.search(r"(?:src|href)\s*=\s*['\"](?!#)", html)


def test_the_page_is_the_same_for_the_same_results():
    assert render(make_results()) == render(make_results())


def test_a_run_of_one_task_and_one_method():
    results = make_results()
    short = results.methods[2].model_copy(update={"accuracy": [[0.8]], "perplexity": [20.0, 20.1], "losses": []})
    html = render(make_results(tasks=results.tasks[:1], methods=[short]))
    assert Tables(html).tables["summary"][1][:3] == ["CURLoRA", "0.800", "–"]


def test_it_is_written_in_one_piece(tmp_path):
    write_report(make_results(), tmp_path / "report.html")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize(("seconds", "text"), [(3.4, "3 s"), (119, "119 s"), (150, "2.5 min")])
def test_times(seconds, text):
    assert format_time(seconds) == text


@pytest.mark.parametrize(("size", "text"), [(0, "none"), (140_900, "137.6 KiB"), (5_180_000, "4.94 MiB")])
def test_sizes(size, text):
    assert format_size(size) == text


@pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here to open the report in (Debian: apt-get install chromium)"
)
@pytest.mark.parametrize("width", [1200, 390])
def test_a_browser_draws_it(width, tmp_path):
    write_report(make_results(), tmp_path / "report.html")
    base = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={width},1000"]
    base += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000"]
    url = (tmp_path / "report.html").as_uri()
    dom = subprocess.run([*base, "--dump-dom", url], capture_output=True, text=True, timeout=120, check=True).stdout
    assert Tables(dom).tables["summary"][3][0] == "CURLoRA"
    assert dom.count("<svg") == 4
    picture = tmp_path / "page.png"
    subprocess.run([*base, f"--screenshot={picture}", url], capture_output=True, timeout=120, check=True)
    from matplotlib.image import imread

    pixels = imread(picture)[..., :3]
    assert pixels.shape[1] == width
    coloured = (pixels.max(-1) - pixels.min(-1)) > 0.3  # lines and markers of the plots
    assert coloured.sum() > 200
