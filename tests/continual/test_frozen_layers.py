"""Caching the outputs of frozen lower layers leaves a run's results bit-identical."""

import copy
import importlib.util
import io
import os

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from curlora.continual import load_recipe, run_recipe
from curlora.continual.errors import RecipeError, RunError
from curlora.continual.frozen_layers import FOLDER, keep_frozen_layers
from curlora.continual.plan import make_plan
from curlora.report.plan import plan_tables
from tests.continual.streams import figures
from tests.models import VOCABULARY, gpt2, llama, tokens

KEPT = "training.cache_frozen_layers=true"
UPPER = {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [2, 3]}
GUARDED = [{"name": "redraw", "examples": 8}, {"name": "guard", "max_perplexity_increase": 0.2}]
METHODS = [
    {"name": "frozen", "method": "frozen"},
    {
        "name": "lora",
        "method": "lora",
        "learning_rate": {"grid": [0.01, 0.02]},
        "options": {"r": 4, **UPPER, "lora_dropout": 0.2},
        "plugins": [{"name": "replay", "examples": 6}, {"name": "ewc", "strength": 1.0, "examples": 5}],
    },
    {"name": "cur", "method": "curlora", "learning_rate": 0.1, "options": {"r": 4, **UPPER}, "plugins": GUARDED},
    {
        "name": "pissa",
        "method": "lora",
        "learning_rate": 0.01,
        "options": {"r": 4, **UPPER, "init_lora_weights": "pissa"},
        "plugins": [{"name": "kl_to_base", "strength": 1.0, "tokens": 16}],
    },
    {"name": "each", "method": "lora", "learning_rate": 0.01,
     "options": {"r": 4, "target_modules": ["down_proj"], "layers_to_transform": [3]}, "adapter_per_task": True},
]  # fmt: skip


@pytest.fixture
def study(recipe_path):
    """A model of four layers whose upper two are adapted, with classes, completions and generated answers."""
    folder = recipe_path.parent
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    content = yaml.safe_load(recipe_path.read_text())
    (second,) = [task for task in content["tasks"] if task["name"] == "second"]
    fields = {"prompt": "sentence", "completion": "sign"}
    answers = {"name": "third", "kind": "completion", "score": {"generate": {"max_new_tokens": 4}}}
    for split in ("train", "evaluation"):
        answers[split] = {"path": second[split]["path"], **fields}
    content["tasks"].append(answers)
    for task in content["tasks"]:
        task["train"]["limit"] = task["evaluation"]["limit"] = 12
    content["methods"] = METHODS
    content["guard"] = {"name": "more words", "path": "more.txt", "tokens": 50, "window": 16}
    content["training"] = {"epochs": 2, "batch_size": 4, "head_learning_rate": 0.05, "logging_steps": 1,
                           "checkpoint_steps": 100}  # fmt: skip
    recipe_path.write_text(yaml.safe_dump(content))
    return recipe_path


def learned(directory):
    """Return everything that was saved, by file."""
    return {
        str(path.relative_to(directory)): {name: value.numpy().tobytes() for name, value in load_file(path).items()}
        for path in sorted(directory.glob("*/seed-*/**/*.safetensors"))
    }


def files(directory):
    return {path.name: path.stat().st_mtime_ns for path in below(directory, 2).iterdir()}


def below(directory, layers):
    """The folder of the outputs of so many layers; its name ends with a digest of the model."""
    (folder,) = (directory / FOLDER).glob(f"{layers}-*")
    return folder


def test_a_run_with_and_without_are_the_same_to_the_bit(study, tmp_path):
    without = run_recipe(load_recipe(study), tmp_path / "without")
    kept = run_recipe(load_recipe(study, [KEPT]), tmp_path / "kept")
    assert figures(kept) == figures(without)
    assert learned(tmp_path / "kept") == learned(tmp_path / "without")
    assert list((tmp_path / "kept" / FOLDER).iterdir()) == [below(tmp_path / "kept", 2)]
    before = files(tmp_path / "kept")
    assert before
    assert all(name.endswith(".safetensors") for name in before)
    # One more value of the grid needs no new entry in the cache.
    grid = "methods.1.learning_rate={grid: [0.01, 0.02, 0.03]}"
    run_recipe(load_recipe(study, [KEPT, grid]), tmp_path / "kept")
    assert files(tmp_path / "kept") == before


def test_fixed_batches_serve_all_epochs_and_seeds(study, tmp_path):
    """To the bit, and a second seed adds nothing to the cache. Plug-ins that draw examples draw others, without it."""
    content = yaml.safe_load(study.read_text())
    frozen, lora, cur = METHODS[:3]
    content["methods"] = [frozen, {**lora, "plugins": [], "learning_rate": 0.01}, {**cur, "plugins": GUARDED[1:]}]
    content["tasks"] = content["tasks"][1:]
    content["resources"] = {"cpus": 1}
    study.write_text(yaml.safe_dump(content))
    changes = ["training.fixed_batches=true"]
    without = run_recipe(load_recipe(study, [*changes, "seeds=[0, 1]"]), tmp_path / "without")
    kept = run_recipe(load_recipe(study, [*changes, KEPT]), tmp_path / "kept")
    before = files(tmp_path / "kept")
    both = load_recipe(study, [*changes, KEPT, "seeds=[0, 1]"])
    kept = run_recipe(both, tmp_path / "kept", workers=2 if importlib.util.find_spec("ray") else None)
    assert figures(kept) == figures(without)
    assert learned(tmp_path / "kept") == learned(tmp_path / "without")
    assert files(tmp_path / "kept") == before


def alone(path, method):
    """A recipe with one task, and one method besides the frozen one."""
    content = yaml.safe_load(path.read_text())
    content["methods"] = [{"name": "it", "method": "lora", "learning_rate": 0.01, **method}]
    content["tasks"] = content["tasks"][:1]
    path.write_text(yaml.safe_dump(content))


def test_the_lower_layers_do_not_run_again(study, tmp_path, monkeypatch):
    calls = []
    load = AutoModelForCausalLM.from_pretrained

    def counting(*arguments, **options):
        model = load(*arguments, **options)
        for number in (1, 3):
            model.model.layers[number].mlp.register_forward_hook(lambda *_, number=number: calls.append(number))
        return model

    alone(study, {"options": {"r": 4, **UPPER}})
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", counting)
    for rates in ("[0.01, 0.02]", "[0.01, 0.02, 0.03]"):
        calls.clear()
        run_recipe(load_recipe(study, [KEPT, f"methods.0.learning_rate={{grid: {rates}}}"]), tmp_path / "run")
    assert calls.count(3) > 20
    assert calls.count(1) == 1  # the check on a few tokens


@pytest.mark.parametrize(
    "changes", [[], ["switches.order=as_given"], ["training.fixed_batches=true"]], ids=["shuffled", "as given", "fixed"]
)
def test_the_plan_gives_the_size_of_the_cache(study, tmp_path, changes):
    alone(study, {"options": {"r": 4, **UPPER}})
    changes = ["seeds=[0, 1]", *changes]
    assert make_plan(load_recipe(study, changes)).cache == 0
    recipe = load_recipe(study, [KEPT, *changes])
    plan = make_plan(recipe)
    run_recipe(recipe, tmp_path / "run")
    states = [load_file(path)["states"] for path in below(tmp_path / "run", 2).iterdir()]
    assert 0.5 < plan.cache / sum(held.nbytes for held in states) <= 1.0  # the rest is padding; the rows are short
    console = Console(file=io.StringIO())
    console.print(*plan_tables(plan))
    assert "The cache of frozen layers takes at least" in console.file.getvalue()


def test_a_run_that_goes_on_may_begin_to_keep(study, tmp_path):
    alone(study, {"options": {"r": 4, **UPPER}})
    run = tmp_path / "run"
    whole = run_recipe(load_recipe(study), run)
    (run / "it" / "seed-0" / "result.json").unlink()
    assert figures(run_recipe(load_recipe(study, [KEPT]), run)) == figures(whole)
    torn = sorted(below(run, 2).iterdir())
    torn[0].write_bytes(b"")  # as after a power failure
    os.truncate(torn[1], 100)
    (run / "it" / "seed-0" / "result.json").unlink()
    assert figures(run_recipe(load_recipe(study, [KEPT]), run)) == figures(whole)
    assert torn[0].stat().st_size > 0


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"method": "full"}, "it trains embed_tokens, which is outside the model's layers"),
        ({"options": {"r": 4, "target_modules": ["q_proj"]}}, "it trains the first of the model's 4 layers"),
        ({"method": "osf", "options": {"target_modules": ["q_proj"]}}, "it trains the first of the model's 4 layers"),
        ({"options": {"r": 4, "target_modules": ["q_proj", "embed_tokens"]}}, "it trains embed_tokens"),
        ({"options": {"r": 4, **UPPER, "modules_to_save": ["norm"]}}, "it trains norm"),
        (
            {"options": {"r": 4, "init_lora_weights": "pissa", "target_modules": ["q_proj"]}},
            "it trains the first of the model's 4 layers",
        ),
        ({"options": {"r": 4, "init_lora_weights": "pissa"}}, "it trains the first of the model's 4 layers"),
        (
            {"method": "frod", "options": {"target_modules": "all-linear"}},
            "its layers are not known .*: name its target_modules",
        ),
    ],
)
def test_a_method_that_trains_something_below_is_refused(method, message, study, tmp_path):
    alone(study, method)
    with pytest.raises(RunError, match=rf"method 'it' cannot be applied to this model: {message}"):
        run_recipe(load_recipe(study, [KEPT]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("key", ["gradient_checkpointing", "torch_compile"])
def test_what_runs_layers_again_is_refused(key, study):
    with pytest.raises(RecipeError, match=f"cache_frozen_layers cannot be combined with {key}"):
        load_recipe(study, [KEPT, f"training.trainer={{{key}: true}}"])
    with pytest.raises(RecipeError, match="cache_frozen_layers must be the same for all tasks"):
        load_recipe(study, ["tasks.0.training={cache_frozen_layers: true}"])


def test_a_model_with_dropout_is_refused(study, tmp_path):
    gpt2().save_pretrained(study.parent / "model")
    alone(study, {"options": {"r": 4, "target_modules": ["c_attn"], "layers_to_transform": [1]}})
    with pytest.raises(RunError, match=r"lower layers have a dropout of 0.1 in training"):
        run_recipe(load_recipe(study, [KEPT]), tmp_path / "run")


def test_passes_that_want_more_run_all_layers(tmp_path):
    plain, model = llama().eval(), keep_frozen_layers(llama().eval(), 1, tmp_path)
    ids = tokens()
    folder = below(tmp_path, 1)
    with torch.no_grad():
        states = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
        assert all(map(torch.equal, states, plain(input_ids=ids, output_hidden_states=True).hidden_states))
        embedded = model.get_input_embeddings()(ids)
        model(inputs_embeds=embedded, use_cache=False)
        past = model(input_ids=ids, use_cache=True).past_key_values
        assert len(past.layers) == 2
        assert not list(folder.iterdir())
        for mask in (torch.ones_like(ids), torch.ones_like(ids).index_fill(1, torch.tensor([5, 6]), 0)):
            for _ in range(2):
                found = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
                assert torch.equal(found, plain(input_ids=ids, attention_mask=mask, use_cache=False).logits)
        assert len(list(folder.iterdir())) == 2
        with torch.autocast("cpu", torch.bfloat16):
            model(input_ids=ids, attention_mask=mask, use_cache=False)
        assert len(list(folder.iterdir())) == 3


def test_another_model_has_another_cache(tmp_path):
    ids, config = tokens(), llama().config
    for seed in (0, 1):
        torch.manual_seed(seed)
        plain = LlamaForCausalLM(config).eval()
        kept = keep_frozen_layers(copy.deepcopy(plain), 1, tmp_path)
        for _ in range(2):
            assert torch.equal(kept(input_ids=ids, use_cache=False).logits, plain(input_ids=ids).logits)
    assert len(list((tmp_path / FOLDER).iterdir())) == 2


def test_layers_that_speak_with_each_other_are_refused(tmp_path):
    model = llama()
    heard = []
    lower, upper = model.model.layers
    lower.register_forward_hook(lambda *_: None)
    lower.mlp.register_forward_hook(lambda module, inputs, output: heard.append(output))
    # `heard` is empty if the lower layers are not run.
    upper.mlp.register_forward_hook(lambda module, inputs, output: output + heard.pop())
    with pytest.raises(RunError, match="need more from the lower layers than their output"):
        keep_frozen_layers(model, 1, tmp_path)


def test_a_model_without_layers_to_be_found(tmp_path):
    with pytest.raises(ValueError, match="layers of a Linear were not found"):
        keep_frozen_layers(nn.Linear(2, 2), 1, tmp_path)
