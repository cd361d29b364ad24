"""The base model's answers are sampled once, saved, and scored without their prompts."""

import io
import json

import pytest
import torch
from rich.console import Console

from curlora.continual import load_recipe, run, run_recipe
from curlora.continual.answers import Answers, OwnText, PromptList, answer, kept_answers
from curlora.continual.errors import RecipeError, RunError
from curlora.continual.heldout import measure
from curlora.continual.plan import make_plan
from curlora.report.plan import plan_tables
from curlora.text.own_text import own_text
from tests.models import WORDS, llama, word_tokenizer

PROMPTS = [WORDS[1], " ".join(WORDS[2:7]), " ".join(WORDS[7:9])]
QUICK = ["training.epochs=1"]


def test_they_are_the_models_own_and_the_same_for_a_seed():
    first, again, other = (answer(llama(), word_tokenizer(), PROMPTS, 12, seed) for seed in (0, 0, 1))
    assert all(
        torch.equal(a, b) for pair, same in zip(first, again, strict=True) for a, b in zip(pair, same, strict=True)
    )
    assert not all(torch.equal(a[1], b[1]) for a, b in zip(first, other, strict=True))
    assert [prompt.tolist() for prompt, _ in first] == [word_tokenizer()(text)["input_ids"] for text in PROMPTS]
    assert all(1 <= len(tokens) <= 12 for _, tokens in first)


def test_sampling_leaves_the_generator_alone():
    model = llama()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    answer(model, word_tokenizer(), PROMPTS, 4, 0)
    assert torch.equal(torch.rand(2), expected)


def test_an_answer_is_scored_after_its_prompt(tmp_path):
    text = kept_answers(PromptList("own", tuple(PROMPTS), 6), word_tokenizer(), tmp_path, llama)
    model, losses = llama(), []
    for row, prompt in zip(text.as_rows(), PROMPTS, strict=True):
        log_p = model(row[None]).logits[0].double().log_softmax(-1)
        losses += [-float(log_p[i - 1, row[i]]) for i in range(len(prompt.split()), len(row))]
    expected = torch.tensor(losses).mean().exp().item()
    assert measure(model, text).perplexity == pytest.approx(expected, rel=1e-5)
    assert text.windows == 3
    assert text.describe() == f"own (3 pieces written by the base model, {len(losses)} tokens)"


def test_they_are_kept(tmp_path):
    text = PromptList("own", tuple(PROMPTS), 6)
    first = kept_answers(text, word_tokenizer(), tmp_path, llama)

    def no_model():
        raise AssertionError("it was loaded")

    again = kept_answers(text, word_tokenizer(), tmp_path, no_model)
    assert isinstance(again, Answers)
    assert torch.equal(first.tokens, again.tokens)
    (path,) = tmp_path.glob("answers-*.json")
    path.write_text(path.read_text()[:-5])
    with pytest.raises(RunError, match=r"does not hold the text that the base model has written. Remove the file"):
        kept_answers(text, word_tokenizer(), tmp_path, no_model)


def test_of_the_models_own_text_what_the_template_adds_is_not_scored(tmp_path):
    """A model learns to predict it in a few steps, and this gain would hide the loss on the other tokens."""
    tokenizer, model = word_tokenizer(), llama()
    tokenizer.chat_template = (
        "{% for m in messages %}w90 {{ m.content }}<|end|>w91{% endfor %}{% if add_generation_prompt %}w92{% endif %}"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"], "bos_token": "w93"})
    model.resize_token_embeddings(len(tokenizer))
    expected = own_text(model, tokenizer, tokens=200, max_length=12, progress=False)
    ends_inside = [mask.int().diff().eq(-1).any() for mask in expected.counted]
    assert any(ends_inside), "in some row a template should stand between what is drawn"
    for _ in range(2):  # as sampled, and as read again
        text = kept_answers(OwnText("own", 200, 12), tokenizer, tmp_path, lambda: model)
        for found in (text.as_rows(), text.pieces(12)):
            assert [row.tolist() for row in found] == [row.tolist() for row in expected]
            assert [mask.tolist() for mask in found.counted] == [mask.tolist() for mask in expected.counted]


def test_a_file_of_an_earlier_version_is_read_as_it_was_written(tmp_path):
    text = PromptList("own", ("w1", "w2 w3"), 3)
    rows = [{"prompt": [4], "answer": [5, 6]}, {"prompt": [7, 8], "answer": [9]}]
    path = tmp_path / f"answers-{text.digest[:16]}.json"
    path.write_text(json.dumps({"digest": text.digest, "rows": rows}))
    found = kept_answers(text, word_tokenizer(), tmp_path, llama).as_rows()
    assert [row.tolist() for row in found] == [[4, 5, 6], [7, 8, 9]]
    assert [mask.tolist() for mask in found.counted] == [[False, True, True], [False, False, True]]


class TestAnotherModel:
    """What one model has written is not taken for another's."""

    @pytest.fixture
    def stopped(self, recipe_path, tmp_path, monkeypatch):
        """A run that was interrupted when the base model had written its answers."""
        words = "{name: words, path: text.txt, tokens: 50, window: 16}"
        where = f"heldout=[{words}, {{name: own, prompts: {json.dumps(PROMPTS)}, max_new_tokens: 5}}]"

        def interrupted(*_):
            raise KeyboardInterrupt

        recipe = load_recipe(recipe_path, [*QUICK, where])
        monkeypatch.setattr(run, "measured_base", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(recipe, tmp_path / "run")
        monkeypatch.undo()
        assert list((tmp_path / "run").glob("answers-*.json"))
        other = llama()
        torch.nn.init.normal_(other.lm_head.weight)
        other.save_pretrained(tmp_path / "another")
        word_tokenizer().save_pretrained(tmp_path / "another")
        return recipe_path, where, tmp_path

    def test_named_in_the_recipe(self, stopped):
        recipe_path, where, folder = stopped
        recipe = load_recipe(recipe_path, [*QUICK, where, "model.name=another"])
        found, fresh = (run_recipe(recipe, folder / name) for name in ("run", "fresh"))
        assert found.methods[1].seeds[0].heldout == fresh.methods[1].seeds[0].heldout

    def test_in_the_same_folder(self, stopped):
        recipe_path, where, folder = stopped
        (folder / "another" / "model.safetensors").replace(folder / "model" / "model.safetensors")
        with pytest.raises(RunError, match=r"The text 'own' in .* was written by another model than this one"):
            run_recipe(load_recipe(recipe_path, [*QUICK, where]), folder / "run")


def test_a_run_follows_them(recipe_path, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n")
    words = "{name: words, path: text.txt, tokens: 50, window: 16}"
    where = f"heldout=[{words}, {{name: own, prompts: prompts.txt, max_new_tokens: 5}}]"
    results = run_recipe(load_recipe(recipe_path, [*QUICK, where]), tmp_path / "run")
    assert list(results.heldout) == ["words", "own"]
    lora = results.methods[1].seeds[0]
    assert lora.heldout["own"][0].drift == 0
    assert lora.lost("own", "rise") != 0
    listed = where.replace("prompts.txt", json.dumps(PROMPTS))
    other = run_recipe(load_recipe(recipe_path, [*QUICK, listed]), tmp_path / "listed")
    assert other.methods[1].seeds[0].heldout == lora.heldout


GUARDS = {
    "own text": "{name: own, written_by: model, tokens: 60, max_length: 12}",
    "answers": "{name: own, prompts: [w1 w2, w3], max_new_tokens: 20}",
}


@pytest.mark.parametrize("guard", GUARDS.values(), ids=GUARDS)
@pytest.mark.filterwarnings("ignore:The guard's text has")
def test_the_guard_goes_by_them(guard, recipe_path, tmp_path, monkeypatch):
    monkeypatch.setenv("CURLORA_CACHE_DIR", str(tmp_path / "cache"))
    tokenizer = word_tokenizer()
    tokenizer.eos_token = "w97"
    tokenizer.save_pretrained(recipe_path.parent / "model")
    plugins = "[{name: guard, max_kl: 0.001}, {name: redraw, examples: 8}]"
    changes = [
        "training.epochs=1", f"guard={guard}",
        "methods=[{name: cur, method: curlora, learning_rate: 0.02, options: {r: 2, target_modules: [q_proj]}, "
        f"plugins: {plugins}}}, {{name: kl, method: lora, learning_rate: 0.001, options: {{r: 2}}, "
        "plugins: [{name: kl_to_base, strength: 1.0, tokens: 8}]}]",
    ]  # fmt: skip
    recipe = load_recipe(recipe_path, changes)
    results = run_recipe(recipe, tmp_path / "run")
    by_name = {method.name: method.seeds[0] for method in results.methods}
    assert "own" in results.shown
    assert all(0 < kept.kl <= 0.001 for kept in by_name["cur"].guarded)
    assert by_name["kl"].lost("own") > 0
    assert "own (5 pieces)" in _printed(recipe) or "own (2 pieces)" in _printed(recipe)
    again = run_recipe(recipe, tmp_path / "again")
    assert by_name["cur"].heldout == {method.name: method.seeds[0] for method in again.methods}["cur"].heldout


def _printed(recipe):
    console = Console(width=200, record=True, file=io.StringIO())
    for table in plan_tables(make_plan(recipe)):
        console.print(table)
    return console.export_text()


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("{name: own, written_by: someone}", "written_by"),
        ("{name: own, written_by: model, window: 3}", "window"),
        ("{name: own, prompts: []}", "prompts"),
        ("{name: own, prompts: missing.txt}", r"text 'own' .*missing.txt\) cannot be read"),
        ("{name: own, prompts: [a], max_new_tokens: 0}", "max_new_tokens"),
        ("{name: own, prompts: [a], window: 3}", "window"),
    ],
)
def test_what_cannot_be_asked_is_refused(part, message, recipe_path, tmp_path):
    with pytest.raises(RecipeError, match=message):
        run_recipe(load_recipe(recipe_path, [f"heldout=[{part}]"]), tmp_path / "run")
