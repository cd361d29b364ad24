"""The JSON schema of recipes, for editors."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Collection, Mapping
from typing import Any

from transformers import TrainingArguments

from curlora.continual.methods.peft import REFUSED_OPTIONS, peft_types
from curlora.continual.plugins import PLUGINS, Plugin
from curlora.continual.recipe import Recipe
from curlora.continual.settings import OWN_ARGUMENTS

__all__ = ["DESCRIPTIONS", "recipe_schema"]

_PLACE = {
    "path": "A local file, relative to the recipe's folder.",
    "columns": "The names of the columns of a TSV or CSV file without a header.",
    "quoted": "Whether a TSV or CSV file encloses fields in quotation marks. GLUE's files do not.",
    "encoding": "The file's encoding.",
    "hub": "The id of a data set of the Hugging Face hub, instead of path.",
    "subset": "The subset of the data set, which the hub also calls its configuration.",
    "revision": "A branch, tag or commit of the data set.",
    "split": "The split of the data set, such as train or train[:1000].",
}
_SPLITS = {
    "labels": "The names of the classes. Quote yes and no, which YAML reads as booleans.",
    "train": "The training examples.",
    "evaluation": "The evaluation examples.",
    "training": "Settings that are different for this task.",
}

DESCRIPTIONS: dict[str, dict[str, str]] = {
    "Recipe": {
        "title": "The title of the report.",
        "model": "The base model.",
        "tasks": "The tasks, in the order in which they are learned.",
        "methods": "The methods to compare; each learns all tasks from the base model. frozen (heads only) is added.",
        "heldout": "One or several texts whose perplexity and drift are measured. Summaries show the first.",
        "guard": "A general text that the plug-ins guard, redraw, scale_back and kl_to_base use.",
        "seeds": "Every method is run once with each seed.",
        "orders": "Further orders of the tasks, each a list of all their names; or all orders.",
        "training": "How every method is trained and scored.",
        "protocol": "corrected, or paper for what the paper's reference code does.",
        "switches": "Switches of the protocol to change.",
        "reference": "Settings that are different under the paper's protocol.",
        "resources": "The CPU threads and GPUs for each method and seed.",
        "limits": "Limits on the guard's text. For each, the report shows the best of each method within it.",
        "output": "The run directory, relative to the working directory; runs/<name of the recipe> if not given.",
    },
    "ModelSpec": {
        "name": "A folder, relative to the recipe's, or the id of a model of the Hugging Face hub.",
        "revision": "A branch, tag or commit of the model.",
        "gguf_file": "A GGUF file in the folder or repository.",
        "dtype": "The floating-point dtype of torch in which the weights are loaded.",
        "quantization": "A quantization_config of transformers: {quant_method: bitsandbytes, load_in_4bit: true}.",
    },
    "TaskSpec": {
        "name": "A short name of letters, digits, - and _.",
        "kind": "What is predicted: a class, a completion of a prompt, or the assistant's messages of a conversation.",
        **_SPLITS,
        "turns": "Chat: whether all of the assistant's messages are trained, or only the last.",
        "too_long": "Whether examples that are longer than max_length are cut or left out.",
        "score": "How generated answers of a completion or chat task are scored. Without it: loss and exact match.",
        "description": "A sentence for the report.",
        "reference": "What is different if the protocol's data is reference.",
    },
    "Splits": _SPLITS,
    "Source": {
        **_PLACE,
        "text": "Classification: the column of the text, or several columns.",
        "join": "The text between several columns.",
        "label": "Classification: the column of the class.",
        "label_names": "Maps the values of that column to names in labels.",
        "prompt": "Completion: a column, or a template such as 'Question: {question}'.",
        "completion": "Completion: a column, or a template.",
        "messages": "Chat: the column of conversations.",
        "layout": "Chat: messages, sharegpt or alpaca; detected from the columns if not given.",
        "shuffle": "The seed with which the rows are shuffled before skip and limit are applied.",
        "skip": "The number of rows to skip at the start.",
        "limit": "The most rows to use after the skipped ones.",
    },
    "MethodSpec": {
        "name": "A short name of letters, digits, - and _, also the name of a folder in the run directory.",
        "method": "frozen (heads only), full (every parameter), or an adapter of PEFT.",
        "label": "The name in reports.",
        "options": "Options of the adapter's configuration, such as r, lora_alpha and target_modules.",
        "learning_rate": "The learning rate of all trainable parameters except the heads.",
        "adapter_per_task": "Whether each task trains its own adapter beside those of earlier tasks.",
        "plugins": "The plug-ins that the method is combined with.",
        "training": "Settings that are different for this method.",
    },
    "Resources": {
        "cpus": "CPU threads. If not given, a worker has one, and a run without workers all of the process's.",
        "gpus": "GPUs of a worker, if the run is divided among workers; 0.5 puts two methods on one GPU. Default: one.",
    },
    "AnswersSpec": {
        "name": "The text's name in reports.",
        "prompts": "The prompts that the base model answers: a list, or a file with one per line.",
        "max_new_tokens": "The most tokens of an answer.",
        "seed": "The seed of the sampling.",
    },
    "OwnTextSpec": {
        "name": "The text's name in reports.",
        "written_by": "The base model writes the text without a prompt.",
        "tokens": "The number of tokens that it writes.",
        "max_length": "Tokens of a row.",
        "seed": "The seed of the sampling.",
    },
    "GenerateSpec": {"max_new_tokens": "The most tokens of an answer."},
    "ScoreSpec": {
        "generate": "How answers are generated.",
        "metric": "The metric that compares a generated answer with the reference answer.",
        "normalize": "How both answers are normalized first: none, lower, gsm8k or a regular expression.",
    },
    "HeldOutSpec": {
        **_PLACE,
        "name": "The text's name in reports.",
        "text": "The column of a table whose rows are the text.",
        "join": "The text between rows.",
        "skip": "The number of tokens to skip at the start.",
        "tokens": "The number of tokens that are scored.",
        "window": "Tokens of a window, which is scored in one forward pass.",
        "stride": "Tokens from the start of one window to the next; window if not given.",
        "chunk": "The number of tokens that are scored if the protocol's perplexity is first_chunk.",
    },
    "Settings": {
        "epochs": "How often each example is trained on.",
        "batch_size": "Examples of a batch, over all processes.",
        "gradient_accumulation_steps": "Batches of an optimizer step.",
        "fixed_batches": "Whether each epoch and seed has the same batches, in another order.",
        "evaluation_batch_size": "Examples of a batch when scoring, over all processes.",
        "max_length": "The most tokens of an example; longer ones are cut or left out.",
        "head_learning_rate": "The learning rate of the head of a classification task.",
        "weight_decay": "AdamW's weight decay.",
        "max_grad_norm": "The norm to which gradients are clipped; 0 turns clipping off.",
        "schedule": "A learning-rate schedule of transformers, such as linear, cosine or constant.",
        "warmup": "A fraction of a task's steps if below 1, else a number of steps.",
        "logging_steps": "Steps between two losses in the report.",
        "checkpoint_steps": "Steps between two checkpoints; an interrupted run loses at most this many steps.",
        "forward_transfer": "Whether each task is also scored just before it is learned.",
        "cache_frozen_layers": "Whether to cache the outputs of the lowest layers, which no method trains.",
        "fp32_products": "How a CPU multiplies float32: bfloat16 rounds the factors and is faster with AMX.",
        "trainer": "Further arguments of transformers' Trainer: bf16, gradient_checkpointing, report_to, ...",
        "readout": "A switch of the protocol: set it under switches.",
        "order": "A switch of the protocol: set it under switches.",
        "schedule_length": "A switch of the protocol: set it under switches.",
        "evaluation": "A switch of the protocol: set it under switches.",
        "heads": "A switch of the protocol: set it under switches.",
    },
}
"""The description of each key, by the name of its model, for keys without one in the model itself."""


def recipe_schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe as written in YAML.

    The options of methods, plug-ins and the Trainer are known by name and description; their values are not checked.
    """
    schema = Recipe.model_json_schema()
    for name, part in {"Recipe": schema, **schema["$defs"]}.items():
        for key, entry in part.get("properties", {}).items():
            if "description" not in entry and key in DESCRIPTIONS.get(name, {}):
                entry["description"] = DESCRIPTIONS[name][key]
            entry.pop("title", None)
        part.pop("title", None)
    several = schema["properties"]["heldout"]
    schema["properties"]["heldout"] = {
        "description": several.pop("description"), "anyOf": [several["items"], several]
    }  # fmt: skip
    method = schema["$defs"]["MethodSpec"]["properties"]
    method["method"]["enum"] = ["frozen", "full", *sorted(peft_types())]
    which = {"name": {"enum": sorted(PLUGINS), "description": "Which plug-in."}}
    method["plugins"]["items"] = {
        "type": "object",
        "properties": which,
        "required": ["name"],
        "allOf": [_if_named("name", name, _only({**which, **_options_of(cls)})) for name, cls in PLUGINS.items()],
    }
    schema["$defs"]["MethodSpec"]["allOf"] = [
        _if_named("method", name, {"properties": {"options": _only(_fields_of(cls, REFUSED_OPTIONS))}})
        for name, cls in peft_types().items()
    ]
    schema["$defs"]["Settings"]["properties"]["trainer"] |= _only(_fields_of(TrainingArguments, OWN_ARGUMENTS))
    del method["grid"]  # not written in a recipe
    for key in ("method", "learning_rate", "adapter_per_task"):
        plain = method[key]
        grid = {"type": "object", "properties": {"grid": {"type": "array", "minItems": 2}}, "required": ["grid"]}
        method[key] = {"description": plain.pop("description"), "anyOf": [plain, grid]}
        if "default" in plain:
            method[key]["default"] = plain.pop("default")
    orders = schema["properties"]["orders"]
    schema["properties"]["orders"] = {
        "description": orders.pop("description"), "anyOf": [orders, {"const": "all"}]
    }  # fmt: skip
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "A recipe of curlora", **schema}


def _if_named(key: str, name: str, then: dict[str, Any]) -> dict[str, Any]:
    return {"if": {"properties": {key: {"const": name}}, "required": [key]}, "then": then}


def _only(properties: Mapping[str, Any]) -> dict[str, Any]:
    """Allow these keys and no others. The message of a validator then names the wrong key."""
    return {"properties": properties, "propertyNames": {"enum": list(properties)}}


def _fields_of(cls: Any, refused: Collection[str]) -> dict[str, dict[str, str]]:
    """Return the fields of a dataclass of PEFT or transformers that are not refused, with the help that they give."""
    fields = (field for field in dataclasses.fields(cls) if field.init and field.name not in refused)
    said = {field.name: field.metadata.get("help", "") for field in fields}
    # A trailing comma has made a few of PEFT's texts tuples of one text.
    return {name: {"description": " ".join("".join(text).split())} for name, text in said.items()}


def _options_of(plugin: type[Plugin]) -> dict[str, dict[str, str]]:
    """Return the options of a plug-in, with their descriptions from its docstring."""
    found = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", inspect.getdoc(plugin) or "", re.MULTILINE)
    said = {name: " ".join(text.split()) for name, text in found}
    return {name: {"description": said[name]} for name in inspect.signature(plugin).parameters}
