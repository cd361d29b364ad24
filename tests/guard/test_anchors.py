"""Anchors on a linear problem with a known optimum."""

import pytest
import torch

from curlora.guard import Anchors, GuardError


def linear(seed, W, columns, rows, examples=40):
    """A task: inputs and targets of ``y = (W + C U R) x`` plus noise of variance 1."""
    rng = torch.Generator().manual_seed(seed)
    m, n = W.shape
    # The tasks' inputs have different distributions; otherwise there would be nothing to protect.
    spread = torch.rand(n, generator=rng, dtype=torch.float64) ** 2
    x = torch.randn(examples, n, generator=rng, dtype=torch.float64) * spread
    U = torch.randn(len(rows), len(rows), generator=rng, dtype=torch.float64)
    noise = torch.randn(examples, m, generator=rng, dtype=torch.float64)
    return x, x @ (W + W[:, columns] @ U @ W[rows]).T + noise


def normal_equations(tasks, W, columns, rows):
    """The least squares of all tasks together: ``sum_k C^T C U S_k = sum_k C^T (y - W x) z^T``."""
    C, R = W[:, columns], W[rows]
    r = len(rows)
    matrix, vector = torch.zeros(r * r, r * r, dtype=torch.float64), torch.zeros(r, r, dtype=torch.float64)
    for x, y in tasks:
        z = x @ R.T
        matrix += torch.kron(C.T @ C, z.T @ z / len(x))
        vector += C.T @ (y - x @ W.T).T @ z / len(x)
    return torch.linalg.solve(matrix, vector.flatten()).view(r, r)


def test_tasks_one_after_the_other_end_at_the_optimum_of_all():
    rng = torch.Generator().manual_seed(0)
    m = 6
    W = torch.randn(m, 5, generator=rng, dtype=torch.float64)
    columns, rows = torch.tensor([0, 2, 4]), torch.tensor([1, 3, 5])
    C, R = W[:, columns], W[rows]
    tasks = [linear(seed, W, columns, rows) for seed in (1, 2, 3)]

    anchors = Anchors()
    U = normal_equations(tasks[:1], W, columns, rows)
    for number, (x, y) in enumerate(tasks):
        if number:  # learn the task without the data of the earlier ones
            z, rest = x @ R.T, y - x @ W.T
            U = torch.nn.Parameter(U.clone())
            optimizer = torch.optim.LBFGS([U], line_search_fn="strong_wolfe", max_iter=500, tolerance_grad=1e-12)

            def closure(U=U, z=z, rest=rest, optimizer=optimizer):
                optimizer.zero_grad()
                loss = 0.5 * (rest - z @ U.T @ C.T).square().sum(1).mean() + anchors.penalty({"U": U})
                loss.backward()
                return loss

            optimizer.step(closure)
            U = U.detach()
        # Answers are normal around the prediction, so the gradient of an answer is C^T e z^T with e ~ N(0, 1). The rows
        # of draws have the same covariance as e.
        draws = torch.eye(m, dtype=torch.float64) * m**0.5
        anchors.add({"U": U}, ({"U": (e @ C)[:, None] * z} for z in x @ R.T for e in draws))

    assert len(anchors) == 3
    expected = normal_equations(tasks, W, columns, rows)
    torch.testing.assert_close(U, expected, rtol=1e-4, atol=1e-4)
    alone = normal_equations(tasks[-1:], W, columns, rows)
    assert (alone - expected).norm() > 100 * (U - expected).norm()


def test_layers_of_several_ranks_are_held_together():
    rng = torch.Generator().manual_seed(0)
    shapes = {"a": 3, "b": 5, "c": 3}
    anchors, expected, seen = Anchors(), 0.0, []
    now = {name: torch.randn(r, r, generator=rng) for name, r in shapes.items()}
    for _ in range(2):
        centre = {name: torch.randn(r, r, generator=rng) for name, r in shapes.items()}
        gradients = [{name: torch.randn(r, r, generator=rng) for name, r in shapes.items()} for _ in range(4)]
        anchors.add(centre, iter(gradients))
        seen.append(gradients)
    for gradients in seen:
        for name in shapes:
            L = sum(g[name] @ g[name].T for g in gradients) / 4
            R = sum(g[name].T @ g[name] for g in gradients) / 4
            D = now[name] - centre[name]
            expected += float((D.T @ L @ D @ R).trace() / L.trace()) / 2
    assert float(anchors.penalty(now)) == pytest.approx(expected, rel=1e-5)
    other = Anchors()
    other.load_state_dict(anchors.state_dict())
    assert torch.equal(other.penalty(now), anchors.penalty(now))


def test_nothing_is_held_at_first_and_what_does_not_matter_never():
    anchors = Anchors()
    assert anchors.penalty({"U": torch.ones(2, 2)}) is None
    anchors.add({"U": torch.zeros(2, 2)}, [{"U": torch.zeros(2, 2)}])
    assert float(anchors.penalty({"U": torch.ones(2, 2)})) == 0


def test_bad_input_is_named():
    with pytest.raises(GuardError, match="no example"):
        Anchors().add({"U": torch.zeros(2, 2)}, [])
    with pytest.raises(GuardError, match="U: the gradients .* not finite"):
        Anchors().add({"U": torch.zeros(2, 2)}, [{"U": torch.full((2, 2), torch.nan)}])


def test_other_matrices_than_the_tasks_are_refused_and_another_device_is_not():
    anchors, U = Anchors(), {"a": torch.ones(2, 2), "b": torch.ones(2, 2)}
    anchors.add(U, [{name: torch.eye(2) for name in U}])
    moved = {name: matrix + 1 for name, matrix in U.items()}
    found = anchors.penalty(moved)
    assert anchors.penalty({"a": moved["a"]}) == found / 2
    with pytest.raises(GuardError, match="and not 'c'. Train the same layers as before"):
        anchors.penalty({**U, "c": U["a"]})
    assert anchors.penalty({name: matrix.to("meta") for name, matrix in moved.items()}).is_meta
    assert anchors.penalty(dict(reversed(moved.items()))) == found > 0
