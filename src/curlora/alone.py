"""Whether a tensor may be changed in place: where nothing but the caller can see it.

The output of a linear layer usually goes to its caller alone, but a hook or a cache may have kept it. A gradient
usually goes to one node of the graph alone, but a residual connection gives the same one to both of its sides, and a
caller may have passed it in. PyTorch's engine adds in place where it holds the last reference
(``can_accumulate_inplace`` in torch/csrc/autograd/input_buffer.cpp); here the same is asked from Python.

How many references there are when nobody else has one is the interpreter's and PyTorch's business. So it is looked at
once, on tensors that are known to be nobody else's, and then a tensor is alone that has just as many. Where that does
not tell such tensors from others (another version of PyTorch, say), none ever counts as alone.
"""

import functools
import sys
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["alone", "told_if_alone"]


def alone(tensor: Tensor) -> bool:
    """Whether the caller, who holds ``tensor`` in one local variable, may change it in place.

    Never while ``torch.compile`` traces, or of a subclass, or of a tensor whose memory has gaps or overlaps.
    """
    return _plain(tensor) and _counts(tensor) in _of_outputs()


def told_if_alone(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate the ``backward`` of an :class:`torch.autograd.Function` to be told if it may change its first gradient.

    Args:
        backward: called as ``backward(ctx, alone, *gradients)``.
    """
    return _judged(backward, lambda counts: counts in _of_gradients())


def _judged(backward: Callable[..., Any], judge: Callable[[Hashable], bool]) -> Callable[..., Any]:
    @functools.wraps(backward)
    def told(ctx: Any, *gradients: Tensor | None) -> Any:
        first = gradients[0]
        # With create_graph the gradient is part of a graph itself.
        may_change = first is not None and not torch.is_grad_enabled() and _plain(first) and judge(_counts(first))
        del first
        return backward(ctx, may_change, *gradients)

    return told


def _plain(tensor: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and type(tensor) is Tensor
        and tensor.is_contiguous()
        and not tensor._is_zerotensor()
    )


def _counts(tensor: Tensor) -> Hashable:
    """References to a tensor, to its memory, and to the tensor that it is a view of: C++'s and Python's of each."""
    base = tensor._base
    storage = tensor.untyped_storage()
    return (
        tensor._use_count(),  # type: ignore[attr-defined]
        sys.getrefcount(tensor),
        torch._C._storage_Use_Count(storage._cdata),
        sys.getrefcount(storage),
        None if base is None else (base._use_count(), sys.getrefcount(base)),  # type: ignore[attr-defined]
    )


@functools.cache
def _of_outputs() -> set[Hashable]:
    """Counts of outputs that are known to be alone: as they come, and as views, with and without a graph."""
    x = torch.ones(1, 2, 3)
    plain, view = nn.Linear(3, 3, bias=False), nn.Linear(3, 3)
    kept: list[Any] = []

    def counted(layer: nn.Module, keep: Callable[[Tensor], Any] | None = None) -> Hashable:
        output = layer(x)
        if keep is not None:
            kept.append(keep(output))
        return ask(output)

    def ask(tensor: Tensor) -> Hashable:  # as ``alone`` does, so that as many references are its own
        return _counts(tensor)

    def look() -> tuple[set[Hashable], set[Hashable]]:
        found: set[Hashable] = set()
        others: set[Hashable] = set()
        for layer in (plain, view):
            for graph in (True, False):
                with torch.set_grad_enabled(graph):
                    found.add(counted(layer))
                    others.update(counted(layer, keep) for keep in _KEEPING)
        return found, others

    return _told_apart(look)


@functools.cache
def _of_gradients() -> set[Hashable]:
    """Counts of gradients that are known to be alone: as they come, and as views."""
    seen: list[Hashable] = []

    def note(counts: Hashable) -> bool:
        seen.append(counts)
        return False

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        @functools.partial(_judged, judge=note)
        def backward(ctx: Any, alone: bool, gradient: Tensor) -> Tensor:
            return gradient

    kept: list[Any] = []

    def counted(
        shape: tuple[int, ...],
        keep: Callable[[Tensor], Any] | None = None,
        before: bool = False,
        twice: bool = False,
    ) -> Hashable:
        x = torch.ones(2, 3, requires_grad=True) * 1
        y = Probe.apply(x)
        z = y.view(shape) if shape != y.shape else y
        if keep is not None:
            (z if before else y).register_hook(lambda gradient: kept.append(keep(gradient)))
        # A sum gives both of its sides one gradient; the side that was made later is gone through first.
        ((x.view(shape) + z if twice else z) * 2).sum().backward()
        return seen.pop()

    def look() -> tuple[set[Hashable], set[Hashable]]:
        found: set[Hashable] = set()
        others: set[Hashable] = set()
        for shape in ((2, 3), (3, 2)):
            found.add(counted(shape))
            others.add(counted(shape, twice=True))
            others.update(counted(shape, keep, before) for keep in _KEEPING for before in (False, True))
        return found, others

    with torch.enable_grad():
        return _told_apart(look)


# Ways to hold on to a tensor.
_KEEPING: tuple[Callable[[Tensor], Any], ...] = (
    lambda tensor: tensor,
    lambda tensor: tensor.detach(),
    lambda tensor: tensor.view(-1),
    lambda tensor: tensor.untyped_storage(),
    lambda tensor: tensor.numpy(force=True),
)


def _told_apart(look: Callable[[], tuple[set[Hashable], set[Hashable]]]) -> set[Hashable]:
    try:
        found, others = look()
    except (AttributeError, TypeError):  # PyTorch without these counters
        return set()
    return found if found.isdisjoint(others) else set()
