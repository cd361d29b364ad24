"""Whether a tensor may be changed in place: where nothing but the caller can see it.

The output of a linear layer usually goes to its caller alone, but a hook or a cache may have kept it. A gradient
usually goes to one node of the graph alone, but a residual connection gives the same one to both of its sides, and a
caller may have passed it in. PyTorch's engine adds in place where it holds the last reference
(``can_accumulate_inplace`` in torch/csrc/autograd/input_buffer.cpp); here the same is asked from Python.

How many references there are when nobody else has one is the interpreter's and PyTorch's business. So it is looked at
once, on tensors that are known to be nobody else's, and then a tensor is alone that has just as many. Where that does
not tell such tensors from others (another version of PyTorch, say), none ever counts as alone. Nor do small tensors:
to copy one takes less time than to ask.

References are all that is seen: memory of which another library knows, or an address that was written down, is not.
"""

import functools
import sys
import threading
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import linear

__all__ = ["alone", "look_once", "told_if_alone"]

# Fewer numbers than these are copied sooner than it is found out whether they have to be.
WORTH_ASKING = 1 << 14


def alone(tensor: Tensor) -> bool:
    """Whether the caller, who holds ``tensor`` in one local variable, may change it in place.

    Never while ``torch.compile`` traces, a dispatch mode looks on or forward-mode derivatives are taken, nor for a
    subclass, a tensor inside of a transform of ``torch.func``, one whose memory has gaps or overlaps or came from
    elsewhere, or one of an inference mode that is over. Nor for one that is too small to be worth the question.
    """
    # While torch.compile traces, a size that is compared would be a constant of the graph from there on.
    if torch.compiler.is_compiling() or tensor.numel() < WORTH_ASKING:
        return False
    return _plain(tensor) and _counts(tensor) in _of_outputs() and _own_memory(tensor)


def look_once() -> None:
    """Find out how tensors that are alone are told, unless that is known; best before a backward pass begins."""
    if not torch.compiler.is_compiling():
        _of_outputs()
        _of_gradients()


def told_if_alone(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate the ``backward`` of an :class:`torch.autograd.Function` to be told if it may change its first gradient.

    Args:
        backward: called as ``backward(ctx, alone, *gradients)``; ``alone`` is as :func:`alone` has it.
    """
    return _judged(backward, lambda counts: counts in _of_gradients(), lambda: WORTH_ASKING)


def _judged(
    backward: Callable[..., Any], judge: Callable[[Hashable], bool], least: Callable[[], int]
) -> Callable[..., Any]:
    @functools.wraps(backward)
    def told(ctx: Any, *gradients: Tensor | None) -> Any:
        first = gradients[0]
        # With create_graph the gradient is part of a graph itself.
        may_change = (
            first is not None
            and not torch.compiler.is_compiling()
            and first.numel() >= least()
            and not torch.is_grad_enabled()
            and _plain(first)
            and judge(_counts(first))
            and _own_memory(first)
        )
        return backward(ctx, may_change, *gradients)

    return told


def _plain(tensor: Tensor) -> bool:
    return (
        type(tensor) is Tensor
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        and not torch._C._len_torch_dispatch_stack()
        and forward_ad._current_level < 0
        and tensor.is_contiguous()
        and not tensor._is_zerotensor()
        and (not tensor.is_inference() or torch.is_inference_mode_enabled())
    )


def _counts(tensor: Tensor) -> Hashable:
    """References to a tensor, to its memory, and to the tensor that it is a view of: C++'s and Python's of each.

    ``None`` where they cannot be counted. Of the memory by its address: Python's object of it would be one more
    reference for as long as there is the tensor, and PyTorch's engine would no longer add in place.
    """
    try:
        base = tensor._base
        memory = torch._C._storage_address(tensor)  # type: ignore[attr-defined]
        return (
            tensor._use_count(),  # type: ignore[attr-defined]
            sys.getrefcount(tensor),
            torch._C._storage_Use_Count(memory),
            None if base is None else (base._use_count(), sys.getrefcount(base)),  # type: ignore[attr-defined]
        )
    except (AttributeError, TypeError, RuntimeError):
        return None


def _own_memory(tensor: Tensor) -> bool:
    """Whether PyTorch has allocated it: numpy's, for one, cannot be resized."""
    return bool(tensor.untyped_storage().resizable())


def _calibration(look: Callable[[], tuple[set[Hashable], set[Hashable]]]) -> Callable[[], set[Hashable]]:
    """What ``look`` finds of tensors that are alone, if it differs from what it finds of others; looked for once.

    In a thread of its own: modes and hooks of saved tensors, which are the caller's thread's, would hold on to what is
    looked at, or see it.
    """

    @functools.cache
    def known() -> set[Hashable]:
        result: list[tuple[set[Hashable], set[Hashable]]] = []
        thread = threading.Thread(target=lambda: result.append(look()))
        thread.start()
        thread.join()
        ((found, others),) = result
        # Without the interpreter's lock references are counted in pieces.
        locked = getattr(sys, "_is_gil_enabled", lambda: True)()
        return found if locked and None not in found and found.isdisjoint(others) else set()

    return known


@_calibration
def _of_outputs() -> tuple[set[Hashable], set[Hashable]]:
    """Counts of outputs of linear layers: as they come, and as views, with and without a graph."""
    x, weight, bias = (torch.ones(*shape, device="cpu") for shape in ((1, 2, 3), (3, 3), (3,)))
    kept: list[Any] = []

    def counted(bias: Tensor | None, keep: Callable[[Tensor], Any] | None = None) -> Hashable:
        output = linear(x, weight, bias)
        if keep is not None:
            kept.append(keep(output))
        return ask(output)

    def ask(tensor: Tensor) -> Hashable:  # as ``alone`` does, so that as many references are its own
        return _counts(tensor)

    found: set[Hashable] = set()
    others: set[Hashable] = set()
    for with_graph in (True, False):
        x.requires_grad_(with_graph)
        for added in (None, bias):
            with torch.set_grad_enabled(with_graph):
                found.add(counted(added))
                others.update(counted(added, keep) for keep in _KEEPING)
    return found, others


@_calibration
def _of_gradients() -> tuple[set[Hashable], set[Hashable]]:
    """Counts of gradients: as they come, and as views."""
    seen: list[Hashable] = []
    kept: list[Any] = []

    def note(counts: Hashable) -> bool:
        seen.append(counts)
        return False

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        @functools.partial(_judged, judge=note, least=lambda: 0)
        def backward(ctx: Any, alone: bool, gradient: Tensor) -> Tensor:
            return gradient

    def counted(
        shape: tuple[int, ...],
        keep: Callable[[Tensor], Any] | None = None,
        before: bool = False,
        twice: bool = False,
    ) -> Hashable:
        x = torch.ones(2, 3, device="cpu", requires_grad=True) * 1
        y = Probe.apply(x)
        z = y.view(shape) if shape != y.shape else y
        if keep is not None:
            (z if before else y).register_hook(lambda gradient: kept.append(keep(gradient)))
        # A sum gives both of its sides one gradient; the side that was made later is gone through first.
        ((x.view(shape) + z if twice else z) * 2).sum().backward()
        return seen.pop()

    found: set[Hashable] = set()
    others: set[Hashable] = set()
    with torch.enable_grad():
        for shape in ((2, 3), (3, 2)):
            found.add(counted(shape))
            others.add(counted(shape, twice=True))
            others.update(counted(shape, keep, before) for keep in _KEEPING for before in (False, True))
    return found, others


# Ways to hold on to a tensor.
_KEEPING: tuple[Callable[[Tensor], Any], ...] = (
    lambda tensor: tensor,
    lambda tensor: tensor.detach(),
    lambda tensor: tensor.view(-1),
    lambda tensor: tensor.untyped_storage(),
    lambda tensor: tensor.numpy(force=True),
)
