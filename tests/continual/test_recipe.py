"""Recipes are read as their files say, and errors are reported before a model is loaded."""

from pathlib import Path

import filelock
import pytest
import yaml

from curlora.continual.errors import RecipeError, RunError
from curlora.continual.launch import build, run_recipe
from curlora.continual.protocol import Protocol
from curlora.continual.recipe_file import load_recipe, packaged_recipes
from tests.continual.streams import figures
from tests.models import gpt2, llama, word_examples, word_tokenizer


def test_what_is_read_is_what_the_files_say(recipe_path):
    stream = build(load_recipe(recipe_path))
    assert (stream.tasks[0].train, stream.tasks[0].evaluation) == word_examples(2)
    expected = [[(text, 1 - label) for text, label in rows] for rows in word_examples(8)]  # "yes" comes first there
    assert [stream.tasks[1].train, stream.tasks[1].evaluation] == expected
    assert len(stream.heldout[0].tokens) == 50
    assert [method.name for method in stream.methods] == ["frozen", "lora", "cur"]


def test_a_run_and_going_on_with_one_more_method(recipe_path, tmp_path):
    out = tmp_path / "run"
    without = load_recipe(recipe_path)
    without = without.model_copy(update={"methods": without.methods[:2]})
    first = run_recipe(without, out)
    assert [m.name for m in first.methods] == ["frozen", "lora"]
    stamp = (out / "lora" / "seed-0" / "result.json").stat().st_mtime_ns
    full = run_recipe(load_recipe(recipe_path), out)
    assert full.methods[:2] == first.methods
    assert (out / "lora" / "seed-0" / "result.json").stat().st_mtime_ns == stamp  # not run again
    assert full.methods[2].trainable_parameters == 6 * 16
    assert full.methods[2].accuracy(0, 0).mean > full.tasks[0].majority_rate


def test_label_names_by_number_are_no_change(recipe_path, tmp_path):
    recipe = load_recipe(
        recipe_path, ["tasks.0.train.label_names={0: a, 1: b}", "methods=[{name: frozen, method: frozen}]"]
    )
    first = run_recipe(recipe, tmp_path / "run")
    assert figures(run_recipe(recipe, tmp_path / "run")) == figures(first)


@pytest.mark.parametrize(
    ("change", "named"),
    [("training.epochs=1", "training"), ("heldout.tokens=40", "heldout"), ("methods.1.options.r=2", "method 'lora'")],
)
def test_a_changed_recipe_does_not_go_on(recipe_path, tmp_path, change, named):
    out = tmp_path / "run"
    recipe = load_recipe(recipe_path)
    first = run_recipe(recipe.model_copy(update={"methods": recipe.methods[:2]}), out)
    with pytest.raises(RunError, match=f"holds a run of another recipe: {named} changed"):
        run_recipe(load_recipe(recipe_path, [change]), out)
    again = run_recipe(recipe.model_copy(update={"methods": recipe.methods[:2]}), out)
    assert figures(again) == figures(first)


def test_two_runs_in_one_directory(recipe_path, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    with filelock.FileLock(out / ".lock"), pytest.raises(RunError, match="in use by another run"):
        run_recipe(load_recipe(recipe_path), out)


def test_a_damaged_result_is_named(recipe_path, tmp_path):
    out = tmp_path / "run"
    run_recipe(load_recipe(recipe_path, ["methods=[{name: frozen, method: frozen}]"]), out)
    (out / "frozen" / "seed-0" / "result.json").write_text("{")
    with pytest.raises(RunError, match=r"seed-0/result\.json does not hold.*Remove the folder"):
        run_recipe(load_recipe(recipe_path), out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("titel=x", "a recipe has no key 'titel'. Did you mean 'title'"),
        ("methods.1.method=lorra", "method 'lora': a recipe has no method 'lorra'. Did you mean 'lora'"),
        ("methods.2.options.rank=4", "method 'cur': options: CurloraConfig has no option 'rank'. Did you mean 'r'"),
        ("methods.2.options.r=0", "method 'cur': options: CurloraConfig: r must be a positive integer, got 0"),
        ("methods.2.learning_rate=null", "method 'cur': learning_rate is missing"),
        ("methods.0.learning_rate=0.1", "method 'frozen': frozen trains only the heads"),
        ("methods.0.name=cur", "methods: 'cur' is listed twice"),
        ("tasks.1.name=first", "tasks: 'first' is listed twice"),
        ("tasks.0.train.hub=glue", "task 'first': train: give either path"),
        ("model.quantization={load_in_4bit: true}", "model.quantization: quant_method is missing"),
        ("model.dtype=float33", "model.dtype: 'float33' is not a floating-point dtype"),
        ("output=5", "output: must be a path, got 5"),
        ("model=5", "model: must be a mapping of keys to values, got 5"),
        ("training.epochs=x", "training.epochs: must be a whole number, got 'x'"),
        ("training.cache_frozen_layers=3", "training.cache_frozen_layers: must be true or false, got 3"),
        ("limits={kl: 0.1}", "limits.kl: must be a list, got 0.1"),
        ("training.epochs=0", "training.epochs: must be greater than 0"),
        ("tasks.0.labels=[a]", "task 'first': labels: must have 2 entries or more, found 1"),
        (
            "tasks.1.labels=[yes, no]",
            "task 'second': labels.0: a string is expected, got True. Quote the value",
        ),  # YAML reads booleans
        ("methods.0.name=../x", "method '../x': name: String should match pattern"),
        ("methods.1.plugins=[ewc]", "method 'lora': plugins.0: must be a mapping of keys to values, got 'ewc'"),
        ("heldout={name: h}", "heldout.*: a text is a mapping with a name, and a path, hub, prompts or written_by"),
        ("guard={name: g, path: a, hub: b}", "guard: give either path"),
        ("methods=[]", "methods: must have 1 entry or more, found 0"),
        ("methods.1.plugins=[{name: ewk}]", "method 'lora': a recipe has no plug-in 'ewk'. Did you mean 'ewc'"),
        (
            "methods.1.plugins=[{name: zzz}]",
            "It has anchors, ewc, guard, kl_to_base, probe, redraw, replay",
        ),
        ("methods.1.plugins=[{name: guard, max_perplexity_increase: 0.1}]", "'guard' is only for method 'curlora'"),
        ("methods.2.plugins=[{name: guard, max_perplexity_increase: 0.1}]", "needs a general text: name one"),
        (
            "methods.2.plugins=[{name: guard, max_perplexity_increase: 0}]",
            "method 'cur': max_perplexity_increase must be a positive share, such as 0.01 or .*, got 0",
        ),
        ("methods.1.plugins=[{name: ewc}]", "method 'lora': plug-in 'ewc' needs strength"),
        ("methods.1.plugins=[{name: [ewc]}]", "method 'lora': plugins: a plug-in needs a name, such as guard"),
        ("methods.1.plugins=[{strength: 1}]", "method 'lora': plugins: a plug-in needs a name, such as guard"),
        (
            "methods.2.plugins=[{name: guard, max_kl: 0.1}, {name: scale_back, max_kl: 0.1}]",
            "method 'cur': plugins: guard and scale_back each keep a limit of their own: leave one of them out",
        ),
        (
            "methods.1.plugins=[{name: scale_back, max_perplexity_increase: 1}]",
            "nothing. For 1 % give 0.01",
        ),
        ("methods.1.plugins=[{name: scale_back, max_kl: 1%}]", "max_kl must be a positive number of nats per token"),
        ("methods.1.training={epoch: 1}", "method 'lora': training has no key 'epoch'. Did you mean 'epochs'"),
        ("methods.1.training={learning_rate: 1}", "a method's learning_rate stands beside its name"),
        ("methods.1.training={max_length: 9}", "'max_length' cannot differ between methods"),
        ("methods.2.options.alpha=x", "CurloraConfig: alpha must be a finite number, got 'x'"),
        ("methods.2.options.replacement=2", "CurloraConfig: replacement must be true or false, got 2"),
        (
            "guard=text.txt",
            "guard: a text is a mapping with a name, and a path, hub, prompts or written_by, got 'text.txt'",
        ),
        ("resources={gpus: 2}", "resources.gpus: must be less than or equal to 1, got 2"),
        (
            "methods.1.options={init_lora_weights: corda, corda_config: {corda_method: kpmm}}",
            "corda_method must be kpm .* or ipm, got 'kpmm'",
        ),
        (
            "methods.1.plugins=[{name: replay, examples: 0}]",
            "method 'lora': replay needs examples to be a whole number of 1 or more, got 0",
        ),
        ("seeds=[1, 1]", "seeds: 1 is listed twice"),
        ("training.trainer={output_dir: x}", "training.trainer: 'output_dir' is set by the run itself"),
        (
            "training.trainer={bf61: true}",
            "transformers' Trainer has no argument 'bf61'. Did you mean 'bf16'",
        ),
        ("training.schedule=cosinus", "training.schedule: 'cosinus' is not a schedule"),
        ("training.checkpoint_steps=7", "must be a multiple of logging_steps"),
        ("training.readout=last_position", "training: readout is a switch of the protocol"),
        ("switches={readout: first}", "switches: readout: must be 'last_token' or 'last_position'"),
        ("switches={read: first}", "switches: the protocol has no switch 'read'. Did you mean 'readout'"),
        ("protocol=papers", "protocol: must be 'corrected' or 'paper'"),
        ("tasks.0.training={epoch: 1}", "task 'first': training has no key 'epoch'. Did you mean 'epochs'"),
        ("tasks.0.reference={training: {epoch: 1}}", "task 'first': training has no key 'epoch'"),
        ("tasks.0.reference={train: {path: x.csv, text: text}}", "task 'first': reference: train: .*needs label"),
        ("reference.epoch=5", "reference has no key 'epoch'"),
        (
            "tasks.0.training={forward_transfer: true}",
            "task 'first': training: forward_transfer must be the same for all tasks",
        ),
        ("tasks.0.training={readout: last_position}", "task 'first': training: readout must be the same for all tasks"),
        ("training.schedule=greedy", "is not a schedule of transformers that depends only on the step"),
        ("training.trainer={dataloader_drop_last: true}", "'dataloader_drop_last' is set by the run itself"),
        ("training.epochs=[", "the value after = is not YAML"),
        ("seeds=[5000000000]", "seeds.0: must be less than"),
        ("methods.0.name=CUR", "methods: 'CUR' is listed twice"),
        ("model.dtype=int8", "'int8' is not a floating-point dtype"),
        ("methods.1.method=adalora", "has no method 'adalora'"),
        ("tasks.0.kind=completion", "a task of completion has no labels"),
        ("tasks.0.train.label=null", "train: a task of classification needs label"),
        ("heldout.stride=17", "stride 17 is longer than window 16"),
        ("model.name=./gone", "model.name: there is no folder .*gone"),
        ("model.name=/models/of/old", "model.name: there is no folder /models/of/old"),
        ("model.name=models/of/old", "model.name: there is no folder .*/models/of/old"),
        ("model.name=recipe.yaml", "recipe.yaml is a file, but a model's folder is expected"),
        ("methods.2.options.lora_alpha=4", "CurloraConfig has no option 'lora_alpha'. Did you mean 'alpha'"),
        ("methods.1.options.alpha=4", "LoraConfig has no option 'alpha'. Did you mean 'lora_alpha'"),
        ("methods.1.optons={r: 4}", "method 'lora' has no key 'optons'. Did you mean 'options'"),
        (
            "methods.1.plugins=[{name: ewc, strenght: 1}]",
            "'ewc' has no option 'strenght'. Did you mean 'strength'",
        ),
        ("tasks.0.train.limt=3", "task 'first': train has no key 'limt'. Did you mean 'limit'"),
        ("tasks.0.train.limit=0", "task 'first': train.limit: must be greater than 0, got 0"),
        ("heldout.tokns=3", "heldout 'words' has no key 'tokns'. Did you mean 'tokens'"),
        ("training.num_train_epochs=3", "training has no key 'num_train_epochs'. Did you mean 'epochs'"),
        ("training.colour=red", "training has no key 'colour'. It has epochs, batch_size, "),
        ("heldout.path=${NO_SUCH_VARIABLE}/x", "the environment variable NO_SUCH_VARIABLE is not set"),
        ("tasks.9.name=x", "'tasks.9.name=x' names no place in the recipe"),
        ("nonsense", "'nonsense' is not a valid change"),
    ],
)
def test_bad_entries_are_named(recipe_path, change, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe_path, [change])


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("heldout={name: h, prompts: []}", "prompts: must have 1 entry or more, found 0"),
        ("heldout={name: h, prompts: 3}", "prompts: must be a list or a path, got 3"),
        ("heldout={name: h, prompts: [a, '']}", "prompts.1: must not be empty"),
        ("heldout={name: h, prompts: {a: b}}", "prompts: must be a list or a path"),
        ("heldout={name: h, paht: a}", "has no key 'paht'. Did you mean 'path'?"),
        ("tasks.0.train.text=3", "train.text: must be a string or a list, got 3"),
        ("training.Epochs=3", "training has no key 'Epochs'. Did you mean 'epochs'?"),
        ("tasks.0.Kind=chat", "'first' has no key 'Kind'. Did you mean 'kind'?"),
        (
            "methods.1.learning_rate={grid: [0.1]}",
            "learning_rate: a grid must be a list of two or more values, got [0.1]",
        ),
    ],
)
def test_a_wrong_value_is_named_once(recipe_path, change, line):
    with pytest.raises(RecipeError) as error:
        load_recipe(recipe_path, [change])
    (said,) = str(error.value).splitlines()[1:]
    assert said.endswith(line)


def test_each_entry_of_a_mapping_is_named(recipe_path):
    """YAML reads yes and no as booleans."""
    with pytest.raises(RecipeError) as error:
        load_recipe(recipe_path, ["tasks.0.train.label_names={Positive: yes, Negative: no}"])
    said = str(error.value).splitlines()[1:]
    assert [line.partition(": a string")[0] for line in said] == [
        "  task 'first': train.label_names.Positive", "  task 'first': train.label_names.Negative"
    ]  # fmt: skip


def test_a_methods_arguments_of_the_trainer_are_added_to_the_runs(recipe_path):
    changes = ["training.trainer={adam_beta1: 0.8}", "methods.1.training={trainer: {adam_beta2: 0.9}}"]
    recipe = load_recipe(recipe_path, changes)
    settings = recipe.settings().changed(recipe.methods[1].training)
    assert settings.trainer == {"adam_beta1": 0.8, "adam_beta2": 0.9}


def test_per_cent_is_read(recipe_path):
    changes = [
        "guard={name: g, path: train.tsv, tokens: 20}",
        "methods.1.plugins=[{name: scale_back, max_perplexity_increase: 1%}]",
    ]
    (made,) = load_recipe(recipe_path, changes).methods[1].make(Protocol()).plugins
    assert made().limit == 0.01


def test_every_bad_entry_is_named_at_once(recipe_path):
    changes = [
        "titel=x",
        "training.epochs=0",
        "model.dtype=float33",
        "tasks.0.training={epoch: 1, batchsize: 2}",
        "switches={read: first}",
        "reference={epoch: 1}",
        "methods.1.options={rank: 4, lora_alfa: 4}",
        "methods.1.plugins=[{name: ewk}, {name: ewc, strenght: 1}]",
        "methods.2.options={target_module: [q_proj]}",
    ]
    with pytest.raises(RecipeError) as error:
        load_recipe(recipe_path, changes)
    wrong = ["titel", "training.epochs", "model.dtype", "'epoch'", "'batchsize'", "'read'", "'rank'", "'lora_alfa'"]
    wrong += ["'ewk'", "'strenght'"]
    for entry in (*wrong, "reference has no key 'epoch'", "needs strength", "method 'cur': options: CurloraConfig"):
        assert entry in str(error.value), entry


def test_a_name_alone_that_could_be_a_hubs_is_looked_for_there(recipe_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert load_recipe(recipe_path, ["model.name=gone"]).model.name == "gone"


def test_variables_of_the_environment(recipe_path, monkeypatch):
    monkeypatch.setenv("DATA", str(recipe_path.parent))
    monkeypatch.setenv("lower", "3")
    monkeypatch.setenv("title", "of the environment")
    recipe = load_recipe(
        recipe_path,
        [
            "heldout.path=${DATA}/text.txt",
            "tasks.0.train.path=${oc.env:DATA}/train.tsv",
            "tasks.0.evaluation.path=${oc.env:NOT_THERE,eval.csv}",
            "training.epochs=${lower}",
            "tasks.0.description=${title} \\${DATA}",
        ],
    )
    folder = recipe_path.parent
    assert recipe.heldout[0].path == folder / "text.txt"
    assert recipe.tasks[0].train.path == folder / "train.tsv"
    assert recipe.tasks[0].evaluation.path == folder / "eval.csv"
    assert recipe.training.epochs == 3
    assert recipe.tasks[0].description == "Two small tasks ${DATA}"  # title is a key of recipes, so it is replaced
    portable = recipe.portable()
    assert str(portable.heldout[0].path) == "${DATA}/text.txt"
    assert str(portable.tasks[0].train.path) == "${oc.env:DATA}/train.tsv"


def test_variables_that_are_other_entries(recipe_path):
    recipe = load_recipe(recipe_path, ["training.evaluation_batch_size=${training.batch_size}"])
    assert recipe.training.evaluation_batch_size == 4
    recipe = load_recipe(recipe_path, ["guard={name: g, path: '${heldout.path}', tokens: '${heldout.window}'}"])
    assert recipe.guard.path == recipe.heldout[0].path
    assert recipe.guard.tokens == 16
    nested = "{name: '${.path}', path: text.txt, text: '${..title}'}"
    recipe = load_recipe(recipe_path, [f"guard={nested}"])
    assert (recipe.guard.name, recipe.guard.text) == ("text.txt", "Two small tasks")


def test_every_variable_without_a_value_is_named_at_once(recipe_path):
    changes = ["heldout.path=${GONE}", "title=${titel}", "training.epochs=${training.epoch}", "tasks.0.train.limit=???"]
    changes += ["model.name=./gone", "methods.1.options.rank=2"]
    with pytest.raises(RecipeError) as error:
        load_recipe(recipe_path, changes)
    for line in (
        "  heldout.path: the environment variable GONE is not set",
        "  title: the environment variable titel is not set. Is the key 'title' meant?",
        "  training.epochs: Interpolation key 'training.epoch' not found",
        "  task 'first': train.limit: ??? stands for a missing value; give one",
        f"  model.name: there is no folder {recipe_path.parent / 'gone'}",
        "  method 'lora': options: LoraConfig has no option 'rank'",
    ):
        assert line in str(error.value), error.value
    assert len(str(error.value).split("\n")) == 1 + 6


@pytest.mark.parametrize(
    ("change", "message"),
    [("training=${training}", "an entry that contains|nterpolation"), ("title=${", "names no place|not YAML")],
)
def test_variables_that_lead_nowhere(recipe_path, change, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe_path, [change])


@pytest.mark.parametrize("key", ["methods.1.learning_rate", "methods[1].learning_rate"])
@pytest.mark.parametrize("value", ["1e-3", "0.001", "1.0e-3", ".001"])
def test_entries_of_lists_and_numbers_by_set(recipe_path, key, value):
    assert load_recipe(recipe_path, [f"{key}={value}"]).methods[1].learning_rate == 0.001


def test_a_value_by_set_replaces_what_is_there_and_makes_what_is_not(recipe_path):
    recipe = load_recipe(
        recipe_path, ["methods.1.options={r: 2}", "training.trainer.adam_epsilon=1e-6", "seeds=[3, 4]"]
    )
    assert recipe.methods[1].options == {"r": 2}
    assert recipe.training.trainer == {"adam_epsilon": 1e-6}
    assert recipe.seeds == [3, 4]


def test_a_key_that_is_there_twice(recipe_path):
    recipe_path.write_text(recipe_path.read_text() + "\ntitle: again\n")
    with pytest.raises(RecipeError, match=r"(?s)is not YAML: .*duplicate key title"):
        load_recipe(recipe_path)


def test_a_misspelt_name_of_a_recipe_that_comes_with_it():
    with pytest.raises(RecipeError, match="Did you mean 'paper-smollm2'"):
        load_recipe("paper-smolm2")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("tasks.0.train.path=gone.tsv", r"task 'first', train \(.*gone\.tsv\): there is no such file"),
        ("tasks.0.train.text=words", "there is no column 'words' among text, label"),
        ("tasks.1.labels=[nay, maybe]", "row 0 has label 'no', which is neither one of"),
        ("tasks.0.evaluation.path=text.txt", "the file type .txt is not supported"),
        ("tasks.0.train.label_names={0: a}", "row .* has label 1, which is not in label_names"),
        ("tasks.0.train={hub: ./nowhere, split: train, text: text, label: label}", "cannot be loaded from the hub"),
        (
            "tasks.0.train={hub: ., split: train, text: text, label: label}",
            r"holds .*\.(csv|tsv)\. Name that file under",
        ),
        ("heldout.path=gone.txt", "text 'words' .*gone.txt.* cannot be read"),
    ],
)
def test_bad_data_is_named_before_a_model_is_loaded(recipe_path, change, message, monkeypatch):
    monkeypatch.chdir(recipe_path.parent)
    (recipe_path.parent / "model" / "model.safetensors").write_bytes(b"not a model")  # loading it would fail
    with pytest.raises(RecipeError, match=message):
        build(load_recipe(recipe_path, [change]))


@pytest.mark.parametrize(
    ("text", "message"), [("[1, 2]", "is not a recipe: a map"), ("a: [", "is not YAML"), ("", "is not a recipe: a map")]
)
def test_files_that_are_no_recipe(text, message, tmp_path):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(tmp_path / "r.yaml")


def test_a_recipe_that_is_not_there(tmp_path):
    with pytest.raises(RecipeError, match="cannot be read: No such file"):
        load_recipe(tmp_path / "r.yaml")


def test_a_frozen_method_is_added_where_there_is_none(recipe_path):
    recipe = load_recipe(recipe_path, ["methods=[{name: l, method: lora, learning_rate: 0.1}]"])
    assert [part.name for part in recipe.methods] == ["frozen", "l"]


def test_seeds_can_be_added(recipe_path, tmp_path):
    changes = ["methods=[{name: lora, method: lora, learning_rate: 0.01, options: {r: 4, target_modules: [q_proj]}}]"]
    one = run_recipe(load_recipe(recipe_path, changes), tmp_path / "run")
    two = run_recipe(load_recipe(recipe_path, [*changes, "seeds=[0, 5]"]), tmp_path / "run")
    assert two.seeds == [0, 5]
    assert [method.seeds[0] for method in two.methods] == [method.seeds[0] for method in one.methods]
    assert two.methods[1].seeds[1].losses != two.methods[1].seeds[0].losses


def test_the_protocol_changes_settings_data_and_held_out_text(recipe_path):
    reference = (
        "tasks.0.reference={labels: [a, b, never], evaluation: {path: eval.csv, text: text, label: label, limit: 3}}"
    )
    changes = [reference, "heldout.chunk=30", "reference={warmup: 500}"]
    corrected = build(load_recipe(recipe_path, changes))
    paper = build(load_recipe(recipe_path, [*changes, "protocol=paper"]))
    mixed = build(
        load_recipe(recipe_path, [*changes, "protocol=paper", "switches={data: corrected, perplexity: windows}"])
    )
    assert (corrected.settings.readout, corrected.settings.warmup) == ("last_token", 0.1)
    assert (paper.settings.readout, paper.settings.warmup) == ("last_position", 500)
    assert [len(s.tasks[0].labels) for s in (corrected, paper, mixed)] == [2, 3, 2]
    assert [len(s.tasks[0].evaluation) for s in (corrected, paper, mixed)] == [21, 3, 21]
    assert [s.heldout[0].windows for s in (corrected, paper, mixed)] == [4, 1, 4]
    assert len(paper.heldout[0].tokens) == 30
    assert corrected.protocol == {}
    assert load_recipe(recipe_path, ["protocol=honest"]).protocol == "corrected"  # its name in earlier versions
    assert set(mixed.protocol) == set(paper.protocol) - {"data", "perplexity"}
    curlora = [stream.methods[2].configuration(0) for stream in (corrected, paper)]
    assert [(c.sampling, c.replacement) for c in curlora] == [("inverse", False), ("reference", True)]


@pytest.mark.parametrize("name", packaged_recipes())
@pytest.mark.parametrize("protocol", ["corrected", "paper"])
def test_the_recipes_that_come_with_it_are_right(name, protocol, monkeypatch):
    monkeypatch.setenv("CURLORA_DATA_DIR", "/data")
    recipe = load_recipe(Path(name), [f"protocol={protocol}"])
    assert recipe.protocol == protocol


def test_an_unknown_name_lists_those_that_come_with_it():
    with pytest.raises(RecipeError, match="nothing cannot be read: No such file.*paper-gpt2-large, paper-"):
        load_recipe(Path("nothing"))


def test_a_folder_of_something_else_is_left_alone(recipe_path, tmp_path):
    out = tmp_path / "mine"
    out.mkdir()
    (out / "precious").write_text("mine")
    with pytest.raises(RunError, match="holds files, but no run"):
        run_recipe(load_recipe(recipe_path), out)
    assert [path.name for path in out.iterdir()] == ["precious"]


def test_a_file_in_the_place_of_the_folder(recipe_path, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunError, match="cannot be used as a run directory"):
        run_recipe(load_recipe(recipe_path), tmp_path / "file")


def test_a_damaged_recipe_of_a_run_is_named(recipe_path, tmp_path):
    out = tmp_path / "run"
    recipe = load_recipe(recipe_path, ["methods=[{name: frozen, method: frozen}]"])
    run_recipe(recipe, out)
    (out / "recipe.json").write_text("{")
    with pytest.raises(RunError, match=r"recipe\.json cannot be read"):
        run_recipe(recipe, out)


def test_arguments_that_the_trainer_refuses_are_one_message(recipe_path, tmp_path):
    recipe = load_recipe(recipe_path, ["training.trainer={fp16: true, bf16: true}"])
    with pytest.raises(RecipeError, match="transformers' Trainer rejects the arguments: At most one of fp16 and bf16"):
        run_recipe(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_arguments_of_one_method_that_the_trainer_refuses_are_found_before_the_run(recipe_path, tmp_path):
    method = "{name: lora, method: lora, learning_rate: 0.01, training: {schedule: cosine_with_min_lr}}"
    recipe = load_recipe(recipe_path, [f"methods=[{{name: frozen, method: frozen}}, {method}]"])
    with pytest.raises(RecipeError, match="transformers' Trainer rejects the arguments: One of min_lr"):
        run_recipe(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_quantization_is_passed_on(recipe_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        "curlora.continual.model_spec.AutoModelForCausalLM.from_pretrained", lambda *_, **options: seen.update(options)
    )
    recipe = load_recipe(recipe_path, ["model.quantization={quant_method: bitsandbytes, load_in_4bit: true}"])
    recipe.model.load()
    assert seen["quantization_config"].load_in_4bit
    assert type(seen["quantization_config"]).__name__ == "BitsAndBytesConfig"


def test_a_run_can_be_moved_with_its_data(recipe_path, tmp_path, monkeypatch):
    """A run is identified by what is run, not by where its files are."""
    content = yaml.safe_load(recipe_path.read_text())
    content["heldout"]["path"] = "${TEXTS}/text.txt"
    recipe_path.write_text(yaml.safe_dump(content))
    monkeypatch.setenv("TEXTS", str(tmp_path))
    frozen = ["methods=[{name: frozen, method: frozen}]"]
    first = run_recipe(load_recipe(recipe_path, frozen), tmp_path / "run")
    assert str(tmp_path) not in (tmp_path / "run" / "results.json").read_text()
    assert first.recipe["tasks"][0]["train"]["path"] == "train.tsv"
    assert first.recipe["heldout"][0]["path"] == "${TEXTS}/text.txt"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for path in list(tmp_path.iterdir()):
        if path != elsewhere:
            path.rename(elsewhere / path.name)
    monkeypatch.setenv("TEXTS", str(elsewhere))
    again = run_recipe(load_recipe(elsewhere / "recipe.yaml", frozen), elsewhere / "run")
    assert again.methods == first.methods


def test_changed_data_do_not_go_on(recipe_path, tmp_path):
    out = tmp_path / "run"
    frozen = load_recipe(recipe_path, ["methods=[{name: frozen, method: frozen}]"])
    run_recipe(frozen, out)
    lines = (tmp_path / "train.tsv").read_text(encoding="utf-8").splitlines()
    (tmp_path / "train.tsv").write_text("\n".join(lines[:-1]) + "\n", encoding="utf-8")
    with pytest.raises(RunError, match="data or the tokenizer have changed"):
        run_recipe(load_recipe(recipe_path), out)


@pytest.mark.parametrize(
    "change",
    ["methods.1.options.target_modules=[nope]", "methods.2.options.r=400", "methods.1.options.init_lora_weights=foo"],
)
def test_a_method_that_cannot_be_put_on_the_model_is_one_message(recipe_path, tmp_path, change):
    with pytest.raises((RunError, RecipeError), match="cannot be applied to this model|methods.1"):
        run_recipe(load_recipe(recipe_path, [change]), tmp_path / "run")


def test_a_first_start_that_failed_does_not_bind(recipe_path, tmp_path):
    out = tmp_path / "run"
    bad = ["methods=[{name: lora, method: lora, learning_rate: 0.1, options: {target_modules: [nope]}}]"]
    recipe = load_recipe(recipe_path, bad)
    with pytest.raises(RunError, match="cannot be applied to this model"):
        run_recipe(recipe.model_copy(update={"methods": recipe.methods[1:]}), out)
    changed = load_recipe(
        recipe_path, ["methods=[{name: frozen, method: frozen}]", "training.epochs=1", "heldout.tokens=40"]
    )
    assert run_recipe(changed, out).methods[0].name == "frozen"


def test_another_model_of_the_same_name_is_refused(recipe_path, tmp_path):
    out = tmp_path / "run"
    recipe = load_recipe(recipe_path)
    run_recipe(recipe.model_copy(update={"methods": recipe.methods[:1]}), out)
    llama(seed=1).save_pretrained(tmp_path / "model")
    with pytest.raises(RunError, match="base model is not the one that the run in .* began with"):
        run_recipe(load_recipe(recipe_path), out)


def test_names_for_people_may_change(recipe_path, tmp_path):
    out = tmp_path / "run"
    first = run_recipe(load_recipe(recipe_path), out)
    again = run_recipe(load_recipe(recipe_path, ["methods.1.label=L [/o]", "tasks.0.description=about"]), out)
    assert again.tasks[0].description == "about"
    assert again.methods[1].label == "L [/o]"
    assert again.methods[1].seeds == first.methods[1].seeds


def test_a_window_longer_than_the_model_is_one_message(recipe_path, tmp_path):
    gpt2().save_pretrained(tmp_path / "gpt2")
    word_tokenizer().save_pretrained(tmp_path / "gpt2")
    (tmp_path / "text.txt").write_text("w1 w2 " * 60)
    changes = ["model.name=gpt2", "heldout.tokens=100", "heldout.window=80", "methods=[{name: frozen, method: frozen}]"]
    with pytest.raises(RunError, match="windows of 80 tokens, but the model has only 64 positions"):
        run_recipe(load_recipe(recipe_path, changes), tmp_path / "run")
