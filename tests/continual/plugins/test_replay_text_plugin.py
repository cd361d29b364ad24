"""Replay of general text: pieces of the guard's text are learned beside every task."""

import pytest
import torch
import yaml

from curlora.continual import load_recipe, run_recipe
from curlora.continual.answers import Answers
from curlora.continual.batches import Collator
from curlora.continual.errors import RecipeError
from curlora.continual.heldout import HeldOut, measure
from curlora.continual.plan import make_plan
from curlora.continual.plugins import ReplayTextPlugin, TaskContext, make_plugin
from curlora.continual.task_model import TaskModel
from tests.models import llama, word_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:The guard's text has", "ignore:The text")


def rows_of(text, pieces, tokens, number=0, seed=0):
    own = [{"input_ids": [1, 2], "labels": 1, "task": number}]
    context = TaskContext(number, TaskModel(llama()), own, lambda rows: {}, seed, guard_text=text)
    rows = ReplayTextPlugin(pieces, tokens).training_rows(context)
    assert rows[:1] == own
    return rows[1:]


def test_their_loss_is_the_text_s_in_windows_of_so_many_tokens():
    tokens = torch.randint(5, 90, (64,), generator=torch.Generator().manual_seed(0))
    model = TaskModel(llama())
    batch = Collator(word_tokenizer())(rows_of(HeldOut("text", tokens), 4, 16))
    assert batch["input_ids"].shape == (4, 15)
    loss = model.eval()(**batch)["loss"].item()
    expected = measure(model.language_model, HeldOut("text", tokens, window=16)).perplexity
    assert torch.tensor(loss).exp().item() == pytest.approx(expected, rel=1e-5)


def test_only_what_the_base_model_has_written_is_learned():
    counted = (torch.arange(8) >= 3, torch.arange(6) >= 1)
    text = Answers("own", torch.arange(10, 24), counted=counted)
    by_start = {row["input_ids"][0]: row["labels"] for row in rows_of(text, 2, 8)}
    assert by_start == {10: [-100, -100, 13, 14, 15, 16, 17], 18: [19, 20, 21, 22, 23]}


def test_the_choice_is_a_function_of_the_seed_and_the_task():
    text = HeldOut("text", torch.arange(5, 85))
    choice = lambda seed, number: [row["input_ids"] for row in rows_of(text, 3, 4, number, seed)]  # noqa: E731
    assert choice(0, 0) == choice(0, 0)
    assert choice(0, 0) != choice(1, 0)
    assert choice(0, 0) != choice(0, 1)
    assert len(rows_of(text, 100, 4)) == 20  # no more than there are


def test_it_keeps_the_text_beside_tasks_with_heads(guarded_path, tmp_path):
    content = yaml.safe_load(guarded_path.read_text())
    plain = {"name": "plain", "method": "lora", "learning_rate": 0.05,
             "options": {"r": 4, "target_modules": ["q_proj", "v_proj"]}}  # fmt: skip
    mixed = {**plain, "name": "mixed", "plugins": [{"name": "replay_text", "pieces": 8, "tokens": 32}]}
    content["methods"] = [plain, mixed]
    guarded_path.write_text(yaml.safe_dump(content))
    recipe = load_recipe(guarded_path)
    plan = {method.name: method for method in make_plan(recipe).methods}
    results = run_recipe(recipe, tmp_path / "run")
    after = {method.name: method.seeds[0] for method in results.methods}
    assert after["mixed"].heldout["more words"][-1].drift < 0.5 * after["plain"].heldout["more words"][-1].drift
    for name, seed in after.items():
        assert (plan[name].steps, plan[name].tokens) == (seed.steps, seed.train_tokens)


def test_a_plan_knows_what_is_not_written_yet(guarded_path):
    content = yaml.safe_load(guarded_path.read_text())
    content["guard"] = {"name": "own text", "written_by": "model", "tokens": 128, "max_length": 32}
    mixed = {**content["methods"][0], "plugins": [{"name": "replay_text", "pieces": 3, "tokens": 32}]}
    content["methods"] = [content["methods"][0], {**mixed, "name": "mixed"}]
    guarded_path.write_text(yaml.safe_dump(content))
    _, alone, mixed = make_plan(load_recipe(guarded_path)).methods
    epochs, tasks = 3, 2
    assert mixed.tokens == alone.tokens + epochs * tasks * 3 * 31


@pytest.mark.parametrize(
    ("options", "message"),
    [({"pieces": 0}, "pieces to be a whole number of 1 or more, got 0"), ({"pieces": 1, "tokens": 1}, "got 1")],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        make_plugin("replay_text", options)


def test_a_recipe_without_a_general_text_is_refused(recipe_path):
    content = yaml.safe_load(recipe_path.read_text())
    content["methods"][1]["plugins"] = [{"name": "replay_text", "pieces": 2}]
    recipe_path.write_text(yaml.safe_dump(content))
    with pytest.raises(RecipeError, match="'replay_text' needs a general text: name one under guard"):
        load_recipe(recipe_path)
