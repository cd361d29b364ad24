"""Training a CURLoRA adapter so that what is forgotten stays within a budget."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from curlora.guard.calibration import Calibration, Moments, adapter_of
from curlora.guard.coordinates import Coordinates, coordinates
from curlora.guard.errors import GuardError
from curlora.tuner.layer import CurloraLayer

__all__ = ["Guard"]


class Guard:
    """Trains an adapter in coordinates in which forgetting is a squared distance, and keeps it within a budget.

    The second-order rise of the KL divergence from the calibrated model is, layer by layer, a quadratic form of ``U``
    (:class:`curlora.guard.calibration.Moments`). In coordinates ``V`` in which that form is the same in all directions
    of all layers, scaled so that the predicted divergence is ``mean(V^2)``, in nats per token:

    - any optimizer of torch works as it is, on ``V`` in the place of ``U`` (:meth:`attach`). A learning rate is then in
      square roots of nats: Adam's first step costs ``lr^2`` nats, whatever the rank, the layers and the model, and
      ``alpha`` makes no difference. Weight decay pulls towards the base model.
    - after every step the prediction is known for nothing (:meth:`drift`), and where it is over ``budget`` the step is
      scaled back onto it.

    ``U`` stays what is in the model, saved, merged and shared. A layer that the calibration's text does not use, such
    as an expert that no token went to, is left untrained: what training it would cost is not known.

    Args:
        model: with the adapter; its ``U`` are found here.
        calibration: of this model and adapter.
        budget: the most that may be forgotten, in nats per token of the calibration's text; ``None`` for no limit.
        max_perplexity_increase: the same as a relative rise of perplexity, 0.01 for 1 %: ``budget = log(1.01)``.
        damping: see :func:`curlora.guard.coordinates.coordinates`.
        adapter: the adapter's name; the active one if ``None``.

    Raises:
        GuardError: if the calibration is of another model or adapter, if both limits are given, or one is not positive.
    """

    def __init__(
        self,
        model: nn.Module,
        calibration: Calibration,
        *,
        budget: float | None = None,
        max_perplexity_increase: float | None = None,
        damping: float = 0.1,
        adapter: str | None = None,
    ) -> None:
        if budget is not None and max_perplexity_increase is not None:
            raise GuardError("budget and max_perplexity_increase say the same thing: give one of them")
        for name, value in (
            ("budget", budget), ("max_perplexity_increase", max_perplexity_increase), ("damping", damping)
        ):  # fmt: skip
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise GuardError(f"{name} must be a positive number, got {value!r}")
        self.adapter = adapter_of(model, adapter)
        self.calibration = calibration
        self.budget = math.log1p(max_perplexity_increase) if max_perplexity_increase is not None else budget
        self.damping = damping
        layers = calibration.check(model, self.adapter)
        found = {}
        self._unknown = []
        for name, layer in layers.items():
            U = layer.curlora_U[self.adapter]
            place = _coordinates_of(layer, self.adapter, calibration.layers[name], damping, calibration.tokens)
            if place is None:
                self._unknown.append(U)
            else:
                found[U] = place
        if not found:
            raise GuardError("The calibration's text uses none of the adapted layers, so nothing can be guarded by it")
        self.numbers = sum(U.numel() for U in found)
        stacks = defaultdict(list)
        for U, place in found.items():
            stacks[U.shape[0], U.device, U.dtype].append((U, place))
        self._stacks = [_Stack(pairs, math.sqrt(2 / self.numbers)) for pairs in stacks.values()]
        self._undo: list[Any] = []

    @property
    def parameters(self) -> list[Tensor]:
        """Every ``U`` that it guards."""
        return [U for stack in self._stacks for U in stack.parameters]

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """From now on the optimizer's steps are in the guard's coordinates and within its budget.

        Raises:
            GuardError: if it does not train all of the adapter's ``U``.
        """
        optimizer = getattr(optimizer, "optimizer", optimizer)  # Accelerate's is around another
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        guarded = [id(U) in trained for U in self.parameters]
        if not all(guarded):
            raise GuardError(
                f"The optimizer does not train {guarded.count(False)} of the adapter's {len(guarded)} U: make it from "
                "this model's parameters, after the adapter is on it."
            )
        self.detach()
        self._undo = [
            optimizer.register_step_pre_hook(lambda *_: self._enter()),
            optimizer.register_step_post_hook(lambda *_: self._leave()),
        ]

    def detach(self) -> None:
        """Leave the optimizer alone again."""
        for handle in self._undo:
            handle.remove()
        self._undo = []

    @torch.no_grad()
    def drift(self) -> float:
        """The predicted KL divergence from the calibrated model, in nats per token.

        Where the calibration was made without gradients: half the squared shift of the layers' outputs on its text,
        each relative to its output and summed over layers.
        """
        return sum(float(stack.inside().square().sum()) for stack in self._stacks) / self.numbers

    @torch.no_grad()
    def _enter(self) -> None:
        for U in self._unknown:
            U.grad = None
        for stack in self._stacks:
            stack.enter()

    @torch.no_grad()
    def _leave(self) -> None:
        if self.budget is not None:
            squares = [torch.stack(stack.parameters).square().sum() for stack in self._stacks]
            total = torch.stack([square.to(squares[0].device) for square in squares]).sum() / self.numbers
            scale = (self.budget / total).sqrt().clamp(max=1.0)  # no number of it is read: a GPU need not stop for it
            for stack in self._stacks:
                torch._foreach_mul_(stack.parameters, scale.to(stack.parameters[0].device))
        for stack in self._stacks:
            stack.leave()


class _Stack:
    """The ``U`` of one size, device and dtype, mapped together."""

    def __init__(self, pairs: Sequence[tuple[nn.Parameter, Coordinates]], unit: float) -> None:
        self.parameters: list[Tensor] = [U for U, _ in pairs]
        U = self.parameters[0]
        sides = (torch.stack(side) for side in zip(*(place for _, place in pairs), strict=True))
        dtype = torch.promote_types(U.dtype, torch.float32)
        self.left, self.right, self.left_inverse, self.right_inverse = (s.to(U.device, dtype) for s in sides)
        self.left, self.left_inverse = self.left * unit, self.left_inverse / unit

    def inside(self) -> Tensor:
        """``V`` of each ``U``, shape ``(count, r, r)``."""
        return self.left_inverse @ torch.stack(self.parameters).to(self.left.dtype) @ self.right_inverse

    def enter(self) -> None:
        """Put ``V`` and its gradients in the place of ``U`` and its own."""
        torch._foreach_copy_(self.parameters, list(self.inside().unbind()))
        known = [(i, U.grad) for i, U in enumerate(self.parameters) if U.grad is not None]
        if known:
            index, gradients = zip(*known, strict=True)
            left, right = (self.left, self.right) if len(index) == len(self.parameters) else (
                self.left[list(index)], self.right[list(index)]
            )  # fmt: skip
            mapped = left @ torch.stack(gradients).to(left.dtype) @ right
            torch._foreach_copy_(list(gradients), list(mapped.unbind()))

    def leave(self) -> None:
        """Put ``U`` in the place of ``V`` again."""
        mapped = self.left @ torch.stack(self.parameters).to(self.left.dtype) @ self.right
        torch._foreach_copy_(self.parameters, list(mapped.unbind()))


def _coordinates_of(
    layer: CurloraLayer, adapter: str, moments: Moments, damping: float, tokens: int
) -> Coordinates | None:
    """Of ``U`` as the layer stores it, so that ``KL = ||V||^2 / 2``."""
    if moments.left is None or moments.right is None:  # the shift of the output, relative to the output
        factor = layer.sides(adapter)[1].detach().cpu().double()
        left = factor.T @ factor / moments.output if moments.output > 0 else torch.zeros_like(moments.inputs)
        right = moments.inputs
    else:
        left, right = moments.left, moments.right / moments.left.trace().clamp_min(1e-300)
    r = len(moments.inputs)
    # The moments of few tokens are rough: where they see nothing there may be something.
    place = coordinates(left, right, damping + r / tokens)
    if place is None:
        return None
    alpha = layer.alpha[adapter]  # M = alpha U
    place = place._replace(left=place.left / alpha, left_inverse=place.left_inverse * alpha)
    if layer.stores_outputs_last:  # its U is M the other way round
        place = Coordinates(place.right, place.left, place.right_inverse, place.left_inverse)
    return place
