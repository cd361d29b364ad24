"""Two processes train to what one trains to, whole or sharded, and save and load it."""

import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from tests import processes
from tests.models import tokens

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
MOVED = 0.05  # U moves by more than this


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What one process makes of the same batches."""
    model = processes.train(processes.fresh())
    trainer = processes.trainer(processes.fresh(), tmp_path_factory.mktemp("one"), use_cpu=True)
    trainer.train()
    with torch.no_grad():
        logits, frozen = model.eval()(tokens()).logits, processes.base()(tokens()).logits
    assert (logits - frozen).abs().max() > 1e-3
    half = processes.train(processes.fresh(torch.bfloat16))
    guarded = processes.guarded(processes.fresh(), tmp_path_factory.mktemp("guarded"), logging_steps=1, use_cpu=True)
    budgeted = processes.budgeted(
        processes.fresh(), tmp_path_factory.mktemp("budgeted"), learning_rate=0.3, use_cpu=True
    )
    penalized = processes.penalized(
        processes.lora(), tmp_path_factory.mktemp("penalized"), learning_rate=0.05, logging_steps=1, use_cpu=True
    )
    return {
        "penalized": penalized,
        "budgeted": budgeted,
        "U": processes.trained(model),
        "U on bfloat16": processes.trained(half),
        "trainer": processes.trained(trainer.model),
        "guarded": guarded,
        "indices": processes.indices(model),
        "logits": logits,
    }


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def two(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    command = [*TORCHRUN, "-m", "tests.processes", request.param, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(folder / "found.pt", weights_only=False)
    # That it has been sharded at all.
    assert found["parameters"] == {"DTensor" if request.param == "fsdp2" else "Parameter"}
    return {**found, "folder": folder}


def same(found, expected, tolerance):
    assert found.keys() == expected.keys()
    assert all(U.abs().max() > MOVED for U in expected.values())
    return all(torch.allclose(found[name], U, rtol=0, atol=tolerance) for name, U in expected.items())


def test_a_loop_under_accelerate(one, two):
    assert same(two["U"], one["U"], 1e-12)


def test_U_is_float32_beside_weights_in_half_precision(one, two):
    assert two["dtypes"] == {torch.float32, torch.bfloat16}
    assert same(two["U on bfloat16"], one["U on bfloat16"], 1e-3)


def test_the_trainer_and_its_checkpoints(one, two):
    assert same(two["trainer"], one["trainer"], 1e-12)
    assert same(two["resumed"], one["trainer"], 1e-12)


def test_the_guard_holds_what_it_holds_in_one_process(one, two):
    expected, found = one["guarded"], two["guarded"]
    assert 0 < expected["kept"][0] < 1, "the limit should bind"
    assert all(U.abs().max() > 0.001 for U in expected["U"].values())
    for part in ("U", "kept", "drifts", "end", "calibrations"):
        # Gradients of rows and perplexities are summed up in float32, in another order.
        torch.testing.assert_close(found[part], expected[part], rtol=1e-4, atol=1e-6)


def test_a_budget_is_kept_as_in_one_process(one, two):
    expected, found = one["budgeted"], two["budgeted"]
    assert 0 < expected["figures"][1] < 1, "the limit should bind"
    assert torch.equal(found["indices"], expected["indices"])
    assert not torch.equal(expected["indices"], one["indices"]), "columns and rows should have been chosen"
    for part in ("U", "figures", "texts"):
        torch.testing.assert_close(found[part], expected[part], rtol=1e-4, atol=1e-6)
    # Which answers are drawn depends on an example's place in its process.
    assert found["anchors"].keys() == expected["anchors"].keys()
    assert all(bool(moment.isfinite().all()) for moment in found["anchors"].values())


def test_a_training_within_a_budget_is_resumed_to_the_bit(two):
    expected, found = two["budgeted"], two["budgeted, resumed"]
    assert found["U"].keys() == expected["U"].keys()
    assert all(torch.equal(found["U"][name], U) for name, U in expected["U"].items())
    assert found["anchors"].keys() == expected["anchors"].keys()
    assert all(torch.equal(found["anchors"][name], moment) for name, moment in expected["anchors"].items())
    for part in ("indices", "figures", "texts"):
        assert torch.equal(found[part], expected[part]), part


def test_a_budget_of_lora_is_kept_as_in_one_process(one, two):
    """Sharded parameters have no whole gradients that a penalty could add to."""
    expected, found = one["penalized"], two["penalized"]
    if isinstance(found, str):
        assert "FSDP or DeepSpeed shards them. Train with DDP" in found
        return
    assert 0 < expected["figures"][0] < 1, "the limit should bind"
    assert expected["logs"].max() > 0.001, "the penalty should act"
    for part in ("trained", "figures", "logs"):
        torch.testing.assert_close(found[part], expected[part], rtol=1e-4, atol=1e-6)


def test_every_process_has_the_text_that_the_base_writes_in_the_first(one, two):
    assert torch.equal(two["guarded"]["own text"], one["guarded"]["own text"])


def test_columns_and_rows_are_drawn_alike_whatever_the_generators_say(one, two):
    for drawn in two["indices"]:
        assert torch.equal(drawn, one["indices"])


def test_what_is_saved_is_an_adapter_like_any_other(one, two):
    loaded = PeftModel.from_pretrained(processes.base(), two["folder"] / "saved").eval()
    assert torch.allclose(loaded(tokens()).logits, one["logits"], rtol=0, atol=1e-12)


def test_loading_into_what_is_shared_out(one, two):
    before, after = two["after load_state"]
    assert torch.allclose(before, one["logits"], rtol=0, atol=1e-12)
    assert torch.equal(after, before)
    assert torch.allclose(two["second"], one["logits"], rtol=0, atol=1e-12)


def test_merging_into_what_is_shared_out(one, two):
    assert torch.allclose(two["merged"], one["logits"], rtol=0, atol=1e-12)
    with torch.no_grad():
        frozen = processes.base()(tokens()).logits
    assert torch.allclose(two["unmerged"], frozen, rtol=0, atol=1e-12)


def test_the_trainers_checkpoint_holds_the_adapter_alone(two):
    (folder,) = two["folder"].glob("trainer/checkpoint-4")
    parts = {name.partition(".curlora_U.")[2] for name in load_file(folder / "adapter_model.safetensors")}
    assert parts == {"weight", "indices", "fingerprint"}
