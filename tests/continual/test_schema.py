"""The JSON schema of recipes accepts and rejects what pydantic does."""

import json
from importlib import resources
from typing import get_args

import jsonschema
import pytest
import yaml
from pydantic import BaseModel

from curlora.continual.plugins import PLUGINS
from curlora.continual.recipe import Recipe
from curlora.continual.recipe_file import packaged_recipes
from curlora.continual.schema import DESCRIPTIONS, recipe_schema


@pytest.fixture(scope="module")
def schema():
    return recipe_schema()


def objects(schema):
    return {"Recipe": schema, **{name: part for name, part in schema["$defs"].items() if "properties" in part}}


def test_every_key_is_described(schema):
    """Editors show it when the pointer is over a key."""
    for name, part in objects(schema).items():
        for key, entry in part["properties"].items():
            assert entry.get("description"), f"{name}.{key}"


def models(annotation):
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
        for field in annotation.model_fields.values():
            yield from models(field.annotation)
    for argument in get_args(annotation):
        yield from models(argument)


def test_no_key_is_described_that_is_not_there():
    known = {model.__name__: model.model_fields for model in models(Recipe)}
    for name, keys in DESCRIPTIONS.items():
        assert keys.keys() <= known[name].keys(), name


def accepted(schema, content):
    validator = jsonschema.Draft202012Validator(schema)
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(content)]


def test_the_recipes_that_come_with_it_are_valid(schema):
    recipes = {**packaged_recipes()}
    for name in ("demo", "demo-full"):
        recipes[name] = resources.files("curlora") / "recipes" / f"{name}.yaml"
    for path in recipes.values():
        content = json.loads(json.dumps(yaml.safe_load(path.read_text(encoding="utf-8"))))  # JSON's keys are strings
        assert accepted(schema, content) == [], path


def test_options_and_arguments_are_described(schema):
    method = schema["$defs"]["MethodSpec"]
    plugins = {
        of["if"]["properties"]["name"]["const"]: of["then"] for of in method["properties"]["plugins"]["items"]["allOf"]
    }
    assert plugins.keys() == PLUGINS.keys()
    adapters = {
        of["if"]["properties"]["method"]["const"]: of["then"]["properties"]["options"] for of in method["allOf"]
    }
    assert {"lora", "curlora", "osf"} < adapters.keys()
    trainer = schema["$defs"]["Settings"]["properties"]["trainer"]
    for part in (*plugins.values(), *adapters.values(), trainer):
        assert all(
            entry["description"] for key, entry in part["properties"].items() if key not in ("peft_type", "name")
        )


def test_one_held_out_text_or_several(schema, recipe_path):
    content = yaml.safe_load(recipe_path.read_text())
    assert accepted(schema, content) == []
    assert accepted(schema, {**content, "heldout": [content["heldout"]]}) == []


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"titel": "x"}, "titel"),
        ({"seeds": ["a"]}, "$.seeds[0]"),
        ({"training": {"epochs": 0}}, "$.training.epochs"),
        ({"methods": [{"name": "x", "method": "lorra"}]}, "$.methods[0].method"),
        ({"methods": [{"name": "x", "method": "lora", "plugins": [{"name": "ewk"}]}]}, "$.methods[0].plugins[0].name"),
        ({"methods": [{"name": "x", "method": "lora", "options": {"rank": 4}}]}, "$.methods[0].options: 'rank'"),
        (
            {"methods": [{"name": "x", "method": "lora", "plugins": [{"name": "ewc", "strenght": 1.0}]}]},
            "$.methods[0].plugins[0]: 'strenght'",
        ),
        ({"training": {"trainer": {"gradient_checkpoint": True}}}, "$.training.trainer: 'gradient_checkpoint'"),
        ({"training": {"trainer": {"seed": 3}}}, "$.training.trainer: 'seed'"),
        ({"methods": [{"method": "lora"}]}, "'name' is a required property"),
        ({"heldout": []}, "$.heldout"),
    ],
)
def test_what_is_wrong_is_marked(schema, recipe_path, change, where):
    (error,) = accepted(schema, {**yaml.safe_load(recipe_path.read_text()), **change})
    assert where in error
