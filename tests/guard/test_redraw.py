"""Columns and rows for a task, against moments taken from the base model by hand."""

import pytest
import torch
from peft import PeftModel

from curlora import CurloraConfig, CurloraLayer, Guard, calibrate, redraw
from curlora.guard import GuardError
from curlora.text.model_pass import _drawn_gradient
from tests.models import BASES, curlora, llama, tokens

pytestmark = pytest.mark.filterwarnings("ignore:The guard's text has")

MAPS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}


def untrained(base="llama", on=None, **config):
    model = curlora(BASES[base]() if on is None else on, **{"target_modules": MAPS[base], "r": 5, **config})
    for layer in layers_of(model):
        layer.curlora_U["default"].weight.data.zero_()
    return model


def layers_of(model):
    return [m for m in model.modules() if isinstance(m, CurloraLayer)]


def batches(seed=3, count=3):
    every = tokens(seed=seed, batch=2 * count, length=9)
    return [{"input_ids": ids, "labels": ids} for ids in every.split(2)]


GENERAL = {"input_ids": tokens(seed=1, batch=4, length=8)}


def squares(base, losses):
    """``sum (y0)_i^2`` and ``sum (W^T d)_j^2`` of each adapted layer over all tokens with a gradient, float64."""
    # With the eager kernel, a query without effect has a gradient of exactly zero, without rounding.
    model = (llama(attn_implementation="eager") if base == "llama" else BASES[base]()).requires_grad_(True)
    seen, sums = {}, {}
    for name, module in model.named_modules():
        if name.split(".")[-1] in MAPS[base]:
            module.register_forward_hook(lambda m, i, o, name=name: seen.__setitem__(name, (m, o)))
    for loss in losses:
        value = loss(model)
        for name, (module, output) in list(seen.items()):
            (d,) = torch.autograd.grad(value, output, retain_graph=True)
            y0 = output if module.bias is None else output - module.bias
            W = module.weight if base == "llama" else module.weight.T
            keep = (d != 0).any(-1)
            both = y0[keep].double().square().sum(0), (d[keep].double() @ W.double()).square().sum(0)
            sums[name] = [a + b for a, b in zip(sums.get(name, (0, 0)), both, strict=True)]
    return sums


@pytest.mark.parametrize("base", MAPS)
def test_taken_is_what_the_task_uses_most_for_what_general_text_uses(base):
    def general(model):
        logits = model(**GENERAL, use_cache=False).logits
        answered = torch.ones(4, 7, dtype=torch.bool)
        return (logits * _drawn_gradient(logits.detach(), answered, range(4), seed=0)).sum()

    of_task = squares(base, [lambda model, batch=batch: model(**batch).loss for batch in batches()])
    of_general = squares(base, [general])
    model = untrained(base)
    redraw(model, batches(), [GENERAL], progress=False)
    for layer in layers_of(model):
        columns, rows = layer.basis("default").indices.tolist()
        gathered, added = (columns, rows) if base == "gpt2" else (rows, columns)
        for chosen, task, other in zip((gathered, added), of_task[layer.name], of_general[layer.name], strict=True):
            score = task / (other + 0.01 * other.mean())
            assert set(chosen) == set(score.topk(5).indices.tolist()), layer.name
        W = layer.get_base_layer().weight
        assert torch.equal(layer.basis("default").factor, W[rows].T if base == "gpt2" else W[:, columns])


def chosen(model, task, **options):
    redraw(model, task, [GENERAL], progress=False, **options)
    return [layer.basis("default").indices.tolist() for layer in layers_of(model)]


def test_a_loss_of_ones_own_is_used():
    model = untrained()
    other = tokens(seed=8, batch=2, length=9)
    found = chosen(model, batches(), loss=lambda batch: model(input_ids=batch["input_ids"], labels=other).loss)
    expected = chosen(untrained(), [{"input_ids": batch["input_ids"], "labels": other} for batch in batches()])
    assert found == expected != chosen(untrained(), batches())


def test_how_the_task_is_put_into_batches_does_not_matter():
    """The mean over a short last batch has larger gradients; they do not weigh more."""
    ids = tokens(seed=3, batch=33, length=9)

    def of(size):
        return [{"input_ids": part, "labels": part} for part in ids.split(size)]

    one_by_one = chosen(untrained(), of(1))
    assert chosen(untrained(), of(16)) == one_by_one
    assert chosen(untrained(), of(16)[:2]) != chosen(untrained(), of(16)[2:])  # otherwise the test could not fail


def test_nor_where_the_model_is_sure_of_some_rows():
    """Their gradients are thousands of times smaller than others, and are still included."""
    ids = tokens(seed=3, batch=16, length=9)

    def chosen_of(size):
        base = llama()
        base.lm_head.weight.data *= 500
        labels = ids.clone()
        labels[::2, 1:] = base(ids).logits.argmax(-1)[::2, :-1]
        parts = zip(ids.split(size), labels.split(size), strict=True)
        return chosen(untrained(on=base), [{"input_ids": part, "labels": answers} for part, answers in parts])

    assert chosen_of(16) == chosen_of(1)


def test_a_layer_that_a_batch_does_not_use_is_passed_over():
    """Like an expert that receives no token."""
    model = untrained()
    mlp = model.get_base_model().model.layers[0].mlp
    mlp.forward = lambda x: x + mlp.down_proj(mlp.up_proj(x)[:0]).sum()
    before = mlp.down_proj.basis("default").indices.clone()
    redraw(model, batches(), [GENERAL], progress=False)
    assert torch.equal(mlp.down_proj.basis("default").indices, before)


def test_a_gradient_that_is_infinite_is_told():
    model = untrained(target_modules=["lm_head"])
    with pytest.raises(GuardError, match=r"'lm_head' has outputs or gradients that are not finite"):
        redraw(
            model, batches(), [GENERAL], progress=False,
            loss=lambda batch: (model(**batch).logits * torch.tensor([torch.inf, *[1.0] * 99])).sum(),
        )  # fmt: skip


def test_what_is_rounding_alone_does_not_count():
    """The query of a row's first token has only one key, so its gradient is zero; some kernels give rounding errors."""
    by_one, by_other = (
        chosen(untrained(on=llama(attn_implementation=kernel), target_modules=["q_proj"]), batches())
        for kernel in ("sdpa", "eager")
    )
    assert by_one == by_other


def test_a_layer_that_the_task_does_not_use_keeps_what_it_has():
    model = untrained()
    block = model.get_base_model().model.layers[0]
    block.mlp.forward = lambda x: x  # skips the MLP
    before = block.mlp.down_proj.basis("default").indices.clone()
    redraw(model, batches(), [GENERAL], progress=False)
    assert torch.equal(block.mlp.down_proj.basis("default").indices, before)


def test_beside_a_trained_adapter_gradients_are_of_the_model_with_it():
    """Merged, it changes the input of every layer in the same way; ``y0`` and ``W`` remain those of the base layer."""
    targets = MAPS["llama"]
    model = untrained(target_modules=targets)
    generator = torch.Generator().manual_seed(4)
    for layer in layers_of(model):
        layer.curlora_U["default"].weight.data.normal_(std=0.5, generator=generator)
    model.add_adapter("second", CurloraConfig(r=5, target_modules=targets))
    model.base_model.set_adapter(["default", "second"])
    redraw(model, batches(), [GENERAL], adapter="second", progress=False)

    seen, sums = {}, {}
    merged = llama(attn_implementation="eager").requires_grad_(True)
    weights = {}
    for layer in layers_of(model):
        module = merged.get_submodule(layer.name)
        weights[layer.name] = module.weight.detach().clone()
        module.weight.data += layer.get_delta_weight("default")
        module.register_forward_hook(lambda m, i, o, name=layer.name: seen.__setitem__(name, (i[0], o)))

    def add(value, key):
        for name, (x, output) in list(seen.items()):
            (d,) = torch.autograd.grad(value, output, retain_graph=True)
            keep, W = (d != 0).any(-1), weights[name].double()
            both = (x[keep].double() @ W.T).square().sum(0), (d[keep].double() @ W).square().sum(0)
            sums[key, name] = [a + b for a, b in zip(sums.get((key, name), (0, 0)), both, strict=True)]

    for batch in batches():
        add(merged(**batch).loss, "task")
    logits = merged(**GENERAL, use_cache=False).logits
    drawn = _drawn_gradient(logits.detach(), torch.ones(4, 7, dtype=torch.bool), range(4), seed=0)
    add((logits * drawn).sum(), "general")
    for layer in layers_of(model):
        columns, rows = layer.basis("second").indices.tolist()
        for chosen, task, other in zip(
            (rows, columns), sums["task", layer.name], sums["general", layer.name], strict=True
        ):
            assert set(chosen) == set((task / (other + 0.01 * other.mean())).topk(5).indices.tolist()), layer.name


def test_the_adapter_trains_saves_and_loads_with_them(tmp_path):
    model = untrained()
    before = [layer.basis("default").indices.clone() for layer in layers_of(model)]
    redraw(model, batches(), [GENERAL], progress=False)
    after = [layer.basis("default").indices for layer in layers_of(model)]
    assert not any(torch.equal(one, two) for one, two in zip(before, after, strict=True))
    assert not any(p.grad is not None for p in model.parameters())
    guard = Guard(model, calibrate(model, [GENERAL], progress=False), budget=1e-3)
    optimizer = torch.optim.AdamW(guard.parameters, lr=0.02)
    guard.attach(optimizer)
    for batch in batches():
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path).eval()
    ids = tokens()
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_bad_input_is_named():
    model = untrained()
    with pytest.raises(GuardError, match="no batch of the task"):
        redraw(model, [], [GENERAL], progress=False)
    with pytest.raises(GuardError, match="no loss for a batch of the task: give the batches labels"):
        redraw(model, [{"input_ids": tokens()}], [GENERAL], progress=False)
    with pytest.raises(GuardError, match="not finite"):
        redraw(model, batches(), [GENERAL], loss=lambda b: model(**b).loss * torch.nan, progress=False)
    with pytest.raises(GuardError, match="no two tokens in a row"):
        redraw(model, batches(), [torch.tensor([1])], progress=False)
    layers_of(model)[1].curlora_U["default"].weight.data[0, 0] = 1.0
    before = [layer.basis("default").indices.clone() for layer in layers_of(model)]
    with pytest.raises(GuardError, match="layers.0.self_attn.v_proj' has been trained"):
        redraw(model, batches(), [GENERAL], progress=False)
    with pytest.raises(RuntimeError, match="has been trained"):
        layers_of(model)[1].redraw("default", before[1])
    assert all(torch.equal(a, b.basis("default").indices) for a, b in zip(before, layers_of(model), strict=True))
    merged = untrained()
    merged.merge_adapter()
    with pytest.raises(GuardError, match="merged"):
        redraw(merged, batches(), [GENERAL], progress=False)


def test_inputs_that_require_gradients_do_not_matter():
    chosen = []
    for required in (False, True):
        model = untrained()
        if required:  # as gradient checkpointing and quantized models need it
            model.enable_input_require_grads()
        redraw(model, batches(), [GENERAL], progress=False)
        chosen.append(torch.stack([layer.basis("default").indices for layer in layers_of(model)]))
    assert torch.equal(*chosen)
    before = torch.stack([layer.basis("default").indices for layer in layers_of(untrained())])
    assert not torch.equal(chosen[0], before)
