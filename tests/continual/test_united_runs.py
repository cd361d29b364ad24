"""Runs under the same conditions are merged; others stay separate."""

import pytest

from curlora.continual.united_runs import differing, unite
from tests.results import TEXT, make_results, make_task


def with_methods(results, *names):
    return results.model_copy(update={"methods": [m for m in results.methods if m.name in names]})


def changed(results, name, **changes):
    methods = [m.model_copy(update=changes) if m.name == name else m for m in results.methods]
    return results.model_copy(update={"methods": methods})


def seeds(results):
    return {method.name: [seed.seed for seed in method.seeds] for method in results.methods}


def test_methods_and_seeds_are_united():
    first = with_methods(make_results(), "frozen", "lora")
    second = with_methods(make_results(seeds=(1, 2)), "lora", "curlora")
    (merged,) = unite([first, second])
    assert seeds(merged) == {"frozen": [0], "lora": [0, 1, 2], "curlora": [1, 2]}
    assert merged.methods[1].seeds == [first.methods[1].seeds[0], *second.methods[0].seeds]


def test_of_a_method_with_one_seed_the_first_is_kept():
    first, second = make_results(), make_results(seeds=(7, 0))  # seed 0 has other figures in the second run
    (merged,) = unite([first, second])
    assert seeds(merged) == {"frozen": [0, 7], "lora": [0, 7], "curlora": [0, 7]}
    assert merged.methods[1].seeds[0] == first.methods[1].seeds[0] != second.methods[1].seeds[1]


def test_one_run_is_left_as_it_is():
    results = make_results()
    assert unite([results]) == [results]
    assert unite([results, results]) == [results]


def test_one_name_for_different_methods_stays_two():
    first, second = make_results(), changed(make_results(seeds=(1,)), "lora", learning_rate=5e-4)
    third = changed(make_results(seeds=(2,)), "lora", learning_rate=5e-4)
    (merged,) = unite([first, second, third])
    assert seeds(merged) == {"frozen": [0, 1, 2], "lora": [0], "lora (2)": [1, 2], "curlora": [0, 1, 2]}
    assert [m.label for m in merged.methods if m.name == "lora (2)"] == ["LoRA (2)"]


def test_settings_that_came_later_had_their_default():
    earlier = make_results()
    later = make_results(seeds=(1,), settings={**earlier.settings, "fixed_batches": False, "cache_frozen_layers": True})
    other = make_results(seeds=(2,), settings={**earlier.settings, "fixed_batches": True})
    merged, alone = unite([earlier, later, other])
    assert seeds(merged)["lora"] == [0, 1]
    assert seeds(alone)["lora"] == [2]
    assert differing([earlier, other]) == ["settings (fixed_batches)"]


RECIPE = {"model": {"name": "/a/model"}, "tasks": [{"name": "reviews"}], "methods": [{"name": "lora"}]}


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"base_model": "another"}, "base model"),
        ({"recipe": {**RECIPE, "model": {"name": "/a/model", "dtype": "bfloat16"}}}, "base model"),
        (
            {"tasks": [make_task(name, majority_rate=0.6) for name in ("reviews", "reuters", "tweets")]},
            "tasks (reviews, reuters, tweets)",
        ),
        ({"heldout": {TEXT: "another part of it"}}, f"held-out texts ({TEXT})"),
        ({"protocol": {"order": "as it comes"}}, "protocol (order)"),
        ({"settings": {"epochs": 2, "batch_size": 8}}, "settings (epochs)"),
        (
            {"recipe": {**RECIPE, "tasks": [{"name": "reviews", "training": {"epochs": 3}}]}},
            "settings (training of reviews)",
        ),
    ],
)
def test_runs_that_measure_something_else_stay_apart(changes, what):
    first, other = make_results(recipe=RECIPE), make_results(**{"recipe": RECIPE, **changes})
    assert differing([first, other]) == [what]
    assert unite([first, other, first, other]) == [first, other]


def test_runs_whose_methods_use_other_texts_stay_apart():
    """A text that one of them used is none that no method has seen."""
    plain, guarded = make_results(), make_results(shown=[TEXT])
    assert len(unite([plain, guarded])) == 2
    assert differing([plain, guarded]) == ["texts that methods use"]


def test_where_a_model_lies_does_not_count():
    elsewhere = {**RECIPE, "model": {"name": "/b/model"}}
    assert differing([make_results(recipe=RECIPE), make_results(recipe=elsewhere)]) == []


def test_what_differs_between_united_runs_is_listed():
    first = make_results(recipe=RECIPE, environment={"torch": "2.12", "device": "A"})
    later = make_results(
        seeds=(1,),
        recipe={**RECIPE, "methods": [{"name": "lora"}, {"name": "curlora"}], "seeds": [1]},
        created="2026-02-02 00:00",
        environment={"torch": "2.12", "device": "B", "processes": "2"},
    )
    (merged,) = unite([first, later])
    assert merged.environment == {"torch": "2.12", "device": "A; B", "processes": "2"}
    assert merged.created == "2026-01-01 00:00, 2026-02-02 00:00"
    assert merged.recipe == {**RECIPE, "methods": [{"name": "lora"}, {"name": "curlora"}], "seeds": [0, 1]}
    assert unite([first, make_results(seeds=(1,))])[0].recipe is None
