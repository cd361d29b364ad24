"""Train a CURLoRA adapter within a budget of predicted forgetting."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from curlora.errors import GuardError
from curlora.functional import autocast_off
from curlora.guard.anchors import Anchors
from curlora.guard.calibration import Calibration, KroneckerFactors, adapter_of
from curlora.guard.coordinates import Coordinates, coordinates
from curlora.guard.share import as_share
from curlora.tuner.layer import CurloraLayer
from curlora.tuner.sharded import assign, laid_out_like, reshard, whole

__all__ = ["Guard"]


class Guard:
    """Trains an adapter in coordinates in which forgetting is a squared distance, and keeps it within a budget.

    To second order and layer by layer, the KL divergence from the calibrated model is a quadratic form of the change of
    ``U`` since calibration (:class:`curlora.guard.calibration.KroneckerFactors`). The guard uses coordinates ``V`` in
    which this form is the same in all directions of all layers. They are scaled so that the predicted divergence is
    ``mean(V^2)``, in nats per token. This has two consequences:

    - Any torch optimizer works unchanged, on ``V`` in place of ``U`` (:meth:`attach`). A learning rate is then in
      square roots of nats: Adam's first step costs ``lr^2`` nats, independent of the rank, the layers, the model and
      ``alpha``. Weight decay pulls towards the calibrated model.
    - The prediction is known after every step without extra cost (:meth:`drift`). If it exceeds ``budget``, ``V`` is
      scaled back to the limit.

    The model still holds, saves, merges and shares ``U``. A layer that the calibration's text does not use, such as an
    expert that received no token, is left untrained, because the guard cannot predict the cost of training it.

    Args:
        model: the model with the adapter, whose ``U`` the guard trains.
        calibration: the calibration of this model and adapter.
        budget: the largest allowed predicted forgetting, in nats per token of the calibration's text; ``None`` for no
            limit.
        max_perplexity_increase: the budget as a relative rise of perplexity: 0.01 or ``"1%"`` for 1 %, which is
            ``log(1.01)`` nats. It predicts the rise on text that the model itself could have written. The rise on any
            other text must be measured after training: :func:`curlora.guard.scale_to_limit`.
        damping: see :func:`curlora.guard.coordinates.coordinates`.
        adapter: the adapter's name; the active one if ``None``.
        anchors: the anchors of earlier tasks, by the names of the adapted layers. The gradient of their penalty, in
            nats per token, is added to the gradient of every step.

    Raises:
        GuardError: if the calibration belongs to another model or adapter, if the adapter has moved further from its
            calibration than the budget allows, if a layer's scaling is 0, if both limits are given, or if a limit or
            ``damping`` is not positive.
    """

    def __init__(
        self,
        model: nn.Module,
        calibration: Calibration,
        *,
        budget: float | None = None,
        max_perplexity_increase: float | str | None = None,
        damping: float = 0.1,
        adapter: str | None = None,
        anchors: Anchors | None = None,
    ) -> None:
        if budget is not None and max_perplexity_increase is not None:
            raise GuardError(
                f"budget={budget!r} and max_perplexity_increase={max_perplexity_increase!r} set the same limit: give "
                "one of them."
            )
        if max_perplexity_increase is not None:
            budget = math.log1p(as_share("max_perplexity_increase", max_perplexity_increase))
        for name, value in (("budget", budget), ("damping", damping)):
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise GuardError(f"{name} must be a positive number, got {value!r}.")
        self.model, self.adapter = model, adapter_of(model, adapter)
        self.calibration = calibration
        self.budget = budget
        self.damping, self.anchors = damping, anchors
        layers = calibration.check(model, self.adapter)
        self._places: list[_Place] = []
        self._unknown: list[_Place] = []
        for name, layer in layers.items():
            moments = calibration.layers[name]
            for expert, of_one in enumerate(moments.of_experts()):
                known = _coordinates_of(layer, self.adapter, of_one, damping + _roughness(calibration, of_one))
                place = _Place(layer, self.adapter, expert if moments.start.ndim == 3 else None, known, of_one.start)
                (self._unknown if known is None else self._places).append(place)
        if not self._places:
            raise GuardError(
                "The calibration's text uses none of the adapted layers, so the guard can predict nothing. Calibrate "
                "with other text."
            )
        unused = Counter(place.layer.name for place in self._unknown if place.expert is not None)
        if unused:
            name, count = next(iter(unused.items()))
            warnings.warn(
                f"{sum(unused.values())} experts of {len(unused)} parameters see no token of the calibration's text "
                f"({count} of {name!r}) and are left untrained, because the guard cannot predict the cost of training "
                "them. Calibrate with more text to train them.",
                stacklevel=2,
            )
        self.parameter_count = sum(place.start.numel() for place in self._places)
        self._grouped: list[_Stack] = []
        self._homes: list[tuple[int, torch.device, torch.dtype]] = []
        self._hooks: list[Any] = []
        self._inside = False
        self._untrained: list[Tensor] = []
        # The coordinates magnify small directions, and with them the rounding of a U in half precision.
        wide = all(U.dtype in (torch.float32, torch.float64) for U in self.parameters)
        if self.budget is not None and self.drift() > self.budget * (1.01 if wide else 2.0):
            raise GuardError(
                f"The adapter is {self.drift():.2g} nats from where it was calibrated, further than the budget of "
                f"{self.budget:.2g} nats, so the first step would scale it back. Calibrate the adapter again, or raise "
                "the budget."
            )

    @property
    def parameters(self) -> list[Tensor]:
        """The guarded ``U`` parameters of the model. FSDP2 replaces parameters, so they are looked up every time."""
        reshard(self.model)
        return list({id(place.parameter): place.parameter for place in self._places}.values())

    @contextlib.contextmanager
    def as_calibrated(self) -> Iterator[None]:
        """Set every guarded ``U`` to its value at calibration, and restore it afterwards."""
        self._leave()
        now = [whole(U.detach()).clone() for U in self.parameters]
        try:
            with torch.no_grad():
                assign([place.value for place in self._places], [place.start for place in self._places])
            yield
        finally:
            with torch.no_grad():
                assign(self.parameters, now)

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Make the optimizer's steps in the guard's coordinates and within its budget.

        A closure passed to ``step`` runs with ``U`` in the model, as all other code does. If a step raises an error,
        call :meth:`detach` before the model is used or saved; it restores ``U``.

        Raises:
            GuardError: if the optimizer does not train all of the adapter's ``U``, if it has another guard for one of
                them, or if the adapter has been replaced since calibration.
        """
        self.calibration.check(self.model, self.adapter)
        optimizer = getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps the optimizer
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        guarded = [id(U) in trained for U in self.parameters]
        if not all(guarded):
            raise GuardError(
                f"The optimizer does not train {guarded.count(False)} of the adapter's {len(guarded)} matrices U: "
                "create it from this model's parameters, after the adapter was added."
            )
        self.detach()
        others = [guard for guard in _GUARDS.get(optimizer, ()) if guard._hooks]
        held = {id(U) for guard in others for U in guard.parameters}
        if any(id(U) in held for U in self.parameters):
            raise GuardError(f"The optimizer has another guard for adapter {self.adapter!r}: detach that one first.")
        _GUARDS[optimizer] = [*others, self]
        self._hooks = [optimizer.register_step_pre_hook(self._before), optimizer.register_step_post_hook(self._after)]

    def detach(self) -> None:
        """Remove the guard from the optimizer."""
        self._leave()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @torch.no_grad()
    def drift(self) -> float:
        """Return the predicted KL divergence from the calibrated model, in nats per token.

        If the calibration was made without gradients, this is half the squared shift of the layers' outputs on its
        text, relative to the squared output of each layer and summed over layers.
        """
        self._leave()
        return sum(float(stack.moved().square().sum()) for stack in self._stacks()) / self.parameter_count

    def _before(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)  # args[0] is the optimizer
        # torch's GradScaler leaves it to a fused optimizer to divide the gradients by this.
        loss_scale = getattr(optimizer, "grad_scale", None)
        if closure is None:
            self._enter(loss_scale=loss_scale)
            return None

        def outside() -> Any:
            self._leave()
            loss = closure()
            self._enter(loss_scale=loss_scale)
            return loss

        # The optimizer will not use the present gradients: the closure computes new ones.
        self._enter(gradients=False)
        return args[:1], {**kwargs, "closure": outside}

    @torch.no_grad()
    def _after(self, *_: Any) -> None:
        held = [stack.values() for stack in self._grouped]
        if self.budget is not None:
            squares = [values.square().sum() for values in held]
            total = torch.stack([square.to(squares[0].device) for square in squares]).sum() / self.parameter_count
            # Nothing is read back to the CPU, so a GPU does not synchronize here. If the total is not finite, nothing
            # is scaled: values that are not finite stay in their own layer.
            scale = torch.where(total.isfinite(), (self.budget / total).sqrt().clamp(max=1.0), 1.0)
            held = [values * scale.to(values.device) for values in held]
        self._leave(held)

    @torch.no_grad()
    def _enter(self, gradients: bool = True, loss_scale: Tensor | None = None) -> None:
        self._leave()
        for place in self._unknown:
            place.forget_gradient()
        self._untrained = [place.value.detach().clone() for place in self._unknown]
        if gradients and self.anchors:
            self._hold_anchors(self.anchors, loss_scale)
        for stack in self._stacks():
            stack.enter()
            if gradients:
                stack.map_gradients()
        self._inside = True

    @torch.no_grad()
    def _leave(self, held: Sequence[Tensor] | None = None) -> None:
        """Put ``U`` back into the model.

        torch does not call the post hook of a step that raised an error, so other methods call this first.
        """
        if self._inside:
            held = [stack.values() for stack in self._grouped] if held is None else held
            for stack, values in zip(self._grouped, held, strict=True):
                stack.leave(values)
            # The gradient of an unused expert is zero, but weight decay may have changed it.
            for place, value in zip(self._unknown, self._untrained, strict=True):
                if place.expert is not None:
                    place.value.copy_(value)
            self._inside = False

    @torch.enable_grad()
    def _hold_anchors(self, anchors: Anchors, loss_scale: Tensor | None) -> None:
        """Add the gradient of the anchors' penalty to the gradients that the optimizer is about to use.

        Args:
            anchors: the anchors of earlier tasks.
            loss_scale: the factor that these gradients are still scaled by; ``None`` if they are not scaled.
        """
        trained = {place.layer.name: place.parameter for place in self._places}
        values = {name: whole(U.detach()).clone().requires_grad_() for name, U in trained.items()}
        penalty = anchors.penalty(values)
        assert penalty is not None  # empty anchors are falsy
        found = torch.autograd.grad(penalty, list(values.values()))
        for U, gradient in zip(trained.values(), found, strict=True):
            if U.grad is not None:
                if loss_scale is not None:
                    gradient = gradient * loss_scale.to(gradient.device)
                U.grad += laid_out_like(gradient.to(U.grad.dtype), U.grad)

    def _stacks(self) -> list[_Stack]:
        """Return the stacks, rebuilt if parameters have moved: a Trainer moves the model to its device later."""
        homes = [(id(U), U.device, U.dtype) for U in (place.parameter for place in self._places)]
        if homes != self._homes:
            groups = defaultdict(list)
            for place in self._places:
                groups[place.start.shape[-1], place.parameter.device, place.parameter.dtype].append(place)
            self._grouped = [_Stack(group, math.sqrt(2 / self.parameter_count)) for group in groups.values()]
            self._homes = homes
        return self._grouped


class _Place(NamedTuple):
    """The ``U`` of a layer or of one expert, with its coordinates; these are ``None`` if the text does not use it."""

    layer: CurloraLayer
    adapter: str
    expert: int | None
    coordinates: Coordinates | None
    start: Tensor

    @property
    def parameter(self) -> Tensor:
        """The parameter in the optimizer; with experts, that of all experts."""
        return self.layer.matrices[self.adapter].weight

    @property
    def value(self) -> Tensor:
        """The matrix ``U``, shape ``(r, r)``, a view into the parameter."""
        return self.parameter if self.expert is None else self.parameter.detach()[self.expert]

    @property
    def gradient(self) -> Tensor | None:
        """The gradient of the matrix, shape ``(r, r)``, a view into the parameter's gradient."""
        gradient = self.parameter.grad
        return gradient if gradient is None or self.expert is None else gradient[self.expert]

    def forget_gradient(self) -> None:
        """Remove the gradient, so that the optimizer does not change the matrix."""
        if self.expert is None:
            self.parameter.grad = None
        elif self.parameter.grad is not None:
            self.parameter.grad[self.expert].zero_()


_GUARDS: WeakKeyDictionary[torch.optim.Optimizer, list[Guard]] = WeakKeyDictionary()


class _Stack:
    """All ``U`` of one size, device and dtype, mapped in one batch: ``U = start + left @ V @ right``."""

    def __init__(self, places: Sequence[_Place], unit: float) -> None:
        self.places = places
        U = places[0].parameter
        dtype = torch.promote_types(U.dtype, torch.float32)
        known = [place.coordinates for place in places if place.coordinates is not None]
        sides = (torch.stack(side) for side in zip(*known, strict=True))
        self.left, self.right, self.left_inverse, self.right_inverse = (s.to(U.device, dtype) for s in sides)
        self.left, self.left_inverse = self.left * unit, self.left_inverse / unit
        self.start = torch.stack([place.start for place in places]).to(U.device, dtype)
        self.gradients: tuple[list[Tensor], Tensor] = [], self.start[:0]
        self.entered: tuple[Tensor, Tensor] = self.start[:0], self.start[:0]

    def values(self) -> Tensor:
        """Return the current values of the parameters, shape ``(count, r, r)``: ``V`` within a step, else ``U``."""
        return torch.stack([whole(place.value.detach()) for place in self.places]).to(self.left.dtype)

    def moved(self) -> Tensor:
        """Return ``V`` of each ``U``, shape ``(count, r, r)``."""
        return self._coordinates_of(self.values())

    def _coordinates_of(self, values: Tensor) -> Tensor:
        with autocast_off(self.left):
            return self.left_inverse @ (values - self.start) @ self.right_inverse

    def enter(self) -> None:
        """Replace ``U`` by ``V`` in the parameters."""
        values = self.values()
        moved = self._coordinates_of(values).to(self.places[0].parameter.dtype)  # rounded as in the parameters
        assign([place.value for place in self.places], moved.unbind())
        self.entered = values, moved.to(values.dtype)

    def map_gradients(self) -> None:
        """Replace the gradients with respect to ``U`` by those with respect to ``V``."""
        known = [(i, grad) for i, place in enumerate(self.places) if (grad := place.gradient) is not None]
        if known:
            index, gradients = zip(*known, strict=True)
            left, right = (self.left, self.right) if len(index) == len(self.places) else (
                self.left[list(index)], self.right[list(index)]
            )  # fmt: skip
            given = torch.stack([whole(gradient) for gradient in gradients])
            self.gradients = list(gradients), given
            with autocast_off(left):
                mapped = left @ given.to(left.dtype) @ right
            assign(gradients, mapped.unbind())

    def leave(self, values: Tensor) -> None:
        """Replace ``V`` by ``U`` in the parameters, and restore the gradients with respect to ``U``.

        Args:
            values: the ``V`` to map to ``U``, shape ``(count, r, r)``.
        """
        with autocast_off(self.left):
            back = self.start + self.left @ values @ self.right
        # A step that changed nothing, such as one that a fused optimizer skipped after an overflow, restores U exactly.
        was, entered = self.entered
        back = torch.where((values == entered).all(-1).all(-1)[:, None, None], was, back)
        self.entered = was[:0], was[:0]
        assign([place.value for place in self.places], back.unbind())
        gradients, given = self.gradients
        assign(gradients, given.unbind())
        self.gradients = [], given[:0]


def _roughness(calibration: Calibration, moments: KroneckerFactors) -> float:
    """Return additional damping for moments of little text, which may miss directions that matter."""
    return len(moments.inputs) / calibration.tokens if moments.left is None else 1 / calibration.rows


def _coordinates_of(layer: CurloraLayer, adapter: str, moments: KroneckerFactors, damping: float) -> Coordinates | None:
    """Return coordinates of ``U`` as the layer stores it, with ``KL = ||V||^2 / 2``; ``None`` if nothing is known."""
    if moments.left is None or moments.right is None:  # the relative shift of the layer's output
        factor = layer.basis(adapter).factor.detach().cpu().double()
        left = factor.T @ factor / moments.output if moments.output > 0 else torch.zeros_like(moments.inputs)
        right = moments.inputs
    else:
        left, right = moments.left, moments.right / moments.left.trace().clamp_min(1e-300)
    place = coordinates(left, right, damping)
    if place is None:
        return None
    alpha = layer.scaling[adapter]  # M = alpha U
    place = place._replace(left=place.left / alpha, left_inverse=place.left_inverse * alpha)
    if layer.fan_in_fan_out:  # M = alpha U^T
        place = Coordinates(place.right, place.left, place.right_inverse, place.left_inverse)
    return place
