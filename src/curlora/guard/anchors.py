"""A penalty that keeps earlier tasks: two ``r x r`` matrices for each layer and task."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from curlora.errors import GuardError
from curlora.functional import autocast_off

__all__ = ["Anchors"]


class Anchors:
    """A quadratic penalty on moving ``U`` away from the values that earlier tasks were learned with.

    For an example of task ``j``, an answer is drawn from the model's own predictions. ``G`` is the gradient of its
    log-probability with respect to ``U``. Let ``L_j = E[G G^T]`` and ``R_j = E[G^T G]``, both of shape ``(r, r)``, and
    let ``U*`` be ``U`` at the end of the last task. The penalty is

        1/2 sum over tasks and layers of tr((U - U*)^T L_j (U - U*) R_j) / tr L_j

    To second order and layer by layer, this is the KL divergence of the earlier tasks' predictions from those at
    ``U*``, in nats per answer (see :class:`curlora.guard.calibration.KroneckerFactors`).

    All tasks share the centre ``U*``, because the last task was learned under the penalty of those before it. If the
    losses are quadratic and ``L (x) R`` is exact, the result is the optimum of all tasks together
    (https://arxiv.org/abs/1712.03847). The method is elastic weight consolidation (https://arxiv.org/abs/1612.00796)
    with a Kronecker product in place of the diagonal. ``U`` is small enough to afford this: ``2 r^2`` values for each
    layer and task, and ``r^2`` for each layer.
    """

    def __init__(self) -> None:
        self._centre: dict[str, Tensor] = {}
        self._tasks: list[dict[str, tuple[Tensor, Tensor]]] = []
        self._stacks: dict[tuple[torch.device, tuple[str, ...]], tuple[Tensor, Tensor, Tensor]] = {}

    def __len__(self) -> int:
        """Return the number of tasks."""
        return len(self._tasks)

    def add(self, values: Mapping[str, Tensor], gradients: Iterable[Mapping[str, Tensor]]) -> None:
        """Add a learned task, given the gradients of its examples.

        Args:
            values: each ``U`` at the end of the task by name, shape ``(r, r)``.
            gradients: for each example, its ``G`` by the same names, shape ``(r, r)``.

        Raises:
            GuardError: if there is no example, or a gradient is not finite.
        """
        # On the CPU, because some devices have no float64.
        left = {name: torch.zeros(U.shape, dtype=torch.float64, device="cpu") for name, U in values.items()}
        right = {name: torch.zeros_like(moment) for name, moment in left.items()}
        count = 0
        for of_example in gradients:
            for name in values:
                G = of_example[name].detach().cpu().double()
                left[name] += G @ G.mT
                right[name] += G.mT @ G
            count += 1
        if not count:
            raise GuardError("The task has no example, so its anchor cannot be computed: pass at least one.")
        self.add_moments(values, {name: (left[name] / count, right[name] / count) for name in values})

    def add_moments(self, values: Mapping[str, Tensor], moments: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Add a learned task, given its moments.

        Args:
            values: each ``U`` at the end of the task by name, shape ``(r, r)``, or ``(E, r, r)`` for ``E`` experts.
            moments: ``E[G G^T]`` and ``E[G^T G]`` by the same names, float64, in the same shapes. The penalty is in
                nats per answer if the means are over answers, and in nats per token if they are over tokens.

        Raises:
            GuardError: if a moment is not finite.
        """
        task = {}
        for name, (left, right) in moments.items():
            if not (left.isfinite().all() and right.isfinite().all()):
                raise GuardError(
                    f"{name}: the gradients of the learned task are not finite. Is the model sound, and its precision "
                    "enough? Try float32 or bfloat16."
                )
            trace = left.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None].clamp_min(1e-300)
            task[name] = left.float(), (right / trace).float()
        self._tasks.append(task)
        self._centre = {name: U.detach().clone() for name, U in values.items()}
        self._stacks = {}

    def penalty(self, values: Mapping[str, Tensor]) -> Tensor | None:
        """Return the penalty in nats as a scalar tensor, or ``None`` if there are no tasks.

        Args:
            values: each current ``U`` by name, shape ``(r, r)`` or ``(E, r, r)``. Some may be left out, such as
                those that are not trained.

        Raises:
            GuardError: if a name is not among those of the tasks.
        """
        if not self._tasks:
            return None
        if unknown := sorted(values.keys() - self._centre.keys()):
            raise GuardError(
                f"The anchors of earlier tasks hold {len(self._centre)} matrices U, and not {unknown[0]!r}. Train the "
                "same layers as before."
            )
        groups = defaultdict(list)
        for name, U in values.items():
            groups[U.shape, U.device].append(name)
        total = []
        for (_, device), names in groups.items():
            centre, left, right = self._stacked(device, tuple(names))
            moved = (torch.stack([values[name] for name in names]) - centre).to(left.dtype)  # (layers, r, r)
            with autocast_off(moved):  # the caller usually computes its loss under autocast
                # left and right have shape (tasks, layers, r, r), so moved broadcasts over the tasks.
                total.append(0.5 * ((left @ moved @ right) * moved).sum())
        return torch.stack([part.to(total[0].device) for part in total]).sum()

    def _stacked(self, device: torch.device, names: tuple[str, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Return centre, ``L`` and ``R`` of these matrices, with all tasks in ``L`` and ``R``, on a device."""
        if (device, names) not in self._stacks:
            left, right = (
                torch.stack([torch.stack([task[name][side] for name in names]) for task in self._tasks]).to(device)
                for side in (0, 1)
            )
            self._stacks[device, names] = torch.stack([self._centre[name] for name in names]).to(device), left, right
        return self._stacks[device, names]

    def state_dict(self) -> dict[str, Tensor]:
        """Return the centre and all tasks as tensors by name."""
        state = {f"centre:{name}": value for name, value in self._centre.items()}
        for number, task in enumerate(self._tasks):
            for name, (left, right) in task.items():
                state |= {f"{number}:{name}:left": left, f"{number}:{name}:right": right}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace the centre and all tasks with those of a :meth:`state_dict`."""
        self._centre = {key.removeprefix("centre:"): value for key, value in state.items() if key.startswith("centre:")}
        count = 1 + max((int(key.partition(":")[0]) for key in state if not key.startswith("centre:")), default=-1)
        self._tasks = [
            {name: (state[f"{number}:{name}:left"], state[f"{number}:{name}:right"]) for name in self._centre}
            for number in range(count)
        ]
        self._stacks = {}
