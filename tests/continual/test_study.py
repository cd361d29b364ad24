"""Studies: grids, orders of the tasks, and settings and heads that differ between methods and runs."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

from curlora.continual import load_recipe, run_recipe
from curlora.continual.errors import RecipeError, RunError
from curlora.continual.results import RunResults
from curlora.continual.united_runs import unite
from curlora.report import render
from curlora.report.tables import results_tables
from tests.continual.streams import figures

QUICK = ["training.epochs=1", "training.logging_steps=1", "training.checkpoint_steps=1"]
GRID = "methods.1.learning_rate={grid: [0.01, 0.02]}"
ORDER = "orders=[[second, first]]"


def measured(seed):
    return seed.model_dump(exclude={"seconds", "train_seconds", "order"})


def changed(path, change):
    content = yaml.safe_load(path.read_text())
    change(content)
    path.write_text(yaml.safe_dump(content))
    return path


def test_each_method_of_a_grid_is_what_it_would_be_alone(recipe_path, tmp_path):
    grid = run_recipe(load_recipe(recipe_path, [*QUICK, GRID]), tmp_path / "grid")
    assert [method.name for method in grid.methods] == [
        "frozen", "lora@learning_rate=0.01", "lora@learning_rate=0.02", "cur",
    ]  # fmt: skip
    assert [method.entry for method in grid.methods] == ["frozen", "lora", "lora", "cur"]
    assert grid.methods[2].grid == {"learning_rate": 0.02}
    alone = run_recipe(load_recipe(recipe_path, [*QUICK, "methods.1.learning_rate=0.02"]), tmp_path / "alone")
    assert measured(grid.methods[2].seeds[0]) == measured(alone.methods[1].seeds[0])
    assert measured(grid.methods[1].seeds[0]) != measured(alone.methods[1].seeds[0])
    assert (tmp_path / "grid" / "lora@learning_rate=0.02" / "seed-0" / "adapter").is_dir()


def test_another_order_is_what_a_recipe_in_that_order_gives(recipe_path, tmp_path):
    both = run_recipe(load_recipe(recipe_path, [*QUICK, ORDER, "training.forward_transfer=true"]), tmp_path / "both")
    assert [seed.order for seed in both.methods[1].seeds] == [[], ["second", "first"]]
    changed(recipe_path, lambda content: content["tasks"].reverse())
    other = run_recipe(load_recipe(recipe_path, [*QUICK, "training.forward_transfer=true"]), tmp_path / "other")
    for method, alone in zip(both.methods, other.methods, strict=True):
        assert measured(method.seeds[1]) == measured(alone.seeds[0])
    first, second = both.by_order().values()
    assert [task.name for task in first.tasks] == ["first", "second"]
    assert [task.name for task in second.tasks] == ["second", "first"]
    assert figures(second)[1]["seeds"][0]["scores"] == figures(other)[1]["seeds"][0]["scores"]
    assert RunResults.load(tmp_path / "both" / "results.json") == both
    assert len(results_tables(both)) > len(results_tables(other))
    page = render([both])
    assert "In the order second, first" in page
    assert 'id="matrix-order-2"' in page


def test_an_order_may_be_added_and_no_other_change_of_them(recipe_path, tmp_path):
    one = run_recipe(load_recipe(recipe_path, QUICK), tmp_path / "run")
    begun = (tmp_path / "run" / "cur" / "seed-0" / "result.json").stat().st_mtime_ns
    two = run_recipe(load_recipe(recipe_path, [*QUICK, ORDER]), tmp_path / "run")
    assert (tmp_path / "run" / "cur" / "seed-0" / "result.json").stat().st_mtime_ns == begun
    assert measured(two.methods[2].seeds[0]) == measured(one.methods[2].seeds[0])
    with pytest.raises(RunError, match="orders changed"):
        run_recipe(load_recipe(recipe_path, QUICK), tmp_path / "run")


def test_runs_with_other_orders_are_united(recipe_path, tmp_path):
    one = run_recipe(load_recipe(recipe_path, QUICK), tmp_path / "one")
    two = run_recipe(load_recipe(recipe_path, [*QUICK, ORDER]), tmp_path / "two")
    (united,) = unite([one, two])
    assert [seed.order for seed in united.methods[1].seeds] == [[], ["second", "first"]]


def test_all_orders(recipe_path):
    assert load_recipe(recipe_path, ["orders=all"]).orders == [["second", "first"]]


@pytest.mark.parametrize(
    ("orders", "message"),
    [
        ("[[first]]", "an order must name each task once: first, second; got first"),
        ("[[first, second]]", "the order first, second is listed twice"),
        ("[[second, first], [second, first]]", "the order second, first is listed twice"),
        ("[[second, third]]", "an order must name each task once"),
        ("every", "orders"),
    ],
)
def test_what_is_no_order_is_refused(orders, message, recipe_path):
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe_path, [f"orders={orders}"])


def test_a_method_may_be_trained_otherwise(recipe_path, tmp_path):
    recipe = load_recipe(recipe_path, [*QUICK, "methods.1.training={epochs: 2, head_learning_rate: 0.001}"])
    results = run_recipe(recipe, tmp_path / "run")
    _, lora, cur = results.methods
    assert lora.seeds[0].steps == 2 * cur.seeds[0].steps
    assert lora.training == {"epochs": 2, "head_learning_rate": 0.001}
    alone = run_recipe(
        load_recipe(recipe_path, [*QUICK, "training.epochs=2", "training.head_learning_rate=0.001"]), tmp_path / "alone"
    )
    assert measured(lora.seeds[0]) == measured(alone.methods[1].seeds[0])


@pytest.mark.parametrize(
    ("training", "message"),
    [
        (
            "{max_length: 5}",
            r"method 'lora': training: 'max_length' cannot differ between methods; .*: batch_size, epochs",
        ),
        ("{epochs: 0}", r"method 'lora': training: epochs: .*greater than 0"),
        ("{evaluation: one_by_one}", "'evaluation' cannot differ between methods"),
    ],
)
def test_settings_that_are_not_a_methods_are_refused(training, message, recipe_path):
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe_path, [f"methods.1.training={training}"])


def heads(folder):
    # The heads are almost as initialized, because their learning rate is tiny.
    state = load_file(folder / "heads.safetensors")
    return torch.cat([state[key].flatten() for key in sorted(state)])


def test_heads_differ_by_seed_and_are_the_papers_under_its_protocol(recipe_path, tmp_path):
    slow = [*QUICK, "seeds=[0, 1]", "training.head_learning_rate=1e-12"]
    run_recipe(load_recipe(recipe_path, slow), tmp_path / "run")
    run_recipe(load_recipe(recipe_path, [*slow, "switches.heads=fixed"]), tmp_path / "paper")
    first, second = (heads(tmp_path / "run" / "cur" / f"seed-{seed}") for seed in (0, 1))
    assert (first - second).abs().max() > 0.01
    first, second = (heads(tmp_path / "paper" / "cur" / f"seed-{seed}") for seed in (0, 1))
    torch.testing.assert_close(first, second, atol=1e-6, rtol=0)


def test_the_trainer_logs_the_backbones_learning_rate(recipe_path, tmp_path):
    recipe = load_recipe(
        recipe_path,
        [*QUICK, "training.warmup=0", "training.schedule=constant", "training.trainer={report_to: tensorboard}"],
    )
    run_recipe(recipe, tmp_path / "run")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = {path.parent for path in (tmp_path / "run" / "lora" / "seed-0" / "logs" / "first").rglob("events*")}
    events = EventAccumulator(str(folder)).Reload()
    assert {round(event.value, 6) for event in events.Scalars("train/learning_rate")} == {0.01}


def test_a_head_is_fitted_again_to_what_the_model_has_become(recipe_path, tmp_path):
    def with_probe(again):
        def change(content):
            content["methods"][2]["plugins"] = [{"name": "probe", "again": again}]

        changed(recipe_path, change)
        return run_recipe(load_recipe(recipe_path, QUICK), tmp_path / f"run-{again}").methods[2].seeds[0]

    without, again = with_probe(False), with_probe(True)
    assert without.losses[:3] == again.losses[:3]  # of the first task
    assert without.scores[0][0].loss != again.scores[0][0].loss
    assert json.loads((tmp_path / "run-True" / "cur" / "seed-0" / "result.json").read_text())
