"""What the documentation tells people to type is right."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from datasets import Dataset
from peft import PeftModel, get_peft_model
from ray.scripts.scripts import cli as ray
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed import run as torchrun
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from curlora.continual import load_recipe
from curlora.guard import Ledger
from curlora_cli.commands import app
from tests.models import WORDS, curlora, layers, llama, save_base, tokens, word_tokenizer
from tests.results import make_results_by_loss

DOCS = Path(__file__).parent.parent / "docs"
README = (DOCS.parent / "README.md").read_text(encoding="utf-8")
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)


def test_the_guards_python_runs(tmp_path, monkeypatch):
    """With a small local model in the place of the hub's."""
    llama().save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    rows = [{"input_ids": row, "labels": row} for row in tokens(batch=16)]
    names = {"general_texts": [" ".join(WORDS)] * 12, "train_dataset": rows}
    whole, by_callback, measured, own, redrawn = blocks("guard.md", "python")
    exec(whole.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(tmp_path / "base")), names)
    assert 0 < names["guard"].drift() <= 0.01
    exec(by_callback, names)
    assert names["callback"].kept.rise <= 0.01
    assert PeftModel.from_pretrained(llama(), "my-adapter").active_adapter == "default"
    moved = []

    def rise():
        pairs = zip(names["guard"].parameters, names["before"], strict=True)
        moved.append(sum(float((U - old).detach().norm()) for U, old in pairs))
        return 0.02 * moved[-1] / moved[0]

    names["perplexity_rise"] = rise
    exec(measured.replace("...\n", "trainer.train()\n"), names)
    assert 0 < names["scale"] < 1
    monkeypatch.setenv("CURLORA_CACHE_DIR", str(tmp_path / "cache"))
    names["tokenizer"].bos_token = WORDS[5]
    exec(own, names)
    assert names["calibration"].tokens == sum(map(len, names["rows"])) >= 8192
    names["task_batches"] = [{"input_ids": ids, "labels": ids} for ids in tokens(batch=8).split(4)]
    for U in names["guard"].parameters:
        U.data.zero_()  # as before any training
    before = [indices.clone() for name, indices in names["model"].named_buffers() if name.endswith(".indices")]
    exec(redrawn, names)
    after = [indices for name, indices in names["model"].named_buffers() if name.endswith(".indices")]
    assert not all(torch.equal(one, two) for one, two in zip(before, after, strict=True))
    assert 0 < names["rise"] <= 0.01


def test_the_budgets_python_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("CURLORA_CACHE_DIR", str(tmp_path / "cache"))
    save_base(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    pairs = [{"prompt": f"w{i} w2 ", "completion": f"w{i + 1}"} for i in range(24)]
    names = {
        "conversations": Dataset.from_list(pairs[:12]),
        "more_conversations": Dataset.from_list(pairs[12:]),
        "code_texts": ["w1 w2 w3"],
        "conversations_to_keep": [[{"role": "user", "content": "w4"}]],
    }
    first, with_lora, several, on = (
        block.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(tmp_path / "base"))
        .replace("(r=32", "(r=4")
        .replace('Config("out', 'Config(bf16=False, use_cpu=True, output_dir="out')
        for block in blocks("budget.md", "python")
    )
    exec(first, names)
    assert names["budget"].outcome.texts["own text"].rise <= 0.01
    exec(with_lora, names)
    assert names["budget"].outcome.texts["own text"].rise <= 0.01
    assert PeftModel.from_pretrained(llama(initializer_range=0.2), "my-lora").peft_config["default"].r == 16
    exec(several, names)
    assert names["budget"]._texts.limits["code"] == 0.005
    exec(on, names)
    ledger = Ledger.load("my-adapter")
    assert len(ledger.trainings) == 2
    assert ledger.left <= 0.03
    exec(*blocks("continual.md", "python"), names)
    assert names["training"] == ledger.trainings[-1]


def test_the_trackers_are_told(tmp_path, monkeypatch):
    monkeypatch.setenv("CURLORA_CACHE_DIR", str(tmp_path / "cache"))
    save_base(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    names = {"conversations": Dataset.from_list([{"prompt": f"w{i} w2 ", "completion": "w3"} for i in range(8)])}
    code = blocks("trackers.md", "python")[0].replace(BASE, str(tmp_path / "base")).replace("(r=32", "(r=4")
    exec(code.replace('Config("out"', 'Config("out", bf16=False, use_cpu=True'), names)
    (events,) = tmp_path.rglob("events.out.tfevents*")
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    assert {"train/drift", "train/kept", "train/perplexity_rise/own text"} <= set(accumulator.Tags()["scalars"])


def test_the_measurement_runs():
    names = {"base": llama(), "model": curlora(llama()), "texts": [" ".join(WORDS)], "tokenizer": word_tokenizer()}
    exec(*blocks("measuring.md", "python"), names)
    assert names["after"] != names["before"]


def test_the_conversions_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = curlora(llama())
    exec(*blocks("convert.md", "python"), {"model": model})
    loaded = PeftModel.from_pretrained(llama(), "my-lora").eval()
    assert torch.allclose(loaded(tokens()).logits, model(tokens()).logits, atol=1e-5)


def test_lm_eval_reads_an_adapter_and_its_conversion(tmp_path, monkeypatch):
    """The page's commands, with a small model and a task without the hub."""
    save_base(tmp_path / "base")
    model = curlora(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "my-adapter")
    (tmp_path / "pairs.csv").write_text("\n".join(["sentence\tlabel", *(f"w{i} w2\t{i % 2}" for i in range(40))]))
    task = (DOCS.parent / "benchmarks" / "harness" / "reviews.yaml").read_text(encoding="utf-8")
    task = task.replace("DATA_DIR/sst2/dev.tsv", str(tmp_path / "pairs.csv")).replace("negative, positive", "w1, w3")
    (tmp_path / "reviews.yaml").write_text(task)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    scores = []
    for number, block in enumerate(blocks("lm-eval.md", "sh")):
        script = block.strip().replace(BASE, "base")
        script = script.replace(
            "--tasks hellaswag", f"--tasks reviews --include_path . --log_samples --output_path {number}"
        )
        subprocess.run(["sh", "-ec", script], cwd=tmp_path, check=True, capture_output=True, timeout=300)
        (samples,) = (tmp_path / str(number)).rglob("samples_reviews_*.jsonl")
        answers = [json.loads(line)["filtered_resps"] for line in samples.read_text().splitlines()]
        scores.append([float(score) for answer in answers for score, _ in answer])
    imported, converted = scores
    assert len(imported) == 80
    assert imported == pytest.approx(converted, abs=1e-4)


def test_the_trainers_python_runs(tmp_path, monkeypatch):
    save_base(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    names = {
        "train_dataset": [{"input_ids": row, "labels": row} for row in tokens(batch=4)],
        "tasks": [[{"input_ids": row, "labels": row} for row in tokens(seed, batch=4)] for seed in range(2)],
        "general_rows": list(tokens(seed=5, batch=2)),
        "conversations": Dataset.from_list([{"prompt": "w1 w2 ", "completion": "w3"}] * 4),
    }
    for block in blocks("trainers.md", "python"):
        code = block.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(tmp_path / "base")).replace("(r=16)", "(r=4)")
        exec(code.replace('Config("out"', 'Config("out", bf16=False'), names)
        assert all(layer.curlora_U["default"].weight.any() for layer in layers(names["trainer"].model))


def test_the_preferences_python_runs(tmp_path, monkeypatch):
    """In that order: the second block goes on from what the first has saved."""
    monkeypatch.setenv("CURLORA_CACHE_DIR", str(tmp_path / "cache"))
    save_base(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    pairs = [{"prompt": f"w{i} w2 ", "chosen": "w3", "rejected": "w4 w5"} for i in range(16)]
    names = {
        "preferences": Dataset.from_list(pairs[:8]),
        "more_preferences": Dataset.from_list(pairs[8:]),
        "prompts": Dataset.from_list([{"prompt": f"w{i} w2 "} for i in range(4)]),
    }
    first, second, rewarded = (
        block.replace(BASE, str(tmp_path / "base")) for block in blocks("preferences.md", "python")
    )
    exec(first, names)
    exec(second, names)
    saved = PeftModel.from_pretrained(llama(initializer_range=0.2), "my-adapter")
    for one, two in zip(layers(saved), layers(names["trainer"].model), strict=True):
        assert one.curlora_U["default"].weight.any()
        assert torch.equal(one.curlora_U["default"].weight, two.curlora_U["ref"].weight)
        assert not torch.equal(one.curlora_U["default"].weight, two.curlora_U["default"].weight)
    assert len(Ledger.of(names["trainer"].model.peft_config["default"]).trainings) == 2
    sizes = "max_steps=1, max_completion_length=8, num_generations=4, per_device_train_batch_size=4"
    with pytest.warns(UserWarning, match="Columns and rows are not chosen for the task"):
        exec(rewarded.replace("bf16=False", f"bf16=False, {sizes}"), names)
    assert any(layer.curlora_U["default"].weight.any() for layer in layers(names["trainer"].model))
    assert names["trainer"].state.log_history[-1]["perplexity_rise/own text"] <= 0.01


@pytest.mark.parametrize("number", range(4))
def test_the_configurations_for_many_gpus_are_accelerates(number, tmp_path):
    (tmp_path / "accelerate.yaml").write_text(blocks("scale.md", "yaml")[number])
    config = load_config_from_file(str(tmp_path / "accelerate.yaml"))  # refuses entries that it does not know
    known = {action.dest for action in launch_command_parser()._actions}
    assert {*config.fsdp_config, *config.deepspeed_config} <= known


def test_the_quantized_python_runs(tmp_path, monkeypatch):
    # Where a processor has AVX512-BF16, bitsandbytes refuses layers as narrow as these.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    llama(initializer_range=0.2).save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks("quantized.md", "python"):
        exec(block.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(tmp_path / "base")), names)
    assert type(layers(names["model"])[0].get_base_layer()).__name__ == "Linear4bit"
    names["model"](tokens(), labels=tokens()).loss.backward()
    assert all(layer.curlora_U["default"].weight.grad.any() for layer in layers(names["model"]))


def mixture():
    sizes = dict(vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    return MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=2))


def test_the_adapters_python_runs(tmp_path, monkeypatch):
    llama(initializer_range=0.2).save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    logits = {"__base__": llama(initializer_range=0.2)(tokens()).logits}
    for seed, name in enumerate(("sentiment", "topics")):
        model = curlora(llama(initializer_range=0.2), seed=seed)
        model.save_pretrained(f"adapters/{name}")
        logits[name] = model(tokens()).logits
    names = {"batch": {"input_ids": tokens()[[0, 0, 0]]}}
    several, experts, by_row, combined, merged = (
        block.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(tmp_path / "base"))
        for block in blocks("adapters.md", "python")
    )
    exec(several, names)
    names["model"].eval()
    assert torch.allclose(names["model"](tokens()).logits, logits["topics"], atol=1e-5)
    of_experts = dict(names)
    exec(experts, of_experts)
    model = get_peft_model(mixture(), of_experts["config"])
    assert {layer.name.rpartition(".")[2] for layer in layers(model)} == {"q_proj", "gate_up_proj"}
    exec(by_row, names)
    for row, name in zip(names["logits"], ("topics", "sentiment", "__base__"), strict=True):
        assert torch.allclose(row, logits[name][0], atol=1e-5)
    exec(combined, names)
    both = names["model"](tokens()).logits
    for layer in layers(names["model"]):
        U = {name: matrix.weight for name, matrix in layer.curlora_U.items()}
        assert torch.allclose(U["both"], 0.7 * U["sentiment"] + 0.3 * U["topics"], atol=1e-6)
    merge, rest = merged.split("\n", 1)
    exec(merge, names)
    assert torch.allclose(names["model"](tokens()).logits, both, atol=1e-5)
    exec(rest, names)
    assert set(layers(names["model"])[0].r) == {"sentiment", "topics"}


def test_the_guards_recipe_is_one(tmp_path):
    """Put into the README's."""
    content = yaml.safe_load(re.search(r"```yaml\n(.*?)```", README, re.DOTALL).group(1))
    content.update(yaml.safe_load(blocks("guard.md", "yaml")[0]))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    assert load_recipe(tmp_path / "recipe.yaml").methods[-1].plugins[0]["max_perplexity_increase"] == 0.01


def recipe_of(page, number, folder):
    """Load a recipe of a page that is whole, with a small model and texts of its own in the place of the hub's."""
    save_base(folder / "model")
    (folder / "novel.txt").write_text(" ".join(WORDS))
    content = yaml.safe_load(blocks(page, "yaml")[number])
    content["model"]["name"] = str(folder / "model")
    return content


def test_the_recipes_of_the_recipe_page_are_valid(tmp_path):
    content = recipe_of("recipes.md", 0, tmp_path)
    assert [task["name"] for task in content["tasks"]] == ["sentiment", "answers"]
    generated, gridded = (yaml.safe_load(block) for block in blocks("recipes.md", "yaml")[1:])
    content["tasks"] += generated
    content["methods"] += [{**gridded["methods"][0], "name": "gridded"}]
    content["methods"][-2]["plugins"] = yaml.safe_load(blocks("guard.md", "yaml")[1])["plugins"]
    content["guard"] = {"name": "general", "path": "novel.txt"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert len(recipe.methods) == 1 + 3 + 6


def test_the_recipe_pages_python_runs(tmp_path, monkeypatch, capsys):
    content = recipe_of("recipes.md", 0, tmp_path)
    del content["tasks"][0], content["seeds"]
    content["methods"] = content["methods"][-1:]
    content["methods"][0]["options"]["r"] = 4
    for split in ("train", "test"):
        rows = [json.dumps({"question": WORDS[i], "answer": WORDS[i + 1]}) for i in range(8)]
        (tmp_path / f"qa-{split}.jsonl").write_text("\n".join(rows))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.chdir(tmp_path)
    exec(blocks("recipes.md", "python")[0], {})
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["Base", "CURLoRA"]
    assert load_recipe("recipe.yaml").training.epochs == 1


def test_the_results_pages_python_runs(tmp_path, monkeypatch, capsys):
    reading, by_loss = blocks("results.md", "python")
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    make_results_by_loss().save(tmp_path / "runs" / "demo" / "results.json")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(reading, names)
    exec(by_loss, names)
    assert "CURLORA 0.475" in capsys.readouterr().out


def test_the_quick_start_is_the_readmes():
    """Whose Python is run in test_readme."""
    assert set(blocks("quickstart.md", "python")) <= set(re.findall(r"```python\n(.*?)```", README, re.DOTALL))


def commands(program):
    """Lines of shell that call a program, also by ``srun`` or after a prompt that names a machine."""
    for page in sorted([*DOCS.glob("*.md"), DOCS.parent / "README.md"]):
        for block in re.findall(r"```(?:sh|bash|console)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line.removesuffix("&"), comments=True)
                if words[:1] == [program] or (words and words[0].endswith(("$", "srun")) and program in words):
                    yield page.name, words[words.index(program) + 1 :]


@pytest.mark.parametrize(("page", "words"), commands("curlora"))
def test_commands_are_understood(page, words):
    name, *rest = words
    typer.main.get_command(app).commands[name].make_context(name, rest)  # refuses what it does not know


@pytest.mark.parametrize(("page", "words"), commands("ray"))
def test_commands_of_ray_are_understood(page, words):
    name, *rest = words
    ray.commands[name].make_context(name, rest)


@pytest.mark.parametrize(("page", "words"), commands("torchrun"))
def test_commands_of_torchrun_are_understood(page, words):
    torchrun.parse_args(["4" if word == "$SLURM_NNODES" else word for word in words])


@pytest.mark.parametrize("page", ["clusters.md", "recipes.md"])
def test_scripts_are_bashs(page):
    for script in blocks(page, "bash"):
        assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=True).stderr == ""


def messages():
    """What the source says in strings, with a NUL where a value is filled in."""
    for file in sorted((DOCS.parent / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


@pytest.fixture(scope="module")
def said():
    return list(messages())


@pytest.mark.parametrize("quoted", blocks("troubleshooting.md", "text"))
def test_quoted_messages_are_those_of_the_source(quoted, said):
    """In the order of their parts, with something filled in at each of the dots."""
    parts = [re.escape(part) for part in " ".join(quoted.split()).split("...")]
    assert any(re.search(".*\0.*".join(parts), message) for message in said)


def test_the_files_they_point_to_exist():
    for page in DOCS.rglob("*.md"):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), (page.name, target)


def anchors(page):
    """What GitHub makes of a page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
            for heading in re.findall(r"^#+ (.*?)\s*$", text, re.MULTILINE)}  # fmt: skip


def test_the_headings_they_point_to_exist():
    for page in [*DOCS.glob("*.md"), *DOCS.parent.glob("*.md")]:
        for target, anchor in re.findall(r"\]\((?!http)([^)#]*)#([^)]+)\)", page.read_text(encoding="utf-8")):
            to = page.parent / target if target else page
            assert to.suffix != ".md" or anchor in anchors(to), (page.name, target, anchor)
