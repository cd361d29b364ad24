import json
import math
import re
from pathlib import Path

import pytest

from curlora.continual.results import (
    SCHEMA_VERSION,
    MethodResult,
    ResultsError,
    RunResults,
    Score,
    SeedResult,
    TaskInfo,
    TextScore,
    environment,
)
from curlora.continual.united_runs import differing, unite
from curlora.report import render
from tests.results import TEXT, make_method, make_results, make_seed


def test_round_trip(tmp_path):
    results = make_results(seeds=(0, 3))
    results.save(tmp_path / "results.json")
    assert RunResults.load(tmp_path / "results.json") == RunResults.load(str(tmp_path / "results.json")) == results
    assert json.loads((tmp_path / "results.json").read_text())["schema_version"] == SCHEMA_VERSION
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_a_run_that_diverged_can_be_read_again(tmp_path):
    broken = make_method("lora", "LoRA", [[0.5], [0.5, 0.5], [0.5, 0.5, 0.5]], [20.2, math.inf, math.inf, math.inf])
    seed = broken.seeds[0].model_copy(update={"losses": [(5, math.nan)]})
    results = make_results(methods=[make_results().methods[0], broken.model_copy(update={"seeds": [seed]})])
    results.save(tmp_path / "results.json")
    again = RunResults.load(tmp_path / "results.json").methods[1].seeds[0]
    assert [score.perplexity for score in again.text()] == [20.2, math.inf, math.inf, math.inf]
    assert math.isnan(again.losses[0][1])
    assert "inf" in render([RunResults.load(tmp_path / "results.json")])


def test_figures_of_one_seed():
    method = make_results().methods[1]
    assert method.average_accuracy.mean == pytest.approx((0.79 + 0.805 + 0.88) / 3)
    assert method.learning_accuracy.mean == pytest.approx((0.825 + 0.79 + 0.88) / 3)
    assert method.forgetting.mean == pytest.approx((0.035 - 0.015) / 2)
    assert method.backward_transfer.mean == pytest.approx((-0.035 + 0.015) / 2)
    assert method.perplexity_rise.mean == pytest.approx(21.4 / 20.2 - 1)
    assert method.forward_transfer is None
    assert method.average_accuracy.deviation is None
    assert method.tokens_per_second == pytest.approx(10_000 / 30)


def test_figures_over_seeds():
    method = make_results(seeds=(0, 1, 2)).methods[1]  # 0.00, 0.01 and 0.02 higher
    assert method.accuracy(1, 0).mean == pytest.approx(0.825)
    assert method.accuracy(1, 0).deviation == pytest.approx(0.01)
    assert method.perplexity.mean == pytest.approx(21.5)
    assert method.perplexity.deviation == pytest.approx(0.1)
    assert method.forgetting.deviation == pytest.approx(0, abs=1e-9)
    assert method.seconds == 40


def test_forward_transfer_needs_every_seed():
    accuracy, perplexity = [[0.8], [0.8, 0.9]], [20.0, 20.1, 20.2]
    scores = dict(before=[Score(accuracy=a, loss=1) for a in (0.1, 0.5)], base=[Score(accuracy=0.2, loss=1)] * 2)
    seeds = [make_seed(0, accuracy, perplexity, **scores), make_seed(1, accuracy, perplexity)]
    method = make_method("lora", "LoRA", accuracy, perplexity).model_copy(update={"seeds": seeds[:1]})
    assert method.forward_transfer.mean == pytest.approx(0.5 - 0.2)
    assert method.model_copy(update={"seeds": seeds}).forward_transfer is None


def test_the_first_text_is_the_one_of_summaries():
    seed = make_seed(0, [[0.8]], [20.0, 22.0])
    seed = seed.model_copy(update={"heldout": {**seed.heldout, "other": [TextScore(perplexity=5, drift=0)] * 2}})
    assert seed.perplexity_rise == pytest.approx(0.1)
    assert seed.text() == seed.text(TEXT) != seed.text("other")


def test_perplexity_of_completions():
    assert Score(accuracy=0.5, loss=1.5).perplexity == pytest.approx(math.exp(1.5))
    assert Score(accuracy=0.0, loss=1e6).perplexity == math.inf


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"schema_version": 4, "unknown": 2}'])
def test_other_files_are_refused_by_name(text, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ResultsError, match=r"results\.json does not hold valid results of a run"):
        RunResults.load(path)


@pytest.mark.parametrize(
    ("heading", "record"),
    [("The run:", RunResults), ("A task:", TaskInfo), ("A method:", MethodResult), ("A seed of a method", SeedResult)],
)
def test_every_field_is_documented(heading, record):
    text = (Path(__file__).parents[2] / "docs" / "results.md").read_text(encoding="utf-8")
    assert f"## Version {SCHEMA_VERSION}\n" in text
    table = text.split(f"\n{heading}")[1].split("\n\n")[1]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(record.model_fields)


def test_results_from_before_examples_were_counted_are_read_and_united_with_new_ones(tmp_path):
    results = make_results()
    tasks = [task.model_copy(update={"train_cut": 4}) for task in results.tasks]
    results = results.model_copy(update={"tasks": tasks})
    content = json.loads(results.model_dump_json())
    for task in content["tasks"]:
        for key in ("train_cut", "train_dropped", "evaluation_cut", "evaluation_dropped"):
            del task[key]
    for method in content["methods"]:
        for score in (score for row in method["seeds"][0]["scores"] for score in row):
            del score["unfinished"]
    (tmp_path / "results.json").write_text(json.dumps(content))
    old = RunResults.load(tmp_path / "results.json")
    assert old.tasks[0].train_cut == old.methods[0].seeds[0].scores[0][0].unfinished == 0
    assert old.methods == results.methods
    assert len(unite([results, old])) == 1
    other = old.model_copy(update={"tasks": [*old.tasks[:2], old.tasks[2].model_copy(update={"train_examples": 9})]})
    assert differing([results, other]) == ["tasks (tweets)"]


def test_environment_names_what_results_depend_on():
    assert {"python", "torch", "transformers", "peft", "curlora", "device", "threads"} <= set(environment())


def test_another_version_of_the_schema_is_one_sentence(tmp_path):
    (tmp_path / "results.json").write_text('{"schema_version": 2, "title": "t"}')
    with pytest.raises(ResultsError, match="has version 2 of the schema, but .* reads only 3 and 4"):
        RunResults.load(tmp_path / "results.json")
