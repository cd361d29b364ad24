"""Batched generation equals greedy decoding of one prompt without a cache, and its answers are scored unchanged."""

import json
import re

import pytest
import torch
import yaml
from transformers import GenerationConfig

from curlora.continual.answer_score import AnswerScore
from curlora.continual.encoding import encode
from curlora.continual.errors import RunError
from curlora.continual.generation import Generation, generate, score_generated
from curlora.continual.heldout import HeldOut, measure
from curlora.continual.launch import run_recipe
from curlora.continual.method_run import BaseScores, MethodRun, work_of
from curlora.continual.methods import make_method
from curlora.continual.plan import make_plan
from curlora.continual.recipe_file import load_recipe
from curlora.continual.results import RunResults
from curlora.continual.settings import Settings
from curlora.continual.tasks import ChatTask, CompletionTask, Prompts
from curlora.report import render
from tests.models import WORDS, curlora, gpt2, llama, multimodal, word_tokenizer


def talkative(model):
    """Return the model with larger weights, so that it does not repeat one token."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= 10
    return model


def adapted():
    return curlora(talkative(llama())).get_base_model()


def half_trained():
    """A model with dropout, partly in training mode."""
    model = talkative(gpt2())
    model.transformer.h[1].train()
    return model


MODELS = {
    "llama": lambda: talkative(llama()),
    "gpt2": lambda: talkative(gpt2()),
    "curlora": adapted,
    "with dropout": half_trained,
}


@pytest.fixture(scope="module")
def tokenizer():
    made = word_tokenizer()
    made.eos_token = WORDS[3]
    return made


def prompts(count=11, seed=0):
    rng = torch.Generator().manual_seed(seed)
    lengths = [1, 9, 3, 3, 7, 2, 12, 1, 5, 8, 4][:count]
    return [torch.randint(2, 100, (length,), generator=rng).tolist() for length in lengths]


@torch.no_grad()
def one_by_one(model, ids, max_new_tokens, ends):
    """Greedy decoding that recomputes the whole text for each token."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    new = []
    while len(new) < max_new_tokens and (not new or new[-1] not in ends):
        logits = model(torch.tensor([[*ids, *new]]), use_cache=False).logits[0, -1]
        new.append(int(logits.argmax()))
    for module, training in modes.items():
        module.training = training
    return new


def expected(model, tokenizer, given, max_new_tokens, ends):
    found = []
    for ids in given:
        new = one_by_one(model, ids, max_new_tokens, ends)
        finished = new[-1] in ends
        found.append((tokenizer.decode(new[:-1] if finished else new, skip_special_tokens=True), finished))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_as_one_token_after_the_other_whatever_the_batch(name, tokenizer):
    model = MODELS[name]()
    given = prompts()
    likely = one_by_one(model, given[1], 6, set())[4]
    model.generation_config = GenerationConfig(eos_token_id=[likely, 50], pad_token_id=0)
    stop = frozenset([one_by_one(model, given[3], 4, set())[2]])
    ends = {likely, 50, tokenizer.eos_token_id, *stop}
    right = expected(model, tokenizer, given, 10, ends)
    assert {finished for _, finished in right} == {True, False}
    assert len({text for text, _ in right}) > 8
    for batch_size in (1, 2, 3, 4, 11, 50):
        assert generate(model, tokenizer, given, max_new_tokens=10, stop=stop, batch_size=batch_size) == right


@pytest.mark.parametrize("name", ["llama", "of PEFT", "of PEFT, for a task"])
def test_what_the_models_configuration_says_of_sampling_and_penalties_does_not_count(tokenizer, name):
    model = MODELS["llama"]()
    if name != "llama":
        model = curlora(model, task_type="CAUSAL_LM" if "task" in name else None)
    right = expected(model, tokenizer, prompts(), 8, {tokenizer.eos_token_id})
    own = GenerationConfig(
        do_sample=True, temperature=5.0, top_k=3, repetition_penalty=9.0, no_repeat_ngram_size=1, max_length=3,
        forced_eos_token_id=7, num_beams=2,
    )  # fmt: skip
    base = model if name == "llama" else model.get_base_model()
    base.generation_config = own
    if "task" in name:
        model.generation_config = own
    assert generate(model, tokenizer, prompts(), max_new_tokens=8, batch_size=4) == right
    assert base.generation_config is own
    assert model.generation_config is own


def test_the_model_is_left_as_it_was(tokenizer):
    model = half_trained().requires_grad_(True)
    modes = [module.training for module in model.modules()]
    generate(model, tokenizer, prompts(), max_new_tokens=3)
    assert [module.training for module in model.modules()] == modes
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_progress_adds_up_though_answers_end_early(tokenizer):
    told = []
    prompted = Prompts(prompts(), ["x"] * 11, AnswerScore(max_new_tokens=7))
    generation = Generation("t", prompted, batch_size=3)
    model = llama()
    model.generation_config.eos_token_id = list(range(100))  # every answer ends at once
    score_generated(model, tokenizer, generation, told.append)
    assert sum(told) == generation.steps == 4 * 7


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_scores_are_the_mean_over_what_was_generated(tokenizer, tmp_path):
    model = MODELS["llama"]()
    found = generate(model, tokenizer, prompts(), max_new_tokens=6)
    answers = [answer.text if i % 3 else "something else" for i, answer in enumerate(found)]
    for score in (AnswerScore(6), AnswerScore(6, metric="rouge")):
        file = tmp_path / "made here" / "t.jsonl"
        generation = Generation("t", Prompts(prompts(), answers, score), 4)
        scored = score_generated(model, tokenizer, generation, keep=file)
        assert scored.score == pytest.approx(
            sum(score.score(answer.text, right) for answer, right in zip(found, answers, strict=True)) / 11
        )
        assert scored.unfinished == sum(not answer.finished for answer in found) / 11
        kept = read(file)
        assert [(line["generated"], line["finished"]) for line in kept] == found
        assert [line["prompt"] for line in kept] == [tokenizer.decode(ids) for ids in prompts()]
        assert [line["expected"] for line in kept] == answers
        assert sum(line["score"] for line in kept) / 11 == pytest.approx(scored.score)


def test_an_answer_that_does_not_fit_into_the_positions_is_refused(tokenizer):
    generation = Generation("t", Prompts(prompts(), ["x"] * 11, AnswerScore(max_new_tokens=53)), 4)
    for model in (gpt2(), multimodal()):
        with pytest.raises(
            RunError, match="Task 't' generates up to 53 tokens after a prompt of 12 tokens, but the model has only 64"
        ):
            score_generated(model, tokenizer, generation)


def copying(count=24, **options):
    """A task whose completion is the prompt's last word twice."""
    rng = torch.Generator().manual_seed(5)
    picks = torch.randint(20, 90, (count, 3), generator=rng).tolist()
    examples = [(" ".join(WORDS[i] for i in row), f"{WORDS[row[-1]]} {WORDS[row[-1]]}") for row in picks]
    return CompletionTask("copy", examples, examples[: count // 2], **options)


HELDOUT = HeldOut("noise", torch.randint(0, 100, (50,), generator=torch.Generator().manual_seed(0)), window=16)


class Recorder:
    units = 0.0

    def stage(self, text): ...

    def advance(self, units):
        self.units += units


def run(task, tokenizer, directory, method, **changes):
    settings = Settings(**{**dict(batch_size=4, evaluation_batch_size=5, epochs=20), **changes})
    encoded = encode([task], tokenizer, settings)
    recorder = Recorder()
    result, *_ = MethodRun(
        method, llama, tokenizer, encoded, [HELDOUT],
        seed=0, base=BaseScores({"noise": measure(llama(), HELDOUT)}), directory=directory, progress=recorder,
    ).run()  # fmt: skip
    assert recorder.units == work_of(method, encoded, [HELDOUT])
    return result.scores[0][0]


def test_a_run_scores_what_it_generates_and_keeps_the_loss(tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM

    full = make_method("full", "full", "Full", 1e-2)
    scored = copying(score=AnswerScore(max_new_tokens=4))
    found = run(scored, tokenizer, tmp_path / "a", full)
    forced = run(copying(), tokenizer, tmp_path / "b", full)
    assert found.loss == forced.loss
    assert found.accuracy == forced.accuracy > 0.9  # exact match of every token equals greedy generation
    assert forced.unfinished == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "model").eval()
    given = [tokenizer(prompt)["input_ids"] for prompt, _ in scored.evaluation]
    right = expected(model, tokenizer, given, 4, {tokenizer.eos_token_id})
    assert found.accuracy == sum(
        text == answer for (text, _), (_, answer) in zip(right, scored.evaluation, strict=True)
    ) / len(scored.evaluation)
    assert found.unfinished == sum(not finished for _, finished in right) / len(right)
    assert scored.majority_rate == copying().majority_rate
    assert scored.metric == "exact match, generated"


def test_what_is_left_out_for_its_length_is_neither_generated_nor_scored(tokenizer, tmp_path):
    task = copying(score=AnswerScore(max_new_tokens=4), too_long="drop")
    long = [(" ".join(WORDS[20:40]), "w1")] * 3
    longer = CompletionTask("copy", [*task.train, *long], [*long, *task.evaluation], score=task.score, too_long="drop")
    (part,) = encode([longer], tokenizer, Settings(max_length=8))
    assert len(part.generation.prompts.ids) == len(part.evaluation) == len(task.evaluation)
    assert part.generation.prompts.answers == [answer for _, answer in task.evaluation]
    assert (part.too_long["train_dropped"], part.too_long["evaluation_dropped"]) == (3, 3)
    frozen = make_method("frozen", "frozen", "Frozen")
    assert run(longer, tokenizer, tmp_path / "a", frozen, max_length=8) == run(task, tokenizer, tmp_path / "b", frozen)


def test_a_chat_answers_all_that_comes_before_the_last_turn_and_stops_where_a_turn_ends():
    tokenizer = word_tokenizer()
    tokenizer.eos_token = "w97"
    tokenizer.add_special_tokens({"additional_special_tokens": ["w96"]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'w1 ' if m.role == 'user' else 'w2 ' }}{{ m.content }} w96 {% endfor %}"
        "{% if add_generation_prompt %}{{ 'w2 ' }}{% endif %}"
    )
    talk = [{"role": role, "content": f"w{i}"} for i, role in enumerate(("user", "assistant") * 2, start=10)]
    task = ChatTask("t", [talk], [[*talk, {"role": "user", "content": "w14"}]], score=AnswerScore(max_new_tokens=5))
    prompts = task.prompts(tokenizer, 32)
    assert tokenizer.decode(prompts.ids[0]) == "w1 w10 w96 w2 w11 w96 w1 w12 w96 w2"
    assert prompts.answers == ["w13"]
    assert prompts.stop == {tokenizer.convert_tokens_to_ids("w96")}
    assert tokenizer.decode(task.prompts(tokenizer, 4).ids[0]) == "w1 w12 w96 w2"


@pytest.mark.parametrize(
    "changes",
    [
        {"trainer": {"gradient_checkpointing": True}},
        {"evaluation": "one_by_one"},
        {"evaluation_batch_size": 1},
        {"trainer": {"bf16": True}},
    ],
    ids=["checkpointing", "one by one", "batches of one", "bfloat16"],
)
def test_settings_that_change_how_but_not_what_is_generated(changes, tokenizer, tmp_path):
    method = make_method("full", "full", "Full", 1e-2)
    task = copying(score=AnswerScore(max_new_tokens=4, normalize=r"w(\d)"))
    plain = run(task, tokenizer, tmp_path / "a", method, epochs=9)
    other = run(task, tokenizer, tmp_path / "b", method, epochs=9, **changes)
    assert 0 < plain.accuracy < 1
    assert other.accuracy == pytest.approx(plain.accuracy, abs=0.5 if "bf16" in str(changes) else 0)
    assert other.loss == pytest.approx(plain.loss, rel=0.1 if "bf16" in str(changes) else 1e-3)


def test_a_recipe_that_generates(recipe_path, tmp_path):
    content = yaml.safe_load(recipe_path.read_text())
    split = {"prompt": "sentence", "completion": "sentence"}
    task = {
        "name": "said", "kind": "completion", "score": {"generate": {"max_new_tokens": 3}, "normalize": r"w(\d)"},
        "train": {"path": "second-train.jsonl", **split}, "evaluation": {"path": "second-eval.jsonl", **split},
    }  # fmt: skip
    content["tasks"] = [task, {**task, "name": "again"}]
    content["training"].update(forward_transfer=True, epochs=1)
    content["methods"] = content["methods"][1:2]
    recipe_path.write_text(yaml.safe_dump(content))
    results = run_recipe(load_recipe(recipe_path), tmp_path / "run")
    assert [task.metric for task in results.tasks] == ["exact match, generated"] * 2
    lines = (recipe_path.parent / "second-eval.jsonl").read_text().splitlines()
    digits = [re.findall(r"w(\d)", json.loads(line)["sentence"])[-1] for line in lines]
    assert results.tasks[0].majority_rate == max(map(digits.count, digits)) / len(digits)
    for method in results.methods:
        (seed,) = method.seeds
        assert seed.base[0] == seed.before[0]
        assert all(score.unfinished == 1 for score in (*seed.base, *seed.before, *seed.scores[1]))
        assert seed.base[0].accuracy == seed.base[1].accuracy
        generated = tmp_path / "run" / method.name / "seed-0" / "generated"
        for when, (name, score) in {
            "before-again": ("again", seed.before[1]),
            "after-said": ("said", seed.scores[0][0]),
        }.items():
            kept = read(generated / when / f"{name}.jsonl")
            assert sum(line["score"] for line in kept) / len(kept) == score.accuracy
        scored = ["again.jsonl"] if method.method == "frozen" else ["again.jsonl", "said.jsonl"]
        assert sorted(path.name for path in (generated / "after-again").iterdir()) == scored
    assert sorted(path.name for path in (tmp_path / "run" / "generated").iterdir()) == ["again.jsonl", "said.jsonl"]
    assert RunResults.load(tmp_path / "run" / "results.json") == results
    assert "scored by exact match, generated" in render([results])


def test_a_prompt_and_an_answer_beyond_the_models_positions_are_refused_before_training(recipe_path, tmp_path):
    content = yaml.safe_load(recipe_path.read_text())
    split = {"prompt": "sentence", "completion": "sentence"}
    gpt2().save_pretrained(recipe_path.parent / "model")
    content["tasks"][1] = {
        "name": "said", "kind": "completion", "score": {"generate": {"max_new_tokens": 60}},
        "train": {"path": "second-train.jsonl", **split}, "evaluation": {"path": "second-eval.jsonl", **split},
    }  # fmt: skip
    content["methods"] = content["methods"][:1]
    recipe_path.write_text(yaml.safe_dump(content))
    for attempt in (make_plan, lambda recipe: run_recipe(recipe, tmp_path / "run")):
        with pytest.raises(
            RunError, match="Task 'said' generates up to 60 tokens after a prompt of 7 tokens, but the model"
        ):
            attempt(load_recipe(recipe_path))
    assert not list((tmp_path / "run").glob("*/seed-*"))
