"""The paper's recipes, and the switches of its protocol."""

from pathlib import Path

from curlora.continual.recipe_file import load_recipe

GPT, MISTRAL = Path("paper-gpt2-large"), Path("paper-mistral-7b")
PROTOCOLS = ("corrected", "paper")
LEARNING_RATE = 2.5e-4

# Switch: its corrected value and the paper's value.
SWITCHED = {
    "readout": ("last_token", "last_position"),
    "evaluation": ("batched", "one_by_one"),
    "order": ("shuffled", "as_given"),
    "heads": ("by_seed", "fixed"),
    "schedule_length": ("batches", "examples"),
    "data": ("corrected", "reference"),
    "perplexity": ("windows", "first_chunk"),
    "indices": ("paper", "reference"),
    "lora_init": ("peft", "reference"),
}


def recipe_of(name, protocol, *changes):
    return load_recipe(name, [f"protocol={protocol}", *changes])


def tasks_of(recipe):
    return [part.variant(recipe.switched().data == "reference") for part in recipe.tasks]
