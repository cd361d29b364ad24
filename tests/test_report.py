"""The page shows the figures, needs no network, and renders in a real browser."""

import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.image import imread

from curlora.continual.results import RunResults, Score, Statistic, TextScore
from curlora.report import render, write_report
from curlora.report.formatting import format_percent, format_size, format_statistic, format_time
from tests.results import TEXT, make_method, make_results, make_results_by_loss, make_seed, make_task, with_guard
from tests.test_tables import with_long_examples

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)


class Tables(HTMLParser):
    """Parses the rows of cells of every table, by the table's id."""

    def __init__(self, html):
        super().__init__()
        self.tables, self.table, self.cell, self.drawing = {}, None, None, 0
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        if tag == "table":
            self.table = self.tables.setdefault(dict(attributes)["id"], [])
        elif tag == "tr":
            self.table.append([])
        elif tag in ("td", "th"):
            self.cell = ""
        elif tag == "svg":
            self.drawing += 1

    def handle_data(self, data):
        if self.cell is not None and not self.drawing:
            self.cell += data

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.table[-1].append(" ".join(self.cell.split()))
            self.cell = None
        elif tag == "svg":
            self.drawing -= 1


def tables(*runs):
    return Tables(render(runs)).tables


def panels(html):
    """Return the plots by name, in order; several may have the same name."""
    found = re.findall(r'<svg role="img" aria-label="([^"]*)"(.*?)</svg>', html, re.DOTALL)
    return {name: [svg for other, svg in found if other == name] for name, _ in found}


def test_the_tables_hold_the_figures():
    found = tables(make_results())
    assert found["summary"][1][:3] == ["always the majority class", "0.500", ""]
    assert found["summary"][3] == [
        "LoRA", "0.825", "0.832", "+0.010", "-0.010", "20.20", "21.40", "+5.9 %", "0.0240", "1,290,240", "4.94 MiB",
        "40 s", "333",
    ]  # fmt: skip
    assert len({len(row) for row in found["summary"]}) == 1
    matrix = found["matrix"]
    assert matrix[1] == ["always the majority class", "", "0.500", "0.500", "0.500"]
    assert matrix[2] == ["Frozen <heads>", "reviews", "0.740", "", ""]
    assert matrix[7] == ["", "tweets", "0.790", "0.805", "0.880"]
    assert found["methods"][2] == ["LoRA", "lora", "0.001", "r 16", "", "0"]
    assert set(found) == {"summary", "matrix", "methods"}


def test_a_run_of_answers_shows_their_loss():
    html = render([make_results_by_loss()])
    found = Tables(html).tables
    assert found["summary"][0][1:5] == ["fallof loss, nats", "fallwhen learned", "forgetting", "backwardtransfer"]
    assert found["summary"][2][:5] == ["LORA", "0.450", "0.600", "+0.300", "-0.300"]
    assert found["completions"][3] == ["LORA", "sums", "1.400", "4.06", "0.000", "", "", ""]
    assert found["completions"][4] == ["", "dialogues", "1.700", "5.47", "0.000", "0.900", "2.46", "0.000"]
    assert "matrix" not in found
    assert "ccuracy" not in html
    assert {"loss and perplexity", "plasticity and forgetting", "sums", "dialogues"} <= set(panels(html))
    other = tables(make_results_by_loss(), make_results(base_model="another"))["overview"]
    assert other[0][3:5] == ["fall of loss, nats or average accuracy", "fall when learned or learning accuracy"]
    assert other[2][1:6] == ["LORA", "–", "0.450", "0.600", "+0.300"]


def test_what_was_cut_or_left_out_is_said():
    page = render([with_long_examples()])
    said = "3 cut and 1 left out in the training split, 2 left out in the evaluation split"
    assert f"; longer than max_length: {said}; up to 25% of the generated answers were cut off unfinished.</li>" in page
    assert "longer than max_length" not in render([make_results()])


def test_what_is_missing_is_said_until_another_run_has_it():
    half = make_results(missing=["lora, seed 1", "curlora, seed 1"])
    assert "<b>2 of 5 runs were not finished yet: lora, seed 1; curlora, seed 1.</b>" in render([half])
    other = make_results(seeds=(1,))
    other = other.model_copy(update={"methods": other.methods[:2]})  # without curlora
    assert "1 of 6 runs were not finished yet: curlora, seed 1." in render([half, other])
    assert "not finished" not in render([make_results()])


def test_figures_over_seeds_have_their_deviation():
    found = tables(make_results(seeds=(0, 1, 2)))
    lora = found["summary"][3]
    assert lora[1:3] == ["0.835 ± 0.010", "0.842 ± 0.010"]
    assert lora[5:8] == ["20.20", "21.50 ± 0.10", "+6.4 % ± 0.5 %"]
    assert found["matrix"][5] == ["LoRA", "reviews", "0.835 ± 0.010", "", ""]
    assert found["methods"][2][-1] == "0, 1, 2"


def test_points_have_error_bars_where_there_are_several_seeds():
    def bars(results):
        (svg,) = panels(render([results]))["accuracy and perplexity"]
        return svg.count('<g id="LineCollection')

    assert bars(make_results()) == 0
    assert bars(make_results(seeds=(0, 1, 2))) == 2 * 3  # a horizontal and a vertical bar for each method


def test_forward_transfer_is_shown_where_there_is_any():
    scores = dict(before=[Score(accuracy=a, loss=1) for a in (0.1, 0.5)], base=[Score(accuracy=0.2, loss=1)] * 2)
    accuracy, perplexity = [[0.8], [0.8, 0.9]], [20.0, 20.1, 20.2]
    with_it = make_method("lora", "LoRA", accuracy, perplexity)
    with_it = with_it.model_copy(update={"seeds": [make_seed(0, accuracy, perplexity, **scores)]})
    methods = [with_it, make_method("curlora", "CURLoRA", accuracy, perplexity)]
    rows = tables(make_results(tasks=[make_task("a"), make_task("b")], methods=methods))["summary"]
    assert rows[0][5] == "forwardtransfer"
    assert [row[5] for row in rows[2:]] == ["+0.300", "–"]
    assert len({len(row) for row in rows}) == 1


def test_runs_of_one_experiment_are_one_section():
    first = make_results()
    second = first.model_copy(update={"methods": make_results(seeds=(1,)).methods[1:]})
    found = tables(first, second)
    assert set(found) == {"summary", "matrix", "methods"}
    assert [row[-1] for row in found["methods"][1:]] == ["0", "0, 1", "0, 1"]
    assert len(found["summary"]) == 2 + 3


def test_several_runs_have_a_section_each_and_a_common_table():
    other = make_results(title="Another <model>", base_model="another", seeds=(0, 1))
    html = render([make_results(), other])
    found = Tables(html).tables
    assert found["overview"][1] == [
        "1. Three tasks, one after another", "Frozen <heads>", "0.500", "0.800", "0.800", "+0.000", "20.20", "+0.0 %",
        "0.0000", "0",
    ]  # fmt: skip
    assert [row[1] for row in found["overview"][1:]] == 2 * ["Frozen <heads>", "LoRA", "CURLoRA"]
    assert found["overview"][4][0] == "2. Another <model>"
    assert found["overview"][5][3] == "0.830 ± 0.007"
    assert found["summary-1"][3][1] == "0.825"
    assert found["summary-2"][3][1] == "0.830 ± 0.007"
    assert "The runs differ in base model: their figures cannot be compared directly." in html
    assert len(panels(html)["plasticity and forgetting"]) == 3  # one of all runs, and one of each run
    assert "differ in" not in render([make_results()])


def test_every_picture_is_there():
    found = panels(render([make_results(seeds=(0, 1))]))
    assert list(found) == [
        "reviews", "reuters", "tweets", "Frozen &lt;heads&gt;", "LoRA", "CURLoRA", "accuracy and perplexity",
        "plasticity and forgetting", "trained parameters", "training loss",
    ]  # fmt: skip
    assert re.findall(r">(0\.\d\d\d)<", found["LoRA"][0]) == ["0.830", "0.820", "0.795", "0.795", "0.810", "0.885"]
    assert "1,290,240" in found["trained parameters"][0]


def test_many_methods_can_be_told_apart():
    methods = [make_method(f"m{n}", f"method {n}", [[0.8]], [20, 20 + n], 10, 10) for n in range(14)]
    html = render([make_results(tasks=[make_task("a")], methods=methods)])
    keys = re.findall(r'<svg class="key".*?</svg>', html, re.DOTALL)
    assert len(set(keys)) == 14


def test_tasks_of_completions_have_their_loss_and_perplexity():
    chat = make_task("chat", kind="chat", metric="exact match", labels=[], majority_rate=0.01)
    method = make_method("lora", "LoRA", [[0.9], [0.8, 0.25]], [20.0, 20.1, 20.2])
    results = make_results(tasks=[make_task("a"), chat], methods=[method])
    found = tables(results)
    assert found["completions"] == [
        ["method", "after", "chatloss", "chatperplexity"],
        ["LoRA", "a", "", ""],
        ["", "chat", "0.750", f"{math.exp(0.75):.2f}"],
    ]
    assert found["matrix"][0] == ["method", "after", "a", "chatexact match"]


def test_several_texts_have_a_table():
    method = make_method("lora", "LoRA", [[0.9]], [25.0, 26.0], seeds=(0, 1))
    code = [TextScore(perplexity=10, drift=0), TextScore(perplexity=15, drift=0.5)]
    seeds = [seed.model_copy(update={"heldout": {**seed.heldout, "code": code}}) for seed in method.seeds]
    method = method.model_copy(update={"seeds": seeds})
    heldout = {TEXT: "prose (9 tokens)", "code": "code (7 tokens)"}
    found = tables(make_results(tasks=[make_task("a")], methods=[method], heldout=heldout))
    assert found["texts"][1:] == [
        ["prose (9 tokens)", "LoRA", "25.00", "26.05 ± 0.07", "+4.2 % ± 0.3 %", "0.0200 ± 0.0000"],
        ["code (7 tokens)", "LoRA", "10.00", "15.00 ± 0.00", "+50.0 % ± 0.0 %", "0.5000 ± 0.0000"],
    ]


def test_how_a_guards_budget_was_kept_has_a_table():
    found = tables(with_guard(make_results()))["guarded"]
    assert found[1:] == [
        ["CURLoRA", "reviews", "0.0050", "+0.60 %", "–", "1.00 %", "1.00"],
        ["", "reuters", "0.0098", "+0.99 %", "–", "1.00 %", "0.50"],
        ["", "tweets", "0.0099", "+1.00 %", "–", "1.00 %", "1.00"],
    ]
    assert "guarded" not in tables(make_results())


def test_protocol_settings_and_recipe_are_shown():
    recipe = {"title": "<b>", "methods": [{"name": "lora", "learning_rate": 0.001}], "seeds": [0, 1]}
    html = render([make_results(protocol={"lora_init": "It starts elsewhere."}, recipe=recipe)])
    assert "<dt>lora init</dt><dd>It starts elsewhere.</dd>" in html
    assert "<dt>batch size</dt><dd>8</dd>" in html
    assert "<dt>device</dt><dd>CPU (x86_64)</dd>" in html
    assert "title: &lt;b&gt;\nmethods:\n- name: lora\n  learning_rate: 0.001\nseeds:\n- 0\n- 1\n" in html
    assert "recipe" not in render([make_results()])


def test_names_are_escaped():
    html = render([make_results(title="<i>", tasks=[make_task(name) for name in ("reviews", "reuters", "tweets")])])
    assert "<heads>" not in html
    assert "<i>" not in html


def test_the_page_needs_no_network():
    html = render([make_results(), make_results(base_model="another")])
    assert not re.search(r"<script|<link|<img|@import|url\(\s*['\"]?http", html)
    assert not re.search(r"(?:src|href)\s*=\s*['\"](?!#)", html)


def test_the_page_is_the_same_for_the_same_results():
    assert render([make_results()]) == render([make_results()])


def test_a_run_of_one_task_and_one_method():
    method = make_method("curlora", "CURLoRA", [[0.8]], [20.0, 20.1])
    method = method.model_copy(update={"seeds": [method.seeds[0].model_copy(update={"losses": []})]})
    html = render([make_results(tasks=[make_task("a")], methods=[method])])
    assert Tables(html).tables["summary"][2][:5] == ["CURLoRA", "0.800", "0.800", "–", "–"]
    assert "plasticity and forgetting" not in panels(html)
    assert "trained parameters" not in panels(html)


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
@pytest.mark.parametrize("perplexity", [math.inf, math.nan, 1e300])
def test_a_method_that_diverged(perplexity, seeds):
    results = make_results(seeds=seeds)
    broken = make_method("lora", "LoRA", [[0.5], [0.5, 0.5], [0.5, 0.5, 0.5]], [20.2, 21, 22, perplexity], 9, 9, seeds)
    lost = [(5, 1.0), (10, math.nan), (15, math.inf)]
    broken = broken.model_copy(update={"seeds": [s.model_copy(update={"losses": lost}) for s in broken.seeds]})
    html = render([results.model_copy(update={"methods": [results.methods[0], broken]})])
    assert Tables(html).tables["summary"][3][6].split()[0] == format_statistic(Statistic.of([perplexity]), digits=2)
    assert "Diverged, and not shown on the panel of perplexity: LoRA." in html
    assert re.search(r"nan|inf", "".join(re.findall(r' d="([^"]*)"', html))) is None


def test_it_is_written_in_one_piece(tmp_path):
    write_report([make_results()], tmp_path / "report.html")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize(("seconds", "text"), [(3.4, "3 s"), (119, "119 s"), (150, "2.5 min")])
def test_times(seconds, text):
    assert format_time(seconds) == text


@pytest.mark.parametrize(("size", "text"), [(0, "none"), (140_900, "137.6 KiB"), (5_180_000, "4.94 MiB")])
def test_sizes(size, text):
    assert format_size(size) == text


@pytest.mark.parametrize(
    ("mean", "deviation", "options", "text"),
    [
        (0.825, None, {}, "0.825"),
        (0.825, 0.01, {}, "0.825 ± 0.010"),
        (0.01, 0.02, {"signed": True}, "+0.010 ± 0.020"),
        (21.404, None, {"digits": 2}, "21.40"),
        (math.inf, None, {"signed": True}, "inf"),
        (math.nan, math.nan, {}, "nan ± nan"),
        (1e300, None, {"digits": 2}, "1.00e+300"),
    ],
)
def test_statistics(mean, deviation, options, text):
    assert format_statistic(Statistic(mean=mean, deviation=deviation), **options) == text


def test_per_cent():
    assert format_percent(Statistic(mean=0.0594, deviation=None)) == "+5.9 %"
    assert format_percent(Statistic(mean=-0.0594, deviation=0.004)) == "-5.9 % ± 0.4 %"


browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here to open the report in (Debian: apt-get install chromium)"
)


def study():
    """Results with grids, limits and many texts."""
    return RunResults.load(Path(__file__).parent.parent / "benchmarks" / "proof" / "gsm8k" / "results.json")


def chromium(folder, *arguments):
    base = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=2000"]
    base += [f"--user-data-dir={folder / 'profile'}"]
    return subprocess.run([*base, *arguments], capture_output=True, text=True, timeout=900, check=True).stdout


@browser
@pytest.mark.parametrize("width", [1200, 390])
def test_a_browser_draws_it(width, tmp_path):
    page, window = tmp_path / "report.html", f"--window-size={width},1000"
    write_report([make_results(seeds=(0, 1)), make_results(base_model="another"), study()], page)
    dom = chromium(tmp_path, window, "--dump-dom", page.as_uri())
    assert Tables(dom).tables["summary-2"][4][0] == "CURLoRA"
    assert len(panels(dom)["training loss"]) == 3
    picture = tmp_path / "page.png"
    chromium(tmp_path, window, f"--screenshot={picture}", page.as_uri())
    pixels = imread(picture)[..., :3]
    assert pixels.shape[1] == width
    coloured = (pixels.max(-1) - pixels.min(-1)) > 0.3  # lines and markers of the plots
    assert coloured.sum() > 200


@browser
@pytest.mark.parametrize("width", [1200, 390])
def test_nothing_but_tables_scrolls_sideways(width, tmp_path):
    recipe = {"name": 300 * "x", "path": "/a/" + 90 * "b"}
    html = render(
        [make_results(seeds=(0, 1), recipe=recipe), make_results(base_model="another", title=200 * "t"), study()]
    )
    # In a frame, because a window cannot be as narrow as a phone. The page itself has no such script.
    report = "<script>parent.postMessage([innerWidth, document.documentElement.scrollWidth], '*')</script>"
    (tmp_path / "report.html").write_text(html + report)
    frame = tmp_path / "frame.html"
    frame.write_text(
        "<body><script>onmessage = message => document.body.id = message.data</script>"
        f'<iframe src="report.html" width="{width}" height="900" style="border: 0"></iframe>'
    )
    dom = chromium(tmp_path, "--dump-dom", frame.as_uri())
    assert re.search(r'<body id="([^"]*)"', dom)[1] == f"{width},{width}"


@browser
def test_it_can_be_printed(tmp_path):
    write_report([make_results(seeds=(0, 1)), study()], tmp_path / "report.html")
    chromium(tmp_path, f"--print-to-pdf={tmp_path / 'report.pdf'}", (tmp_path / "report.html").as_uri())
    printed = (tmp_path / "report.pdf").read_bytes()
    assert printed.startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b", printed)) >= 1
