"""A plan gives the steps of a run of the same recipe, and about the memory that it keeps."""

import dataclasses
import io
import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from typer.testing import CliRunner

from curlora import CurloraConfig
from curlora.continual import memory as memory_module
from curlora.continual.errors import RecipeError, RunError
from curlora.continual.launch import run_recipe
from curlora.continual.memory import Memory, UnknownError, kept_for_backward
from curlora.continual.plan import make_plan
from curlora.continual.recipe_file import load_recipe
from curlora.continual.task_model import TaskModel
from curlora.continual.tasks import TaskError
from curlora.report.plan import plan_tables
from curlora.tuner.fingerprint import LENGTH
from curlora_cli.commands import app
from tests.models import layers, word_tokenizer

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
        assert not expected.memory.unknown, method.name
        assert expected.trained == method.trainable_parameters, method.name
        assert expected.steps == sum(seed.steps for seed in method.seeds), method.name
        assert expected.tokens == sum(seed.train_tokens for seed in method.seeds), method.name
    assert planned.base_parameters == results.base_parameters
    first, second = planned.tasks
    steps = {name: by_name(planned)[name].steps for name in ("frozen", "lora")}
    assert steps["frozen"] == 2 * 2 * 3  # five batches, two per step; the other task has no head to train
    assert steps["lora"] == steps["frozen"] + 2 * 3 * 4
    assert max(len(row["input_ids"]) for row in first.train) == 7
    assert max(len(row["input_ids"]) for row in second.train) == 7 + 7 - 1  # the last token is not an input


def test_windows_of_held_out_texts(recipe_path):
    planned = make_plan(load_recipe(recipe_path, ["seeds=[0, 1, 2]"]))
    assert planned.base_windows == 4  # 50 tokens in windows of 16
    assert [method.windows for method in planned.methods] == [0, 4 * 2 * 3, 4 * 2 * 3]


class Kept:
    """Counts the bytes that a forward pass keeps for backward: each storage once, without those of the model itself."""

    def __init__(self, model):
        held = [tensor for layer in layers(model) for U in layer.matrices.values() for tensor in U.basis.tensors]
        self.own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers(), *held)}
        self.kept = {}

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.own:
            self.kept[storage.data_ptr()] = storage  # kept alive, so that no address is reused
        return tensor

    @property
    def bytes(self):
        return sum(storage.nbytes() for storage in self.kept.values())


SIZES = dict(vocab_size=100, hidden_size=64, num_hidden_layers=4, num_attention_heads=4)
GATED = dict(SIZES, intermediate_size=176, num_key_value_heads=2)
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**GATED)),
    "llama, eager": lambda: LlamaForCausalLM(LlamaConfig(**GATED, attn_implementation="eager")),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**GATED, head_dim=16)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**GATED, head_dim=16)),
    "phi": lambda: PhiForCausalLM(PhiConfig(**GATED)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=100, n_embd=64, n_layer=4, n_head=4)),
    "gpt2, no dropout": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=100, n_embd=64, n_layer=4, n_head=4, resid_pdrop=0, attn_pdrop=0, embd_pdrop=0)
    ),
}
ADAPTERS = {
    "full": None,
    "lora": partial(LoraConfig, r=4, target_modules="all-linear"),
    "lora with dropout": partial(LoraConfig, r=4, lora_dropout=0.1, target_modules="all-linear"),
    "curlora": partial(CurloraConfig, r=4, target_modules="all-linear"),
}


def kept_by_a_step(base, adapter, batch, length, trainer):
    """Return the measured bytes and those of the formula."""
    base.train()
    model = base if adapter is None else get_peft_model(base, adapter())
    ids = torch.randint(0, 90, (batch, length))
    mask = torch.ones_like(ids)
    mask[-1, -1] = 0  # padding needs a mask, which takes memory too
    if trainer.get("gradient_checkpointing"):
        base.gradient_checkpointing_enable()
        base.enable_input_require_grads()
    with Kept(model) as kept, torch.autocast("cpu", torch.bfloat16, enabled=bool(trainer.get("bf16"))):
        base.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    return kept.bytes, model


@pytest.mark.parametrize("trainer", [{}, {"bf16": True}], ids=["float32", "autocast"])
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("batch", "length"), [(8, 32), (2, 100)])
def test_what_a_step_keeps_is_what_the_formula_says(family, adapter, trainer, batch, length):
    measured, model = kept_by_a_step(FAMILIES[family](), ADAPTERS[adapter], batch, length, trainer)
    with torch.device("meta"):
        base = FAMILIES[family]()
    off = 0.15 if family == "llama, eager" else 0.1  # the error that docs/complexity.md states
    assert kept_for_backward(model, base, batch, length, trainer, "cpu") == pytest.approx(measured, rel=off)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("family", ["llama", "gpt2, no dropout"])
def test_of_a_model_in_half_precision(family, adapter):
    measured, model = kept_by_a_step(FAMILIES[family]().bfloat16(), ADAPTERS[adapter], 8, 32, {})
    assert kept_for_backward(model, FAMILIES[family]().bfloat16(), 8, 32, {}, "cpu") == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("family", ["llama", "gpt2, no dropout"])
def test_of_checkpoints(family):
    """With checkpointing, the inputs of all blocks are kept, and the rest of one block at a time."""
    trainer = {"gradient_checkpointing": True}
    inputs, model = kept_by_a_step(FAMILIES[family](), ADAPTERS["curlora"], 8, 32, trainer)
    blocks, _ = kept_by_a_step(FAMILIES[family](), ADAPTERS["curlora"], 8, 32, {})
    formula = kept_for_backward(model, FAMILIES[family](), 8, 32, trainer, "cpu")
    assert formula == pytest.approx(inputs + blocks / 4, rel=0.1)


def test_of_a_model_of_gpt2s_size():
    config = GPT2Config(attn_pdrop=0, resid_pdrop=0, embd_pdrop=0)
    with torch.device("meta"):
        base = GPT2LMHeadModel(config)
    for adapter in ("lora", "curlora"):
        measured, model = kept_by_a_step(GPT2LMHeadModel(config), ADAPTERS[adapter], 2, 64, {})
        assert kept_for_backward(model, base, 2, 64, {}, "cpu") == pytest.approx(measured, rel=0.05)


def test_blocks_below_the_first_that_trains_keep_nothing():
    adapter = partial(CurloraConfig, r=4, target_modules=["q_proj"], layers_to_transform=[3])
    measured, model = kept_by_a_step(FAMILIES["llama"](), adapter, 8, 32, {})
    assert kept_for_backward(model, FAMILIES["llama"](), 8, 32, {}, "cpu") == pytest.approx(measured, rel=0.25)
    assert measured < 0.3 * kept_by_a_step(FAMILIES["llama"](), ADAPTERS["curlora"], 8, 32, {})[0]


def test_models_without_a_formula():
    mamba = MambaForCausalLM(MambaConfig(vocab_size=100, hidden_size=64, num_hidden_layers=2))
    with pytest.raises(UnknownError, match="attention and a dense MLP"):
        kept_for_backward(mamba, mamba, 2, 8, {}, "cpu")


def largest_step(monkeypatch, recipe, name, directory):
    """Return the most bytes that a training step of a real run of one method keeps for backward."""
    recipe = recipe.model_copy(update={"methods": [part for part in recipe.methods if part.name == name]})
    seen = []
    forward = TaskModel.forward

    def counting(self, *args, **kwargs):
        with Kept(self) as kept:
            result = forward(self, *args, **kwargs)
        if self.training:
            seen.append(kept.bytes)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(TaskModel, "forward", counting)
        run_recipe(recipe, directory)
    return max(seen)


@pytest.mark.parametrize("name", ["frozen", "lora", "curlora", "full", "replay"])
def test_what_a_run_keeps(recipe_path, tmp_path, monkeypatch, name):
    """With only two blocks the formula gives more: below the first, nothing is kept for an adapter."""
    recipe = load_recipe(recipe_path, [methods(name), "training.epochs=1"])
    memory = by_name(make_plan(recipe))[name].memory
    measured = largest_step(monkeypatch, recipe, name, tmp_path / "run")
    assert memory.kept == pytest.approx(measured, rel=0.2, abs=2000)
    assert memory.logits == 4 * 2 * 4  # four texts, two classes


def test_logits_of_completions(recipe_path):
    rows = [{"sentence": "w20 w21 w22", "sign": "w23 w24"}] * 7 + [{"sentence": "w20 w21", "sign": "w23 w24"}]
    (recipe_path.parent / "second-train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = COMPLETION.replace(
        "train.jsonl, prompt: sentence, completion: sentence", "train.jsonl, prompt: sentence, completion: sign"
    )
    changes = [methods("lora"), f"tasks=[{task}]", "training.batch_size=8"]
    # Logits from the first labelled position of the shorter text on; log-probabilities and gradients of two answers.
    assert by_name(make_plan(load_recipe(recipe_path, changes)))["lora"].memory.logits == 8 * 100 * (3 * 4 + 2 * 2 * 4)
    half = load_recipe(recipe_path, [*changes, "training.trainer.bf16=true"])
    assert by_name(make_plan(half))["lora"].memory.logits == 8 * 100 * (3 * 2 + 2 * 2 * 4)


def test_weights_gradients_and_moments(recipe_path):
    recipe = load_recipe(recipe_path, [methods("lora", "curlora", "full")])
    base = bytes_of(recipe.model.load())
    planned = by_name(make_plan(recipe))
    heads = (2 + 3) * 4 * (32 * 2 + 2)  # two heads, and a gradient and two moments of one of them
    numbers = sum(p.numel() for p in recipe.model.load().parameters())
    assert planned["frozen"].memory.weights == base
    assert planned["frozen"].memory.trained == heads
    assert planned["lora"].memory.weights == base
    assert planned["lora"].memory.trained == 16 * planned["lora"].trained + heads
    # Columns of queries, keys and values of two layers, and the indices and a fingerprint of each.
    assert planned["curlora"].memory.weights == base + 2 * (32 + 16 + 16) * 4 * 4 + 2 * 3 * (2 * 4 + LENGTH) * 4
    assert planned["full"].memory.trained == 16 * numbers + heads
    # The model's own buffers, and the copy that drift is measured against.
    assert planned["full"].memory.weights == base + (base - 4 * numbers)
    memory = planned["full"].memory
    assert memory.total == memory.weights + memory.trained + memory.kept + memory.logits


def test_half_precision(recipe_path):
    full = make_plan(load_recipe(recipe_path, ["model.dtype=bfloat16", methods("full")])).methods[1]
    assert full.memory.trained == 8 * full.trained + 5 * 4 * (32 * 2 + 2)  # heads stay float32


def test_no_weights_are_read(recipe_path, tmp_path):
    recipe = load_recipe(recipe_path, [methods("lora", "curlora", "full")])
    whole = make_plan(recipe)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"broken")
    assert make_plan(recipe).methods == whole.methods
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


def test_a_start_from_a_decomposition_takes_what_lora_takes(recipe_path):
    methods = [
        f"{{name: {start}, method: lora, learning_rate: 0.1, options: {{r: 4, init_lora_weights: {start}}}}}"
        for start in ("pissa", "gaussian")
    ]
    _, pissa, lora = make_plan(load_recipe(recipe_path, [f"methods=[{', '.join(methods)}]"])).methods
    assert pissa.trained == lora.trained > 0
    # It changes the base model, so that a second copy is needed to measure the drift from it.
    assert pissa.memory == dataclasses.replace(lora.memory, weights=2 * lora.memory.weights)


def test_a_method_that_needs_the_weights_is_unknown_and_the_plan_goes_on(recipe_path):
    frod = "{name: frod, method: frod, learning_rate: 0.1, options: {target_modules: [q_proj]}}"
    planned = make_plan(load_recipe(recipe_path, [f"methods=[{frod}, {METHODS['curlora']}]"]))
    assert planned.methods[1].trained is None
    assert planned.methods[1].memory.total is None
    assert planned.methods[1].steps == planned.methods[2].steps > 0
    assert planned.methods[1].memory.unknown.startswith("reads the model's weights when it starts (")
    assert planned.methods[2].memory.total is not None
    printed = text_of(planned)
    assert "frod: reads the model's weights when it starts" in printed
    assert "unknown" in printed


def test_an_adapter_without_a_formula(recipe_path):
    ia3 = "{name: ia3, method: ia3, learning_rate: 0.1, options: {target_modules: [q_proj], feedforward_modules: []}}"
    planned = make_plan(load_recipe(recipe_path, [f"methods=[{ia3}]"]))
    assert planned.methods[1].trained == 2 * 32
    assert planned.methods[1].memory.kept is planned.methods[1].memory.total is None
    printed = " ".join(text_of(planned).split())
    assert "ia3: there is no formula for what an adapter of ia3 keeps for the backward pass" in printed


def test_a_quantized_base(recipe_path, tmp_path, monkeypatch):
    # On a processor with AVX512-BF16, bitsandbytes rejects layers as narrow as these.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    sizes = dict(SIZES, hidden_size=256, intermediate_size=512, num_key_value_heads=2)
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path / "model")
    changes = ["model.quantization={quant_method: bitsandbytes, load_in_4bit: true}", methods("lora")]
    recipe = load_recipe(recipe_path, changes)
    model = recipe.model.load()
    measured = bytes_of(model)
    measured += sum(bytes_of_state(p.quant_state) for p in model.parameters() if hasattr(p, "quant_state"))
    memory = make_plan(recipe).methods[1].memory
    assert memory.weights == pytest.approx(measured, rel=0.02)
    assert memory.total is not None


def bytes_of_state(state):
    return state.absmax.nbytes


def test_a_quantization_without_a_formula(recipe_path):
    changes = ["model.quantization={quant_method: torchao, quant_type: int4_weight_only}", methods("lora")]
    planned = make_plan(load_recipe(recipe_path, changes))
    assert planned.methods[1].trained is not None
    assert planned.methods[1].memory.weights is planned.methods[1].memory.total is None
    assert "the size of weights that torchao has quantized" in text_of(planned)


def test_over_several_processes(recipe_path, monkeypatch):
    recipe = load_recipe(recipe_path, [methods("lora")])
    alone = make_plan(recipe)
    two = SimpleNamespace(num_processes=2, device=torch.device("cpu"))
    monkeypatch.setattr(memory_module, "process_state", lambda: two)
    shared = make_plan(recipe)
    assert [method.steps for method in shared.methods] == [method.steps for method in alone.methods]
    assert shared.methods[1].memory.kept < 0.6 * alone.methods[1].memory.kept
    three = SimpleNamespace(num_processes=3, device=torch.device("cpu"))
    monkeypatch.setattr("curlora.continual.processes.process_state", lambda: three)
    with pytest.raises(RunError, match="A batch_size of 4 cannot be divided evenly among 3 processes"):
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
            "no train example is left. All 30 are too long for max_length 2 .*Raise max_length",
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
        assert (len(part.train), len(part.evaluation)) == (task.train_examples, task.evaluation_examples)
    assert results.tasks[1].train_examples == len(rows) - dropped
    said = " ".join(text_of(planned).split())
    assert f"Examples of copy that are longer than max_length: {dropped} left out in the training split" in said


def text_of(planned, width=80):
    console = Console(width=width, file=io.StringIO())
    for part in plan_tables(planned):
        console.print(part)
    return console.file.getvalue()


def test_large_figures_fit_into_80_columns(recipe_path):
    planned = make_plan(load_recipe(recipe_path, ["title=A run [of] some length", methods("lora", "full")]))
    rows = [{"input_ids": range(987_654_321), "labels": 0}]
    tasks = [
        replace(part, task=replace(part.task, name="a-task-with-a-long-name"), train=rows) for part in planned.tasks
    ]
    memory = Memory(141_107_412_992, 1_128_859_303_936, 98_765_432_100, 98_765_432_100)
    large = replace(
        planned,
        base_parameters=70_553_706_496,
        tasks=tasks,
        methods=[
            replace(
                method, label="A method by another name", trained=70_553_706_496, tokens=98_765_432_100, memory=memory
            )
            for method in planned.methods
        ],
    )
    printed = text_of(large)
    assert max(map(len, printed.splitlines())) <= 80
    assert "…" not in printed
    assert "A run [of] some length" in printed
    for figure in ("70,553,706,496", "987,654,321", "98,765,432,100", "131.4 GiB", "1051.3 GiB", "1366.7 GiB"):
        assert figure in printed


def command(*arguments):
    return CliRunner().invoke(app, ["run", *map(str, arguments)])


def test_dry_run_prints_the_figures_and_writes_nothing(recipe_path, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    done = command(recipe_path, "--out", tmp_path / "run", "--dry-run")
    assert done.exit_code == 0, done.stderr
    assert sorted(tmp_path.rglob("*")) == before
    planned = make_plan(load_recipe(recipe_path))
    for method in planned.methods[1:]:
        cells = [method.label, method.trained, method.steps, method.tokens, method.windows]
        row = next(line.split() for line in done.stdout.splitlines() if line.startswith(method.label))
        assert row == [cell if isinstance(cell, str) else f"{cell:,}" for cell in cells]
    assert f"{sum(method.steps for method in planned.methods):,}" in done.stdout
    assert "1 process" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_dry_run_of_bad_data_is_one_message(recipe_path, tmp_path):
    done = command(recipe_path, "--out", tmp_path / "run", "--dry-run", "--set", "tasks.0.train.path=missing.tsv")
    assert done.exit_code == 1
    assert "Error: task 'first', train" in done.stderr
    assert "there is no such file" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
