import json
import math

import pytest

from curlora.continual.results import SCHEMA_VERSION, ResultsError, RunResults, environment
from curlora.report import render
from tests.results import make_results


def test_round_trip(tmp_path):
    results = make_results()
    results.save(tmp_path / "results.json")
    assert RunResults.load(tmp_path / "results.json") == results
    assert json.loads((tmp_path / "results.json").read_text())["schema_version"] == SCHEMA_VERSION
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_a_run_that_diverged_can_be_read_again(tmp_path):
    results = make_results()
    broken = results.methods[1].model_copy(
        update={"losses": [(5, float("nan"))], "perplexity": [20.0, float("inf"), float("inf"), float("inf")]}
    )
    results = results.model_copy(update={"methods": [results.methods[0], broken]})
    results.save(tmp_path / "results.json")
    again = RunResults.load(tmp_path / "results.json")
    assert again.methods[1].perplexity == broken.perplexity
    assert math.isnan(again.methods[1].losses[0][1])
    assert "inf" in render(again)


def test_derived_figures():
    method = make_results().methods[1]
    assert method.average_accuracy == pytest.approx((0.79 + 0.805 + 0.88) / 3)
    assert method.forgetting == pytest.approx((0.035 - 0.015) / 2)
    assert method.perplexity_rise == pytest.approx(21.4 / 20.2 - 1)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"schema_version": 1, "unknown": 2}'])
def test_other_files_are_refused_by_name(text, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ResultsError, match=r"results\.json does not hold the results of a run"):
        RunResults.load(path)


def test_environment_names_what_results_depend_on():
    assert {"python", "torch", "transformers", "peft", "curlora", "device", "threads"} <= set(environment())
