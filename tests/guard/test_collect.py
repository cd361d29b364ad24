"""Calibration against moments taken token by token."""

import copy
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from curlora import CurloraConfig, CurloraLayer
from curlora.guard import Calibration, Guard, GuardError, calibrate, collect, perplexity
from curlora.text import model_pass
from curlora.text.model_pass import _drawn_gradient
from curlora.text.rows import Rows
from tests.models import BASES, WORDS, curlora, llama, tokens, word_tokenizer

# Few tokens are enough here.
pytestmark = pytest.mark.filterwarnings("ignore:The guard's text has")

MAPS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn"]}


def adapted(base="llama", **config):
    return curlora(BASES[base](), target_modules=MAPS[base], **config)


def batch(ids, mask=None):
    return {"input_ids": ids} if mask is None else {"input_ids": ids, "attention_mask": mask}


def close(a, b, rtol=1e-5):
    assert a.tokens == b.tokens
    assert a.layers.keys() == b.layers.keys()
    for name in a.layers:
        for part in ("inputs", "left", "right"):
            x, y = getattr(a.layers[name], part), getattr(b.layers[name], part)
            assert (x - y).norm() <= rtol * y.norm(), (name, part)
        assert a.layers[name].output == pytest.approx(b.layers[name].output, rel=rtol)


@pytest.mark.parametrize("base", MAPS)
def test_inputs_are_second_moments_of_what_the_adapter_gathers(base):
    model = adapted(base)
    ids = tokens(batch=3, length=9)
    calibration = calibrate(model, [batch(ids)], progress=False)
    outputs = {}
    found = {m.name: m for m in model.modules() if isinstance(m, CurloraLayer)}
    for name, layer in found.items():
        layer.base_layer.register_forward_hook(lambda m, i, o, name=name: outputs.__setitem__(name, (i[0], o)))
    model(input_ids=ids)
    for name, layer in found.items():
        x, y0 = outputs[name]
        columns, rows = layer.basis("default").indices
        W = layer.get_base_layer().weight.double()
        # R x, as the paper writes it; a Conv1D stores W the other way round.
        z = x.double() @ (W[:, columns] if base == "gpt2" else W[rows].T)
        expected = torch.einsum("bti,btj->ij", z, z) / ids.numel()
        torch.testing.assert_close(calibration.layers[name].inputs, expected, rtol=1e-5, atol=1e-7)
        shift = (y0 - layer.get_base_layer().bias if layer.get_base_layer().bias is not None else y0).double()
        assert calibration.layers[name].output == pytest.approx(
            float(shift.detach().square().sum() / ids.numel()), rel=1e-5
        )


@pytest.mark.parametrize("base", MAPS)
def test_gradients_are_those_of_answers_the_model_itself_would_give(base):
    """The mean over many draws against the exact expectation over every answer at every position."""
    model = adapted(base, alpha=2.0)
    ids = tokens(batch=1, length=4)
    found = {m.name: m for m in model.modules() if isinstance(m, CurloraLayer)}
    trained = [layer.curlora_U["default"].weight for layer in found.values()]
    logits = model(input_ids=ids).logits[0, :-1]
    exact = {(name, side): torch.zeros(4, 4, dtype=torch.float64) for name in found for side in ("left", "right")}
    for position, row in enumerate(logits):
        for answer, p in enumerate(row.softmax(-1).tolist()):
            loss = cross_entropy(logits[position], torch.tensor(answer))
            gradients = torch.autograd.grad(loss, trained, retain_graph=True)
            for name, gradient in zip(found, gradients, strict=True):
                G = (gradient.T if base == "gpt2" else gradient).double() / 2.0  # with respect to alpha U
                exact[name, "left"] += p * G @ G.T / len(logits)
                exact[name, "right"] += p * G.T @ G / len(logits)
    draws = [calibrate(model, [batch(ids)], seed=seed, progress=False) for seed in range(400)]
    for (name, side), expected in exact.items():
        each = torch.stack([getattr(draw.layers[name], side) for draw in draws])
        error = each.mean(0) - expected
        # No entry of the 4 x 4 moment should be off by five standard errors.
        assert (error.abs() <= 5 * each.std(0) / len(draws) ** 0.5).all(), (name, side)
        assert error.norm() < 0.25 * expected.norm(), (name, side)


def inputs_require_gradients(model):
    """As gradient checkpointing and the training of quantized models need it."""
    model.enable_input_require_grads()


def another_adapter_is_trained_below(model):
    model.add_adapter("other", CurloraConfig(r=2, target_modules=r".*layers\.0\..*o_proj"))
    model.base_model.set_adapter(["default", "other"])


@pytest.mark.parametrize("change", [inputs_require_gradients, another_adapter_is_trained_below])
def test_what_else_has_gradients_does_not_matter(change):
    ids = tokens(batch=4, length=9)
    expected = calibrate(adapted(), [batch(ids)], progress=False)
    model = adapted()
    change(model)
    close(calibrate(model, [batch(ids)], adapter="default", progress=False), expected)


def test_a_process_that_has_a_batch_less_runs_one_that_counts_for_nothing(monkeypatch):
    """Two processes share three rows, one row a batch; the second process has one row."""
    rows = tokens(batch=3, length=9)
    expected = calibrate(adapted(), [batch(rows[1:2])], progress=False)
    model, passes = adapted(), []
    model.register_forward_hook(lambda *_: passes.append(1))
    monkeypatch.setattr(model_pass, "rank_and_count", lambda: (1, 2))
    monkeypatch.setattr(model_pass, "sum_over_processes", lambda tensors, device: tensors)
    monkeypatch.setattr(collect, "sum_over_processes", lambda tensors, device: tensors)
    found = calibrate(model, rows.unbind(), batch_size=1, progress=False)
    assert len(passes) == 2
    assert (found.tokens, found.rows) == (9, 1)
    for name, of in expected.layers.items():
        torch.testing.assert_close(found.layers[name].inputs, of.inputs)


def test_how_the_text_is_put_into_batches_does_not_matter():
    model = adapted()
    texts = [" ".join(WORDS[i : i + 3 + i % 5]) for i in range(17)]
    one = calibrate(model, texts, word_tokenizer(), batch_size=1, progress=False)
    close(calibrate(model, texts, word_tokenizer(), batch_size=5, progress=False), one)
    close(calibrate(model, iter(texts), word_tokenizer(), batch_size=17, progress=False), one)
    rows = list(word_tokenizer()(texts)["input_ids"])
    close(calibrate(model, [batch(torch.tensor([row])) for row in rows], progress=False), one)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("base", MAPS)
def test_padding_counts_for_nothing(base, side):
    """It takes no position either, which matters for GPT-2's absolute positions."""
    model = adapted(base)
    ids = tokens(batch=1, length=6)
    alone = calibrate(model, [batch(ids)], progress=False)
    junk = torch.full((1, 3), 5)
    padding = torch.zeros(1, 3, dtype=torch.long)
    real = torch.ones_like(ids)
    row, mask = ((junk, ids), (padding, real)) if side == "left" else ((ids, junk), (real, padding))
    padded = calibrate(model, [batch(torch.cat(row, 1), torch.cat(mask, 1))], progress=False)
    assert padded.tokens == alone.tokens == 6
    for name in alone.layers:
        torch.testing.assert_close(padded.layers[name].inputs, alone.layers[name].inputs, rtol=1e-4, atol=1e-7)
    if side == "right":  # with padding on the left, the draws belong to other positions
        close(padded, alone, rtol=1e-4)


def test_positions_that_are_given_are_used():
    model = adapted("gpt2")
    ids = tokens(batch=1, length=6)
    positions = torch.arange(20, 26)[None]
    given = calibrate(model, [{**batch(ids), "position_ids": positions}], progress=False)
    longer = torch.cat([torch.zeros(1, 20, dtype=torch.long), ids], 1)
    mask = torch.cat([torch.zeros(1, 20, dtype=torch.long), torch.ones_like(ids)], 1)
    padded = calibrate(
        model, [{**batch(longer, mask), "position_ids": torch.arange(26)[None]}], gradients=False, progress=False
    )
    for name in given.layers:
        torch.testing.assert_close(given.layers[name].inputs, padded.layers[name].inputs, rtol=1e-4, atol=1e-7)


def test_an_adapted_output_layer_sees_prompts_too():
    """Moments of inputs are of all tokens, also of those whose prediction does not count."""
    model = curlora(llama(), target_modules=["q_proj", "lm_head"])
    rows = tokens(batch=2, length=9).unbind()
    answers = Rows(rows, (torch.arange(9) >= torch.tensor([[5], [7]])).unbind())
    whole, of_answers = (calibrate(model, data, progress=False) for data in (rows, answers))
    assert any("lm_head" in name for name in whole.layers)
    for name, moments in whole.layers.items():
        torch.testing.assert_close(of_answers.layers[name].inputs, moments.inputs, rtol=1e-5, atol=0)
        assert of_answers.layers[name].output == pytest.approx(moments.output, rel=1e-5)


@pytest.mark.parametrize("base", MAPS)
def test_a_layer_that_is_used_twice_moves_twice(base):
    """In ``L = E[G G^T]``, the gradient ``G`` of a row is the sum over both uses."""
    model = adapted(base)
    blocks = model.get_base_model().model.layers if base == "llama" else model.get_base_model().transformer.h
    blocks[1] = blocks[0]
    ids = tokens(batch=1, length=5)
    found = {m.name: m for m in model.modules() if isinstance(m, CurloraLayer)}
    calibration = calibrate(model, [batch(ids)], progress=False)
    logits = model(input_ids=ids, use_cache=False).logits
    at_logits = _drawn_gradient(logits.detach(), torch.ones(1, 4, dtype=torch.bool), [0], seed=0)
    trained = [layer.curlora_U["default"].weight for layer in found.values()]
    for name, gradient in zip(found, torch.autograd.grad(logits, trained, at_logits), strict=True):
        G = (gradient.T if base == "gpt2" else gradient).double()
        torch.testing.assert_close(calibration.layers[name].left, G @ G.T / 4, rtol=1e-4, atol=1e-9)


def test_long_texts_are_cut_and_nothing_is_left_out():
    model = adapted()
    text = " ".join(WORDS[:23])
    cut = calibrate(model, [text], word_tokenizer(), max_length=10, progress=False)
    assert cut.tokens == 23
    ids = torch.tensor(word_tokenizer()(text)["input_ids"])
    close(calibrate(model, ids.split(10), progress=False), cut)


def test_the_model_is_left_as_it_was():
    model = adapted().train()
    model(input_ids=tokens()).logits.sum().backward()
    frozen = next(p for p in model.parameters() if p.requires_grad)
    frozen.requires_grad_(False)
    before = {name: (p.requires_grad, p.grad, p.clone()) for name, p in model.named_parameters()}
    calibrate(model, [batch(tokens())], progress=False)
    for name, p in model.named_parameters():
        requires_grad, grad, value = before[name]
        assert (p.requires_grad, p.grad is grad) == (requires_grad, True)
        assert torch.equal(p, value)
    assert all(module.training for module in model.modules())
    assert not any(m._forward_hooks for m in model.modules())


def test_forward_alone_gives_the_same_inputs():
    model = adapted()
    full = calibrate(model, [batch(tokens())], progress=False)
    forward = calibrate(model, [batch(tokens())], gradients=False, progress=False)
    for name in full.layers:
        torch.testing.assert_close(forward.layers[name].inputs, full.layers[name].inputs)
        assert forward.layers[name].left is forward.layers[name].right is None


@pytest.mark.parametrize("gradients", [True, False])
def test_saved_and_loaded(tmp_path, gradients):
    calibration = calibrate(adapted(), [batch(tokens())], gradients=gradients, progress=False)
    calibration.save(tmp_path / "c.safetensors")
    loaded = Calibration.load(tmp_path / "c.safetensors")
    assert (loaded.tokens, loaded.rows) == (calibration.tokens, calibration.rows) == (14, 2)
    for name, moments in calibration.layers.items():
        assert torch.equal(moments.inputs, loaded.layers[name].inputs)
        assert moments.output == loaded.layers[name].output
        assert torch.equal(moments.start, loaded.layers[name].start)
        assert moments.start.any()
        for side in ("left", "right"):
            saved, read = getattr(moments, side), getattr(loaded.layers[name], side)
            assert torch.equal(saved, read) if gradients else saved is read is None
    loaded.check(adapted())


def test_refused_for_another_model_or_other_indices():
    calibration = calibrate(adapted(), [batch(tokens())], progress=False)
    with pytest.raises(GuardError, match="other columns and rows"):
        calibration.check(curlora(llama(), target_modules=MAPS["llama"], r=4, sampling="uniform"))
    with pytest.raises(GuardError, match="other columns and rows"):
        calibration.check(adapted(r=5))
    with pytest.raises(GuardError, match="other layers"):
        calibration.check(curlora(llama(), target_modules=["q_proj"]))
    other = adapted()
    for layer in (m for m in other.modules() if isinstance(m, CurloraLayer)):
        layer.get_base_layer().weight.data.normal_()
        layer.curlora_U["default"].weight.data.zero_()
        layer.redraw("default", layer.basis("default").indices)
    with pytest.raises(GuardError, match="another base model"):
        calibration.check(other)
    with pytest.raises(GuardError, match="no CURLoRA adapter"):
        calibration.check(llama())


def test_refused_for_a_base_model_that_has_been_trained_since():
    model = adapted()
    calibration = calibrate(model, [batch(tokens())], progress=False)
    calibration.check(model)
    model.merge_adapter()
    with pytest.raises(GuardError, match="has merged adapters. Unmerge them first"):
        calibration.check(model)
    model.unmerge_adapter()
    calibration.check(model)
    weight = next(m for m in model.modules() if isinstance(m, CurloraLayer)).get_base_layer().weight
    weight.data += 0.01 * torch.randn_like(weight)
    for known in (calibration, calibrate(model, [batch(tokens())], progress=False)):  # which is no remedy
        with pytest.raises(GuardError, match="has been trained since adapter 'default' .* Add a new adapter"):
            Guard(model, known, budget=0.01)
    model.delete_adapter("default")
    model.add_adapter("new", CurloraConfig(r=4, target_modules=MAPS["llama"]))
    model.set_adapter("new")
    Guard(model, calibrate(model, [batch(tokens())], progress=False), budget=0.01)


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "c.safetensors"
    calibration = calibrate(adapted(), [batch(tokens())], progress=False)
    calibration.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(GuardError, match="cannot be read"):
        Calibration.load(path)
    with pytest.raises(GuardError, match="cannot be read"):
        Calibration.load(tmp_path / "none")
    broken = copy.deepcopy(calibration)
    next(iter(broken.layers.values())).inputs[0, 0] = torch.nan
    broken.save(path)
    with pytest.raises(GuardError, match="damaged"):
        Calibration.load(path)


def test_bad_input_is_named():
    model = adapted()
    with pytest.raises(GuardError, match="tokenizer"):
        calibrate(model, ["w1 w2"])
    for nothing in (["", " "], [], ["w1", "w2"]):  # no token, or none to predict
        with pytest.raises(GuardError, match="no two tokens in a row"):
            calibrate(model, nothing, word_tokenizer(), progress=False)
    with pytest.raises(GuardError, match=r"A string, 'novel.txt', was given where several texts are expected"):
        calibrate(model, "novel.txt", word_tokenizer())
    with pytest.raises(GuardError, match=r"A path, 'novel.txt', was given where several texts are expected"):
        perplexity(model, Path("novel.txt"), word_tokenizer())
    with pytest.raises(GuardError, match="found NoneType among texts"):
        perplexity(model, ["w1 w2", None], word_tokenizer())
    for nothing in (None, 5):
        with pytest.raises(GuardError, match=f"Expected texts, rows of tokens .* found {type(nothing).__name__}"):
            perplexity(model, nothing, word_tokenizer())
    with pytest.raises(GuardError, match="input_ids"):
        calibrate(model, [tokens()], progress=False)
    with pytest.raises(GuardError, match=r"calibrate\(model, \[batch\]\)"):
        calibrate(model, batch(tokens()), progress=False)
    with pytest.raises(GuardError, match=r"shape \(batch, length\), found \(7,\)"):
        calibrate(model, [batch(tokens()[0])], progress=False)
    with pytest.raises(GuardError, match="70 tokens; the model has 64 positions"):
        calibrate(adapted("gpt2"), [batch(tokens(length=70))], progress=False)
    with pytest.raises(GuardError, match="causal language model"):
        calibrate(classifier(), [batch(tokens())], progress=False)
    with pytest.raises(GuardError, match="no CURLoRA adapter"):
        calibrate(llama(), [batch(tokens())])
    with pytest.raises(GuardError, match="not an active"):
        calibrate(model, [batch(tokens())], adapter="other")
    model.merge_adapter()
    with pytest.raises(GuardError, match="merged"):
        calibrate(model, [batch(tokens())])


def test_activations_that_are_not_finite_are_named():
    model = adapted()
    model.get_base_model().model.layers[1].mlp.down_proj.base_layer.weight.data[0, 0] = torch.nan
    with pytest.raises(GuardError, match="down_proj' has outputs .* not finite"):
        calibrate(model, [batch(tokens())], progress=False)


def test_little_text_is_told():
    with pytest.warns(UserWarning, match="14 tokens in 2 rows, few for a rank of 4.*at least 256"):
        calibrate(adapted(), [batch(tokens())], progress=False)


def test_several_active_adapters_need_a_name():
    model = adapted()
    model.add_adapter("second", CurloraConfig(r=4, target_modules=MAPS["llama"]))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(GuardError, match=r"\['default', 'second'\] are active"):
        calibrate(model, [batch(tokens())])
    assert calibrate(model, [batch(tokens())], adapter="second", progress=False).tokens == 14


def classifier():
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, pad_token_id=0
    )
    return get_peft_model(LlamaForSequenceClassification(config), CurloraConfig(r=4, target_modules=["q_proj"]))
