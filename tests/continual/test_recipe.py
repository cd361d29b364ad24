"""Recipes: what is read is what the files say, and what is wrong is said before a model is loaded."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import filelock
import pytest
import yaml

from curlora.continual.recipe import RecipeError, Source, TaskPart, build, load_recipe, read_task, run_recipe
from curlora.continual.run import RunDirectoryError
from tests.models import WORDS, llama, word_examples, word_tokenizer


class Silent:
    def stage(self, text):
        pass

    def advance(self, units):
        pass


def silent(total):
    return Silent()


@pytest.fixture
def recipe_path(tmp_path):
    """A recipe on a small local model, with a data file of each local kind."""
    llama().save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(" ".join(WORDS[i % 90] for i in range(60)))
    train, evaluation = word_examples(2)
    lines = ["text\tlabel", *(f"{text}\t{label}" for text, label in train)]
    (tmp_path / "train.tsv").write_text("\ufeff" + "\n".join(lines) + "\n", encoding="utf-8")
    (tmp_path / "eval.csv").write_text("\n".join(["label,text", *(f"{y},{x}" for x, y in evaluation)]) + "\n")
    for name, rows in zip(("train", "eval"), word_examples(8), strict=True):
        with (tmp_path / f"second-{name}.jsonl").open("w") as stream:
            for text, label in rows:
                stream.write(json.dumps({"sentence": text, "sign": ["no", "yes"][label]}) + "\n")
    content = {
        "title": "Two small tasks",
        "model": {"name": "model"},
        "tasks": [
            {
                "name": "first",
                "labels": ["a", "b"],
                "train": {"path": "train.tsv", "text": "text", "label": "label"},
                "evaluation": {"path": "eval.csv", "text": "text", "label": "label"},
            },
            {
                "name": "second",
                "labels": ["yes", "no"],
                "train": {"path": "second-train.jsonl", "text": "sentence", "label": "sign"},
                "evaluation": {"path": "second-eval.jsonl", "text": "sentence", "label": "sign"},
            },
        ],
        "methods": [
            {"name": "frozen"},
            {"name": "lora", "label": "LoRA", "peft_type": "lora", "learning_rate": 0.01,
             "options": {"r": 4, "target_modules": ["q_proj"]}},
            {"name": "cur", "label": "CURLoRA", "peft_type": "curlora", "learning_rate": 0.3, "options": {"r": 4}},
        ],
        "heldout": {"name": "words", "path": "text.txt", "tokens": 50},
        "training": {"epochs": 3, "batch_size": 4, "window": 16, "head_learning_rate": 0.05},
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_what_is_read_is_what_the_files_say(recipe_path):
    stream = build(load_recipe(recipe_path))
    assert (stream.tasks[0].train, stream.tasks[0].evaluation) == word_examples(2)
    expected = [[(text, 1 - label) for text, label in rows] for rows in word_examples(8)]  # "yes" comes first there
    assert [stream.tasks[1].train, stream.tasks[1].evaluation] == expected
    assert len(stream.heldout.tokens) == 50
    assert [method.name for method in stream.methods] == ["frozen", "lora", "cur"]


def test_a_run_and_going_on_with_one_more_method(recipe_path, tmp_path):
    out = tmp_path / "run"
    without = load_recipe(recipe_path)
    without = without.model_copy(update={"methods": without.methods[:2]})
    first = run_recipe(without, out, silent)
    assert [m.name for m in first.methods] == ["frozen", "lora"]
    stamp = (out / "lora" / "result.json").stat().st_mtime_ns
    full = run_recipe(load_recipe(recipe_path), out, silent)
    assert full.methods[:2] == first.methods
    assert (out / "lora" / "result.json").stat().st_mtime_ns == stamp  # not run again
    assert full.methods[2].trainable_parameters == 6 * 16
    assert full.methods[2].accuracy[0][0] > full.tasks[0].majority_rate


def same_figures(a, b):
    """Equal in everything but times."""

    def strip(results):
        return [m.model_dump(exclude={"seconds", "train_seconds"}) for m in results.methods]

    return strip(a) == strip(b)


def test_kill_minus_nine_and_the_same_command_goes_on(recipe_path, tmp_path):
    whole = run_recipe(load_recipe(recipe_path), tmp_path / "whole", silent)
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "curlora.cli", "run", str(recipe_path), "--out", str(out)]
    for done in ("frozen", "lora"):  # killed twice, each time within the method after this one
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 120
        while not (out / done / "result.json").exists():
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (out / "results.json").exists()
    finished = {p: p.stat().st_mtime_ns for p in out.glob("*/result.json")}
    assert len(finished) >= 2
    after = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "100"})
    assert after.returncode == 0, after.stderr
    from curlora.continual.results import RunResults

    assert same_figures(RunResults.load(out / "results.json"), whole)
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in finished.items())
    assert (out / "report.html").exists()
    assert "CURLoRA" in after.stdout


def test_label_names_by_number_are_no_change(recipe_path, tmp_path):
    recipe = load_recipe(recipe_path, ["tasks.0.train.label_names={0: a, 1: b}", "methods=[{name: frozen}]"])
    first = run_recipe(recipe, tmp_path / "run", silent)
    assert same_figures(run_recipe(recipe, tmp_path / "run", silent), first)


@pytest.mark.parametrize(
    ("change", "named"),
    [("training.epochs=1", "training"), ("heldout.tokens=40", "heldout"), ("methods.1.options.r=2", "method 'lora'")],
)
def test_a_changed_recipe_does_not_go_on(recipe_path, tmp_path, change, named):
    out = tmp_path / "run"
    recipe = load_recipe(recipe_path)
    first = run_recipe(recipe.model_copy(update={"methods": recipe.methods[:2]}), out, silent)
    with pytest.raises(RunDirectoryError, match=f"holds a run of another recipe: {named} changed"):
        run_recipe(load_recipe(recipe_path, [change]), out, silent)
    assert same_figures(run_recipe(recipe.model_copy(update={"methods": recipe.methods[:2]}), out, silent), first)


def test_two_runs_in_one_directory(recipe_path, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    with filelock.FileLock(out / ".lock"), pytest.raises(RunDirectoryError, match="in use by another run"):
        run_recipe(load_recipe(recipe_path), out, silent)


def test_a_damaged_result_is_named(recipe_path, tmp_path):
    out = tmp_path / "run"
    (out / "frozen").mkdir(parents=True)
    (out / "frozen" / "result.json").write_text("{")
    with pytest.raises(RunDirectoryError, match=r"frozen/result\.json does not hold.*Remove the folder"):
        run_recipe(load_recipe(recipe_path), out, silent)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("titel=x", "titel: Extra inputs are not permitted"),
        ("methods.1.peft_type=lorra", "methods.1: peft_type 'lorra' is not one of .*curlora.*lora"),
        ("methods.2.options.rank=4", "methods.2: CurloraConfig has no option 'rank'"),
        ("methods.2.options.r=0", "methods.2: r must be a positive integer, got 0"),
        ("methods.2.learning_rate=null", "methods.2: learning_rate is missing"),
        ("methods.0.learning_rate=0.1", "methods.0: without peft_type only the heads"),
        ("methods.0.name=cur", "two methods are called 'cur'"),
        ("tasks.1.name=first", "two tasks are called 'first'"),
        ("tasks.0.train.hub=glue", "tasks.0.train: give either path"),
        ("model.dtype=float33", "model.dtype: 'float33' is not a dtype"),
        ("training.epochs=0", "training.epochs: Input should be greater than 0"),
        ("tasks.0.labels=[a]", "tasks.0.labels: List should have at least 2"),
        ("tasks.1.labels=[yes, no]", "tasks.1.labels.0: Input should be a valid string"),  # YAML reads booleans
        ("methods.0.name=../x", "methods.0.name: String should match pattern"),
        ("methods=[]", "methods: List should have at least 1"),
        ("tasks.9.name=x", "'tasks.9.name=x' names no place in the recipe"),
        ("nonsense", "'nonsense' is not a change"),
    ],
)
def test_bad_entries_are_named(recipe_path, change, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe_path, [change])


def test_every_bad_entry_is_named_at_once(recipe_path):
    with pytest.raises(RecipeError) as error:
        load_recipe(recipe_path, ["titel=x", "training.epochs=0", "model.dtype=float33"])
    assert all(entry in str(error.value) for entry in ("titel", "training.epochs", "model.dtype"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("tasks.0.train.path=gone.tsv", r"task 'first', train \(.*gone\.tsv\): there is no such file"),
        ("tasks.0.train.text=words", "there is no column 'words' among text, label"),
        ("tasks.1.labels=[nay, maybe]", "row 0 has label 'no', which is neither one of"),
        ("tasks.0.evaluation.path=text.txt", ".txt is not among the file types"),
        ("tasks.0.train.label_names={0: a}", "row .* has label 1, which label_names does not name"),
        ("heldout.path=gone.txt", "heldout: .*gone.txt cannot be read"),
    ],
)
def test_bad_data_is_named_before_a_model_is_loaded(recipe_path, change, message):
    (recipe_path.parent / "model" / "model.safetensors").write_bytes(b"not a model")  # loading it would fail otherwise
    with pytest.raises(RecipeError, match=message):
        build(load_recipe(recipe_path, [change]))


@pytest.mark.parametrize(
    ("text", "message"), [("[1, 2]", "holds no recipe"), ("a: [", "is not YAML"), ("", "holds no")]
)
def test_files_that_are_no_recipe(text, message, tmp_path):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(tmp_path / "r.yaml")


def test_a_recipe_that_is_not_there(tmp_path):
    with pytest.raises(RecipeError, match="cannot be read: No such file"):
        load_recipe(tmp_path / "r.yaml")


DATA = os.environ.get("CURLORA_DATA_DIR")


@pytest.mark.skipif(not DATA, reason="CURLORA_DATA_DIR is not set: the real data sets are not here")
@pytest.mark.parametrize(
    ("train", "evaluation", "rows", "majority"),
    [
        (
            dict(path="mrpc/train.tsv", text=["#1 String", "#2 String"], label="Quality"),
            "mrpc/dev.tsv",
            3667,
            279 / 408,
        ),
        (dict(path="sst2/train.tsv", text="sentence", label="label"), "sst2/dev.tsv", 67_349, 444 / 872),
    ],
)
def test_real_data_is_read_whole(train, evaluation, rows, majority):
    source = Source(**{**train, "path": Path(DATA) / train["path"]}, quoted=False)
    scored = source.model_copy(update={"path": Path(DATA) / evaluation})
    task = read_task(TaskPart(name="t", labels=["no", "yes"], train=source, evaluation=scored))
    assert len(task.train) == rows
    assert task.majority_rate == pytest.approx(majority)
