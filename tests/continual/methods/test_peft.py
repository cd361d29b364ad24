"""Adapters of PEFT, each over a whole small stream: trained, saved, and compared with the base model."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from curlora.continual.encoding import encode
from curlora.continual.heldout import HeldOut, measure
from curlora.continual.method_run import BaseScores, MethodRun
from curlora.continual.methods import make_method
from curlora.continual.settings import Settings
from curlora.continual.tasks import ClassificationTask
from curlora.text.progress import NullProgress
from tests.models import VOCABULARY, gpt2, layers, llama, word_examples, word_tokenizer

LAYERS = {"target_modules": ["q_proj", "v_proj"]}
ADAPTERS = {
    "curlora": ("curlora", 0.3, {"r": 4}),
    "lora": ("lora", 1e-2, {"r": 4, **LAYERS}),
    "dora": ("lora", 1e-2, {"r": 4, "use_dora": True, **LAYERS}),
    "pissa": ("lora", 1e-2, {"r": 4, "init_lora_weights": "pissa", **LAYERS}),
    "osf": ("osf", 1e-3, {"effective_rank": 4, **LAYERS}),
    "loha": ("loha", 1e-2, {"r": 4, **LAYERS}),
    "ia3": ("ia3", 1e-2, {"feedforward_modules": [], **LAYERS}),
    "oft": ("oft", 1e-2, {"oft_block_size": 4, **LAYERS}),
    "vera": ("vera", 0.3, {"r": 4, "target_modules": ["q_proj"]}),
    "olora": ("lora", 1e-2, {"r": 4, "init_lora_weights": "olora", **LAYERS}),
    "lora with biases": ("lora", 1e-2, {"r": 4, "bias": "all", **LAYERS}),
    "lora and the output layer": ("lora", 1e-2, {"r": 4, "modules_to_save": ["lm_head"], **LAYERS}),
}
HELDOUT = HeldOut("noise", torch.randint(0, VOCABULARY, (40,), generator=torch.Generator().manual_seed(0)), window=20)


def through_stream(method, directory, tasks=2):
    tokenizer = word_tokenizer()
    stream = [ClassificationTask(f"t{seed}", *word_examples(seed), labels=["a", "b"]) for seed in (2, 8)[:tasks]]
    settings = Settings(batch_size=4, epochs=2, head_learning_rate=0.05)
    return MethodRun(
        method, llama, tokenizer, encode(stream, tokenizer, settings), [HELDOUT],
        seed=0, base=BaseScores({"noise": measure(llama(), HELDOUT)}), directory=directory, progress=NullProgress(),
    ).run()  # fmt: skip


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_whole_stream(name, tmp_path):
    kind, rate, options = ADAPTERS[name]
    result, trainable, size = through_stream(make_method(kind, "m", "M", rate, options), tmp_path)
    assert trainable > 0
    assert size > 0
    before, *_, after = result.text()
    assert after.drift > 0
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(llama(), tmp_path / "adapter").eval()
    assert measure(again.get_base_model(), HELDOUT).perplexity == pytest.approx(after.perplexity, rel=1e-4)
    assert before.perplexity != after.perplexity


@pytest.mark.parametrize("name", ADAPTERS)
def test_drift_is_measured_from_the_base_itself(name):
    """This holds even if the adapter changes the base model's weights at its start, and after training."""
    kind, rate, options = ADAPTERS[name]
    method = make_method(kind, "m", "M", rate, options)
    model = method.apply(llama(), seed=0)
    base_logits = method.base_logits(model, llama)
    ids = HELDOUT.tokens[None, :20]
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(base_logits(ids, 5), llama()(ids, logits_to_keep=5).logits, rtol=1e-4, atol=1e-5)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.mark.parametrize("name", ["curlora", "lora"])
def test_an_adapter_for_each_task(name, tmp_path):
    """The first task's adapter stays unchanged and active in the second task, and both are saved."""
    kind, rate, options = ADAPTERS[name]
    method = make_method(kind, "m", "M", rate, options, adapter_per_task=True)
    first, both = tmp_path / "first", tmp_path / "both"
    _, numbers, size = through_stream(method, first, tasks=1)
    result, twice, sizes = through_stream(method, both)
    assert (twice, sizes > size) == (2 * numbers, True)
    learned = load_file(first / "adapter/task0/adapter_model.safetensors")
    kept = load_file(both / "adapter/task0/adapter_model.safetensors")
    assert learned.keys() == kept.keys()
    assert all(torch.equal(value, kept[key]) for key, value in learned.items())
    assert any(value.any() for key, value in learned.items() if "curlora_U.weight" in key or "lora_B" in key)

    again = PeftModel.from_pretrained(llama(), both / "adapter/task0", adapter_name="task0")
    again.load_adapter(both / "adapter/task1", "task1")
    again.base_model.set_adapter(["task0", "task1"])
    last = result.text()[-1]
    assert measure(again.eval().get_base_model(), HELDOUT).perplexity == pytest.approx(last.perplexity, rel=1e-4)
    if kind == "curlora":  # and was drawn separately
        drawn = [[layer.basis(task).indices for layer in layers(again)] for task in ("task0", "task1")]
        assert not all(torch.equal(*pair) for pair in zip(*drawn, strict=True))


def test_each_tasks_adapter_is_trained_in_its_own_task():
    """Also after the base model's logits were computed, for which PEFT disables and enables adapters."""
    method = make_method("lora", "m", "M", 0.1, {"r": 4, **LAYERS}, adapter_per_task=True)
    model = method.apply(llama(), seed=0)
    base_logits = method.base_logits(model, llama)
    for task in range(3):
        method.begin_task(model, task, seed=0)
        base_logits(HELDOUT.tokens[None, :20], 5)
        trained = {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad}
        assert trained == {f"task{task}"}


def test_adapters_of_tasks_and_of_seeds_are_drawn_apart():
    drawn = []
    for seed in range(3):
        method = make_method("curlora", "m", "M", 0.1, {"r": 4}, adapter_per_task=True)
        model = method.apply(llama(), seed=seed)
        for task in range(3):
            method.begin_task(model, task, seed=seed)
            at = torch.cat([layer.basis(f"task{task}").indices.flatten() for layer in layers(model)])
            assert not any(torch.equal(at, other) for other in drawn)
            drawn.append(at)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("osf", {}, "for curlora and lora"),
        ("frozen", {}, "frozen has none"),
        ("full", {}, "full has none"),
        ("curlora", {"seed": 3}, "leave out the option seed"),
        ("curlora", {"init_weights": False}, "leave out the option init_weights"),
        ("curlora", {"modules_to_save": ["lm_head"]}, "leave out the option modules_to_save"),
        ("lora", {"init_lora_weights": "pissa"}, "leave out the option init_lora_weights"),
        ("lora", {"bias": "all"}, "leave out the option bias"),
        ("lora", {"use_dora": True}, "leave out the option use_dora"),
    ],
)
def test_not_every_adapter_can_be_had_for_each_task(kind, options, message):
    with pytest.raises(ValueError, match=message):
        make_method(kind, "m", "M", 0.0 if kind == "frozen" else 0.1, options, adapter_per_task=True)


@pytest.mark.parametrize("base", [llama, gpt2])
def test_the_references_lora_starts_wider(base):
    """A has variance 1/(3 r), where PEFT's has 1/(3 n)."""
    targets = {"r": 8, "target_modules": ["q_proj"] if base is llama else ["c_attn"]}
    deviations = []
    for start in ("peft", "reference"):
        model = make_method("lora", "m", "M", 0.1, targets, lora_init=start).apply(base(), seed=0)
        weights = [m.lora_A["default"].weight for m in model.modules() if hasattr(m, "lora_A") and len(m.lora_A)]
        deviations.append(torch.cat([w.flatten() for w in weights]).std().item())
    assert deviations[0] == pytest.approx((3 * 32) ** -0.5, rel=0.1)
    assert deviations[1] == pytest.approx((3 * 8) ** -0.5, rel=0.1)


@pytest.mark.parametrize("kind", ["prompt_tuning", "xlora", "nonsense"])
def test_what_is_no_adapter_is_refused(kind):
    with pytest.raises(ValueError, match=f"a recipe has no method '{kind}'"):
        make_method(kind, "m", "M", 0.1)


def test_a_method_of_ones_own_is_one_class(tmp_path):
    """Trains only the biases, as BitFit does (https://arxiv.org/abs/2106.10199)."""
    from dataclasses import dataclass

    from curlora.continual.methods import Full

    @dataclass(frozen=True)
    class BitFit(Full):
        def apply(self, model: nn.Module, seed: int, text=None) -> nn.Module:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name.endswith("bias"))
            return model

    tokenizer = word_tokenizer()
    tasks = [ClassificationTask("t", *word_examples(2), labels=["a", "b"])]
    settings = Settings(batch_size=4, head_learning_rate=0.05)
    result, trainable, _ = MethodRun(
        BitFit("bitfit", "BitFit", 1e-2), llama, tokenizer, encode(tasks, tokenizer, settings), [HELDOUT],
        seed=0, base=BaseScores({"noise": measure(llama(), HELDOUT)}), directory=tmp_path, progress=NullProgress(),
    ).run()  # fmt: skip
    assert trainable == sum(p.numel() for name, p in llama().named_parameters() if name.endswith("bias"))
    assert result.text()[-1].drift > 0
