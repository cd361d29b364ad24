"""The choice between kernels and PyTorch's operators, and the kernels under other features of PyTorch."""

import copy
import runpy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from curlora import functional, kernels
from curlora._compat import transformed_by_torch_func
from curlora.functional import gather_update, gather_update_by_row
from curlora.kernels import backward, forward, mixed_batch
from tests.kernels.problems import assert_near, exact, make, sizes
from tests.models import curlora, layers, llama, randomize, tokens


@pytest.fixture(autouse=True)
def kernels_wherever_they_run():
    with kernels.use("triton"):
        yield


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels that were launched."""
    seen = []
    for module in (forward, backward, mixed_batch):
        launch, name = module.launch, module.__name__.rpartition(".")[2]
        monkeypatch.setattr(module, "launch", lambda *a, n=name, f=launch, **k: seen.append(n) or f(*a, **k))
    return seen


def leaves(problem):
    """Return the problem's arguments, with ``output`` and ``scaled_U`` as leaves that require gradients."""
    output, scaled_U, *rest = problem.forward
    return output.clone().requires_grad_(), scaled_U.clone().requires_grad_(), *rest


def gradients(problem, f=gather_update):
    output, scaled_U, *rest = leaves(problem)
    result = f(output, scaled_U, *rest)
    result.backward(problem.grad)
    return [result.detach(), output.grad, scaled_U.grad]


def exact_gradients(problem):
    output, scaled_U, factor, index, offset = leaves(problem)
    result = exact(output, scaled_U, factor, index, offset)[0]
    return [result.detach(), *torch.autograd.grad((result * problem.grad).sum(), [output, scaled_U])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lead", [(7,), (2, 3), ()])
def test_both_kernels_behind_one_call(dtype, lead, launches):
    problem = make(lead, m=20, r=5, dtype=dtype)
    size, _, size_of_output, size_of_U = sizes(problem)
    for got, expected, entries in zip(
        gradients(problem), exact_gradients(problem), (size, size_of_output, size_of_U), strict=True
    ):
        assert_near(got, expected, entries, dtype)
    assert launches == ["forward", "backward"]


def test_gradcheck_first_and_second_order(launches):
    """Only the interpreter runs kernels in float64. PyTorch's operators compute the second derivatives."""
    problem = make((4,), m=7, r=3, dtype=torch.float64, dtype_U=torch.float64)
    output, scaled_U, *rest = leaves(problem)

    def f(output, scaled_U):
        return gather_update(output, scaled_U, *rest)

    assert torch.autograd.gradcheck(f, (output, scaled_U))
    assert {"forward", "backward"} == set(launches)
    assert torch.autograd.gradgradcheck(f, (output, scaled_U))


def test_a_gradient_for_the_bias():
    problem = make((4,), m=7, r=3, dtype=torch.float64, dtype_U=torch.float64)
    offset = problem.offset.requires_grad_()
    assert torch.autograd.gradcheck(lambda offset: gather_update(*problem.forward[:4], offset), offset)


def test_the_factor_is_a_constant():
    problem = make((4,), m=7, r=3)
    problem.factor.requires_grad_()
    assert not gather_update(*problem.forward).requires_grad
    gradients(problem)
    assert problem.factor.grad is None


def test_z_is_kept_for_U_alone():
    problem = make((100,), m=20, r=4)
    output, scaled_U, *rest = leaves(problem)
    for needs, expected in ((scaled_U, [(100, 4)]), (scaled_U.detach(), [])):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            gather_update(output, needs, *rest)
        assert [tuple(t.shape) for t in saved if len(t) == 100] == expected


def test_no_gradient_no_graph(launches):
    problem = make((4,), m=7, r=3)
    with torch.no_grad():
        assert_near(gather_update(*leaves(problem)), exact(*problem.forward)[0], sizes(problem)[0], torch.float32)
    assert launches == ["forward"]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant, launches):
    problem = make((4,), m=7, r=3)
    again = gradients(problem, lambda *a: checkpoint(gather_update, *a, use_reentrant=reentrant))
    for got, expected in zip(again, gradients(problem), strict=True):
        assert torch.equal(got, expected)
    assert launches == ["forward", "forward", "backward", "forward", "backward"]


def test_autocast_changes_nothing():
    problem = make((4,), m=7, r=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = gradients(problem)
    for got, expected in zip(cast, gradients(problem), strict=True):
        assert torch.equal(got, expected)


def test_the_result_can_be_changed_in_place():
    problem = make((2, 3), m=7, r=3)
    changed = gradients(problem, lambda *a: gather_update(*a).relu_())
    for got, expected in zip(changed, gradients(problem, lambda *a: gather_update(*a).relu()), strict=True):
        assert torch.equal(got, expected)


def test_transforms_of_torch_func():
    problem = make((4,), m=7, r=3, dtype=torch.float64, dtype_U=torch.float64)
    output, scaled_U, *rest = problem.forward

    def loss(output, scaled_U):
        return (gather_update(output, scaled_U, *rest) * problem.grad).sum()

    def row_loss(output, scaled_U):
        return gather_update(output, scaled_U, *rest).sin().sum()

    expected = exact_gradients(problem)[1:]
    for got, one in zip(torch.func.grad(loss, (0, 1))(output, scaled_U), expected, strict=True):
        torch.testing.assert_close(got, one)
    by_row = torch.func.vmap(torch.func.grad(row_loss, 1), (0, None))(output, scaled_U)
    one_by_one = torch.stack([torch.func.grad(row_loss, 1)(row, scaled_U) for row in output])
    torch.testing.assert_close(by_row, one_by_one)
    matrices = torch.stack([scaled_U, 2 * scaled_U])
    batched = torch.func.vmap(lambda U: gather_update(output, U, *rest))(matrices)
    torch.testing.assert_close(batched, torch.stack([exact(output, U, *rest)[0] for U in matrices]))
    tangent = torch.randn_like(output)
    _, forward_mode = torch.func.jvp(lambda y: gather_update(y, scaled_U, *rest), (output,), (tangent,))
    torch.testing.assert_close(forward_mode, exact(tangent, scaled_U, *rest[:2], None)[0])
    hessian = torch.func.jacrev(torch.func.jacrev(row_loss, 1), 1)(output, scaled_U)
    reference = torch.func.hessian(lambda y, U: exact(y, U, *rest)[0].sin().sum(), 1)(output, scaled_U)
    torch.testing.assert_close(hessian, reference)


def test_where_torch_does_not_tell_of_transforms(monkeypatch, launches):
    """Without torch's private function, only PyTorch's operators are used, for which ``torch.func`` has rules."""
    assert not transformed_by_torch_func()
    with monkeypatch.context() as patch:
        patch.delattr(torch._C, "_are_functorch_transforms_active")  # torch itself needs it afterwards
        assert transformed_by_torch_func()
    for module in (functional, kernels):
        monkeypatch.setattr(module, "transformed_by_torch_func", lambda: True)
    problem = make((4,), m=7, r=3)
    for got, expected in zip(gradients(problem), exact_gradients(problem), strict=True):
        torch.testing.assert_close(got, expected.float())
    assert launches == []


def test_forward_mode_without_torch_func():
    problem = make((4,), m=7, r=3, dtype=torch.float64, dtype_U=torch.float64)
    output, scaled_U, *rest = problem.forward
    tangent = torch.randn_like(output)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(output, tangent)
        got = torch.autograd.forward_ad.unpack_dual(gather_update(dual, scaled_U, *rest)).tangent
    torch.testing.assert_close(got, exact(tangent, scaled_U, *rest[:2], None)[0])


def test_rows_with_matrices_of_their_own(launches):
    problem = make((3, 5), m=20, r=4, rows=3)
    expected, size = exact(*problem.forward)[0], sizes(problem)[0]
    assert_near(gather_update_by_row(*problem.forward), expected, size, torch.float32)
    assert launches == ["mixed_batch"]
    problem.scaled_U.requires_grad_()  # there is no kernel for gradients by row
    result = gather_update_by_row(*problem.forward)
    assert_near(result.detach(), expected, size, torch.float32)
    assert result.requires_grad
    assert launches == ["mixed_batch"]


# Where kernels are chosen


def test_ranks_that_no_kernel_takes(launches):
    problem = make((3,), m=20, r=257)
    assert_near(gather_update(*problem.forward), exact(*problem.forward)[0], sizes(problem)[0], torch.float32)
    assert launches == []


def test_pytorch_is_the_default(launches):
    problem = make((3,), m=20, r=4)
    with kernels.use("torch"):
        assert_near(gather_update(*problem.forward), exact(*problem.forward)[0], sizes(problem)[0], torch.float32)
    assert launches == []
    assert runpy.run_path(kernels.__file__)["_choice"] == "torch"


def test_a_choice_that_there_is_not():
    with pytest.raises(ValueError, match="'cuda'; it must be one of 'torch', 'triton'"), kernels.use("cuda"):
        pass


@pytest.mark.parametrize("value", ["triton", "cuda"])
def test_the_environment_chooses(value, monkeypatch):
    monkeypatch.setenv("CURLORA_KERNELS", value)
    if value == "triton":
        assert runpy.run_path(kernels.__file__)["_choice"] == "triton"
    else:
        with pytest.raises(ValueError, match="variable CURLORA_KERNELS is 'cuda'; it must be one of"):
            runpy.run_path(kernels.__file__)


def test_tensors_of_other_types_are_left_to_pytorch(launches):
    class Other(torch.Tensor):
        pass

    problem = make((3,), m=20, r=4)
    result = gather_update(problem.output.as_subclass(Other), *problem.forward[1:])
    assert isinstance(result, Other)
    assert launches == []


# Models


@pytest.fixture
def small():
    base = llama()
    base.model.layers = base.model.layers[:1]
    return curlora(base, target_modules="all-linear")


def step(call, model):
    ids = tokens()
    model.zero_grad()
    logits = call(input_ids=ids).logits
    logits.square().mean().backward()
    return [logits.detach(), *(U.weight.grad for layer in layers(model) for U in layer.curlora_U.values())]


def test_a_compiled_model_is_one_graph(small, launches):
    got = step(torch.compile(small, fullgraph=True, backend="aot_eager"), small)
    assert launches.count("forward") == launches.count("backward") == len(layers(small)) == 7
    with kernels.use("torch"):
        expected = step(small, small)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        compiled = torch.compile(small, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(input_ids=tokens()).logits, expected[0], rtol=1e-4, atol=1e-6)


def test_one_graph_for_any_number_of_tokens(launches):
    layer = layers(curlora(llama()))[0]
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (2, 30, 17):
        x = torch.randn(3, length, layer.in_features, requires_grad=True)
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-5)
    exported = torch.export.export(
        layer, (torch.randn(7, layer.in_features),), dynamic_shapes={"x": {0: torch.export.Dim("tokens", max=100)}}
    ).module()
    x = torch.randn(50, layer.in_features)
    torch.testing.assert_close(exported(x), layer(x))
    assert "forward" in launches


def test_a_batch_with_an_adapter_for_each_row(small, launches):
    for i in range(3):
        small.add_adapter(f"a{i}", copy.deepcopy(small.peft_config["default"]))
        randomize(small, f"a{i}", seed=i)
    names, ids = ["a0", "a2", "a0", "__base__", "a1"], tokens(batch=5)
    with torch.no_grad():
        got = small(ids, adapter_names=names).logits
        assert launches == ["mixed_batch"] * len(layers(small))
        with kernels.use("torch"):
            torch.testing.assert_close(got, small(ids, adapter_names=names).logits, rtol=1e-4, atol=1e-5)


def test_a_sharded_model(small, launches, tmp_path):
    """FSDP2 with one process."""
    with kernels.use("torch"):
        expected = step(small, small)
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        fully_shard(small.base_model.model.model.layers[0], mesh=mesh)
        fully_shard(small, mesh=mesh)
        got = step(small, small)
    finally:
        dist.destroy_process_group()
    assert launches.count("forward") == launches.count("backward") == len(layers(small))
    for a, b in zip(got, expected, strict=True):
        b_like = a.full_tensor() if hasattr(a, "full_tensor") else a
        torch.testing.assert_close(b_like, b, rtol=1e-4, atol=1e-6)
