"""Learning against forgetting, computed from known results."""

import math

import pytest

from curlora.continual.results import MethodResult, TextScore
from curlora.continual.task_measure import TaskMeasure
from curlora.continual.tradeoff import Limit, best_within, front, limited_text, limits_of, points
from curlora.report import render
from curlora.report.tables import within_limits
from tests.results import TEXT, make_results

GUARD, OTHER = "guard's", "another text"


def study(**changes):
    """Results of LoRA and CURLoRA, each on a grid, with their accuracy and their divergence on three texts."""
    results = make_results(seeds=(0, 1))
    frozen, lora, cur = results.methods
    made = [frozen.model_copy(update={"seeds": [with_texts(seed, 0, 0, 0) for seed in frozen.seeds]})]
    for method, name, grid in ((lora, "lora", ((1, 0.7, 0.01), (2, 0.8, 0.03), (3, 0.75, 0.05))),
                               (cur, "cur", ((1, 0.9, 0.009), (2, 0.95, 0.02)))):  # fmt: skip
        for value, accuracy, kl in grid:
            seeds = []
            for number, seed in enumerate(method.seeds):
                last = [score.model_copy(update={"accuracy": accuracy + 0.01 * number}) for score in seed.scores[-1]]
                changed = seed.model_copy(update={"scores": [*seed.scores[:-1], last]})
                seeds.append(with_texts(changed, kl, 2 * kl, 4 * kl))
            update = {
                "name": f"{name}@lr={value}",
                "grid": {"lr": value},
                "seeds": seeds,
                "label": f"{name}, lr {value}",
            }
            made.append(method.model_copy(update=update))
    fields = {"methods": made, "shown": [GUARD], "limits": {"kl": [0.012], "perplexity_increase": [0.001]}}
    heldout = {TEXT: "a text", OTHER: "another", GUARD: "the guard's"}
    return results.model_copy(update={**fields, "heldout": heldout, **changes})


def with_texts(seed, guard, first, second):
    def scores(kl):
        start = TextScore(perplexity=20.0, drift=0.0)
        return [start] * 3 + [TextScore(perplexity=20 * (1 + kl), drift=kl)]

    return seed.model_copy(update={"heldout": {TEXT: scores(first), OTHER: scores(second), GUARD: scores(guard)}})


def test_a_point_holds_what_was_learned_and_what_it_cost_on_each_kind_of_text():
    results = study()
    assert (limited_text(results), results.unseen) == (GUARD, [TEXT, OTHER])
    point = points(results)[2]
    assert isinstance(point.method, MethodResult)
    assert point.learned.mean == pytest.approx(0.805)
    assert point.learned.deviation == pytest.approx(0.01 / 2**0.5)
    assert point.limited.mean == pytest.approx(0.03)
    assert (point.mean.mean, point.worst.mean) == (pytest.approx(0.09), pytest.approx(0.12))
    assert (point.rise.mean, point.worst_rise.mean) == (pytest.approx(0.03), pytest.approx(0.12))


def test_the_best_within_a_limit():
    results = study()
    kl, rise = limits_of(results)
    assert (str(kl), str(rise)) == ("KL 0.012", "perplexity +0.1 %")
    best = best_within(points(results), kl)
    assert {entry: point.method.name for entry, point in best.items()} == {
        "frozen": "frozen", "lora": "lora@lr=1", "cur": "cur@lr=1",
    }  # fmt: skip
    best = best_within(points(results), Limit("kl", 0.04))
    assert (best["lora"].method.name, best["cur"].method.name) == ("lora@lr=2", "cur@lr=2")
    assert best_within(points(results), rise)["lora"] is None


def test_the_front_leaves_out_what_is_beaten():
    results = study()
    lora = [point for point in points(results) if point.method.entry == "lora"]
    # The third learns less and forgets more.
    assert [point.method.name for point in front(lora)] == ["lora@lr=1", "lora@lr=2"]


def test_without_a_guards_text_the_first_one_is_limited():
    assert limited_text(study(shown=[])) == TEXT


def test_where_all_is_text_the_loss_is_what_falls():
    results = study()
    tasks = [task.model_copy(update={"kind": "completion", "metric": "exact match"}) for task in results.tasks]
    losses = study(tasks=tasks)
    assert TaskMeasure.of(results).learned_name == "average accuracy"
    assert TaskMeasure.of(losses).learned_name == "fall of loss, nats"
    frozen, lora = losses.methods[:2]
    expected = sum(score.loss for score in frozen.seeds[0].scores[-1]) / 3
    expected -= sum(score.loss for score in lora.seeds[0].scores[-1]) / 3
    assert points(losses)[1].learned.mean == pytest.approx(expected)


def test_it_is_in_the_tables_and_on_the_page():
    from rich.console import Console

    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for table in within_limits(study()):
        console.print(table)
    text = console.export_text()
    assert "within KL 0.012" in text
    assert "none is within" in text
    page = render([study()])
    assert "The best of each method within KL 0.012" in page
    assert 'id="limit-2"' in page
    assert "One point for each value of the grid." in page
    assert "One point for each" not in render([make_results()])  # a single text, whose perplexity says the same


def test_a_run_that_diverged_is_on_no_front_and_is_the_worst():
    results = study()
    lora = [method for method in results.methods if method.entry == "lora"]
    broken = [with_texts(seed, math.nan, 0.001, math.nan) for seed in lora[0].seeds]
    diverged = lora[0].model_copy(update={"name": "lora@lr=9", "grid": {"lr": 9}, "seeds": broken})
    methods = [diverged, *results.methods, diverged]
    known = [point for point in points(study(methods=methods)) if point.method.entry == "lora"]
    assert math.isnan(known[0].worst.mean)
    assert math.isnan(known[0].mean.mean)
    assert [point.method.name for point in front(known)] == ["lora@lr=1", "lora@lr=2"]
