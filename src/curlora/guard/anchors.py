"""What was learned earlier, held where it matters: r x r parameters for each layer and task."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from curlora.functional import autocast_off
from curlora.guard.errors import GuardError

__all__ = ["Anchors"]


class Anchors:
    """A quadratic penalty on moving matrices away from where they serve earlier tasks.

    For a task ``j``, with ``G`` the gradient with respect to ``U`` of the log-probability of an answer to one of its
    examples, drawn from the model's own predictions, let ``L_j = E[G G^T]`` and ``R_j = E[G^T G]``. With ``U*`` where
    the last task ended, the penalty is

        1/2 sum over tasks and layers of tr((U - U*)^T L_j (U - U*) R_j) / tr L_j

    which is, to second order and layer by layer, the divergence of the earlier tasks' predictions from what they are at
    ``U*``, in nats for each answer (see :class:`curlora.guard.calibration.Moments`). The centre is one for all, since
    the last task was learned under the penalty of those before it: with losses that are quadratic, and ``L (x) R`` as
    it is, the end is the optimum of all tasks together (https://arxiv.org/abs/1712.03847). It is elastic weight
    consolidation (https://arxiv.org/abs/1612.00796) with a Kronecker product in the place of the diagonal, which the
    small ``U`` can afford: ``2 r^2`` values for each layer and task, and ``r^2`` for each layer.
    """

    def __init__(self) -> None:
        self._centre: dict[str, Tensor] = {}
        self._tasks: list[dict[str, tuple[Tensor, Tensor]]] = []
        self._stacks: dict[tuple[str, ...], tuple[Tensor, Tensor, Tensor]] = {}

    def __len__(self) -> int:
        """Tasks that are held."""
        return len(self._tasks)

    def add(self, values: Mapping[str, Tensor], gradients: Iterable[Mapping[str, Tensor]]) -> None:
        """A task has been learned.

        Args:
            values: each ``U`` by its name, shape ``(r, r)``, as the task leaves it.
            gradients: of each example the ``G`` by the same names.

        Raises:
            GuardError: if there is no example, or a gradient is not finite.
        """
        # On the CPU: some devices have no float64.
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
            raise GuardError("There is no example to see by what matters to the task")
        self.add_moments(values, {name: (left[name] / count, right[name] / count) for name in values})

    def add_moments(self, values: Mapping[str, Tensor], moments: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """A task has been learned whose moments are known.

        Args:
            values: each ``U`` by its name, shape ``(r, r)`` or ``(E, r, r)``, as the task leaves it.
            moments: ``E[G G^T]`` and ``E[G^T G]`` by the same names, float64, in the same shapes. The penalty is in
                nats for each of what the mean is over: an answer, or a token.

        Raises:
            GuardError: if one is not finite.
        """
        task = {}
        for name, (left, right) in moments.items():
            if not (left.isfinite().all() and right.isfinite().all()):
                raise GuardError(f"{name}: the gradients of the task that was learned are not finite")
            trace = left.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None].clamp_min(1e-300)
            task[name] = left.float(), (right / trace).float()
        self._tasks.append(task)
        self._centre = {name: U.detach().clone() for name, U in values.items()}
        self._stacks = {}

    def penalty(self, values: Mapping[str, Tensor]) -> Tensor | None:
        """What has been lost of the tasks that are held, in nats; ``None`` where there are none.

        Args:
            values: each ``U`` by its name, as it is now.
        """
        if not self._tasks:
            return None
        if not self._stacks:
            groups = defaultdict(list)
            for name, U in values.items():
                groups[U.shape, U.device].append(name)
            for (_, device), group in groups.items():
                centre = torch.stack([self._centre[name] for name in group]).to(device)
                left, right = (
                    torch.stack([torch.stack([task[name][side] for name in group]) for task in self._tasks]).to(device)
                    for side in (0, 1)
                )
                self._stacks[tuple(group)] = centre, left, right
        total = []
        for names, (centre, left, right) in self._stacks.items():
            moved = (torch.stack([values[name] for name in names]) - centre).to(left.dtype)  # (layers, r, r)
            with autocast_off(moved):  # in which a loss is computed, as a rule
                total.append(0.5 * ((left @ moved @ right) * moved).sum())  # of each task before the layers
        return torch.stack([part.to(total[0].device) for part in total]).sum()

    def state_dict(self) -> dict[str, Tensor]:
        """All of it as tensors."""
        state = {f"centre:{name}": value for name, value in self._centre.items()}
        for number, task in enumerate(self._tasks):
            for name, (left, right) in task.items():
                state |= {f"{number}:{name}:left": left, f"{number}:{name}:right": right}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self._centre = {key.removeprefix("centre:"): value for key, value in state.items() if key.startswith("centre:")}
        count = 1 + max((int(key.partition(":")[0]) for key in state if not key.startswith("centre:")), default=-1)
        self._tasks = [
            {name: (state[f"{number}:{name}:left"], state[f"{number}:{name}:right"]) for name in self._centre}
            for number in range(count)
        ]
        self._stacks = {}
