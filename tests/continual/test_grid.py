"""Grids of methods: the methods that an entry of a recipe stands for."""

import pytest

from curlora.continual import load_recipe
from curlora.continual.errors import RecipeError
from curlora.continual.grid import expand


def names(entry):
    return [one["name"] for one in expand(entry)]


def test_an_entry_without_a_grid_is_itself():
    entry = {"name": "lora", "options": {"r": 8}}
    assert expand(entry) == [entry]


def test_every_combination_is_a_method_with_its_values():
    entry = {
        "name": "lora",
        "label": "LoRA",
        "learning_rate": {"grid": [1e-3, 5e-4]},
        "options": {"r": {"grid": [8, 16]}, "target_modules": ["q"]},
    }
    found = expand(entry)
    assert [one["name"] for one in found] == [
        "lora@learning_rate=0.001,r=8", "lora@learning_rate=0.001,r=16",
        "lora@learning_rate=0.0005,r=8", "lora@learning_rate=0.0005,r=16",
    ]  # fmt: skip
    assert found[2]["label"] == "LoRA, learning_rate 0.0005, r 8"
    assert found[2]["grid"] == {"learning_rate": 5e-4, "r": 8}
    assert (found[2]["learning_rate"], found[2]["options"]) == (5e-4, {"r": 8, "target_modules": ["q"]})
    assert entry["learning_rate"] == {"grid": [1e-3, 5e-4]}  # unchanged


def test_whole_lists_and_plugins_may_be_in_a_grid():
    entry = {"name": "c", "options": {"target_modules": {"grid": [["q", "k"], "all-linear"]}}}
    assert names(entry) == ["c@target_modules=q-k", "c@target_modules=all-linear"]
    entry = {"name": "c", "plugins": {"grid": [[], [{"name": "ewc", "strength": 1}]]}}
    assert [one["plugins"] for one in expand(entry)] == [[], [{"name": "ewc", "strength": 1}]]


def test_keys_of_one_name_are_told_apart_by_what_they_are_in():
    strength = {"grid": [1, 2]}
    entry = {"name": "c", "plugins": [{"name": "ewc", "strength": strength}, {"name": "anchors", "strength": strength}]}
    assert names(entry)[1] == "c@ewc.strength=1,anchors.strength=2"


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (5, "learning_rate: a grid must be a list of two or more values, got 5"),
        ([1e-3], "a grid must be a list of two or more values"),
        ([1e-3, 0.001], "holds a value twice"),
        ({}, "a grid must be a list of two or more values"),
    ],
)
def test_what_is_no_grid_is_refused(grid, message, recipe_path):
    entry = {"name": "lora", "learning_rate": {"grid": grid}}
    with pytest.raises(ValueError, match=message):
        expand(entry)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"options": {"r": {"Grid": [4, 8]}}}, r"options.r: a grid is written {grid: \[...\]} and stands alone"),
        (
            {"options": {"r": {"grid": [4, 8], "x": 1}}},
            r"options.r: a grid is written {grid: \[...\]} and stands alone",
        ),
        ({"label": {"grid": ["a", "b"]}}, "label: a grid may not stand here"),
    ],
)
def test_what_is_nearly_a_grid(entry, message):
    with pytest.raises(ValueError, match=message):
        expand({"name": "lora", **entry})


def test_a_recipe_says_where_its_grid_is_wrong(recipe_path):
    with pytest.raises(RecipeError, match=r"method 'lora': learning_rate: a grid must be a list of two .*, got 3"):
        load_recipe(recipe_path, ["methods.1.learning_rate={grid: 3}"])


def test_values_of_a_grid_are_checked_like_any_other(recipe_path):
    with pytest.raises(RecipeError, match=r"has no option 'rank'"):
        load_recipe(recipe_path, ["methods.1.options={rank: {grid: [1, 2]}}"])
    with pytest.raises(RecipeError, match=r"method 'lora': learning_rate: must be greater than 0, got -0.02"):
        load_recipe(recipe_path, ["methods.1.learning_rate={grid: [0.01, -0.02]}"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("methods.2.optoins={r: 4}", "method 'cur' has no key 'optoins'. Did you mean 'options'"),
        ("methods.2.learning_rate=-1", "method 'cur': learning_rate: must be greater than 0, got -1"),
        ("methods.2.plugins=[{name: ewc}]", "method 'cur': plug-in 'ewc' needs strength"),
    ],
)
def test_errors_beside_a_grid_name_the_right_method_once(change, message, recipe_path):
    with pytest.raises(RecipeError, match=message) as raised:
        load_recipe(recipe_path, ["methods.1.learning_rate={grid: [0.01, 0.02]}", change])
    assert len(str(raised.value).splitlines()) == 2


def test_an_error_outside_of_the_grids_values_is_named_once(recipe_path):
    with pytest.raises(RecipeError, match="method 'lora' has no key 'optons'") as raised:
        load_recipe(recipe_path, ["methods.1.learning_rate={grid: [0.01, 0.02]}", "methods.1.optons={r: 4}"])
    assert len(str(raised.value).splitlines()) == 2


def test_values_that_look_alike_have_names_of_their_own():
    entry = {"name": "c", "options": {"target_modules": {"grid": [".*(q)_proj", ".*[q]_proj"]}}}
    one, two = names(entry)
    assert one != two
    assert names(entry) == [one, two]  # the same in every run


def test_a_name_is_that_of_a_folder():
    entry = {"name": "c", "options": {"layers_to_transform": {"grid": [[0], list(range(120))]}}}
    short, long = names(entry)
    assert short == "c@layers_to_transform=0"
    assert len(long) < 100


def test_a_recipe_that_was_expanded_stays_as_it_is(recipe_path):
    recipe = load_recipe(recipe_path, ["methods.1.options={r: {grid: [2, 4]}}"])
    again = type(recipe).model_validate(recipe.model_dump(mode="json"))
    assert again.model_dump() == recipe.model_dump()
    assert [method.name for method in recipe.methods] == ["frozen", "lora@r=2", "lora@r=4", "cur"]
