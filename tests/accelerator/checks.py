"""Checks on an accelerator. tests/test_accelerator.py runs them in a process with the device of :mod:`.device`."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

from curlora import Calibration, CurloraConfig, Guard, GuardCallback, calibrate, convert_to_lora, redraw
from curlora.guard import perplexity
from curlora.guard.anchors import Anchors
from tests.accelerator.device import counted
from tests.models import BASES, curlora, layers, llama, randomize, tokens

HERE = "pretended"
TEXT = tokens(seed=5, batch=64, length=12)
both = pytest.mark.parametrize("base", ["llama", "gpt2"])


def close(a, b, **tolerance):
    torch.testing.assert_close(a.cpu(), b.cpu(), **{"rtol": 1e-4, "atol": 1e-5, **tolerance})


def step(model, ids):
    model(input_ids=ids, labels=ids).loss.backward()


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_the_device_does_not_mix():
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(2, 2, device=HERE) @ torch.ones(2, 2)
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(2, device=HERE, generator=torch.Generator("cpu"))
    first, again = (torch.rand(3, device=HERE, generator=torch.Generator(HERE).manual_seed(1)) for _ in range(2))
    assert torch.equal(first.cpu(), again.cpu())


@both
@pytest.mark.parametrize("moved", ["before", "after"])
def test_an_adapter_is_and_learns_what_it_does_on_the_cpu(base, moved):
    there = curlora(BASES[base]())
    here = curlora(BASES[base]().to(HERE)) if moved == "before" else copy.deepcopy(there).to(HERE)
    assert {t.device.type for t in (*here.parameters(), *here.buffers())} == {HERE}
    for (name, a), b in zip(here.state_dict().items(), there.state_dict().values(), strict=True):
        assert torch.equal(a.cpu(), b), name
    ids = tokens(batch=16, length=40)
    step(here, ids.to(HERE))
    step(there, ids)
    assert gradients(here).keys() == gradients(there).keys()
    for name, gradient in gradients(here).items():
        close(gradient, gradients(there)[name])


@pytest.mark.parametrize(
    ("dtype", "ours", "of_lora"), [(torch.float32, 8, 12), (torch.bfloat16, 12, 17)], ids=["float32", "bfloat16"]
)
def test_a_step_is_few_operators_and_waits_for_none(dtype, ours, of_lora):
    """The counts of docs/complexity.md, per layer over the frozen model, with gradients that flow to the embeddings."""

    def cost(config):
        model = llama().to(HERE, dtype).requires_grad_(False)
        if config is not None:
            model = get_peft_model(model, config)
        model.get_input_embeddings().weight.requires_grad_()
        step(model, ids)
        with counted() as counts:
            step(model, ids)
        return counts

    ids = tokens(batch=16, length=40).to(HERE)
    targets = ["gate_proj", "up_proj", "down_proj"]  # the layers without bias
    floor = cost(None)
    curlora, lora = (cost(kind(r=4, target_modules=targets)) for kind in (CurloraConfig, LoraConfig))
    assert curlora.waits == floor.waits == 0
    count = 2 * len(targets)
    assert (curlora.operators - floor.operators, lora.operators - floor.operators) == (ours * count, of_lora * count)


@both
def test_saved_and_loaded_across_devices(base, tmp_path):
    model = curlora(BASES[base]().to(HERE))
    ids = tokens()
    expected = model(ids.to(HERE)).logits
    model.save_pretrained(tmp_path)
    close(PeftModel.from_pretrained(BASES[base](), tmp_path, torch_device="cpu").eval()(ids).logits, expected)
    for low_memory in (False, True):
        loaded = PeftModel.from_pretrained(
            BASES[base]().to(HERE), tmp_path, torch_device="cpu", low_cpu_mem_usage=low_memory
        )
        assert {t.device.type for t in (*loaded.parameters(), *loaded.buffers())} == {HERE}
        assert torch.equal(loaded.eval()(ids.to(HERE)).logits, expected)


@both
def test_several_adapters_merging_and_export(base):
    there, here = (curlora(BASES[base]().to(device)) for device in ("cpu", HERE))
    ids = tokens()
    for model in (there, here):
        model.add_adapter("second", CurloraConfig(r=4))
        randomize(model, "second", seed=8)
        model.add_weighted_adapter(["default", "second"], [0.5, 0.25], "sum")
    rows = ["default", "second"]
    close(here(ids.to(HERE), adapter_names=rows).logits, there(ids, adapter_names=rows).logits)
    for model in (there, here):
        model.set_adapter("sum")
    close(here(ids.to(HERE)).logits, there(ids).logits)
    (_, ours), (_, theirs) = convert_to_lora(here), convert_to_lora(there)
    for name, tensor in ours.items():
        close(tensor, theirs[name], atol=1e-3)
    weights = [layer.get_base_layer().weight.cpu().clone() for layer in layers(here)]
    here.merge_adapter(safe_merge=True)
    close(here(ids.to(HERE)).logits, there(ids).logits, rtol=1e-3, atol=1e-4)
    here.unmerge_adapter()
    assert all(
        torch.equal(layer.get_base_layer().weight.cpu(), weight)
        for layer, weight in zip(layers(here), weights, strict=True)
    )


@both
def test_where_tensors_are_made_on_it_by_default(base, tmp_path):
    """Scripts make large models under ``with torch.device(...)``, directly on the device."""
    expected = curlora(BASES[base]())
    with torch.device(HERE):
        model = get_peft_model(BASES[base](), CurloraConfig(r=4))
    randomize(model)
    close(model.eval()(tokens().to(HERE)).logits, expected(tokens()).logits)
    with torch.device(HERE):
        calibration = calibrate(model, TEXT.unbind(), progress=False)
        assert Guard(model, calibration, budget=1e-3).drift() == pytest.approx(0, abs=1e-9)
        assert {tensor.device.type for tensor in calibration.state_dict().values()} == {"cpu"}
        calibration.save(tmp_path / "calibration.safetensors")
        anchors = Anchors()
        anchors.add({"U": torch.zeros(4, 4)}, [{"U": torch.ones(4, 4)}])
        assert anchors.penalty({"U": torch.ones(4, 4)}).device.type == HERE
    assert Calibration.load(tmp_path / "calibration.safetensors").check(model).keys() == calibration.layers.keys()
    expected.save_pretrained(tmp_path)
    with torch.device(HERE):
        on_cpu = PeftModel.from_pretrained(BASES[base]().to("cpu"), tmp_path, torch_device="cpu").eval()
    assert torch.equal(on_cpu(tokens()).logits, expected(tokens()).logits)


@both
def test_calibration_and_redraw_are_those_of_the_cpu(base, tmp_path):
    there, here = (curlora(BASES[base]().to(device)) for device in ("cpu", HERE))
    ours, theirs = (calibrate(model, TEXT.unbind(), progress=False) for model in (here, there))
    for name, moments in ours.layers.items():
        for part in ("inputs", "left", "right"):
            moment, other = getattr(moments, part), getattr(theirs.layers[name], part)
            assert moment.device.type == "cpu"
            close(moment, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))
    ours.save(tmp_path / "calibration.safetensors")
    assert Calibration.load(tmp_path / "calibration.safetensors").tokens == theirs.tokens
    fresh = [get_peft_model(BASES[base]().to(device), CurloraConfig(r=4)) for device in (HERE, "cpu")]
    for model in fresh:
        rows = tokens(seed=2, batch=8).to(model.device)
        redraw(model, [{"input_ids": row[None], "labels": row[None]} for row in rows], TEXT.unbind(), progress=False)
    for a, b in zip(*map(layers, fresh), strict=True):
        assert torch.equal(a.basis("default").indices.cpu(), b.basis("default").indices)


@both
def test_of_an_offloaded_model_too(base):
    there, here = BASES[base](), cpu_offload(BASES[base](), torch.device(HERE))
    found = []
    for model in (there, here):
        model = get_peft_model(model, CurloraConfig(r=4)).eval()
        ids = tokens(batch=4, length=9)
        redraw(model, [{"input_ids": ids, "labels": ids}], TEXT.unbind(), progress=False)
        calibration = calibrate(model, TEXT.unbind(), progress=False)
        found.append((calibration, perplexity(model, TEXT.unbind())))
    (expected, cost), (calibration, measured) = found
    assert {U.device.type for U in Guard(model, calibration).parameters} == {HERE}
    assert measured == pytest.approx(cost, rel=1e-4)
    for name, moments in expected.layers.items():
        close(calibration.layers[name].inputs, moments.inputs)
        close(calibration.layers[name].left, moments.left)


def test_a_guarded_step_waits_for_nothing_and_stays_within_the_budget():
    model = get_peft_model(llama().to(HERE), CurloraConfig(r=4))
    guard = Guard(model, calibrate(model, TEXT.unbind(), progress=False), budget=1e-3)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, foreach=True)
    guard.attach(optimizer)
    ids = tokens(batch=8).to(HERE)
    with counted() as counts:
        for _ in range(3):
            step(model, ids)
            optimizer.step()
            optimizer.zero_grad()
    assert counts.waits == 0
    assert guard.drift() == pytest.approx(1e-3, rel=1e-3)


def test_the_trainer_takes_a_model_there_that_was_guarded_on_the_cpu(tmp_path):
    model = get_peft_model(llama(), CurloraConfig(r=4))
    guard = Guard(model, calibrate(model, TEXT.unbind(), progress=False), budget=1e-3)
    rows = [{"input_ids": row, "labels": row} for row in tokens(seed=3, batch=24)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), learning_rate=0.1, num_train_epochs=2, report_to="none", disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[GuardCallback(guard)]).train()
    assert model.device.type == HERE
    assert guard.drift() == pytest.approx(1e-3, rel=1e-3)
    assert PeftModel.from_pretrained(llama(), tmp_path / "checkpoint-6", torch_device="cpu").device.type == "cpu"
