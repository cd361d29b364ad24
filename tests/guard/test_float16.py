"""Training in float16 with a GradScaler, including steps that overflow; it runs on the CPU like on a GPU."""

import math

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from peft import get_peft_model
from torch.amp import GradScaler

from curlora import CurloraConfig, Guard, calibrate, redraw
from curlora.guard.anchors import Anchors
from tests.models import curlora, layers, llama, tokens

pytestmark = pytest.mark.filterwarnings("ignore:The guard's text has")
# A fused optimizer itself divides the gradients by the scale, and itself skips a step that overflows.
both_kinds = pytest.mark.parametrize("fused", [False, True])

BUDGET, SCALE = 1e-2, 2.0**16
ROWS = tokens(seed=3, batch=4, length=12)


@pytest.fixture(scope="module")
def calibration():
    return calibrate(untrained(), list(tokens(batch=32, length=16)), progress=False)


def untrained():
    model = curlora(llama(initializer_range=0.2))
    for layer in layers(model):
        layer.curlora_U["default"].weight.data.zero_()
    return model


def guarded(calibration, fused, anchors=None, rate=0.05):
    model = untrained()
    guard = Guard(model, calibration, budget=BUDGET, anchors=anchors)
    optimizer = torch.optim.AdamW(guard.parameters, lr=rate, fused=fused)
    guard.attach(optimizer)
    return model, guard, optimizer


def put_gradients(guard, step, scale):
    generator = torch.Generator().manual_seed(step)
    for U in guard.parameters:
        U.grad = scale * torch.randn(U.shape, generator=generator)


def scale_of(scaler):
    """The loss scale. A scaler must have scaled a tensor before its first step."""
    return scaler.scale(torch.ones(())).item()


def values(guard):
    return [U.detach().clone() for U in guard.parameters]


def same(guard, others):
    return all(torch.equal(U, other) for U, other in zip(guard.parameters, others, strict=True))


@both_kinds
@pytest.mark.parametrize("unscaled_by_hand", [False, True])
def test_a_step_is_that_of_the_gradients_without_the_scale(fused, unscaled_by_hand, calibration):
    """Bitwise equal, because a factor of a power of two does not round."""
    _, guard, optimizer = guarded(calibration, fused)
    _, plain, other = guarded(calibration, fused)
    scaler = GradScaler("cpu", init_scale=SCALE, growth_interval=2)  # the scale grows during the test
    for step in range(6):
        put_gradients(guard, step, scale_of(scaler))
        put_gradients(plain, step, 1.0)
        if unscaled_by_hand:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        other.step()
        assert same(guard, values(plain))
        assert guard.drift() == plain.drift() > 0
    assert guard.drift() == pytest.approx(BUDGET, rel=1e-5)


@both_kinds
@pytest.mark.parametrize("unscaled_by_hand", [False, True])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_step_that_overflows_moves_nothing(fused, unscaled_by_hand, bad, calibration):
    """Parameters and prediction are unchanged, and so is the next step."""
    _, guard, optimizer = guarded(calibration, fused)
    _, plain, other = guarded(calibration, fused)
    scaler = GradScaler("cpu", init_scale=SCALE)
    for step in range(5):
        put_gradients(guard, step, scale_of(scaler))
        before, drift, scale = values(guard), guard.drift(), scaler.get_scale()
        if step == 2:
            guard.parameters[1].grad[0, 1] = bad
        if unscaled_by_hand:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if step == 2:
            assert same(guard, before)
            assert guard.drift() == drift
            assert scaler.get_scale() == scale / 2
        else:
            put_gradients(plain, step, 1.0)
            other.step()
        assert same(guard, values(plain))


@both_kinds
def test_earlier_tasks_pull_as_hard_as_without_the_scale(fused, calibration):
    anchors = Anchors()
    by_name = {layer.name: layer for layer in layers(untrained())}
    r = {name: layer.curlora_U["default"].weight.shape[0] for name, layer in by_name.items()}
    anchors.add_moments(
        {name: torch.ones(r[name], r[name]) for name in by_name},
        {name: (torch.eye(r[name]).double(), torch.eye(r[name]).double()) for name in by_name},
    )
    _, guard, optimizer = guarded(calibration, fused, anchors)
    _, plain, other = guarded(calibration, fused, anchors)
    _, free, third = guarded(calibration, fused)
    scaler = GradScaler("cpu", init_scale=SCALE)
    for step in range(3):
        put_gradients(guard, step, 1e-3 * scale_of(scaler))
        put_gradients(plain, step, 1e-3)
        put_gradients(free, step, 1e-3)
        scaler.step(optimizer)
        scaler.update()
        other.step()
        third.step()
    for U, one, without in zip(guard.parameters, plain.parameters, free.parameters, strict=True):
        torch.testing.assert_close(U, one)
        assert not torch.allclose(one, without)


@both_kinds
def test_as_accelerate_does_it(fused, calibration):
    _, guard, optimizer = guarded(calibration, fused)
    guard.detach()
    Accelerator(cpu=True)
    scaler = GradScaler("cpu", init_scale=SCALE)
    wrapped = AcceleratedOptimizer(optimizer, device_placement=False, scaler=scaler)
    guard.attach(wrapped)
    put_gradients(guard, 0, scale_of(scaler))
    wrapped.step()
    first = values(guard)
    assert guard.drift() > 0
    put_gradients(guard, 1, math.inf)
    wrapped.step()
    assert same(guard, first)
    assert wrapped.step_was_skipped or fused


@both_kinds
def test_a_loop_learns_within_the_budget(fused, calibration):
    model, guard, optimizer = guarded(calibration, fused)
    scaler, losses, skipped = GradScaler("cpu", init_scale=2.0**40, growth_interval=50), [], 0
    for _ in range(40):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = model(input_ids=ROWS, labels=ROWS).loss
        scaler.scale(loss).backward()
        before, scale = values(guard), scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
        if scaler.get_scale() < scale:
            skipped += 1
            assert same(guard, before)
        assert guard.drift() <= BUDGET * (1 + 1e-4)
    assert 10 < skipped < 35  # the initial scale is far too large
    assert losses[-1] < losses[0] - 0.1
    assert guard.drift() > 0.9 * BUDGET


def test_columns_and_rows_are_chosen_as_in_float32():
    """The gradients of a mean over many tokens are so small that they underflow in float16."""
    text, rows, chosen = list(tokens(batch=32, length=16)), tokens(seed=3, batch=64, length=40), []
    for half in (False, True):
        base = llama(initializer_range=0.2)
        with torch.no_grad():
            base.lm_head.weight.mul_(3e-4)
        model = get_peft_model(base, CurloraConfig(r=8))
        with torch.autocast("cpu", torch.float16, enabled=half):
            redraw(model, [{"input_ids": rows, "labels": rows}], text, progress=False)
        chosen.append([set(side.tolist()) for layer in layers(model) for side in layer.basis("default").indices])
    shared = [len(one & other) / 8 for one, other in zip(*chosen, strict=True)]
    assert sum(shared) / len(shared) > 0.95
