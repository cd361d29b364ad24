"""A whole stream on a small model: the reported figures equal those of the saved files, loaded afresh."""

import json
import math

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from curlora.continual.encoding import encode
from curlora.continual.heldout import HeldOut, measure
from curlora.continual.method_run import BaseScores, MethodRun, work_of
from curlora.continual.methods import make_method
from curlora.continual.settings import Settings
from curlora.continual.task_model import TaskModel
from curlora.continual.tasks import ClassificationTask, CompletionTask, TaskError
from curlora.continual.trainer import TaskTrainer, steps_of
from tests.models import VOCABULARY, WORDS, llama, word_examples, word_tokenizer

SETTINGS = Settings(batch_size=4, evaluation_batch_size=8, epochs=3, head_learning_rate=0.05)
CURLORA = make_method("curlora", "curlora", "CURLoRA", 0.3, {"r": 4})
LORA = make_method("lora", "lora", "LoRA", 1e-2, {"r": 4, "target_modules": ["q_proj", "v_proj"]})
FULL = make_method("full", "full", "Full", 1e-3)
FROZEN = make_method("frozen", "frozen", "Frozen")


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


def classification(name, seed):
    train, evaluation = word_examples(seed)
    return ClassificationTask(name, train, evaluation, labels=["a", "b"])


def copying(name="copy", count=24):
    """A task whose completion is the prompt's last word."""
    rng = torch.Generator().manual_seed(5)
    picks = torch.randint(20, 90, (count, 3), generator=rng).tolist()
    examples = [(" ".join(WORDS[i] for i in row), WORDS[row[-1]]) for row in picks]
    return CompletionTask(name, examples, examples[: count // 2])


TASKS = [classification("first", 2), classification("second", 8)]
HELDOUT = HeldOut("noise", torch.randint(0, VOCABULARY, (50,), generator=torch.Generator().manual_seed(0)), window=16)


class Recorder:
    def __init__(self):
        self.stages, self.units = [], 0.0

    def stage(self, text):
        self.stages.append(text)

    def advance(self, units):
        self.units += units


def run(method, tokenizer, directory, tasks=TASKS, settings=SETTINGS, seed=0, base_tasks=()):
    recorder = Recorder()
    result, trainable, size = MethodRun(
        method,
        llama,
        tokenizer,
        encode(tasks, tokenizer, settings),
        [HELDOUT],
        seed=seed,
        base=BaseScores({"noise": measure(llama(), HELDOUT)}, base_tasks),
        directory=directory,
        progress=recorder,
    ).run()
    return result, trainable, size, recorder


def reload(method, directory):
    if method is FULL:
        return AutoModelForCausalLM.from_pretrained(directory / "model").eval()
    return llama() if method is FROZEN else PeftModel.from_pretrained(llama(), directory / "adapter").eval()


@pytest.mark.parametrize("method", [FROZEN, LORA, CURLORA, FULL], ids=lambda m: m.name)
def test_the_saved_files_reproduce_the_reported_figures(method, tokenizer, tmp_path):
    """Scored one example at a time, without a Trainer and without padding."""
    tasks = [TASKS[0], copying(), TASKS[1]]
    result, *_ = run(method, tokenizer, tmp_path, tasks)
    model = TaskModel(reload(method, tmp_path))
    heads = load_file(tmp_path / "heads.safetensors")
    for i, (task, score) in enumerate(zip(tasks, result.scores[-1], strict=True)):
        right, losses = 0, []
        for given, answer in task.evaluation:
            ids = tokenizer(given)["input_ids"]
            if task.classes is None:
                logits = model.language_model(torch.tensor([ids])).logits[0, -1]
                target = tokenizer(answer)["input_ids"][0]
            else:
                hidden = model.language_model.base_model(torch.tensor([ids])).last_hidden_state[0, -1]
                logits, target = hidden @ heads[f"{i}.weight"].T + heads[f"{i}.bias"], answer
            right += int(logits.argmax()) == target
            losses.append(-logits.log_softmax(-1)[target].item())
        assert score.accuracy == right / len(task.evaluation)
        assert score.loss == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert result.text()[-1].perplexity == pytest.approx(
        measure(model.language_model, HeldOut("text", HELDOUT.tokens, window=16)).perplexity, rel=1e-6
    )


def test_something_is_learned(tokenizer, tmp_path):
    result, *_ = run(CURLORA, tokenizer, tmp_path)
    for i, task in enumerate(TASKS):
        assert result.scores[i][i].accuracy > task.majority_rate + 0.15
    assert result.losses[-1][1] < result.losses[0][1]


def test_a_completion_task_is_learned(tokenizer, tmp_path):
    settings = SETTINGS.changed({"epochs": 20})
    method = make_method("full", "full", "Full", 1e-2)
    result, *_ = run(method, tokenizer, tmp_path, [copying()], settings)
    assert result.scores[0][0].accuracy > 0.9
    frozen, *_ = run(FROZEN, tokenizer, tmp_path / "frozen", [copying()], settings)
    assert frozen.scores[0][0].accuracy < 0.2
    assert frozen.steps == 0


@pytest.mark.parametrize("method", [FROZEN, CURLORA], ids=lambda m: m.name)
def test_progress_adds_up_to_the_announced_work(method, tokenizer, tmp_path):
    *_, recorder = run(method, tokenizer, tmp_path)
    assert recorder.units == work_of(method, encode(TASKS, tokenizer, SETTINGS), [HELDOUT])
    assert len(recorder.stages) == 2 * len(TASKS)


def test_the_frozen_method_changes_nothing_but_its_heads(tokenizer, tmp_path):
    result, trainable, size, _ = run(FROZEN, tokenizer, tmp_path)
    assert trainable == size == 0
    assert result.scores[1][0] == result.scores[0][0]
    assert len(set(result.text())) == 1
    assert result.text()[-1].drift == 0
    assert not (tmp_path / "adapter").exists()


def test_counts_and_sizes(tokenizer, tmp_path):
    result, trainable, size, _ = run(CURLORA, tokenizer, tmp_path)
    assert trainable == 6 * 16
    assert size == (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert result.train_tokens == 3 * sum(len(text.split()) for task in TASKS for text, _ in task.train)
    assert result.steps == sum(steps_of(len(task.train), SETTINGS) for task in TASKS) == 2 * 3 * 8
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 4


def figures(result):
    return result.model_dump(exclude={"seconds", "train_seconds"})


def test_the_same_seed_gives_the_same_run_and_another_another(tokenizer, tmp_path):
    first, *_ = run(LORA, tokenizer, tmp_path / "a")
    torch.rand(3)
    second, *_ = run(LORA, tokenizer, tmp_path / "b")
    assert figures(first) == figures(second)
    other, *_ = run(LORA, tokenizer, tmp_path / "c", seed=1)
    assert other.losses != first.losses


def test_curlora_draws_with_the_runs_seed_unless_told(tokenizer):
    def columns(options, seed):
        method = make_method("curlora", "c", "C", 0.1, options)
        return method.apply(llama(), seed).get_base_model().model.layers[0].self_attn.q_proj.basis("default").indices

    assert not torch.equal(columns({"r": 4}, 0), columns({"r": 4}, 1))
    assert torch.equal(columns({"r": 4, "seed": 3}, 0), columns({"r": 4, "seed": 3}, 1))


def test_heads_of_earlier_tasks_are_untouched(tokenizer, tmp_path):
    run(CURLORA, tokenizer, tmp_path / "one", tasks=TASKS[:1])
    run(CURLORA, tokenizer, tmp_path / "two")
    one, two = (load_file(tmp_path / name / "heads.safetensors") for name in ("one", "two"))
    for key, value in one.items():
        assert torch.equal(value, two[key])


def test_forward_transfer_is_scored_just_before_a_task_is_learned(tokenizer, tmp_path):
    settings = SETTINGS.changed({"forward_transfer": True})
    tasks = [copying("one"), copying("two")]  # the same task twice, so learning the first helps the second
    method = make_method("full", "full", "Full", 1e-2)
    encoded = encode(tasks, tokenizer, settings)
    base = TaskModel(llama())
    trainer = TaskTrainer(base, 0.0, [], tokenizer, settings, 0, tmp_path)
    base_scores = [trainer.score(part.evaluation) for part in encoded]
    result, *_, recorder = run(method, tokenizer, tmp_path / "run", tasks, settings, base_tasks=base_scores)
    assert result.before == [base_scores[0], result.scores[0][0].model_copy()]
    assert result.forward_transfer == result.scores[0][0].accuracy - base_scores[1].accuracy
    assert recorder.units == work_of(method, encoded, [HELDOUT])


def test_a_task_can_be_trained_otherwise(tokenizer, tmp_path):
    train, evaluation = word_examples(8)
    own = ClassificationTask("own", train, evaluation, labels=["a", "b"], training={"epochs": 1, "batch_size": 8})
    result, *_ = run(CURLORA, tokenizer, tmp_path, [TASKS[0], own])
    assert result.steps == 3 * 8 + 4


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 2, "gradient_accumulation_steps": 2},
        {"trainer": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}},
    ],
)
def test_what_only_saves_memory_changes_no_figure(changes, tokenizer, tmp_path):
    tasks = [TASKS[0], copying()]
    plain, *_ = run(CURLORA, tokenizer, tmp_path / "a", tasks)
    other, *_ = run(CURLORA, tokenizer, tmp_path / "b", tasks, SETTINGS.changed(changes))
    assert other.losses == [(step, pytest.approx(loss, rel=1e-3)) for step, loss in plain.losses]
    assert other.text()[-1].perplexity == pytest.approx(plain.text()[-1].perplexity, rel=1e-4)


BF16 = {"bf16": True}


def test_mixed_precision_runs_and_is_close(tokenizer, tmp_path):
    plain, *_ = run(CURLORA, tokenizer, tmp_path / "a")
    mixed, *_ = run(CURLORA, tokenizer, tmp_path / "b", settings=SETTINGS.changed({"trainer": BF16}))
    assert mixed.losses != plain.losses
    assert mixed.losses[0][1] == pytest.approx(plain.losses[0][1], rel=0.05)


def test_the_first_task_begins_at_the_base_models_drift_of_zero(tokenizer, tmp_path):
    result, *_ = run(CURLORA, tokenizer, tmp_path)
    assert result.text()[0].drift == 0
    assert all(score.drift > 0 for score in result.text()[1:])


def test_a_text_that_becomes_nothing_is_named(tokenizer):
    task = ClassificationTask("t", [("w1", 0), ("   ", 1)], [("w1", 0)], labels=["a", "b"])
    with pytest.raises(TaskError, match="task 't': train row 1 has no token"):
        encode([task], tokenizer, SETTINGS)


def test_training_is_logged_where_it_is_asked_to(tokenizer, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = SETTINGS.changed({"trainer": {"report_to": "tensorboard"}})
    result, *_ = run(CURLORA, tokenizer, tmp_path, settings=settings)
    logged = []
    for task in TASKS:
        (file,) = (tmp_path / "logs" / task.name).rglob("events.*")
        events = EventAccumulator(str(file.parent)).Reload()
        logged += [event.value for event in events.Scalars("train/loss")]
    assert logged == [pytest.approx(loss, rel=1e-5) for _, loss in result.losses]


def test_a_run_that_diverges_says_so(tokenizer, tmp_path):
    method = make_method("full", "full", "Full", 1e30)
    result, *_ = run(method, tokenizer, tmp_path, settings=SETTINGS.changed({"logging_steps": 1}))
    assert math.isnan(result.losses[-1][1])
    assert not result.text()[-1].drift < 1
