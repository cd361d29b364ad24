"""The paper's two experiments as recipes: their settings, their step and parameter counts, and a run end to end."""

import csv
import json
import math
import os
from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from safetensors.torch import load_file
from tokenizers import Tokenizer, pre_tokenizers, trainers
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaTokenizer,
    MistralConfig,
    PreTrainedTokenizerFast,
)

from curlora.continual.data import read_task, read_text
from curlora.continual.launch import run_recipe
from curlora.continual.protocol import SWITCHES
from curlora.continual.recipe_file import load_recipe
from curlora.continual.task_model import TaskModel
from curlora.continual.trainer import steps_of
from tests.continual.paper import GPT, LEARNING_RATE, MISTRAL, PROTOCOLS, SWITCHED, recipe_of, tasks_of

# The values of the paper's sections 5 and 6 and of its notebooks.


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("name", "model", "targets", "batch_size", "max_length", "chunk"),
    [
        (GPT, "openai-community/gpt2-large", {"c_attn"}, 32, 256, 256),
        (MISTRAL, "mistralai/Mistral-7B-v0.3", {"q_proj", "k_proj", "v_proj"}, 8, 512, 10_000),
    ],
)
def test_hyperparameters(name, protocol, model, targets, batch_size, max_length, chunk):
    recipe = recipe_of(name, protocol)
    assert (recipe.model.name, recipe.model.dtype, recipe.seeds) == (model, "float32", [0])
    settings = recipe.settings()
    assert (settings.epochs, settings.batch_size, settings.max_length) == (3, batch_size, max_length)
    assert settings.gradient_accumulation_steps == 1
    assert settings.head_learning_rate == LEARNING_RATE
    assert (settings.max_grad_norm, settings.weight_decay) == (0, 0)
    assert (settings.schedule, settings.warmup) == ("cosine", {"corrected": 0.1, "paper": 500}[protocol])
    assert settings.trainer == {"corrected": {}, "paper": {"adam_epsilon": 1e-6}}[protocol]

    adapters = {
        (kind, r): part.make(recipe.switched()).configuration(seed=0)
        for part in recipe.methods
        if (kind := part.method) != "frozen"
        for r in [part.options["r"]]
    }
    assert set(adapters) == {(kind, r) for kind in ("lora", "curlora") for r in (8, 16, 24)}
    assert all(part.learning_rate == LEARNING_RATE for part in recipe.methods if part.method != "frozen")
    for (kind, r), adapter in adapters.items():
        assert set(adapter.target_modules) == targets
        if kind == "lora":
            assert adapter.lora_alpha / adapter.r == 1
            assert adapter.lora_dropout == 0
            assert adapter.bias == "none"
        else:
            assert (adapter.r, adapter.alpha, adapter.bias) == (r, 1, "none")

    (text,) = recipe.heldout
    assert (text.hub, text.subset, text.split) == ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")
    assert (text.text, text.join) == ("text", "")
    assert (text.window, text.stride, text.chunk) == (1024, 512, chunk)
    assert text.tokens > 500_000  # more than the tokens of WikiText-2's test split


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(("name", "limits"), [(GPT, (None, 5000, 5000)), (MISTRAL, (1000, 1000, 1000))])
def test_tasks(name, limits, protocol):
    mrpc, sst2, sentiment = tasks_of(recipe_of(name, protocol))
    for task, subset, columns, limit in [
        (mrpc, "mrpc", ["sentence1", "sentence2"], limits[0]),
        (sst2, "sst2", "sentence", limits[1]),
    ]:
        for source, split, rows in [(task.train, "train", limit), (task.evaluation, "validation", None)]:
            assert (source.hub, source.subset, source.split) == ("nyu-mll/glue", subset, split)
            assert (source.text, source.label, source.limit, source.shuffle) == (columns, "label", rows, None)
        assert (len(task.labels), task.training) == (2, {})
    for source in (sentiment.train, sentiment.evaluation):
        assert (source.hub, source.subset) == ("stanfordnlp/sentiment140", None)
        assert source.revision == "refs/convert/parquet"
        assert (source.text, source.label) == ("text", "sentiment")
    if protocol == "corrected":
        assert sentiment.labels == ["negative", "positive"]
        assert (sentiment.train.limit, sentiment.evaluation.limit) == (limits[2], 1000)
        assert (sentiment.train.shuffle, sentiment.evaluation.shuffle) == (0, 0)
        assert sentiment.training == {}
        return
    # The author's code trains on the test file with label sentiment // 4 and three classes, and scores batches of 128.
    assert len(sentiment.labels) == 3
    assert (sentiment.train.split, sentiment.evaluation.split) == ("test", "train[:1000]")
    assert (sentiment.train.limit, sentiment.train.shuffle, sentiment.evaluation.shuffle) == (None, None, None)
    for source in (sentiment.train, sentiment.evaluation):
        names = source.label_names
        assert {value: sentiment.labels.index(names[value]) for value in names} == {0: 0, 2: 0, 4: 1}
    settings = recipe_of(name, protocol).settings().changed(sentiment.training)
    assert (settings.evaluation, settings.evaluation_batch_size) == ("batched", 128)
    expected = (5, "constant", 500) if name == GPT else (3, "cosine", 500)
    assert (settings.epochs, settings.schedule, settings.warmup) == expected


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", [GPT, MISTRAL])
def test_every_switch_and_the_settings_it_makes(name, protocol):
    assert set(SWITCHED) == set(SWITCHES)
    expected = {switch: values[PROTOCOLS.index(protocol)] for switch, values in SWITCHED.items()}
    if name == MISTRAL:  # its tokenizer pads on the left, where the last position is the last token
        assert LlamaTokenizer.padding_side == "left"
        expected["readout"] = "last_token"
    recipe = recipe_of(name, protocol)
    assert recipe.switched().model_dump() == expected
    settings = recipe.settings().model_dump()
    made = {"readout", "evaluation", "order", "schedule_length", "heads"}
    assert {switch: settings[switch] for switch in made} == {switch: expected[switch] for switch in made}
    assert set(recipe.switched().describe()) == {s for s, value in expected.items() if value == SWITCHED[s][1]}
    for switch, values in SWITCHED.items():  # each switch by itself, from the command line
        other = next(value for value in values if value != expected[switch])
        changed = recipe_of(name, protocol, f"switches.{switch}={other}").switched().model_dump()
        assert {**expected, switch: other} == changed


@pytest.mark.parametrize(
    ("name", "epochs", "batches"),
    # Steps as in the notebooks' progress bars. The last of GPT-2's 157 uses rows up to 5,024.
    [(GPT, (3, 3, 5), (115, 157, 16)), (MISTRAL, (3, 3, 3), (125, 125, 63))],
)
def test_steps_are_the_notebooks_and_all_within_the_warm_up(name, epochs, batches):
    recipe = recipe_of(name, "paper")
    for task, rows, times, count in zip(tasks_of(recipe), (3668, 67_349, 498), epochs, batches, strict=True):
        settings = recipe.settings().changed(task.training)
        taken = min(rows, task.train.limit or rows)
        assert steps_of(taken, settings) == times * count < settings.warmup
        # Training ends within the warm-up, so the rows from which the schedule's length is computed do not matter.
        assert times * taken > settings.warmup


ARCHITECTURES = {
    GPT: GPT2Config(n_embd=1280, n_layer=36, n_head=20),
    MISTRAL: MistralConfig(vocab_size=32768, sliding_window=None),  # the defaults are Mistral 7B's sizes
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("name", "method", "trained"),
    [
        (GPT, "lora-8", 1_474_560),
        (GPT, "curlora-8", 2_304),
        (MISTRAL, "lora-16", 9_437_184),
        (MISTRAL, "curlora-16", 24_576),
    ],
)
def test_trained_numbers_of_the_recipes_methods(name, method, trained, protocol, recwarn):
    recipe = recipe_of(name, protocol)
    (part,) = [part for part in recipe.methods if part.name == method]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(ARCHITECTURES[name])
    adapted = TaskModel(part.make(recipe.switched()).apply(model, seed=0))
    assert sum(p.numel() for p in adapted.backbone_parameters()) == trained
    assert not [w for w in recwarn if "fan_in_fan_out" in str(w.message)]


# A whole run, on real rows in the hub's layout.

DATA = os.environ.get("CURLORA_DATA_DIR")
needs_data = pytest.mark.skipif(not DATA, reason="CURLORA_DATA_DIR is not set: the real data sets are not here")


def table(folder, columns, names=None):
    """Write a parquet file as on the hub, with the names of its classes if there are any."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    kinds = {name: Value("string" if isinstance(values[0], str) else "int32") for name, values in columns.items()}
    if names:
        kinds["label"] = ClassLabel(names=names)
    Dataset.from_dict(columns, features=Features(kinds)).to_parquet(str(folder))


def configured(folder, files):
    """Write the header of a data set's card, which names the files of each split."""
    configs = [
        {"config_name": subset, "data_files": [{"split": split, "path": f"{subset}/{split}-*"} for split in splits]}
        for subset, splits in files.items()
    ]
    (folder / "README.md").write_text(f"---\n{json.dumps({'configs': configs})}\n---\n")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The first rows of the four data sets, laid out as on the hub."""
    folder = tmp_path_factory.mktemp("hub")

    def rows(path, count, **options):
        with (Path(DATA) / path).open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, **options)
            return [row for row, _ in zip(reader, range(count), strict=False)]

    tsv = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    for split, name in (("train", "train"), ("validation", "dev")):
        pairs = rows(f"mrpc/{name}.tsv", 61, **tsv)[1:]
        table(
            folder / f"glue/mrpc/{split}-00000-of-00001.parquet",
            {
                "sentence1": [row[3] for row in pairs],
                "sentence2": [row[4] for row in pairs],
                "label": [int(row[0]) for row in pairs],
            },
            ["not_equivalent", "equivalent"],
        )
        phrases = rows(f"sst2/{name}.tsv", 61, **tsv)[1:]
        table(
            folder / f"glue/sst2/{split}-00000-of-00001.parquet",
            {"sentence": [row[0] for row in phrases], "label": [int(row[1]) for row in phrases]},
            ["negative", "positive"],
        )
    configured(folder / "glue", {"mrpc": ["train", "validation"], "sst2": ["train", "validation"]})

    negative = [row[5] for row in rows("sentiment140/train_first1000.csv", 1000)]
    sample = rows("sentiment140/train_sample_fit.tsv", 3000, **tsv)[1:]
    positive = [row[1] for row in sample if row[0] == "1"][:1000]
    tested = rows("sentiment140/testdata.manual.2009.06.14.csv", 498)
    tweets = {
        "train": {"text": negative + positive, "sentiment": [0] * 1000 + [4] * 1000},
        "test": {"text": [row[5] for row in tested], "sentiment": [int(row[0]) for row in tested]},
    }
    for split, columns in tweets.items():
        table(folder / f"sentiment140/sentiment140/{split}/0000.parquet", columns)

    lines = (Path(DATA) / "wikitext-2-raw/wiki.test.raw").read_text(encoding="utf-8").splitlines(keepends=True)[:60]
    with_empty = [text for line in lines for text in (line, "")]
    table(folder / "wikitext/wikitext-2-raw-v1/test-00000-of-00001.parquet", {"text": with_empty})
    configured(folder / "wikitext", {"wikitext-2-raw-v1": ["test"]})
    return folder, "".join(lines)


def from_here(recipe_name, folder):
    """Return changes that make a recipe read the hub's layout from a folder; the rest of its sources is unchanged."""
    tasks = load_recipe(recipe_name).tasks
    changes = []
    for i, task in enumerate(tasks):
        for place, part in [(f"tasks.{i}", task), (f"tasks.{i}.reference", task.reference)]:
            for split in ("train", "evaluation"):
                if part is not None:
                    changes.append(f"{place}.{split}.hub={folder / getattr(part, split).hub.split('/')[1]}")
    return [*changes, f"heldout.hub={folder / 'wikitext'}"]


SMALL = {  # two layers; the other ratios are those of the real models
    GPT: dict(n_embd=320, n_layer=2, n_head=5, bos_token_id=0, eos_token_id=0),
    MISTRAL: dict(
        hidden_size=256,
        intermediate_size=896,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        sliding_window=None,
        bos_token_id=0,
        eos_token_id=0,
    ),
}


def save_model(name, folder, text):
    tokenizer = Tokenizer(WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(vocab_size=1500, special_tokens=["[PAD]", "[UNK]"])
    tokenizer.train_from_iterator(text.splitlines(), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(0)
    config = type(ARCHITECTURES[name])(vocab_size=tokenizer.get_vocab_size(), **SMALL[name])
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


class NullProgress:
    def stage(self, text):
        pass

    def advance(self, units):
        pass


def run(name, protocol, hub, tmp_path, methods, *changes):
    folder, text = hub
    save_model(name, tmp_path / "model", text)
    rows = {GPT: 34, MISTRAL: 18}[name]  # more than one batch of 32, or than two of 8
    places = ("0", "1", "2", "0.reference", "2.reference")
    limits = [f"tasks.{place}.train.limit={rows}" for place in places]
    limits += [f"tasks.{place}.evaluation.limit=10" for place in places] + ["training.max_length=24"]
    recipe = recipe_of(name, protocol, *from_here(name, folder), *limits, f"model.name={tmp_path / 'model'}", *changes)
    recipe = recipe.model_copy(update={"methods": [part for part in recipe.methods if part.name in methods]})
    return run_recipe(recipe, tmp_path / "run", lambda total: NullProgress())


@needs_data
@pytest.mark.parametrize(
    ("name", "width", "trained", "steps", "chunk"),
    [
        # Two layers; two or three batches an epoch, three epochs of each task and five of GPT-2's third.
        (GPT, 320, (2 * 8 * (320 + 960), 2 * 64), 2 * 3 + 2 * 3 + 2 * 5, 256),
        (MISTRAL, 256, (2 * 8 * (512 + 2 * (256 + 64)), 6 * 64), 3 * 3 * 3, 300),
    ],
)
def test_the_papers_flow(name, width, trained, steps, chunk, hub, tmp_path):
    changes = [] if name == GPT else [f"heldout.chunk={chunk}"]
    results = run(name, "paper", hub, tmp_path, ["frozen", "lora-8", "curlora-8"], *changes)
    assert [task.name for task in results.tasks] == ["mrpc", "sst2", "sentiment140"]
    assert [len(task.labels) for task in results.tasks] == [2, 2, 3]
    assert results.tasks[2].majority_rate == 1.0
    assert all(task.majority_rate < 1 for task in results.tasks[:2])
    assert set(results.protocol) == set(SWITCHED) - ({"readout"} if name == MISTRAL else set())
    assert results.heldout == {"WikiText-2": f"WikiText-2 ({chunk} tokens, one chunk)"}
    assert [method.trainable_parameters for method in results.methods] == [0, *trained]

    # The text is the concatenation of the non-empty rows; the score of its chunk equals the language model's own loss.
    assert read_text(load_recipe(name, from_here(name, hub[0])).heldout[0]) == hub[1]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    ids = tokenizer(hub[1], return_tensors="pt")["input_ids"][:, :chunk]
    with torch.no_grad():
        perplexity = model(input_ids=ids, labels=ids).loss.exp().item()
    for method in results.methods:
        (seed,) = method.seeds
        # Scores after MRPC: one; after SST-2: two; after Sentiment140: three.
        assert [len(row) for row in seed.scores] == [1, 2, 3]
        assert all(0 <= score.accuracy <= 1 and math.isfinite(score.loss) for row in seed.scores for score in row)
        texts = seed.heldout["WikiText-2"]
        assert len(texts) == 4  # before, and after each task
        assert texts[0].perplexity == pytest.approx(perplexity, rel=1e-4)
        assert seed.steps == steps
        assert all(math.isfinite(loss) for _, loss in seed.losses)
        folder = tmp_path / "run" / method.name / "seed-0"
        if method.name == "frozen":
            assert texts == [texts[0]] * 4
        else:  # the parameters that start at zero have changed, in every layer
            adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
            moved = [value.any() for key, value in adapter.items() if "lora_B" in key or "curlora_U.weight" in key]
            assert len(moved) == 2 * (1 if name == GPT else 3)
            assert all(moved)
        heads = load_file(folder / "heads.safetensors")
        assert [tuple(heads[f"{i}.weight"].shape) for i in range(3)] == [(2, width), (2, width), (3, width)]


@needs_data
@pytest.mark.parametrize("name", [GPT, MISTRAL])
def test_the_honest_flow(name, hub, tmp_path):
    changes = ["heldout.tokens=600", "heldout.window=256", "heldout.stride=128"]
    results = run(name, "corrected", hub, tmp_path, ["frozen"], *changes)
    assert [len(task.labels) for task in results.tasks] == [2, 2, 2]
    assert results.tasks[2].majority_rate < 1
    assert results.protocol == {}
    assert results.heldout == {"WikiText-2": "WikiText-2 (600 tokens, windows of 256, stride 128)"}
    assert [len(row) for row in results.methods[0].seeds[0].scores] == [1, 2, 3]
    heads = load_file(tmp_path / "run" / "frozen" / "seed-0" / "heads.safetensors")
    assert heads["2.weight"].shape[0] == 2


@pytest.mark.parametrize("name", [GPT, MISTRAL])
def test_the_honest_samples_of_tweets_are_balanced_by_chance_and_apart(name, tmp_path):
    rows = 8000  # sorted as the hub's file: all negative rows first
    columns = {"text": [f"tweet {i}" for i in range(rows)], "sentiment": [0] * (rows // 2) + [4] * (rows // 2)}
    table(tmp_path / "sentiment140/sentiment140/train/0000.parquet", columns)
    part = load_recipe(name).tasks[2]
    here = {"hub": str(tmp_path / "sentiment140")}
    limits = {"train": min(part.train.limit, 1500), "evaluation": part.evaluation.limit}
    sources = {
        split: getattr(part, split).model_copy(update={**here, "limit": limit}) for split, limit in limits.items()
    }
    task = read_task(part.model_copy(update=sources))
    assert (len(task.train), len(task.evaluation)) == (limits["train"], limits["evaluation"])
    assert not set(task.train) & set(task.evaluation)
    for examples in (task.train, task.evaluation):
        assert len(set(examples)) == len(examples)
        assert all((int(text.split()[1]) >= rows // 2) == label for text, label in examples)
        positive = sum(label for _, label in examples)
        assert abs(positive - len(examples) / 2) < 4 * math.sqrt(len(examples)) / 2  # four standard deviations
        assert [label for _, label in examples] != sorted(label for _, label in examples)
    assert read_task(part.model_copy(update=sources)).train == task.train  # the same sample each time


def test_mistrals_tokenizer_sees_a_pair_of_sentences_as_the_reference_gives_it():
    vocabulary = ["<unk>", "<s>", "</s>", "▁", *"abcdefgh.", "▁a", "▁b", "ab"]
    merges = [("▁", "a"), ("▁", "b"), ("a", "b")]
    ids = {token: i for i, token in enumerate(vocabulary)}
    tokenizer = LlamaTokenizer(vocab=ids, merges=merges, legacy=False, add_bos_token=True)
    first, second = "abc de.", "bab a"
    (join,) = {source.join for source in (tasks_of(recipe_of(MISTRAL, "paper"))[0].train,)}
    bare = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (first, second)]
    assert tokenizer(first + join + second)["input_ids"] == [1, *bare[0], 1, *bare[1]]
