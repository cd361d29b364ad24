"""A whole stream on a small model: what is reported is what a fresh load of the files gives."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file

from curlora import CurloraConfig
from curlora.continual.classifier import TaskClassifier
from curlora.continual.methods import Method
from curlora.continual.perplexity import perplexity
from curlora.continual.sequence import HeldOut, Settings, run_method, work_of
from curlora.continual.tasks import Task
from tests.models import VOCABULARY, llama, word_examples, word_tokenizer

SETTINGS = Settings(batch_size=4, evaluation_batch_size=8, window=16, epochs=3, head_learning_rate=0.05)
CURLORA = Method("curlora", "CURLoRA", lambda: CurloraConfig(r=4), 0.3)
LORA = Method("lora", "LoRA", lambda: LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), 1e-2)
FROZEN = Method("frozen", "Frozen")


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


TASKS = [Task(name, ["a", "b"], *word_examples(seed)) for name, seed in (("first", 2), ("second", 8))]
HELDOUT = HeldOut("noise", torch.randint(0, VOCABULARY, (50,), generator=torch.Generator().manual_seed(0)))


class Recorder:
    def __init__(self):
        self.stages, self.units = [], 0.0

    def stage(self, text):
        self.stages.append(text)

    def advance(self, units):
        self.units += units


def run(method, tokenizer, directory, tasks=TASKS):
    base = perplexity(llama(), HELDOUT.tokens, window=SETTINGS.window)
    recorder = Recorder()
    result = run_method(
        method,
        llama(),
        tokenizer,
        tasks,
        HELDOUT,
        SETTINGS,
        base_perplexity=base,
        directory=directory,
        progress=recorder,
    )
    return result, recorder


def score(classifier, tokenizer, task):
    """Accuracy, one example at a time, without a Trainer and without padding."""
    classifier.task = task.name
    classifier.eval()
    right = 0
    for text, label in task.evaluation:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            right += int(classifier(ids, torch.ones_like(ids))["logits"].argmax()) == label
    return right / len(task.evaluation)


@pytest.mark.parametrize("method", [FROZEN, LORA, CURLORA], ids=lambda m: m.name)
def test_the_saved_files_reproduce_the_reported_figures(method, tokenizer, tmp_path):
    result, _ = run(method, tokenizer, tmp_path)
    model = llama()
    if method.adapter is not None:
        model = PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    classifier = TaskClassifier(model)
    for task in TASKS:
        classifier.add_head(task.name, 2)
    classifier.heads.load_state_dict(load_file(tmp_path / "heads.safetensors"))
    assert result.accuracy[-1] == [score(classifier, tokenizer, task) for task in TASKS]
    assert result.perplexity[-1] == pytest.approx(
        perplexity(classifier.language_model, HELDOUT.tokens, window=SETTINGS.window), rel=1e-6
    )


def test_something_is_learned(tokenizer, tmp_path):
    result, _ = run(CURLORA, tokenizer, tmp_path)
    for i, task in enumerate(TASKS):
        assert result.accuracy[i][i] > task.majority_rate + 0.15
    assert result.losses[-1][1] < result.losses[0][1]


@pytest.mark.parametrize("method", [FROZEN, CURLORA], ids=lambda m: m.name)
def test_progress_adds_up_to_the_announced_work(method, tokenizer, tmp_path):
    _, recorder = run(method, tokenizer, tmp_path)
    assert recorder.units == work_of(method, TASKS, HELDOUT, SETTINGS)
    assert len(recorder.stages) == 2 * len(TASKS)


def test_the_frozen_method_changes_nothing_but_its_heads(tokenizer, tmp_path):
    result, _ = run(FROZEN, tokenizer, tmp_path)
    assert result.trainable_parameters == result.adapter_bytes == 0
    assert result.accuracy[1][0] == result.accuracy[0][0]
    assert len(set(result.perplexity)) == 1
    assert not (tmp_path / "adapter").exists()


def test_counts_and_sizes(tokenizer, tmp_path):
    result, _ = run(CURLORA, tokenizer, tmp_path)
    assert result.trainable_parameters == 6 * 16
    assert result.adapter_bytes == (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert result.train_tokens == 3 * sum(len(text.split()) for task in TASKS for text, _ in task.train)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] == "CURLORA"


def test_the_same_seed_gives_the_same_run(tokenizer, tmp_path):
    first, _ = run(LORA, tokenizer, tmp_path / "a")
    torch.rand(3)
    second, _ = run(LORA, tokenizer, tmp_path / "b")
    assert first.accuracy == second.accuracy
    assert first.perplexity == second.perplexity
    assert first.losses == second.losses


def test_heads_of_earlier_tasks_are_untouched(tokenizer, tmp_path):
    run(CURLORA, tokenizer, tmp_path / "one", tasks=TASKS[:1])
    run(CURLORA, tokenizer, tmp_path / "two")
    one, two = (load_file(tmp_path / name / "heads.safetensors") for name in ("one", "two"))
    for key, value in one.items():
        assert torch.equal(value, two[key])


def test_a_text_that_becomes_nothing_is_named(tokenizer, tmp_path):
    task = Task("t", ["a", "b"], [("w1", 0), ("   ", 1)], [("w1", 0)])
    with pytest.raises(ValueError, match="task 't': train row 1 has no token"):
        run(FROZEN, tokenizer, tmp_path, tasks=[task])
