"""The command line's tables show the figures within 80 columns."""

import io

import pytest
from rich.console import Console

from curlora.continual.results import TextScore
from curlora.report.tables import comparison, results_tables
from tests.results import TEXT, make_results, make_results_by_loss, make_task, with_guard


def printed(*parts, width=80):
    console = Console(file=io.StringIO(), width=width)
    for part in parts:
        console.print(part)
    return console.file.getvalue()


def rows(text):
    """Split every line into words."""
    return [line.split() for line in text.splitlines()]


def test_a_run():
    found = rows(printed(*results_tables(make_results())))
    assert ["majority", "class", "0.500", "0.500", "0.500"] in found
    assert ["LoRA", "reviews", "0.825"] in found
    assert ["tweets", "0.790", "0.805", "0.880"] in found
    assert ["base", "model", "20.20"] in found
    assert ["LoRA", "0.825", "0.832", "+0.010", "21.40", "+5.9", "%", "0.0240"] in found
    assert ["LoRA", "1,290,240", "4.94", "MiB", "40", "s", "333"] in found


def with_long_examples():
    """Results with examples of the second task cut or left out, and some answers cut off after the last task."""
    results = make_results()
    tasks = [*results.tasks]
    tasks[1] = make_task("reuters", train_cut=3, train_dropped=1, evaluation_dropped=2, kind="completion")
    (seed,) = results.methods[2].seeds
    scores = [*seed.scores[:2], [seed.scores[2][0], seed.scores[2][1].model_copy(update={"unfinished": 0.25})]]
    seed = seed.model_copy(update={"scores": [*scores[:2], [*scores[2], seed.scores[2][2]]]})
    methods = [*results.methods[:2], results.methods[2].model_copy(update={"seeds": [seed]})]
    return results.model_copy(update={"tasks": tasks, "methods": methods})


def test_what_was_cut_or_left_out_is_said():
    text = " ".join(printed(*results_tables(with_long_examples())).split())
    said = "3 cut and 1 left out in the training split, 2 left out in the evaluation split."
    assert f"Examples of reuters that are longer than max_length: {said}" in text
    assert "Up to 25% of the answers generated for reuters were cut off unfinished." in text
    assert "max_length" not in printed(*results_tables(make_results()))
    assert "unfinished" not in printed(*results_tables(make_results()))


def test_examples_that_are_in_both_splits_are_told():
    tasks = [make_task("reviews", evaluation_in_train=30), *make_results().tasks[1:]]
    said = "Of the 200 evaluation examples of reviews, 30 are also in its training split"
    assert said in " ".join(printed(*results_tables(make_results(tasks=tasks))).split())
    assert "also in its training split" not in printed(*results_tables(make_results()))


def test_what_is_missing_is_said():
    run = make_results(missing=["lora, seed 1", "curlora, seed 1"])
    said = "2 of 5 runs were not finished yet: lora, seed 1; curlora, seed 1."
    assert said in " ".join(printed(*results_tables(run)).split())
    assert f"B: b. {said}" in " ".join(printed(comparison([make_results(), run], ["a", "b"]), width=200).split())
    assert "not finished" not in printed(*results_tables(make_results()))


def test_several_seeds_fit_into_80_columns():
    text = printed(*results_tables(make_results(seeds=(0, 1, 2))))
    assert "…" not in text
    assert ["LoRA", "reviews", "0.835", "±", "0.010"] in rows(text)
    assert ["LoRA", "0.835", "0.842", "+0.010", "21.50", "+6.4", "%", "0.0240"] in rows(text)
    assert "deviation of 3 seeds" in " ".join(text.split())


def test_a_single_task_has_nothing_to_forget():
    results = make_results()
    seed = results.methods[2].seeds[0]
    texts = {name: scores[:2] for name, scores in seed.heldout.items()}
    seed = seed.model_copy(update={"scores": seed.scores[:1], "heldout": texts})
    method = results.methods[2].model_copy(update={"seeds": [seed]})
    found = rows(printed(*results_tables(make_results(tasks=results.tasks[:1], methods=[method]))))
    assert ["CURLoRA", "0.770", "0.770", "-", "20.40", "+1.0", "%", "0.0040"] in found


def test_the_switches_of_the_protocol_are_named():
    text = printed(*results_tables(make_results(protocol={"order": "as it comes", "indices": "nearly uniform"})))
    assert "These switches follow the paper's reference code: order, indices." in text


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_how_a_guards_budget_was_kept(seeds):
    text = printed(*results_tables(with_guard(make_results(seeds=seeds))))
    assert "…" not in text
    assert ["reuters", "0.0098", "+0.99", "%", "-", "1.00", "%", "0.50"] in rows(text)
    assert "The limit on forgetting" not in printed(*results_tables(make_results()))


def without(results, name):
    return results.model_copy(update={"methods": [m for m in results.methods if m.name != name]})


def test_two_runs_side_by_side():
    first, second = without(make_results(), "curlora"), without(make_results(seeds=(0, 1)), "frozen")
    text = printed(comparison([first, second], ["runs/one", "runs/two"]))
    found = rows(text)
    assert ["majority", "class", "0.500", "0.500"] in found
    assert ["LoRA", "0.825", "+0.010", "+5.9", "%", "0.830", "+0.010", "+6.2", "%", "+0.005"] in found
    assert ["Frozen", "<heads>", "0.800", "+0.000", "+0.0", "%"] in found
    line = next(line for line in text.splitlines() if line.startswith("CURLoRA"))
    assert line.split() == ["CURLoRA", "0.818", "+0.010", "+2.2", "%"]
    assert line.index("0.818") > 30  # within the second run's columns
    assert "A: runs/one" in text
    assert "B: runs/two" in text
    assert "cannot be compared" not in text
    assert "…" not in text


def test_a_run_of_answers_shows_their_loss():
    found = rows(printed(*results_tables(make_results_by_loss())))
    assert ["base", "model", "2.000", "1.500"] in found
    assert ["LORA", "sums", "1.400"] in found
    assert ["dialogues", "1.700", "0.900"] in found
    # learned: 1.75 - 1.3; when learned: 1.75 - (1.4 + 0.9) / 2; forgetting: 1.7 - 1.4
    assert ["LORA", "0.450", "0.600", "+0.300", "21.30", "+5.4", "%", "0.0220"] in found
    assert not any("majority" in row or "accuracy" in row for row in found)
    assert not any("match" in row for row in found)  # it is 0 everywhere


def test_runs_of_answers_are_compared_by_their_loss():
    one, other = make_results_by_loss(), make_results_by_loss()
    text = printed(comparison([one, other], ["[1]", "[2]"]))
    assert text.startswith("Fall of loss, nats, forgetting and rise of perplexity")
    assert ["LORA", *(["0.450", "+0.300", "+5.4", "%"] * 2), "+0.000"] in rows(text)
    assert "majority" not in text
    mixed = printed(comparison([one, make_results()], ["[1]", "[2]"]), width=100)
    assert "B - A" not in mixed
    assert ["CURLORA", "0.475", "+0.050", "+5.4", "%", "0.813", "+0.010", "+2.0", "%"] in rows(mixed)


def test_forgetting_on_several_texts_has_its_mean_and_worst():
    assert "texts that no method uses" not in printed(*results_tables(make_results()))
    results = make_results()
    seeds = [
        seed.model_copy(
            update={
                "heldout": {**seed.heldout, "code": [*seed.heldout[TEXT][:-1], TextScore(perplexity=20.2, drift=0.5)]}
            }
        )
        for seed in results.methods[1].seeds
    ]
    method = results.methods[1].model_copy(update={"seeds": seeds})
    two = make_results(methods=[method], heldout={**results.heldout, "code": "code"})
    found = rows(printed(*results_tables(two)))
    assert ["Forgetting", "on", "the", "2", "texts", "that", "no", "method", "uses"] in found
    assert ["LoRA", "0.2620", "0.5000", "+2.97", "%", "+5.94", "%"] in found


def test_three_runs_have_no_difference():
    runs = [make_results()] * 3
    text = printed(comparison(runs, ["[1]", "[2]", "[3]"]))
    assert ["LoRA", *(["0.825", "+0.010", "+5.9", "%"] * 3)] in rows(text)
    assert "C: [3]" in text


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"base_model": "another"}, "base model"),
        (
            {"protocol": {"order": "as it comes"}, "heldout": {"a text": "less of it"}},
            "held-out texts (a text), protocol (order)",
        ),
    ],
)
def test_runs_that_cannot_be_compared(changes, what):
    text = printed(comparison([make_results(), make_results(**changes)], ["one", "two"]))
    assert f"The runs differ in {what}: their figures cannot be compared directly." in " ".join(text.split())


def test_methods_of_one_name_that_are_not_the_same_are_not_subtracted():
    one, other = make_results(), make_results()
    changed = other.methods[1].model_copy(update={"learning_rate": 0.5})
    other = other.model_copy(update={"methods": [other.methods[0], changed, other.methods[2]]})
    text = printed(comparison([one, other], ["one", "other"]))
    assert "different methods in the runs: lora." in text
    differences = {row[0]: row[-1] for row in rows(text) if row and row[0] in ("LoRA", "CURLoRA")}
    assert differences["CURLoRA"] == "+0.000"
    assert differences["LoRA"] != "+0.000"
