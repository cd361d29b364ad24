"""Training in the guard's coordinates, against the formulas and against measured divergences."""

import math

import pytest
import torch
from torch.nn.functional import kl_div

from curlora import CurloraLayer
from curlora.guard import Guard, GuardError, calibrate, redraw
from tests.models import BASES, curlora, tokens

pytestmark = pytest.mark.filterwarnings("ignore:The guard's text has")

MAPS = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}
# The layers that matter: queries hardly change the predictions of a random model.
USED = ["v_proj", "o_proj", "down_proj"]


def fresh(base="llama", **config):
    model = curlora(BASES[base](), **{"target_modules": MAPS[base], **config})
    for U in mixings(model):
        U.data.zero_()
    return model


def mixings(model):
    return [m.curlora_U["default"].weight for m in model.modules() if isinstance(m, CurloraLayer)]


def calibrated(model, batch=8, length=20, **options):
    return calibrate(model, [{"input_ids": tokens(seed=1, batch=batch, length=length)}], progress=False, **options)


def train(model, guard, steps=5, make=torch.optim.AdamW, lr=0.02, **options):
    optimizer = make(mixings(model), lr=lr, **options)
    if guard is not None:
        guard.attach(optimizer)
    ids = tokens(seed=2, batch=4, length=6)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
    return loss.item()


def sides(moments, damping):
    """``L`` and ``R`` of the Fisher information ``L (x) R``, damped."""
    right = moments.right / moments.left.trace()
    return (m + damping * m.trace() / 4 * torch.eye(4) for m in (moments.left, right))


def kl_from_base(model, batch=8, length=20):
    ids = tokens(seed=1, batch=batch, length=length)
    with torch.no_grad():
        new = model(input_ids=ids).logits[:, :-1].double().log_softmax(-1).flatten(0, 1)
        with model.disable_adapter():
            base = model(input_ids=ids).logits[:, :-1].double().log_softmax(-1).flatten(0, 1)
    return float(kl_div(new, base, reduction="batchmean", log_target=True))


@pytest.mark.parametrize("base", MAPS)
def test_drift_is_the_damped_quadratic_form_of_u(base):
    """``1/2 tr(M^T A M S)`` with ``M = alpha U``, transposed in a Conv1D, in float64."""
    model = fresh(base, alpha=2.5)
    calibration = calibrated(model)
    guard = Guard(model, calibration, damping=0.3)
    expected = 0.0
    for layer in (m for m in model.modules() if isinstance(m, CurloraLayer)):
        U = layer.curlora_U["default"].weight.data.normal_(std=0.1).double()
        M = 2.5 * (U.T if base == "gpt2" else U)
        moments = calibration.layers[layer.name]
        left, right = sides(moments, 0.3 + 1 / calibration.rows)
        expected += float((M.T @ left @ M @ right).trace()) / 2
    assert guard.drift() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("base", MAPS)
def test_without_gradients_drift_is_the_shift_of_the_output(base):
    """``1/2 E||shift||^2 / E||y0||^2`` of the lowest layer, whose inputs do not change."""
    options = {"layers_to_transform": [0], "layers_pattern": "layers" if base == "llama" else "h"}
    model = fresh(base, **options)
    guard = Guard(model, calibrated(model, gradients=False), damping=1e-9)
    guard.damping = 0
    model_layers = [m for m in model.modules() if isinstance(m, CurloraLayer)]
    seen = {}
    for layer in model_layers:
        layer.curlora_U["default"].weight.data.normal_(std=0.1)
        layer.base_layer.register_forward_hook(lambda m, i, o, n=layer.name: seen.__setitem__(n, [o]))
        layer.register_forward_hook(lambda m, i, o, n=layer.name: seen[n].append(o))
    with torch.no_grad():
        model(input_ids=tokens(seed=1, batch=8, length=20))
    expected = 0.0
    for layer in model_layers:
        y0, y = (t.double() for t in seen[layer.name])
        bias = layer.get_base_layer().bias
        size = (y0 - (0 if bias is None else bias)).square().sum()
        expected += float((y - y0).square().sum() / size) / 2
    # The remaining damping, r / tokens, is a few per cent here.
    assert guard.drift() == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("base", MAPS)
def test_the_prediction_is_what_the_model_says(base):
    """Measured against predicted KL, for small steps of one layer: only the Kronecker product is approximate."""
    targets = {"llama": USED, "gpt2": ["c_attn", "c_proj"]}[base]
    model = fresh(base, target_modules=targets).double()
    guard = Guard(model, calibrated(model, batch=64), damping=1e-3)
    ratios = []
    for number, U in enumerate(mixings(model)):
        U.data.normal_(generator=torch.Generator().manual_seed(number))
        U.data.mul_((1e-6 / guard.drift()) ** 0.5)
        ratios.append(kl_from_base(model, batch=64) / 1e-6)
        U.data.zero_()
    assert all(0.6 < ratio < 1.6 for ratio in ratios), ratios


@pytest.mark.parametrize("rows", [1, 4, 16, 64])
def test_little_text_is_damped_for_what_it_does_not_show(rows):
    """On other text, without more damping for few rows, the KL of random steps is over 10 times the prediction."""
    model = fresh(r=16, target_modules=USED).double()
    ratios = []
    for seed in range(4):
        data = [{"input_ids": tokens(seed=10 + seed, batch=rows, length=20)}]
        guard = Guard(model, calibrate(model, data, progress=False, seed=seed))
        guard._enter()
        for U in mixings(model):  # equally likely directions in the guard's coordinates
            U.data.normal_(generator=torch.Generator().manual_seed(seed))
        guard._leave()
        scale = (1e-6 / guard.drift()) ** 0.5
        for U in mixings(model):
            U.data.mul_(scale)
        ratios.append(kl_from_base(model, batch=64) / 1e-6)
        for U in mixings(model):
            U.data.zero_()
    assert 0.1 < sum(ratios) / 4 < 1.0, ratios


@pytest.mark.parametrize("base", MAPS)
def test_a_plain_step_goes_along_the_damped_natural_gradient(base):
    """With SGD ``dU = -lr * 2/N * L^-1 G R^-1``, computed here by solving instead of by square roots."""
    model = fresh(base, alpha=1.7)
    calibration = calibrated(model)
    guard = Guard(model, calibration, damping=0.2)
    ids = tokens(seed=2, batch=4, length=6)
    model(input_ids=ids, labels=ids).loss.backward()
    found = [m for m in model.modules() if isinstance(m, CurloraLayer)]
    gradients = [layer.curlora_U["default"].weight.grad.double().clone() for layer in found]
    optimizer = torch.optim.SGD(mixings(model), lr=1e-3)
    guard.attach(optimizer)
    optimizer.step()
    for layer, gradient in zip(found, gradients, strict=True):
        moments = calibration.layers[layer.name]
        left, right = sides(moments, 0.2 + 1 / calibration.rows)
        if base == "gpt2":
            left, right = right, left
        natural = torch.linalg.solve(left, torch.linalg.solve(right, gradient.T).T)
        expected = -1e-3 * 2 / guard.parameter_count / 1.7**2 * natural
        actual = layer.curlora_U["default"].weight.double()
        assert (actual - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize("r", [2, 4, 8])
@pytest.mark.parametrize("targets", [["q_proj"], "all-linear"])
def test_the_first_step_of_adam_costs_the_square_of_the_learning_rate(r, targets):
    model = curlora(BASES["llama"](), r=r, target_modules=targets)
    for U in mixings(model):
        U.data.zero_()
    guard = Guard(model, calibrated(model))
    train(model, guard, steps=1, lr=0.02, weight_decay=0.0)
    assert guard.drift() == pytest.approx(0.02**2, rel=1e-3)


def test_alpha_makes_no_difference():
    changes = []
    for alpha in (1.0, 8.0):
        model = fresh(alpha=alpha)
        train(model, Guard(model, calibrated(model), budget=1e-3))
        changes.append([alpha * U.detach() for U in mixings(model)])
    for one, other in zip(*changes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor])
def test_the_budget_is_never_left(make):
    model = fresh()
    guard = Guard(model, calibrated(model), budget=2e-4)
    optimizer = make(mixings(model), lr=1.0)
    guard.attach(optimizer)
    ids = tokens(seed=2, batch=4, length=6)
    for _ in range(10):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        assert guard.drift() <= 2e-4 * (1 + 1e-4)
    assert guard.drift() > 1e-4  # the budget is used


def test_a_rise_of_perplexity_is_a_budget_in_nats():
    model = fresh()
    calibration = calibrated(model)
    for one_percent in (0.01, "1%"):
        assert Guard(model, calibration, max_perplexity_increase=one_percent).budget == pytest.approx(math.log(1.01))


def test_detached_the_optimizer_trains_u_again():
    model = fresh()
    guard = Guard(model, calibrated(model))
    optimizer = torch.optim.SGD(mixings(model), lr=1.0)
    guard.attach(optimizer)
    guard.detach()
    for U in mixings(model):
        U.grad = torch.ones_like(U)
    optimizer.step()
    assert all(torch.equal(U, -torch.ones_like(U)) for U in mixings(model))


def test_forgetting_counts_from_what_the_adapter_was_when_it_was_calibrated():
    model = fresh(target_modules=USED)
    train(model, None, lr=2.0)
    learned = [U.detach().clone() for U in mixings(model)]
    assert all(U.any() for U in learned)
    guard = Guard(model, calibrated(model), budget=1e-9)
    assert guard.drift() == 0
    train(model, guard, lr=1.0)
    assert 0 < guard.drift() <= 1e-9 * (1 + 1e-2)
    for U, before in zip(mixings(model), learned, strict=True):
        # The learned values are still there.
        assert 0 < (U - before).norm() < 0.2 * before.norm()


@pytest.mark.parametrize("given", ["positional", "keyword"])
def test_a_closure_runs_on_u(given):
    models = fresh(target_modules=USED), fresh(target_modules=USED)
    calibration = calibrated(models[0])
    ids = tokens(seed=2, batch=4, length=6)
    for model, closed in zip(models, (False, True), strict=True):
        guard = Guard(model, calibration, budget=1e-3)
        optimizer = torch.optim.AdamW(mixings(model), lr=0.02)
        guard.attach(optimizer)

        def loss(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            return loss

        for _ in range(4):
            if not closed:
                loss()
                optimizer.step()
            elif given == "positional":
                optimizer.step(loss)
            else:
                optimizer.step(closure=loss)
    for one, other in zip(*map(mixings, models), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_an_optimizer_that_needs_closures_learns_within_the_budget():
    model = fresh()
    guard = Guard(model, calibrated(model), budget=1e-3)
    optimizer = torch.optim.LBFGS(mixings(model), lr=0.1)
    guard.attach(optimizer)
    ids = tokens(seed=2, batch=4, length=6)
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
        return loss

    for _ in range(3):
        optimizer.step(closure)
    assert losses[-1] < losses[0]
    assert 0 < guard.drift() <= 1e-3 * (1 + 1e-3)


def test_a_calibration_of_another_moment_does_not_undo_what_was_learned():
    trained = fresh(target_modules=USED)
    train(trained, None, lr=0.5)
    calibration = calibrated(trained)
    with pytest.raises(GuardError, match=r"nats from where it was calibrated, further than the budget of 1e-06"):
        Guard(fresh(target_modules=USED), calibration, budget=1e-6)
    Guard(fresh(target_modules=USED), calibration)  # without a budget nothing is taken back


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_far_step_of_half_precision_is_taken_back(dtype):
    """The square of the step overflows the dtype."""
    model = fresh(r=16, target_modules="all-linear")
    calibration = calibrated(model)
    model.to(dtype)
    guard = Guard(model, calibration, budget=1e-3)
    guard._enter()
    for U in mixings(model):
        U.data.fill_(8.0)
    guard._after()
    assert 0 < guard.drift() < 3e-3


def test_a_step_inside_of_autocast_is_the_same_step():
    """Some loops run the whole step under autocast. In bfloat16, rounding of ``U`` would undo small steps."""
    ends = []
    for autocast in (False, True):
        model = fresh()
        guard = Guard(model, calibrated(model), budget=1e-2)
        optimizer = torch.optim.SGD(mixings(model), lr=0.05)
        guard.attach(optimizer)
        ids = tokens(seed=2, batch=4, length=6)
        for _ in range(5):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                optimizer.step()
                drift = guard.drift()
        ends.append((drift, mixings(model)))
    assert ends[0][0] == ends[1][0] > 0
    assert all(torch.equal(a, b) for a, b in zip(ends[0][1], ends[1][1], strict=True))


def test_gradients_are_those_of_u_again_after_a_step():
    model = fresh()
    guard = Guard(model, calibrated(model))
    optimizer = torch.optim.SGD(mixings(model), lr=1e-3)
    guard.attach(optimizer)
    ids = tokens(seed=2, batch=4, length=6)
    model(input_ids=ids, labels=ids).loss.backward()
    before = [U.grad.clone() for U in mixings(model)]
    optimizer.step()
    assert all(torch.equal(U.grad, was) for U, was in zip(mixings(model), before, strict=True))


def test_a_step_that_was_broken_off_is_made_good_by_detach():
    model = fresh().double()  # in float64, so that the tolerance only covers the rounding of the two maps
    guard = Guard(model, calibrated(model))
    train(model, guard, steps=2)
    guard.detach()
    before = [U.detach().clone() for U in mixings(model)]

    class Broken(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            raise RuntimeError("broken")

    optimizer = Broken(mixings(model), lr=1.0)
    guard.attach(optimizer)
    with pytest.raises(RuntimeError, match="broken"):
        optimizer.step()
    guard.detach()
    for U, was in zip(mixings(model), before, strict=True):
        torch.testing.assert_close(U, was)


def test_one_layer_that_is_not_finite_leaves_the_others():
    model = fresh()
    guard = Guard(model, calibrated(model), budget=1e-3)
    optimizer = torch.optim.SGD(mixings(model), lr=1e-3)
    guard.attach(optimizer)
    for U in mixings(model):
        U.grad = torch.ones_like(U)
    mixings(model)[0].grad[0, 0] = torch.nan
    optimizer.step()
    assert [bool(U.isfinite().all()) for U in mixings(model)] == [False, True, True, True]


def test_a_model_that_is_moved_after_the_guard_was_made():
    """Tested with the dtype; a change of the device is handled in the same way."""
    model = fresh()
    calibration = calibrated(model)
    guard = Guard(model, calibration, budget=1e-3)
    model.double()
    train(model, guard)
    other = fresh().double()
    train(other, Guard(other, calibration, budget=1e-3))
    for one, two in zip(mixings(model), mixings(other), strict=True):
        assert one.dtype == torch.float64
        assert torch.equal(one, two)


def test_two_guards_of_one_adapter_are_refused():
    model = fresh()
    calibration = calibrated(model)
    optimizer = torch.optim.SGD(mixings(model), lr=1.0)
    first, second = Guard(model, calibration), Guard(model, calibration)
    first.attach(optimizer)
    first.attach(optimizer)  # attaching twice is allowed
    with pytest.raises(GuardError, match="has another guard for adapter 'default'"):
        second.attach(optimizer)
    first.detach()
    second.attach(optimizer)


def test_training_that_was_cut_off_goes_on_the_same():
    """Only ``U`` and the optimizer's state are saved."""
    whole, cut = fresh(), fresh()
    calibration = calibrated(whole)
    ids = tokens(seed=2, batch=4, length=6)

    def steps(model, guard, optimizer, count):
        guard.attach(optimizer)
        for _ in range(count):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()

    optimizer = torch.optim.AdamW(mixings(whole), lr=0.02)
    steps(whole, Guard(whole, calibration, budget=1e-3), optimizer, 6)
    first = torch.optim.AdamW(mixings(cut), lr=0.02)
    steps(cut, Guard(cut, calibration, budget=1e-3), first, 3)
    again = fresh()
    for U, saved in zip(mixings(again), mixings(cut), strict=True):
        U.data.copy_(saved)
    second = torch.optim.AdamW(mixings(again), lr=0.02)
    second.load_state_dict(first.state_dict())
    steps(again, Guard(again, calibration, budget=1e-3), second, 3)
    for one, other in zip(mixings(whole), mixings(again), strict=True):
        assert torch.equal(one, other)


def test_a_layer_that_the_text_does_not_use_stays_as_it_is():
    model = fresh()
    calibration = calibrated(model)
    name, moments = next(iter(calibration.layers.items()))
    moments.left.zero_()
    guard = Guard(model, calibration, budget=1e-2)
    train(model, guard)
    for layer in (m for m in model.modules() if isinstance(m, CurloraLayer)):
        assert bool(layer.curlora_U["default"].weight.any()) == (layer.name != name)


def test_repeated_columns_and_rows_are_no_trouble():
    model = fresh(replacement=True, r=16)
    found = [m for m in model.modules() if isinstance(m, CurloraLayer)]
    for layer in found:
        indices = layer.basis("default").indices
        layer.redraw("default", indices[:, :1].expand_as(indices))
    guard = Guard(model, calibrated(model), budget=1e-3)
    train(model, guard, steps=3)
    assert all(torch.isfinite(U).all() for U in mixings(model))
    assert 0 < guard.drift() <= 1e-3 * (1 + 1e-4)


def test_half_precision_models_train():
    model = fresh().bfloat16()
    guard = Guard(model, calibrated(model), budget=1e-3)
    train(model, guard, steps=3)
    assert 0 < guard.drift() < 2e-3


@pytest.mark.parametrize("options", [{"alpha": 0}, {"alpha_pattern": {"layers.0.*q_proj": 0.0}}])
def test_a_layer_whose_update_is_scaled_by_zero_is_refused_before_anything_is_measured(options):
    model, sound = fresh(**options), fresh()
    calibration = calibrated(sound)
    for refused in (
        lambda: calibrated(model),
        lambda: redraw(model, [], [], progress=False),
        lambda: Guard(model, calibration),
    ):
        with pytest.raises(GuardError, match="'model.layers.0.self_attn.q_proj' has a scaling of 0"):
            refused()
    guard = Guard(sound, calibration)
    next(m for m in sound.modules() if isinstance(m, CurloraLayer)).set_scale("default", 0)
    with pytest.raises(GuardError, match="has a scaling of 0"):
        train(sound, guard)


def test_bad_input_is_named():
    model = fresh()
    calibration = calibrated(model)
    with pytest.raises(GuardError, match="give one of them"):
        Guard(model, calibration, budget=1.0, max_perplexity_increase=0.1)
    for options, message in (
        ({"budget": 0.0}, "must be a positive number"),
        ({"damping": math.nan}, "must be a positive number"),
        ({"max_perplexity_increase": -0.1}, "must be a positive share"),
        ({"max_perplexity_increase": 1}, "would let perplexity rise by 100%"),
    ):
        with pytest.raises(GuardError, match=message):
            Guard(model, calibration, **options)
    with pytest.raises(GuardError, match="does not train 3 of the adapter's 4 matrices U"):
        Guard(model, calibration).attach(torch.optim.SGD(mixings(model)[:1], lr=1.0))
    for moments in calibration.layers.values():
        moments.left.zero_()
    with pytest.raises(GuardError, match="uses none of the adapted layers"):
        Guard(model, calibration)
