"""``curlora train`` as a user meets it."""

import dataclasses
import glob
import html
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import torch
import typer
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import IA3Config, LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from curlora.budget.limited_texts import LimitedTexts
from curlora.guard import TextOutcome, perplexity
from curlora.storage import Checkpoints
from curlora.text.rows import rows_of
from curlora.train import TrainOptions, history, prepare
from curlora.train.errors import TrainError
from curlora.train.measure import measure
from curlora.train.other_texts import OWN_SAMPLE
from curlora.train.outcome import Budget, TrainOutcome
from curlora_cli.commands import app
from tests.models import gpt2
from tests.train.conftest import conversations, write_lines

# Enough steps to learn something and to be killed between.
SMALL = ["--rank", "8", "--epochs", "10", "--max-forgetting", "5%", "--batch-size", "8"]


def arguments(*given, **options):
    named = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    return ["train", *map(str, [*given, *named])]


def command(*given, **options):
    return CliRunner().invoke(app, arguments(*given, **options), env={"COLUMNS": "100"})


def record(out):
    return json.loads((Path(out) / "training.json").read_text(encoding="utf-8"))


def figures(out):
    """Remove what differs between two runs."""
    outcome = record(out)["outcome"]
    outcome.pop("created")
    outcome["run"].pop("seconds")
    return outcome


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_lines(tmp_path_factory.mktemp("data") / "chat <b>.jsonl", conversations())


@pytest.fixture(scope="module")
def whole(data, chat_model, guard_file, tmp_path_factory):
    """An uninterrupted training, and what it printed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    done = command(data, *SMALL, model=chat_model, out=out, guard_text=f"a novel={guard_file}", export="lora")
    assert done.exit_code == 0, done.output
    return out, done.stdout


def test_what_is_left_behind(whole):
    out, _ = whole
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "curlora_ledger.safetensors", "lora",
        "report.html", "training.json",
    ]  # fmt: skip


def test_the_figures_are_those_of_the_saved_adapter(whole, data, chat_model, guard_file):
    """The reported figures equal those of the model and the adapter loaded from their folders."""
    out, printed = whole
    outcome = record(out)["outcome"]
    _, base, examples, plan, _ = prepare(
        TrainOptions(data=str(data), out=out.parent / "nowhere", model=chat_model, rank=8, epochs=10)
    )
    model = AutoModelForCausalLM.from_pretrained(chat_model, dtype=torch.float32)
    rows = rows_of("novel", guard_file, base.tokenizer, tokens=8192, max_length=128)
    how = dict(stop=examples.stop, reply_tokens=examples.reply_tokens, batch_size=4)
    for when in ("before", "after"):
        if when == "after":
            model = PeftModel.from_pretrained(model, out).eval()
        found = measure(model, base.tokenizer, examples.held_out, examples.prompts, **how)
        assert found.loss == pytest.approx(outcome["held_out"][f"loss_{when}"], abs=1e-5)
        assert found.replies == [reply[when] for reply in outcome["replies"]]
        assert perplexity(model, rows) == pytest.approx(outcome["budget"]["texts"]["a novel"][when], rel=1e-5)
        assert f"{found.loss:.4f}" in printed
    assert outcome["held_out"]["loss_after"] < outcome["held_out"]["loss_before"] - 0.05
    text = outcome["budget"]["texts"]["a novel"]
    assert text["rise"] == pytest.approx(text["after"] / text["before"] - 1)
    assert text["rise"] <= text["limit"] == 0.05
    assert outcome["run"]["steps"] == plan.steps == 50
    assert outcome["run"]["trained_parameters"] == plan.trained == 14 * 8**2


def test_the_plan_and_the_table_are_printed(whole):
    out, printed = whole
    for line in (
        r"trained on 40 examples of .*chat <b>\.jsonl: 400 tokens, 160 in answers; laid out by the model's chat templ",
        r"held out 20 examples: 200 tokens, 80 in answers; split off .*chat <b>.jsonl by seed 0",
        r"steps 50: 10 epochs in batches of 8; a checkpoint every 5 steps",
        r"forgetting limit perplexity may rise by 5\.00 %",
        r"measured on a novel",
        rf"learning rate about {record(out)['outcome']['run']['learning_rate']:.2g}, set by rule",
        r"perplexity of a novel [\d.]+ [\d.]+ [+-]\d\.\d+ % 5\.00 %",
        r"stated perplexity may rise by 5\.00 %",
        r"predicted \+\d\.\d+ % ",
        r"measured [+-]\d\.\d+ % on a novel",
    ):
        assert re.search(line, " ".join(printed.split())), line
    assert str(out / "report.html") in printed.replace("\n", "")


def test_the_page_and_the_card_hold_the_figures_and_escape_names(whole, chat_model):
    out, _ = whole
    page, card, outcome = (out / "report.html").read_text(), (out / "README.md").read_text(), record(out)["outcome"]
    for text in (page, card):
        assert f"{outcome['held_out']['loss_after']:.4f}" in text
        assert "<b>" not in text
        assert "chat &lt;b" in text
    for reply in outcome["replies"]:
        for part in ("prompt", "before", "after", "data"):
            assert html.escape(reply[part]) in page
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!#)""", page)  # nothing is fetched
    assert page.count("<svg") == 2
    names = {}
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    exec(code.replace("this folder or repository", str(out)), names)
    assert type(names["model"]).__name__ == "PeftModelForCausalLM"


def test_the_documentations_python_loads_it(whole, chat_model):
    page = (Path(__file__).parent.parent.parent / "docs" / "train.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names = {}
    code = code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", chat_model).replace('"adapter"', repr(str(whole[0])))
    exec(code, names)
    assert type(names["model"]).__name__ == "PeftModelForCausalLM"


def test_the_exported_adapter_gives_the_same(whole, chat_model):
    out, _ = whole
    ids = torch.arange(5, 25)[None]
    one, other = (
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(chat_model), path).eval()(ids).logits
        for path in (out, out / "lora")
    )
    assert torch.allclose(one, other, atol=1e-5)


def test_a_finished_folder_is_said_to_be_finished(whole, data, chat_model, guard_file):
    out, printed = whole
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    done = command(data, *SMALL, model=chat_model, out=out, guard_text=f"a novel={guard_file}", export="lora")
    assert done.exit_code == 0, done.output
    assert "is finished: nothing was trained again" in done.stdout
    assert printed[printed.index("Forgetting") :] == done.stdout[done.stdout.index("Forgetting") :]
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}


def test_a_finished_folder_without_the_export_says_how_to_get_it(whole, data, chat_model, guard_file):
    out, _ = whole
    done = command(data, *SMALL, model=chat_model, out=out, guard_text=f"a novel={guard_file}", export="merged")
    assert done.exit_code == 1
    assert f"curlora convert {out} --to merged --out {out}/merged" in done.stderr


def test_other_options_or_data_are_refused(whole, data, chat_model, guard_file, tmp_path):
    out, _ = whole
    common = dict(model=chat_model, out=out)
    done = command(data, *SMALL, seed=1, guard_text=f"a novel={guard_file}", **common)
    assert (done.exit_code, "seed is 1 and was 0" in done.stderr) == (1, True)
    other = write_lines(tmp_path / "other.jsonl", conversations(seed=1))
    done = command(other, *SMALL, guard_text=f"a novel={guard_file}", **common)
    assert (done.exit_code, "belongs to another training: data is" in done.stderr) == (1, True)


def test_killed_it_goes_on_to_the_same_end(whole, data, chat_model, guard_file, tmp_path):
    out, tells = tmp_path / "out", dict(guard_text=f"a novel={guard_file}", export="lora")
    process = subprocess.Popen(
        [sys.executable, "-m", "curlora_cli", *arguments(data, *SMALL, model=chat_model, out=out, **tells)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 300
    while not glob.glob("checkpoints/*/complete", root_dir=out):  # pathlib's fails where a folder goes meanwhile
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert "outcome" not in record(out)
    assert not (out / "report.html").exists()
    done = command(data, *SMALL, model=chat_model, out=out, **tells)
    assert done.exit_code == 0, done.output
    assert figures(out) == figures(whole[0])
    for name in ("adapter_model.safetensors", "lora/adapter_model.safetensors"):
        one, other = load_file(out / name), load_file(whole[0] / name)
        assert all(torch.equal(one[key], other[key]) for key in one.keys() | other.keys())
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in whole[0].iterdir())


def test_killed_at_the_very_end_it_ends_the_same(whole, data, chat_model, guard_file, tmp_path, monkeypatch):
    """Interrupted after the last checkpoint, which is already scaled back to the limit."""
    out, tells = tmp_path / "out", dict(guard_text=f"a novel={guard_file}", export="lora")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("curlora.train.run.write_card", killed)
        done = command(data, *SMALL, model=chat_model, out=out, **tells)
    assert done.exit_code == 130
    assert "Interrupted. Run the same command again to resume from the last checkpoint." in done.stderr
    assert (out / "checkpoints" / "checkpoint-50" / "complete").exists()
    done = command(data, *SMALL, model=chat_model, out=out, **tells)
    assert done.exit_code == 0, done.output
    assert figures(out) == figures(whole[0])


def test_if_the_last_measurement_fails_the_training_is_kept(whole, data, chat_model, guard_file, tmp_path, monkeypatch):
    out, trained_steps = tmp_path / "out", []
    tells = dict(model=chat_model, guard_text=f"a novel={guard_file}", out=out, export="lora")

    def failing(*_):
        raise OSError("the disk is away")

    with monkeypatch.context() as patch:
        patch.setattr(LimitedTexts, "worst_share", failing)
        done = command(data, *SMALL, **tells)
    assert done.exit_code == 1
    assert re.search(r"after the last step failed.* the disk is away", " ".join(done.stderr.split()))
    monkeypatch.setattr("curlora.train.training._Listener.on_step_end", lambda *_, **__: trained_steps.append(1))
    done = command(data, *SMALL, **tells)
    assert done.exit_code == 0, done.output
    assert figures(out) == figures(whole[0])
    assert not trained_steps, "the training should go on from its last checkpoint"


def test_it_continues_an_adapter(whole, chat_model, guard_file, tmp_path):
    """The ledger continues: forgetting counts from the base model, which the adapter names."""
    new = write_lines(tmp_path / "more.jsonl", conversations(seed=3))
    common = dict(
        continue_from=whole[0], guard_text=f"a novel={guard_file}", lifetime="30%", max_forgetting="5%", epochs=2
    )
    out = tmp_path / "out"
    done = command(new, "--prompt", "w5 w6 w7", out=out, **common)
    assert done.exit_code == 0, done.output
    outcome = record(out)["outcome"]
    assert (outcome["base_model"], outcome["continue_from"]) == (chat_model, str(whole[0]))
    assert (outcome["rank"], outcome["budget"]["lifetime"]) == (8, 0.3)
    assert [reply["prompt"] for reply in outcome["replies"]] == ["w5 w6 w7"]
    assert "over all trainings" in done.stdout
    # The lifetime is that of the ledger from now on, and a plan says how much of it is left.
    more = dict(continue_from=out, guard_text=f"a novel={guard_file}", out=tmp_path / "more", epochs=1)
    planned = command(new, "--dry-run", **more)
    assert planned.exit_code == 0, planned.output
    left = 0.3 - max(0, record(out)["outcome"]["budget"]["texts"]["a novel"]["rise"])
    assert f"30.00 % over all its trainings, of which {100 * left:.2f} % are left" in " ".join(planned.stdout.split())
    assert "before the adapter's first training" in " ".join(done.stdout.split())
    before, after = (load_file(path / "adapter_model.safetensors") for path in (whole[0], out))
    assert before.keys() == after.keys()
    assert not all(torch.equal(before[name], after[name]) for name in before)
    assert all(torch.equal(before[name], after[name]) for name in before if name.endswith("indices"))


class TestLora:
    """The same command with a LoRA adapter, which trains under a penalty in place of the guard."""

    SMALL = ("--adapter", "lora", "--rank", "4", "--epochs", "6", "--max-forgetting", "2%")

    @pytest.fixture(scope="class")
    def out(self, data, chat_model, guard_file, tmp_path_factory):
        out = tmp_path_factory.mktemp("lora") / "out"
        done = command(data, *self.SMALL, model=chat_model, out=out, guard_text=f"a novel={guard_file}",
                       export="merged")  # fmt: skip
        assert done.exit_code == 0, done.output
        printed = " ".join(done.stdout.split())
        assert "LoRA, rank 4 on 14 layers" in printed
        assert "the penalty takes" in printed
        assert "predicted" not in printed
        return out

    def test_the_figures_are_those_of_the_saved_adapter(self, out, chat_model, guard_file):
        outcome = record(out)["outcome"]
        model, tokenizer = AutoModelForCausalLM.from_pretrained(chat_model), AutoTokenizer.from_pretrained(chat_model)
        rows = rows_of("novel", guard_file, tokenizer, tokens=8192, max_length=128)
        text = outcome["budget"]["texts"]["a novel"]
        assert perplexity(model, rows) == pytest.approx(text["before"], rel=1e-5)
        adapted = PeftModel.from_pretrained(model, out).eval()
        assert isinstance(adapted.peft_config["default"], LoraConfig)
        assert perplexity(adapted, rows) == pytest.approx(text["after"], rel=1e-5)
        assert text["rise"] <= text["limit"] == 0.02
        assert outcome["held_out"]["loss_after"] < outcome["held_out"]["loss_before"] - 0.05
        assert (outcome["adapter"], outcome["budget"]["predicted"]) == ("LoRA", None)
        merged, ids = AutoModelForCausalLM.from_pretrained(out / "merged"), torch.arange(5, 25)[None]
        assert torch.allclose(merged(ids).logits, adapted(ids).logits, atol=1e-5)

    def test_the_page_and_the_card(self, out, chat_model):
        page, card = (out / "report.html").read_text(), (out / "README.md").read_text()
        assert "Divergence from the base model" in page
        assert "LoRA, rank 4" in page
        assert "A LoRA adapter for" in card
        assert "CURLoRA" not in page + card
        assert "import curlora" not in card
        (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        exec(code.replace("this folder or repository", str(out)), {})

    def test_from_a_checkpoint_it_goes_on_to_the_same_end(
        self, out, data, chat_model, guard_file, tmp_path, monkeypatch
    ):
        tells = dict(model=chat_model, out=tmp_path / "out", guard_text=f"a novel={guard_file}", export="merged")
        complete = Checkpoints.complete

        def interrupted(self, step, seconds):
            complete(self, step, seconds)
            if step >= 12:
                raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(Checkpoints, "complete", interrupted)
            assert command(data, *self.SMALL, **tells).exit_code != 0
        assert glob.glob("checkpoints/*/complete", root_dir=tmp_path / "out")
        done = command(data, *self.SMALL, **tells)
        assert done.exit_code == 0, done.output
        assert figures(tmp_path / "out") == figures(out)

    def test_it_continues_an_adapter(self, out, chat_model, guard_file, tmp_path):
        """Forgetting counts from the base model."""
        new = write_lines(tmp_path / "more.jsonl", conversations(seed=3))
        done = command(new, continue_from=out, out=tmp_path / "out", guard_text=f"a novel={guard_file}", epochs=2)
        assert done.exit_code == 0, done.output
        before, after = (record(path)["outcome"]["budget"]["texts"]["a novel"] for path in (out, tmp_path / "out"))
        assert after["before"] == pytest.approx(before["before"], rel=1e-6)
        assert after["limit"] == pytest.approx(max(before["rise"], 0) + 0.01, rel=1e-5)
        assert after["rise"] <= after["limit"]

    def test_a_lifetime_is_kept_for_the_next_training(self, data, chat_model, guard_file, tmp_path):
        """Although a LoRA adapter has no ledger: in the record of the training."""
        told = dict(guard_text=f"a novel={guard_file}", epochs=1, max_forgetting="2%")
        done = command(data, *self.SMALL[:4], model=chat_model, out=tmp_path / "one", lifetime="3%", **told)
        assert done.exit_code == 0, done.output
        new = write_lines(tmp_path / "more.jsonl", conversations(seed=3))
        done = command(new, continue_from=tmp_path / "one", out=tmp_path / "two", **told)
        assert done.exit_code == 0, done.output
        budget = record(tmp_path / "two")["outcome"]["budget"]
        assert budget["lifetime"] == 0.03
        assert budget["texts"]["a novel"]["limit"] <= 0.03
        other = dict(told, guard_text=f"another={guard_file}")
        done = command(new, continue_from=tmp_path / "one", out=tmp_path / "three", **other)
        assert done.exit_code == 1
        assert "the lifetime's budget counts on the text 'a novel'" in " ".join(done.stderr.split())


def test_a_lifetime_that_is_used_up_is_one_sentence(whole, data, guard_file, tmp_path):
    """The folder that it leaves can be used again with a larger limit."""
    spent = record(whole[0])["outcome"]["budget"]["texts"]["a novel"]["rise"]
    assert spent > 0.0002
    tells = dict(continue_from=whole[0], out=tmp_path / "out", guard_text=f"a novel={guard_file}", epochs=1)
    done = command(data, lifetime=spent / 2, max_forgetting=spent / 2, **tells)
    assert done.exit_code == 1, done.output
    assert "Error: The lifetime's budget is used up" in done.stderr
    assert done.stderr.count("\n") == 1
    planned = command(data, "--dry-run", lifetime=spent / 2, max_forgetting=spent / 2, **tells)
    assert planned.stderr == done.stderr  # already the plan refuses
    assert command(data, lifetime=spent * 2, max_forgetting=spent / 2, **tells).exit_code == 0


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_quantized_and_merged(bits, data, chat_model, guard_file, tmp_path, monkeypatch):
    """The base is read again in full precision, and the merged weights differ from it by the adapter's update."""
    # Where a processor has AVX512-BF16, bitsandbytes refuses layers as narrow as these.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    out = tmp_path / "out"
    tells = dict(guard_text=guard_file, quantize=bits, export="merged", epochs=2, rank=4)
    done = command(data, model=chat_model, out=out, **tells)
    assert done.exit_code == 0, done.output
    assert f", {bits}" in done.stdout
    outcome = record(out)["outcome"]
    assert (outcome["quantize"], outcome["exported"]) == (bits, "merged")
    saved = load_file(out / "adapter_model.safetensors")
    assert {value.dtype for name, value in saved.items() if "curlora_U" in name and "weight" in name} == {torch.float32}
    base, merged = (AutoModelForCausalLM.from_pretrained(path) for path in (chat_model, out / "merged"))
    ids = torch.arange(5, 25)[None]
    adapted = PeftModel.from_pretrained(base, out).eval()
    assert torch.allclose(merged(ids).logits, adapted(ids).logits, atol=1e-5)
    with adapted.disable_adapter():
        assert not torch.allclose(merged(ids).logits, adapted(ids).logits, atol=1e-3)


def test_hub_ids(chat_model, guard_file, tmp_path):
    """A model, data and an adapter from the hub, here from its caches, without a network."""
    models, sets = tmp_path / "models", tmp_path / "sets"
    write_lines((tmp_path / "chats").mkdir() or tmp_path / "chats" / "train.jsonl", conversations())
    datasets.load_dataset(str(tmp_path / "chats"), cache_dir=str(sets))
    (sets / "chats").rename(sets / "me___chats")

    def publish(folder, name):
        repository, revision = models / f"models--me--{name}", "0123456789abcdef0123456789abcdef01234567"
        shutil.copytree(folder, repository / "snapshots" / revision)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(revision)

    def run(out, *more):
        offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(models), "HF_DATASETS_CACHE": str(sets)}
        told = arguments("me/chats", *more, guard_text=guard_file, out=out, epochs=1)
        command = [sys.executable, "-m", "curlora_cli", *told]
        done = subprocess.run(command, env={**os.environ, **offline}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return record(out)["outcome"]

    publish(chat_model, "model")
    assert run(tmp_path / "first", "--model", "me/model", "--rank", "4")["base_model"] == "me/model"
    publish(tmp_path / "first", "adapter")
    second = run(tmp_path / "second", "--continue-from", "me/adapter")
    assert (second["base_model"], second["continue_from"]) == ("me/model", "me/adapter")


def test_the_lifetime_of_a_lora_adapter_on_the_hub(tmp_path, monkeypatch):
    record = tmp_path / "training.json"
    texts = {
        name: TextOutcome(before=20.0, after=20 * (1 + rise), rise=rise, limit=0.03, tokens=9, sha256="")
        for name, rise in {"novel": 0.02, "code": 0.01}.items()
    }
    budget = Budget(stated=0.03, lifetime=0.03, predicted=None, kept=1.0, texts=texts)
    record.write_text(json.dumps({"outcome": {"budget": budget.model_dump(mode="json")}}))
    monkeypatch.setattr(history, "hf_hub_download", lambda name, file: str(tmp_path / file))
    assert history.history_of(LoraConfig(), "me/lora", None) == history.History(0.03, 0.02, ("novel", "code"))
    texts["code"] = dataclasses.replace(texts["code"], rise=math.nan)
    unknown = budget.model_copy(update={"texts": texts})
    record.write_text(json.dumps({"outcome": {"budget": json.loads(unknown.model_dump_json())}}))
    with pytest.raises(TrainError, match="The lifetime's budget is used up"):
        history.history_of(LoraConfig(), "me/lora", None)
    record.write_text('{"outcome": {}}')
    with pytest.raises(TrainError, match=r"training\.json is not the record of a finished training"):
        history.history_of(LoraConfig(), "me/lora", None)

    def away(name, file):
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(history, "hf_hub_download", away)
    with pytest.raises(TrainError, match=r"it is unknown what earlier trainings have cost, because training\.json"):
        history.history_of(LoraConfig(), "me/lora", None)


def test_without_a_text_the_model_writes_one(data, chat_model, tmp_path, monkeypatch):
    monkeypatch.setenv("CURLORA_CACHE_DIR", str(tmp_path / "cache"))
    out = tmp_path / "out"
    done = command(data, model=chat_model, out=out, epochs=1, rank=4, report_to="tensorboard")
    assert done.exit_code == 0, done.output
    assert "text that the model itself writes" in done.stdout
    (text,) = record(out)["outcome"]["budget"]["texts"].values()
    assert text["rise"] <= text["limit"] == 0.01
    assert list((out / "logs").glob("events.*"))  # trackers' files stay when checkpoints go


def test_each_text_keeps_a_limit_of_its_own(data, chat_model, guard_file, tmp_path):
    other, out = tmp_path / "other.txt", tmp_path / "out"
    other.write_text("\n\n".join(" ".join(f"w{(i * j) % 90}" for j in range(20)) for i in range(1, 40)))
    given = ["--guard-text", f"novel={guard_file}", "--guard-text", f"other={other}", "--limit", "other=0.2%"]
    tells = dict(model=chat_model, out=out, epochs=4, rank=8, max_forgetting="5%")
    done = command(data, *given, **tells)
    assert done.exit_code == 0, done.output
    printed = " ".join(done.stdout.split())
    assert "forgetting limit perplexity may rise by 5.00 %, by 0.20 % on other" in printed
    assert "stated perplexity may rise by 5.00 %, by 0.20 % on other" in printed
    assert re.search(r"perplexity of novel [\d.]+ [\d.]+ [+-]\d\.\d+ % 5\.00 %", printed)
    assert re.search(r"perplexity of other [\d.]+ [\d.]+ [+-]\d\.\d+ % 0\.20 %", printed)
    outcome = record(out)["outcome"]
    assert outcome["budget"]["limits"] == {"other": 0.002}
    assert {name: text["limit"] for name, text in outcome["budget"]["texts"].items()} == {"novel": 0.05, "other": 0.002}
    assert all(text["rise"] <= text["limit"] for text in outcome["budget"]["texts"].values())
    # The rate of the plan is the one that was set.
    assert f"about {outcome['run']['learning_rate']:.2g}, set by rule" in printed
    for name in ("report.html", "README.md"):
        assert "perplexity may rise by 5.00 %, by 0.20 % on other" in (out / name).read_text()
    again = command(data, *given[:-1], "other=0.3%", **tells)
    assert (again.exit_code, "limits is {'other': 0.003} and was {'other': 0.002}" in again.stderr) == (1, True)


def test_the_bar_moves_with_what_the_guard_does(data, chat_model, tmp_path, monkeypatch):
    """All stages are named, the bar never moves back or beyond its end, and it moves within each stage of the guard."""
    from curlora.train import train

    monkeypatch.setattr(TrainOptions, "GUARD_TOKENS", 2048)
    monkeypatch.setenv("CURLORA_CACHE_DIR", str(tmp_path / "cache"))

    class Bar:
        def __init__(self, total):
            self.total, self.stages = total, []

        def stage(self, text):
            self.stages.append((text, []))

        def advance(self, units):
            assert units >= 0
            self.stages[-1][1].append(units)

    bars = []

    def bar(total):
        bars.append(Bar(total))
        return bars[-1]

    def run(out, **more):
        train(
            prepare(TrainOptions(data=str(data), out=tmp_path / out, model=chat_model, rank=4, epochs=1, **more)), bar
        )
        done = [sum(units) for _, units in bars[-1].stages]
        assert sum(done) == pytest.approx(bars[-1].total)
        return dict(zip([text for text, _ in bars[-1].stages], done, strict=True))

    done = run("one")
    guards = [
        "the model writes 2,048 tokens", "scoring columns and rows on general text",
        "scoring columns and rows on the task", "calibrating 14 layers",
        "measuring own text",
    ]  # fmt: skip
    names = list(done)
    at = names.index(guards[0])
    assert names[at : at + len(guards) + 1] == [*guards, "training"]
    assert names[-4:-1] == ["computing the task's anchor", "held-out examples, after", "other texts, after"]
    assert all(len(units) > 2 for text, units in bars[-1].stages if text in guards)
    assert done["the model writes 2,048 tokens"] > 0.2 * bars[-1].total
    done = run("two")  # the text is there already, and what was to be done for it is passed over
    assert "the model writes 2,048 tokens" not in done


def test_the_loss_is_on_answers_alone(data, chat_model, guard_file, tmp_path):
    """The loss of the first step, on all examples at once, is the base model's on the answers."""
    out, tells = tmp_path / "out", dict(guard_text=guard_file, epochs=1, rank=4)
    done = command(data, model=chat_model, out=out, batch_size=40, **tells)
    assert done.exit_code == 0, done.output
    _, base, examples, _, _ = prepare(TrainOptions(data=str(data), out=tmp_path / "nowhere", model=chat_model))
    model = AutoModelForCausalLM.from_pretrained(chat_model, dtype=torch.float32)
    how = dict(stop=frozenset(), reply_tokens=1, batch_size=8)
    found = measure(model, base.tokenizer, examples.train, examples.prompts, **how)
    (entry,) = record(out)["outcome"]["run"]["log"]
    assert entry["loss"] == pytest.approx(found.loss, abs=1e-4)


def test_a_model_of_few_positions_without_a_template(guard_file, plain_model, tmp_path):
    """GPT-2 has transformers' Conv1D layers, and few positions for a prompt and its reply."""
    gpt2().save_pretrained(tmp_path / "gpt2")
    AutoTokenizer.from_pretrained(plain_model).save_pretrained(tmp_path / "gpt2")
    rows = [{"prompt": " ".join(f"w{(i + j) % 90}" for j in range(62)), "completion": f"w{i}"} for i in range(40)]
    out = tmp_path / "out"
    tells = dict(model=tmp_path / "gpt2", out=out, guard_text=guard_file, epochs=1, rank=4)
    done = command(write_lines(tmp_path / "rows.jsonl", rows), **tells)
    assert done.exit_code == 0, done.output
    assert "as plain text: the model has no chat template" in " ".join(done.stdout.split())
    assert record(out)["outcome"]["held_out"]["tokens"] == 2 * 20  # the word and the end of the text
    for reply in record(out)["outcome"]["replies"]:
        assert len(reply["before"].split()) <= 32


def test_a_dry_run_writes_nothing_and_loads_no_weight(data, chat_model, tmp_path, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loaded)
    done = command(data, "--dry-run", model=chat_model, out=tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "text that the model itself writes" in done.stdout
    assert re.fullmatch(r"Warning: The rank was lowered from 32 to the smaller side .*\n", done.stderr)
    assert not (tmp_path / "out").exists()


def test_the_documentation_names_every_option_and_default():
    page = (Path(__file__).parent.parent.parent / "docs" / "train.md").read_text(encoding="utf-8")
    table = page[page.index("| option | default |") : page.index("## What it prints")]
    named = set(re.findall(r"`(--[a-z0-9-]+)`", table))
    parameters = [p for p in typer.main.get_command(app).commands["train"].params if p.name not in ("data", "help")]
    options = {option for p in parameters for option in [*p.opts, *p.secondary_opts]}
    assert named == options
    for row in re.findall(r"^\| (`.*?`) \| (.*?) \|", table, re.MULTILINE):
        for option, default in zip(re.findall(r"--[a-z0-9-]+", row[0]), row[1].split(", "), strict=False):
            (parameter,) = [p for p in parameters if option in (*p.opts, *p.secondary_opts)]
            if parameter.default not in (None, False) and not parameter.required:
                assert str(getattr(parameter.default, "value", parameter.default)) == default.strip("`"), option
    ranks = TrainOptions.RANKS
    assert f"{ranks['curlora']} (LoRA: {ranks['lora']}), {TrainOptions.TARGET_MODULES} |" in table


def loaded(*_, **__):
    raise AssertionError("a weight was loaded")


BAD = {
    "no model": ([], {}, "Which model is trained? Give --model"),
    "model missing": ([], {"model": "./gone"}, "there is no folder gone"),
    "budget": ([], {"model": "{chat}", "max_forgetting": "1"}, "For 1 % give 0.01."),
    "budget of nothing": ([], {"model": "{chat}", "max_forgetting": "0"}, "must be a positive share"),
    "guard text": ([], {"model": "{chat}", "guard_text": "code=gone.txt"}, "--guard-text gone.txt: there is no such"),
    "limit of no text": ([], {"model": "{chat}", "limit": "code=1%"}, "--limit code=...: no --guard-text has this"),
    "limit without a name": ([], {"model": "{chat}", "limit": "1%"}, "--limit '1%' does not name a text"),
    "guard text of a word": ([], {"model": "{chat}", "guard_text": "{word}"}, "has no two tokens in a row"),
    "guard text of nothing": ([], {"model": "{chat}", "guard_text": "{nothing}"}, "is empty: give a text of a few"),
    "encoder-decoder": ([], {"model": "{t5}"}, "is an encoder-decoder (t5)"),
    "no language model": ([], {"model": "{vit}"}, "is of type vit, for which transformers has no causal"),
    "no template": ([], {"model": "{plain}"}, "the model's tokenizer has no chat template"),
    "rank": ([], {"model": "{chat}", "rank": "0"}, "r must be a positive integer, got 0"),
    "targets": ([], {"model": "{chat}", "target_modules": "wq,wk"}, "The adapter cannot be put on"),
    "too long": ([], {"model": "{chat}", "max_length": "3"}, "none of 40 examples is left"),
    "adapter": ([], {"continue_from": "{chat}"}, "--continue-from"),
    "adapter as the model": ([], {"model": "{lora}"}, "is the folder of an adapter. To train it further, give it with"),
    "adapter of another method": ([], {"continue_from": "{ia3}"}, "is an adapter of type IA3, not CURLORA or LORA"),
    "export of LoRA": ([], {"continue_from": "{lora}", "export": "lora"}, "--export lora is for CURLoRA adapters"),
    "targets that name nothing": ([], {"model": "{chat}", "target_modules": ","}, "--target-modules names no layer"),
    "targets of no expression": ([], {"model": "{chat}", "target_modules": "("}, "is not a valid regular expression"),
    "seed": ([], {"model": "{chat}", "seed": "4294967296"}, "--seed must be between 0 and 4294967295, got 4294967296"),
    "tracker": ([], {"model": "{chat}", "report_to": "paper"}, "--report-to paper: paper is not supported"),
    "tracker that is missing": ([], {"model": "{chat}", "report_to": "clearml"}, "of this tracker is not installed"),
    "bytes": ([], {"model": "{chat}", "eval": "gone.jsonl"}, "gone.jsonl: there is no such file"),
}


@pytest.fixture(scope="module")
def models(chat_model, plain_model, tmp_path_factory):
    from transformers import T5Config, ViTConfig

    folder, found = tmp_path_factory.mktemp("models"), {"chat": chat_model, "plain": plain_model}
    for name, content in (("word", "w1\n\nw2"), ("nothing", " \n")):
        found[name] = str(folder / f"{name}.txt")
        (folder / f"{name}.txt").write_text(content)
    for name, config in (("lora", LoraConfig()), ("ia3", IA3Config())):
        config.base_model_name_or_path = chat_model
        config.save_pretrained(folder / name)
        found[name] = str(folder / name)
    for name, config in (("t5", T5Config()), ("vit", ViTConfig())):
        config.save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(plain_model).save_pretrained(folder / name)
        found[name] = str(folder / name)
    return found


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_one_sentence_and_loads_no_weight(bad, data, models, tmp_path, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loaded)
    monkeypatch.chdir(tmp_path)
    given, options, message = BAD[bad]
    options = {"out": "out", **{name: value.format(**models) for name, value in options.items()}}
    done = command(data, *given, **options)
    assert done.exit_code == 1, done.output
    assert done.stderr.startswith("Error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            [{"role": "user", "content": "w1"}, {"role": "bot", "content": "w2"}],
            "row 16 (line 17) has the unknown role 'bot' in message 1; known roles are system, developer, user, ",
        ),
        (
            [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2", "weight": 0}],
            "row 16 (line 17) has no assistant message that answers a user message: ",
        ),
        ([], "row 16 (line 17) is an empty conversation"),
    ],
)
def test_a_bad_row_is_named_with_its_line(row, message, chat_model, tmp_path, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loaded)
    rows = conversations(20)
    rows[16] = {"messages": row}
    done = command(write_lines(tmp_path / "chat.jsonl", rows), model=chat_model, out=tmp_path / "out")
    assert done.exit_code == 1, done.output
    assert done.stderr.startswith(f"Error: {tmp_path / 'chat.jsonl'}: {message}")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("missing", "options", "message"),
    [
        ("trl", [], "pip install trl"),
        ("bitsandbytes", ["--quantize", "4bit"], "pip install bitsandbytes"),
    ],
)
def test_a_package_that_is_missing(missing, options, message, data, chat_model, tmp_path, monkeypatch):
    from importlib.util import find_spec

    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == missing else find_spec(name, *a))
    done = command(data, *options, model=chat_model, out=tmp_path / "out")
    assert (done.exit_code, message in done.stderr) == (1, True)
    assert done.stderr.count("\n") == 1


def test_other_texts_are_measured_and_have_no_limit(data, chat_model, tmp_path):
    text = tmp_path / "novel.txt"
    text.write_text("\n\n".join(f"w{i} w{i + 1} w{i + 2}" for i in range(30)))
    out = tmp_path / "out"
    done = command(data, *SMALL, model=chat_model, out=out, other_text=text)
    assert done.exit_code == 0, done.output
    outcome = TrainOutcome.model_validate(record(out)["outcome"])
    assert set(outcome.others) == {"novel", OWN_SAMPLE}
    base = AutoModelForCausalLM.from_pretrained(chat_model).eval()
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    kept = rows_of("novel", text, tokenizer, tokens=8192, max_length=128)
    adapted = PeftModel.from_pretrained(base, out)
    after = perplexity(adapted, kept, max_length=128)
    with adapted.disable_adapter():
        before = perplexity(adapted, kept, max_length=128)
    assert outcome.others["novel"].before == pytest.approx(before, rel=1e-5)
    assert outcome.others["novel"].after == pytest.approx(after, rel=1e-5)
    name, worst = outcome.worst_other
    assert worst.rise == max(other.rise for other in outcome.others.values())
    assert f"on {name}" in " ".join(done.output.split())
    for page in ("README.md", "report.html"):
        assert "perplexity of novel" in (out / page).read_text()


def test_other_texts_are_checked_before_weights_are_loaded(data, chat_model, tmp_path):
    text = tmp_path / "novel.txt"
    done = command(data, "--dry-run", model=chat_model, out=tmp_path / "out", other_text=text)
    assert f"--other-text {text}: there is no such file" in done.output.replace("\n", "")
    text.write_text("w1 w2 w3")
    done = command(data, "--dry-run", model=chat_model, out=tmp_path / "out", other_text=text, guard_text=text)
    assert "another text is called 'novel' too" in " ".join(done.output.split())
