"""The JSON schema of recipes, for editors."""

from __future__ import annotations

from typing import Any

from curlora.continual.methods.peft import peft_types
from curlora.continual.plugins import PLUGINS
from curlora.continual.recipe import Recipe

__all__ = ["DESCRIPTIONS", "recipe_schema"]

_PLACE = {
    "path": "A local file; relative to the recipe's folder.",
    "columns": "The names of the columns of a TSV or CSV file that has no heading.",
    "quoted": "Whether quotation marks enclose fields of a TSV or CSV file. GLUE's have none.",
    "encoding": "Of the file.",
    "hub": "The id of a data set of the Hugging Face hub, in the place of path.",
    "subset": "Of the data set; the hub calls it a configuration.",
    "revision": "A branch, tag or commit of the data set.",
    "split": "Of the data set, such as train or train[:1000].",
}
_SPLITS = {
    "labels": "The names of the classes. Quote yes and no, which YAML reads as truth values.",
    "train": "The examples to learn from.",
    "evaluation": "The examples to be scored on.",
    "training": "Settings that are different for this task.",
}

DESCRIPTIONS: dict[str, dict[str, str]] = {
    "Recipe": {
        "title": "Of the report.",
        "model": "The base model.",
        "tasks": "What is learned, in this order.",
        "methods": "What is compared: each learns all tasks, from the same base model. frozen (heads only) is added.",
        "heldout": "A text, or several, whose perplexity and drift are followed. Summaries show the first.",
        "guard": "A general text that the plug-ins guard, redraw, scale_back and kl_to_base go by.",
        "seeds": "Every method is run once with each.",
        "orders": "Further orders of the tasks, each a list of all their names; or all of them.",
        "training": "How every method is trained and scored.",
        "protocol": "honest, or paper: as the paper's reference code does it.",
        "switches": "Parts of the protocol that are set otherwise.",
        "reference": "What is different in training where the protocol is the paper's.",
        "resources": "What each method and seed is given to run on.",
        "limits": "On the guard's text; the report looks for the best of each method within each of them.",
        "output": "The run directory, relative to the working directory; runs/<name of the recipe> if not given.",
    },
    "ModelPart": {
        "name": "A folder, relative to the recipe's, or the id of a model of the Hugging Face hub.",
        "revision": "A branch, tag or commit of the model.",
        "gguf_file": "A GGUF file in the folder or repository.",
        "dtype": "A floating-point dtype of torch that the weights are loaded in.",
        "quantization": "A quantization_config of transformers: {quant_method: bitsandbytes, load_in_4bit: true}.",
    },
    "TaskPart": {
        "name": "Short, of letters, digits, - and _.",
        "kind": "What is told: a class, a completion of a prompt, or the last message of a conversation.",
        **_SPLITS,
        "turns": "Chat: whether all of the assistant's turns are learned, or the last alone.",
        "too_long": "Whether examples that are longer than max_length are cut, or left out.",
        "score": "How a task of text is scored by what the model generates; without it, by its loss and exact match.",
        "description": "A sentence for the report.",
        "reference": "What is different where the protocol's data is reference.",
    },
    "Splits": _SPLITS,
    "Source": {
        **_PLACE,
        "text": "Classification: the column that is read, or several.",
        "join": "What stands between several columns.",
        "label": "Classification: the column of the class.",
        "label_names": "What the values of that column are called in labels.",
        "prompt": "Completion: a column, or a template such as 'Question: {question}'.",
        "completion": "Completion: a column, or a template.",
        "messages": "Chat: the column of conversations.",
        "layout": "Chat: messages, sharegpt or alpaca, where it is not told by the columns.",
        "shuffle": "The seed of an order that the rows are put in before skip and limit are applied.",
        "skip": "How many rows are left, from the first on.",
        "limit": "How many rows are taken, after those.",
    },
    "MethodPart": {
        "name": "Short, of letters, digits, - and _; a folder of the run is called so.",
        "method": "frozen (heads only), full (every parameter), or an adapter of PEFT.",
        "label": "The name that people read.",
        "options": "Those of the adapter's configuration, such as r, lora_alpha and target_modules.",
        "learning_rate": "Of everything that is trained but the heads.",
        "adapter_per_task": "Whether each task trains an adapter of its own, beside those of earlier tasks.",
        "plugins": "What the method is combined with.",
        "training": "Settings that are different for this method.",
    },
    "Resources": {
        "cpus": "Threads; all of the process's if not given.",
        "gpus": "Where a run is shared out over workers; 0.5 puts two methods on one GPU.",
    },
    "AnswersPart": {
        "name": "For people.",
        "prompts": "What the base model has to answer: a list, or a file with one a line.",
        "max_new_tokens": "Of an answer.",
        "seed": "Of the sampling.",
    },
    "OwnTextPart": {
        "name": "For people.",
        "written_by": "The base model writes the text, without being asked.",
        "tokens": "How many tokens it writes.",
        "max_length": "Tokens of a piece.",
        "seed": "Of the sampling.",
    },
    "GeneratePart": {"max_new_tokens": "Of an answer."},
    "ScorePart": {
        "generate": "How answers are generated.",
        "metric": "What is counted.",
        "normalize": "What answers are reduced to first: none, lower, gsm8k or a regular expression.",
    },
    "HeldOutPart": {
        **_PLACE,
        "name": "For people.",
        "text": "The column of a table whose rows are the text.",
        "join": "What stands between rows.",
        "skip": "How many tokens are left out at the start.",
        "tokens": "How many tokens are scored.",
        "window": "How many tokens are scored together.",
        "stride": "Tokens from one window to the next; a whole window if not given.",
        "chunk": "How many tokens are scored where the protocol's perplexity is first_chunk.",
    },
    "Settings": {
        "epochs": "How often each example is seen.",
        "batch_size": "Examples of a batch, over all processes.",
        "gradient_accumulation_steps": "Batches of an optimizer step.",
        "evaluation_batch_size": "Examples that are scored together.",
        "max_length": "Tokens of an example; longer ones are cut.",
        "head_learning_rate": "Of the head of a classification task.",
        "weight_decay": "AdamW's.",
        "max_grad_norm": "What the gradient's norm is clipped to; 0 leaves it as it is.",
        "schedule": "A learning-rate schedule of transformers, such as linear, cosine or constant.",
        "warmup": "A share of a task's steps if below 1, else a number of steps.",
        "logging_steps": "Steps between two losses in the report.",
        "checkpoint_steps": "Steps between two checkpoints, which is the most that a kill can cost.",
        "forward_transfer": "Whether each task is scored also just before it is learned.",
        "cache_frozen_layers": "Whether what the layers below those that any method trains put out is kept.",
        "fp32_products": "How a CPU multiplies float32: bfloat16 rounds the factors and is quicker with AMX.",
        "trainer": "Further arguments of transformers' Trainer: bf16, gradient_checkpointing, report_to, ...",
        "readout": "A switch of the protocol: set it under switches.",
        "order": "A switch of the protocol: set it under switches.",
        "schedule_length": "A switch of the protocol: set it under switches.",
        "evaluation": "A switch of the protocol: set it under switches.",
        "heads": "A switch of the protocol: set it under switches.",
    },
}
"""What each key means, by the name of its model, where the model itself does not say."""


def recipe_schema() -> dict[str, Any]:
    """The JSON schema of a recipe, as it is written in YAML.

    Options of methods and plug-ins are left open: they are those of PEFT and of the plug-in.
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
    method = schema["$defs"]["MethodPart"]["properties"]
    method["method"]["enum"] = ["frozen", "full", *sorted(peft_types())]
    method["plugins"]["items"] = {
        "type": "object",
        "properties": {"name": {"enum": sorted(PLUGINS), "description": "Which plug-in."}},
        "required": ["name"],
    }
    del method["grid"]  # which a recipe does not say itself
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
