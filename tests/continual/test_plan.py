"""Plans: what is planned is what a run of the same recipe then does and keeps."""

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from transformers import GPT2Config

from curlora.continual import memory as memory_module
from curlora.continual import plan
from curlora.continual.errors import RunError
from curlora.continual.launch import run_recipe
from curlora.continual.memory import Memory
from curlora.continual.plan import make_plan
from curlora.continual.recipe import RecipeError, load_recipe
from curlora.continual.task_model import TaskModel
from curlora.continual.tasks import TaskError
from curlora.plan_tables import plan_tables
from tests.models import gpt2, layers, word_tokenizer

COMPLETION = (
    "{name: copy, kind: completion,"
    " train: {path: second-train.jsonl, prompt: sentence, completion: sentence},"
    " evaluation: {path: second-eval.jsonl, prompt: sentence, completion: sentence}}"
)
METHODS = {
    "frozen": "{name: frozen, method: frozen}",
    "lora": "{name: lora, method: lora, learning_rate: 0.01, options: {r: 4, lora_dropout: 0.1}}",
    "curlora": "{name: curlora, method: curlora, learning_rate: 0.3, options: {r: 4}}",
    "full": "{name: full, method: full, learning_rate: 0.001}",
    "replay": "{name: replay, method: lora, learning_rate: 0.01, plugins: [{name: replay, examples: 5}]}",
    "hoard": "{name: hoard, method: lora, learning_rate: 0.01, plugins: [{name: replay, examples: 99}]}",
    "each": "{name: each, method: curlora, learning_rate: 0.3, options: {r: 4}, adapter_per_task: true}",
    "ewc": "{name: ewc, method: curlora, learning_rate: 0.3, options: {r: 4}, plugins: [{name: ewc, strength: 1.0}]}",
}


def methods(*names):
    return f"methods=[{', '.join(METHODS[name] for name in names)}]"


def by_name(planned):
    return {method.name: method for method in planned.methods}


def bytes_of(model):
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


def test_counts_are_those_that_a_run_reports(recipe_path, tmp_path):
    changes = [
        methods(*METHODS),
        f"tasks.1={COMPLETION}",
        "seeds=[0, 3]",
        "tasks.0.training={epochs: 2, batch_size: 7}",
    ]
    changes.append("training.gradient_accumulation_steps=2")
    recipe = load_recipe(recipe_path, changes)
    planned = make_plan(recipe)
    results = run_recipe(recipe, tmp_path / "run")
    for method in results.methods:
        expected = by_name(planned)[method.name]
        assert not expected.unknown, method.name
        assert expected.trained == method.trainable_parameters, method.name
        assert expected.steps == sum(seed.steps for seed in method.seeds), method.name
        assert expected.tokens == sum(seed.train_tokens for seed in method.seeds), method.name
    assert planned.base_parameters == results.base_parameters
    assert planned.heldout == results.heldout
    first, second = planned.tasks
    assert (first.examples, first.evaluation_examples) == (30, 21)
    assert first.steps == 2 * 3  # five batches, two to a step
    assert by_name(planned)["frozen"].steps == 2 * first.steps  # the other task has no head to be trained
    assert by_name(planned)["lora"].steps == 2 * (first.steps + second.steps)
    assert by_name(planned)["lora"].tokens == 2 * (2 * first.tokens + 3 * second.tokens)
    assert first.longest == 7
    assert second.longest == 7 + 7 - 1  # the last token of a completion is no input


def test_windows_of_held_out_texts(recipe_path):
    planned = make_plan(load_recipe(recipe_path, ["seeds=[0, 1, 2]"]))
    assert planned.base_windows == 4  # 50 tokens by 16
    assert [method.windows for method in planned.methods] == [0, 4 * 2 * 3, 4 * 2 * 3]
    assert planned.windows == 4 + 48


def largest_step(monkeypatch, recipe, name, directory):
    """The most bytes that any training step of a real run of one method keeps for backward, by address."""
    recipe = recipe.model_copy(update={"methods": [part for part in recipe.methods if part.name == name]})
    seen = []
    forward = TaskModel.forward

    def counting(self, *args, **kwargs):
        held = [tensor for layer in layers(self) for U in layer.matrices.values() for tensor in U.basis.tensors]
        own = {tensor.untyped_storage().data_ptr() for tensor in (*self.parameters(), *self.buffers(), *held)}
        kept = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = forward(self, *args, **kwargs)
        if self.training:
            seen.append(sum(kept.values()))
        return result

    with monkeypatch.context() as patch:
        patch.setattr(TaskModel, "forward", counting)
        run_recipe(recipe, directory)
    return max(seen)


PLAIN, BF16, CHECKPOINTS = "{}", "{bf16: true}", "{gradient_checkpointing: true}"


@pytest.mark.parametrize("base", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("name", "trainer"),
    [
        *((name, PLAIN) for name in ("frozen", "lora", "curlora", "full", "replay")),
        *((name, trainer) for name in ("curlora", "full") for trainer in (BF16, CHECKPOINTS)),
    ],
)
def test_what_a_step_keeps_is_what_a_run_keeps(recipe_path, tmp_path, monkeypatch, name, trainer, base):
    if base == "gpt2":
        gpt2().save_pretrained(tmp_path / "model")
    changes = [methods(name), f"training.trainer={trainer}", "training.epochs=1", "tasks.1.training={max_length: 5}"]
    recipe = load_recipe(recipe_path, changes)
    memory = by_name(make_plan(recipe))[name].memory
    assert memory.kept == largest_step(monkeypatch, recipe, name, tmp_path / "run") > 0
    assert memory.logits == 4 * 2 * (2 if trainer == BF16 else 4)  # four texts, two classes


def test_what_a_step_of_completions_keeps(recipe_path, tmp_path, monkeypatch):
    """Where all completions are of one length, as a plan takes them to be, and one text is a token shorter."""
    rows = [{"sentence": "w20 w21 w22", "sign": "w23 w24"}] * 7 + [{"sentence": "w20 w21", "sign": "w23 w24"}]
    (tmp_path / "second-train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = COMPLETION.replace(
        "train.jsonl, prompt: sentence, completion: sentence", "train.jsonl, prompt: sentence, completion: sign"
    )
    recipe = load_recipe(recipe_path, [methods("lora"), f"tasks=[{task}]", "training.batch_size=8"])
    memory = by_name(make_plan(recipe))["lora"].memory
    assert memory.kept == largest_step(monkeypatch, recipe, "lora", tmp_path / "run")
    assert memory.logits == 8 * 3 * 100 * 4  # from the first labelled position of the shorter text on


def test_weights_gradients_and_moments(recipe_path):
    recipe = load_recipe(recipe_path, [methods("lora", "curlora", "full")])
    base = bytes_of(recipe.model.load())
    planned = by_name(make_plan(recipe))
    heads = (2 + 3) * 4 * (32 * 2 + 2)  # two heads, and of one a gradient and two moments
    numbers = sum(p.numel() for p in recipe.model.load().parameters())
    assert planned["frozen"].memory.frozen == base
    assert planned["frozen"].memory.trained == heads
    assert planned["lora"].memory.frozen == base
    assert planned["lora"].memory.trained == 16 * planned["lora"].trained + heads
    assert planned["curlora"].memory.frozen > base  # the factors that are taken from it
    assert planned["full"].memory.trained == 16 * numbers + heads
    # The model's own buffers, and the copy that drift is measured against.
    assert planned["full"].memory.frozen == base + (base - 4 * numbers)
    memory = planned["full"].memory
    assert memory.total == memory.frozen + memory.trained + memory.kept + memory.logits


def test_half_precision(recipe_path):
    full = make_plan(load_recipe(recipe_path, ["model.dtype=bfloat16", methods("full")])).methods[1]
    assert full.memory.trained == 8 * full.trained + 5 * 4 * (32 * 2 + 2)  # heads stay float32


def test_no_weights_are_read(recipe_path, tmp_path):
    recipe = load_recipe(recipe_path, [methods("lora", "curlora", "full")])
    whole = make_plan(recipe)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"broken")
    assert make_plan(recipe) == whole
    with pytest.raises(Exception, match=r".+"):
        recipe.model.load()


def test_the_papers_counts_on_gpt2_large(recipe_path, tmp_path):
    GPT2Config(n_embd=1280, n_layer=36, n_head=20).save_pretrained(tmp_path / "large")
    word_tokenizer().save_pretrained(tmp_path / "large")
    changes = [
        "model.name=large",
        "methods=[{name: curlora, method: curlora, learning_rate: 0.1, options: {r: 8}},"
        " {name: lora, method: lora, learning_rate: 0.1, options: {r: 8, target_modules: [c_attn]}}]",
    ]
    planned = make_plan(load_recipe(recipe_path, changes))
    assert [method.trained for method in planned.methods] == [0, 2_304, 1_474_560]
    assert planned.base_parameters == 774_030_080
    assert all(method.memory.total > 4 * 774_030_080 for method in planned.methods)


def test_a_method_that_needs_the_weights_is_unknown_and_the_plan_goes_on(recipe_path):
    pissa = "{name: pissa, method: lora, learning_rate: 0.1, options: {r: 4, init_lora_weights: pissa}}"
    planned = make_plan(load_recipe(recipe_path, [f"methods=[{pissa}, {METHODS['curlora']}]"]))
    assert planned.methods[1].trained is None
    assert planned.methods[1].memory.total is None
    assert planned.methods[1].steps == planned.methods[2].steps > 0
    assert planned.methods[1].unknown.startswith("could not be put on the model without the model's weights: ")
    assert planned.methods[2].memory.total is not None
    printed = text_of(planned)
    assert "pissa could not be put on the model" in printed
    assert "unknown" in printed


def test_what_a_model_lacks_is_said(recipe_path):
    nope = "{name: nope, method: lora, learning_rate: 0.1, options: {target_modules: [nope]}}"
    with pytest.raises(RunError, match="method 'nope' cannot be put on this model: Target modules {'nope'} not found"):
        make_plan(load_recipe(recipe_path, [f"methods=[{nope}]"]))


def test_the_bytes_of_a_quantized_base_are_unknown(recipe_path):
    changes = ["model.quantization={quant_method: bitsandbytes, load_in_4bit: true}", methods("lora")]
    planned = make_plan(load_recipe(recipe_path, changes))
    assert planned.methods[1].trained is not None
    assert planned.methods[1].memory.frozen is planned.methods[1].memory.total is None
    assert "The base is quantized" in text_of(planned)


def test_over_several_processes(recipe_path, monkeypatch):
    recipe = load_recipe(recipe_path, [methods("lora")])
    alone = make_plan(recipe)
    two = SimpleNamespace(num_processes=2, device=torch.device("cpu"))
    for module in (plan, memory_module):
        monkeypatch.setattr(module, "process_state", lambda: two)
    shared = make_plan(recipe)
    assert shared.processes == 2
    assert shared.steps == alone.steps
    assert shared.methods[1].memory.kept < 0.6 * alone.methods[1].memory.kept
    three = SimpleNamespace(num_processes=3, device=torch.device("cpu"))
    monkeypatch.setattr("curlora.continual.processes.process_state", lambda: three)
    with pytest.raises(RunError, match="A batch_size of 4 cannot be shared out over 3 processes evenly"):
        make_plan(recipe)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ("tasks.0.train.path=missing.tsv", RecipeError, "there is no such file"),
        ("tasks.0.train.text=body", RecipeError, "there is no column 'body'"),
        ("heldout.path=train.csv", RecipeError, "there is no such file"),
        (
            f"tasks.1={COMPLETION.replace('}}', '}, too_long: drop, training: {max_length: 2}}')}",
            TaskError,
            "no train example is left: all 30 are too long for max_length 2 .*Raise max_length",
        ),
    ],
)
def test_bad_data_is_what_it_is_to_a_run(recipe_path, tmp_path, change, error, message):
    recipe = load_recipe(recipe_path, [change])
    with pytest.raises(error, match=message) as planned:
        make_plan(recipe)
    with pytest.raises(error) as run:
        run_recipe(recipe, tmp_path / "run")
    assert str(planned.value) == str(run.value)


def test_what_is_cut_or_left_out_is_counted_as_a_run_counts_it(recipe_path, tmp_path):
    longer = COMPLETION.replace("}}", "}, too_long: drop, training: {max_length: 7}}")
    changes = [methods("frozen"), f"tasks.1={longer}", "training.max_length=4"]
    recipe = load_recipe(recipe_path, changes)
    planned = make_plan(recipe)
    results = run_recipe(recipe, tmp_path / "run")
    rows = [json.loads(line)["sentence"] for line in (tmp_path / "second-train.jsonl").read_text().splitlines()]
    dropped = sum(2 * len(row.split()) - 1 > 7 for row in rows)
    assert planned.tasks[1].too_long["train_dropped"] == dropped > 0
    assert planned.tasks[0].too_long["train_cut"] > 0
    for part, task in zip(planned.tasks, results.tasks, strict=True):
        assert part.too_long == task.model_dump(include=set(part.too_long))
        assert (part.examples, part.evaluation_examples) == (task.train_examples, task.evaluation_examples)
    assert results.tasks[1].train_examples == len(rows) - dropped
    said = " ".join(text_of(planned).split())
    assert f"Examples of copy that are longer than max_length: {dropped} left out of those to learn from" in said


def text_of(planned, width=80):
    console = Console(width=width, file=io.StringIO())
    for part in plan_tables(planned):
        console.print(part)
    return console.file.getvalue()


def test_large_figures_fit_into_80_columns(recipe_path):
    planned = make_plan(load_recipe(recipe_path, ["title=A run [of] some length", methods("lora", "full")]))
    large = replace(
        planned,
        base_parameters=70_553_706_496,
        tasks=[
            replace(task, name="a-task-with-a-long-name", examples=1_234_567, tokens=987_654_321, steps=123_456)
            for task in planned.tasks
        ],
        methods=[
            replace(
                method, label="A method by another name", trained=70_553_706_496, tokens=98_765_432_100,
                memory=Memory(141_107_412_992, 1_128_859_303_936, 98_765_432_100, 98_765_432_100),
            )
            for method in planned.methods
        ],
    )  # fmt: skip
    printed = text_of(large)
    assert max(map(len, printed.splitlines())) <= 80
    assert "…" not in printed
    assert "A run [of] some length" in printed
    for figure in ("70,553,706,496", "987,654,321", "98,765,432,100", "131.4 GiB", "1051.3 GiB", "1366.7 GiB"):
        assert figure in printed


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "curlora_cli", "run", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "COLUMNS": "80"},
    )


def test_dry_run_prints_the_figures_and_writes_nothing(recipe_path, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    done = command(recipe_path, "--out", tmp_path / "run", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert sorted(tmp_path.rglob("*")) == before
    planned = make_plan(load_recipe(recipe_path))
    for method in planned.methods[1:]:
        cells = [method.label, method.trained, method.steps, method.tokens, method.windows]
        row = next(line.split() for line in done.stdout.splitlines() if line.startswith(method.label))
        assert row == [cell if isinstance(cell, str) else f"{cell:,}" for cell in cells]
    assert f"{planned.steps:,}" in done.stdout
    assert "1 process" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_dry_run_of_bad_data_is_one_message(recipe_path, tmp_path):
    done = command(recipe_path, "--out", tmp_path / "run", "--dry-run", "--set", "tasks.0.train.path=missing.tsv")
    assert done.returncode == 1
    assert "Error: task 'first', train" in done.stderr
    assert "there is no such file" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
