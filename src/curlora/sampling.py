"""Sampling of the columns and rows of a weight that become ``C`` and ``R`` (section 4.2 of the paper).

Everything is plain torch without global state. A draw depends only on the weight, the seed and the layer's name, so it
is the same on every device and process, in any order of the layers. Norms, probabilities and draws are float64 on the
CPU.
"""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["SAMPLINGS", "draw", "probabilities", "select", "squared_norms"]

# From the share p of a squared norm (eq. 3) to its unnormalized probability.
_TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "inverse": lambda p: p[p > 0].min() / p,  # eq. 4: 1/p, scaled so that it cannot overflow
    "uniform": torch.ones_like,
    "norm": lambda p: p,  # eq. 3, classical CUR
    "reference": lambda p: 1 / (p + 0.001),  # the author's code; nearly uniform on wide matrices
}

SAMPLINGS = tuple(_TRANSFORMS)

_CHUNK_ELEMENTS = 1 << 17  # a chunk's squares and the running sums take 1 MiB each in float64, and stay in the cache


def squared_norms(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the squared Euclidean norms of the columns and of the rows, in one pass and bounded memory.

    Args:
        weight: floating-point matrix, shape ``(m, n)``.

    Returns:
        ``(columns, rows)``: float64 on the CPU, shapes ``(n,)`` and ``(m,)``.
    """
    m, n = weight.shape
    height = max(1, min(m, _CHUNK_ELEMENTS // max(1, n)))
    # Convert to float64 before squaring: no overflow, and the same sums on every device (to about 1e-15).
    # All chunks use one buffer: memory that is freed after each chunk is not always returned to the system.
    squares = torch.empty(height, n, dtype=torch.float64, device="cpu")
    if m <= height:
        square = squares[:m].copy_(weight.detach()).square_()
        return square.sum(0), square.sum(1)
    rows = torch.zeros(m, dtype=torch.float64, device="cpu")
    # Keep the sums of all chunks and reduce them to one row at the end. To reduce each chunk takes longer: a thread
    # holds rows of the chunk in its cache, and other threads would sum its columns.
    sums = torch.zeros_like(squares)
    for begin in range(0, m, height):
        chunk = weight.detach()[begin : begin + height]
        square = squares[: len(chunk)].copy_(chunk).square_()
        sums[: len(chunk)] += square
        torch.sum(square, 1, out=rows[begin : begin + height])
    return sums.sum(0), rows


def probabilities(squared_norms: Tensor, sampling: str = "inverse") -> Tensor:
    """Return sampling probabilities for squared norms (eq. 3 and 4).

    A zero column or row is never drawn: it carries no information, and its ``1/p`` would be infinite. The exception is
    ``"reference"``, whose formula is defined at zero.

    Args:
        squared_norms: shape ``(n,)``.
        sampling: one of :data:`SAMPLINGS`.

    Returns:
        float64 probabilities, shape ``(n,)``, summing to one.

    Raises:
        ValueError: if ``sampling`` is unknown, a norm is not finite, or every norm is zero.
    """
    if sampling not in _TRANSFORMS:
        raise ValueError(f"sampling must be one of {', '.join(map(repr, SAMPLINGS))}, got {sampling!r}")
    norms = squared_norms.to(torch.float64)
    total = norms.sum()
    if not torch.isfinite(total):
        raise ValueError("the weight contains NaN or infinite values")
    if total == 0:
        raise ValueError("the weight is all zeros, so there is nothing to draw from")
    p = norms / total
    scores = _TRANSFORMS[sampling](p)
    if sampling != "reference":
        scores = torch.where(p > 0, scores, 0.0)
    return scores / scores.sum()


def draw(probabilities: Tensor, r: int, generator: torch.Generator, replacement: bool = False) -> Tensor:
    """Draw ``r`` positions.

    Without replacement, positions are drawn one after another: each remaining position has a probability proportional
    to its share (Efraimidis and Spirakis 2006, exponential races). With replacement the draws are independent, as in
    the author's code, and positions may repeat.

    Args:
        probabilities: shape ``(n,)``, as from :func:`probabilities`.
        r: number of draws.
        generator: a CPU generator.
        replacement: whether a position may be drawn more than once.

    Returns:
        int64 positions on the CPU, shape ``(r,)``, in drawing order.

    Raises:
        ValueError: if fewer than ``r`` positions can be drawn without replacement.
    """
    p = probabilities.to(device="cpu", dtype=torch.float64)
    if replacement:
        uniform = torch.rand(r, dtype=torch.float64, device="cpu", generator=generator)
        cumulative = p.cumsum(0)
        # right=True skips entries of probability zero. The clamp catches rounding past the last non-zero entry.
        last = int(p.nonzero().max())
        return torch.searchsorted(cumulative, uniform * cumulative[-1], right=True).clamp_(max=last)
    available = int((p > 0).sum())
    if r > available:
        raise ValueError(
            f"cannot draw {r} different positions: only {available} of {len(p)} are non-zero. Choose a smaller r, or "
            "replacement=True"
        )
    uniform = torch.rand(len(p), dtype=torch.float64, device="cpu", generator=generator)
    arrival = -torch.log1p(-uniform) / p
    return arrival.nan_to_num(nan=torch.inf).topk(r, largest=False, sorted=True).indices


def select(
    norms: tuple[Tensor, Tensor],
    r: int,
    *,
    sampling: str = "inverse",
    replacement: bool = False,
    seed: int = 0,
    name: str = "",
) -> tuple[Tensor, Tensor]:
    """Draw the columns of ``C = W[:, columns]`` and the rows of ``R = W[rows, :]`` (eq. 5 and 6).

    Args:
        norms: squared norms of the columns, shape ``(n,)``, and of the rows, shape ``(m,)``, as from
            :func:`squared_norms`. ``W`` has shape ``(m, n)``, in the layout that the layer stores.
        r: rank, ``1 <= r <= min(m, n)``.
        sampling: one of :data:`SAMPLINGS`.
        replacement: whether a column or row may be drawn more than once.
        seed: the adapter's seed.
        name: the layer's name, so that layers draw independently of each other.

    Returns:
        ``(columns, rows)``: int32 on the CPU, shape ``(r,)`` each.

    Raises:
        ValueError: if ``r`` does not fit the weight, or its columns or rows cannot be drawn. The message names the
            layer.
    """
    shape = len(norms[1]), len(norms[0])
    where = f"layer {name!r} with weight of shape {shape}: " if name else ""
    if not 1 <= r <= min(shape):
        raise ValueError(
            f"{where}rank r={r} is not between 1 and {min(shape)}. Choose a smaller r, give this "
            "layer its own in rank_pattern, or leave it out with exclude_modules"
        )
    drawn = []
    for axis, squares in zip(("columns", "rows"), norms, strict=True):
        try:
            p = probabilities(squares, sampling)
            drawn.append(draw(p, r, _generator(seed, name, axis), replacement).to(torch.int32))
        except ValueError as error:
            raise ValueError(f"{where}{axis}: {error}") from None
    return drawn[0], drawn[1]


def _generator(seed: int, name: str, axis: str) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/{name}/{axis}".encode(), digest_size=8).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little", signed=True))
