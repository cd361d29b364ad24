import pytest
import torch

from curlora.continual.encoding import encode
from curlora.continual.method_run import BaseScores, MethodRun
from curlora.continual.methods import make_method
from curlora.continual.plugins import ReplayPlugin, TaskContext, make_plugin
from curlora.continual.settings import Settings
from curlora.continual.task_model import TaskModel
from curlora.continual.tasks import CompletionTask
from curlora.text.progress import NullProgress
from tests.models import WORDS, llama, word_tokenizer


def context(number, count, seed=0):
    rows = [{"input_ids": [number, i], "labels": [-100, i], "task": number} for i in range(count)]
    return TaskContext(number, TaskModel(llama()), rows, lambda rows: {}, seed)


def test_every_later_task_trains_on_so_many_examples_of_each_before():
    replay = ReplayPlugin(examples=3)
    for number in range(3):
        now = context(number, 10)
        rows = replay.training_rows(now)
        assert len(rows) == 10 + replay.added_rows(number) == 10 + 3 * number
        assert rows[:10] == now.rows
        replay.after_task(now)
    kept = replay.training_rows(context(3, 0))
    assert [sum(row["task"] == number for row in kept) for number in range(3)] == [3, 3, 3]
    assert len({tuple(row["input_ids"]) for row in kept}) == 9


def test_the_choice_is_a_function_of_the_seed():
    def choice(seed):
        replay = ReplayPlugin(examples=4)
        replay.after_task(context(0, 50, seed))
        return replay.kept

    torch.rand(3)
    assert choice(1) == choice(1) != choice(2)


def test_its_state_is_what_it_keeps():
    replay = ReplayPlugin(examples=2)
    replay.after_task(context(0, 5))
    replay.kept.append({"input_ids": [1, 2, 3], "labels": 1, "task": 7})  # a class, not tokens
    other = ReplayPlugin(examples=2)
    other.load_state_dict(replay.state_dict())
    assert other.kept == replay.kept


def test_replaying_everything_keeps_what_contradicts_nothing(tmp_path):
    """Two tasks share weights: without replay the first is overwritten, with replay of all examples it is kept."""
    tokenizer = word_tokenizer()

    def mapping(name, first, answers):
        examples = [(f"{WORDS[first + i]} {WORDS[first + i]}", WORDS[answer]) for i, answer in enumerate(answers)]
        return CompletionTask(name, examples, examples)

    tasks = [mapping("one", 10, [60, 61, 62, 63] * 3), mapping("two", 30, [70, 71, 72, 73] * 3)]
    settings = Settings(batch_size=4, epochs=40)
    kept = {}
    for label, plugins in (("without", ()), ("with", (lambda: ReplayPlugin(examples=12),))):
        method = make_method("full", label, label, 1e-2, plugins=plugins)
        result, *_ = MethodRun(
            method, llama, tokenizer, encode(tasks, tokenizer, settings), [],
            seed=0, base=BaseScores({}), directory=tmp_path / label, progress=NullProgress(),
        ).run()  # fmt: skip
        assert result.accuracy[0][0] == 1.0
        assert result.accuracy[1][1] == 1.0
        kept[label] = result.accuracy[1][0]
    assert kept["with"] == 1.0
    assert kept["without"] < 0.8


def test_bad_options():
    with pytest.raises(ValueError, match="examples to be a whole number of 1 or more, got 0"):
        make_plugin("replay", {"examples": 0})
