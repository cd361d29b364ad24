"""A run and a plan report errors before weights are loaded, and for every method before the first one runs."""

import re

import pytest
from typer.testing import CliRunner

from curlora.continual.errors import RecipeError, RecipeWarning, RunError
from curlora.continual.launch import run_recipe
from curlora.continual.plan import make_plan
from curlora.continual.recipe_file import load_recipe
from curlora_cli.commands import app
from tests.models import gpt2, word_tokenizer


@pytest.fixture
def unreadable(recipe_path):
    """A recipe with a model whose weights cannot be read."""
    (recipe_path.parent / "model" / "model.safetensors").write_bytes(b"not a model")
    return recipe_path


@pytest.fixture
def short_model(recipe_path):
    """A recipe with a GPT-2 of 64 positions and longer texts."""
    folder = recipe_path.parent
    gpt2().save_pretrained(folder / "gpt2")
    (folder / "gpt2" / "model.safetensors").write_bytes(b"not a model")
    word_tokenizer().save_pretrained(folder / "gpt2")
    (folder / "train.tsv").write_text("text\tlabel\n" + "w1 " * 100 + "\t0\n" + "w2\t1\n")
    return recipe_path


def command(*arguments):
    return CliRunner().invoke(app, ["run", *map(str, arguments)])


def refused(recipe, directory, error=RunError):
    """Return the error of a run, which must equal that of a plan."""
    with pytest.raises(error) as planned:
        make_plan(recipe)
    with pytest.raises(error) as run:
        run_recipe(recipe, directory)
    assert str(planned.value) == str(run.value)
    assert not directory.exists()
    return str(run.value)


def test_texts_longer_than_the_models_positions(short_model, tmp_path):
    fitting = ["model.name=gpt2", "methods.1.options={r: 4}"]
    recipe = load_recipe(short_model, [*fitting, "training.max_length=128", "heldout.window=70"])
    assert refused(recipe, tmp_path / "run") == (
        "Task 'first' has a text of 100 tokens, but the model has only 64 positions. Lower max_length from 128 to 64 "
        "or less."
    )  # the held-out text has only 50 tokens, so no window of 70
    make_plan(load_recipe(short_model, [*fitting, "training.max_length=64"]))


def test_prompts_longer_than_the_models_positions(short_model, tmp_path):
    fitting = ["model.name=gpt2", "methods.1.options={r: 4}", "training.max_length=64"]
    text = f"heldout={{name: own, prompts: [w1, {'w1 ' * 60}], max_new_tokens: 5}}"
    assert refused(load_recipe(short_model, [*fitting, text]), tmp_path / "run") == (
        "The base model would write rows of 65 tokens for the text 'own', but it has only 64 positions. Lower its "
        "max_new_tokens, or shorten its longest prompt, of 60 tokens."
    )
    make_plan(load_recipe(short_model, [*fitting, text.replace("tokens: 5", "tokens: 4")]))


def test_weights_that_cannot_be_read(unreadable, tmp_path):
    with pytest.raises(RecipeError, match=r"model\.name: .*model cannot be loaded: .*header"):
        run_recipe(load_recipe(unreadable), tmp_path / "run")


def test_windows_longer_than_the_models_positions(short_model, tmp_path):
    (short_model.parent / "text.txt").write_text("w1 w2 " * 60)
    (short_model.parent / "guard.txt").write_text("w3 w4 " * 60)
    changes = ["model.name=gpt2", "training.max_length=64", "heldout.tokens=100", "heldout.window=80"]
    changes.append("guard={name: general, path: guard.txt, tokens: 90, window: 90}")
    message = refused(load_recipe(short_model, changes), tmp_path / "run")
    assert "'words' has windows of 80 tokens, but the model has only 64 positions" in message
    assert "'general' has windows of 90 tokens" in message
    assert "method 'lora' cannot be applied to this model: target_modules: the model has no module 'q_proj'" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("written_by: model, max_length: 128", "rows of 128 tokens for the text 'h', .* Lower its max_length"),
        ("prompts: [w1], max_new_tokens: 64", "rows of 65 tokens for the text 'h', .* Lower its max_new_tokens"),
    ],
)
def test_texts_that_the_model_has_no_positions_to_write(text, message, short_model, tmp_path):
    changes = ["model.name=gpt2", "methods.1.options={r: 4}", "training.max_length=64", f"heldout={{name: h, {text}}}"]
    assert re.search(message, refused(load_recipe(short_model, changes), tmp_path / "run"))


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_the_command_says_it_in_a_line(short_model, tmp_path, more):
    changes = ["--set", "model.name=gpt2", "--set", "methods.1.options={r: 4}"]
    done = command(short_model, "--out", tmp_path / "run", *changes, *more)
    assert done.exit_code == 1
    assert done.stderr.split("\n")[-2].startswith("Error: Task 'first' has a text of 100 tokens")
    assert "Traceback" not in done.stderr


def test_every_method_is_checked_before_the_first_runs(unreadable, tmp_path):
    lora = "{name: %s, method: %s, learning_rate: 0.1, options: %s}"
    methods = [
        lora % ("good", "lora", "{r: 4}"),
        lora % ("none", "lora", "{r: 4, target_modules: [nope]}"),
        lora % ("some", "lora", "{r: 4, target_modules: [q_proj, q_porj]}"),
        lora % ("regex", "curlora", "{r: 4, target_modules: 'nope.*'}"),
        lora % ("high", "curlora", "{r: 20, target_modules: [q_proj, k_proj]}"),
    ]
    lines = refused(load_recipe(unreadable, [f"methods=[{', '.join(methods)}]"]), tmp_path / "run").split("\n")
    assert len(lines) == 4
    assert all(line.startswith("method '") and "cannot be applied to this model: " in line for line in lines)
    none, some, regex, high = lines
    assert "'none'" in none
    assert "the model has no module 'nope'. It has down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj" in none
    assert "no module 'q_porj'. Did you mean 'q_proj'" in some
    assert "Linear layers of this model: down_proj, gate_proj" in some
    assert "down_proj" in regex
    assert "its rank is larger than the smaller side of 2 layer(s): model.layers.0.self_attn.k_proj (16)" in high


def test_a_rank_that_loras_layers_have_no_use_for_is_a_warning(unreadable):
    changes = ["methods.1.options={r: 20, target_modules: [q_proj, k_proj]}"]
    with pytest.warns(RecipeWarning, match=r"method 'lora': its rank is larger than the smaller side of 2 layer\(s\)"):
        make_plan(load_recipe(unreadable, changes))


def test_ranks_of_layers_of_their_own_are_right(unreadable):
    make_plan(load_recipe(unreadable, ["methods.2.options={r: 20, target_modules: [q_proj]}"]))
    make_plan(
        load_recipe(
            unreadable, ["methods.2.options={r: 20, target_modules: [q_proj, k_proj], rank_pattern: {k_proj: 16}}"]
        )
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("{r: four}", "TypeError: .*'str' and 'int'"),
        ("{r: 4, bias: everything}", "NotImplementedError: Requested bias: everything"),
        ("{r: 4, target_modules: 5}", "TypeError: 'int' object is not iterable"),
        ("{r: 4, init_lora_weights: pissa, lora_alpha: x}", "TypeError"),
        ("{r: 4, init_lora_weights: pissa, target_modules: [nope]}", "the model has no module 'nope'"),
        ("{r: 4, init_lora_weights: corda, target_modules: [nope]}", "the model has no module 'nope'"),
        ("{r: 99, init_lora_weights: corda, target_modules: [q_proj]}", "A decomposition of the weights has no more"),
        ("{r: 99, init_lora_weights: olora, target_modules: [q_proj]}", "A decomposition of the weights has no more"),
    ],
)
def test_options_that_fail_when_a_method_is_applied(unreadable, tmp_path, options, message):
    """A failure on a model without weights is not taken for a method that needs the weights."""
    (unreadable.parent / "guard.txt").write_text("w3 w4 " * 60)
    changes = ["guard={name: general, path: guard.txt, tokens: 90, window: 30}", f"methods.1.options={options}"]
    found = refused(load_recipe(unreadable, changes), tmp_path / "run")
    assert re.fullmatch(rf"method 'lora' cannot be applied to this model: .*{message}.*", found)


def test_a_method_that_trains_nothing(unreadable, tmp_path):
    osf = "{name: osf, method: osf, learning_rate: 0.1, options: {target_modules: [q_proj], effective_rank: 999}}"
    message = refused(load_recipe(unreadable, [f"methods=[{osf}]"]), tmp_path / "run")
    assert message == "method 'osf' cannot be applied to this model: with these options it trains no parameter"


GUARD = "guard={name: general, path: text.txt, skip: %d, tokens: %d, window: 16}"


@pytest.mark.parametrize("guard", [GUARD % (0, 50), GUARD % (0, 60)])
def test_a_held_out_text_that_is_the_guards(unreadable, tmp_path, guard):
    message = refused(load_recipe(unreadable, [guard]), tmp_path / "run", RecipeError)
    assert message == (
        "heldout 'words' and guard 'general' have 50 of 50 tokens in common. Hold out another text, or another part of "
        "it (skip)."
    )


def test_a_copy_of_the_guards_text(unreadable, tmp_path):
    (unreadable.parent / "copy.txt").write_text((unreadable.parent / "text.txt").read_text())
    changes = [(GUARD % (0, 50)).replace("text.txt", "copy.txt")]
    assert "50 of 50" in refused(load_recipe(unreadable, changes), tmp_path / "run", RecipeError)


def test_a_part_of_a_copy_of_the_guards_text(unreadable):
    """Wherever in the other file it stands."""
    words = (unreadable.parent / "text.txt").read_text()
    (unreadable.parent / "copy.txt").write_text(f"w1 w2 w3 {words}")
    changes = [(GUARD % (0, 30)).replace("text.txt", "copy.txt")]
    with pytest.warns(RecipeWarning, match="have 16 of 50 tokens in common"):
        make_plan(load_recipe(unreadable, changes))


@pytest.mark.parametrize(
    "text", ["prompts: [w1 w2, w3], max_new_tokens: %d", "written_by: model, max_length: 16, tokens: %d"]
)
def test_texts_of_the_base_model_that_are_the_same(unreadable, tmp_path, text):
    both = [f"guard={{name: g, {text % 9}}}", f"heldout={{name: h, {text % 5}}}"]
    message = refused(load_recipe(unreadable, both), tmp_path / "run", RecipeError)
    assert message.startswith("heldout 'h' and guard 'g' are the same text of the base model")
    make_plan(load_recipe(unreadable, [f"{both[0][:-1]}, seed: 1}}", both[1]]))


def test_a_text_that_shares_some_tokens_with_the_guards(unreadable):
    with pytest.warns(RecipeWarning, match="have 20 of 50 tokens in common"):
        make_plan(load_recipe(unreadable, [GUARD % (30, 30)]))


@pytest.mark.filterwarnings("error::curlora.continual.errors.RecipeWarning")
def test_texts_that_are_apart(unreadable):
    make_plan(load_recipe(unreadable, ["heldout.tokens=30", GUARD % (30, 30)]))
    (unreadable.parent / "other.txt").write_text("w1 w2 " * 20)
    make_plan(load_recipe(unreadable, [(GUARD % (0, 40)).replace("text.txt", "other.txt")]))


def test_a_text_that_is_shorter_than_its_tokens(unreadable):
    with pytest.warns(RecipeWarning, match="'words' is shorter .*: it has 55 tokens after the first 5, but 100"):
        make_plan(load_recipe(unreadable, ["heldout.tokens=100", "heldout.skip=5"]))
    with pytest.warns(RecipeWarning, match="'words' is shorter .*: it has 60 tokens, but 70 are asked for"):
        make_plan(load_recipe(unreadable, ["protocol=paper", "heldout.chunk=70"]))


@pytest.mark.filterwarnings("error::curlora.continual.errors.RecipeWarning")
def test_tokens_that_nobody_asked_for_are_not_missed(unreadable):
    text = unreadable.read_text()
    unreadable.write_text(text.replace("  tokens: 50\n", ""))
    assert len(make_plan(load_recipe(unreadable)).stream.heldout[0].tokens) == 60


def test_a_warning_is_a_line_of_the_command(unreadable):
    done = command(unreadable, "--dry-run", "--set", "heldout.tokens=100")
    assert done.exit_code == 0
    line = "Warning: The text 'words' is shorter than the recipe asks for: it has 60 tokens, but 100 are asked for."
    assert line in done.stderr.split("\n")
