"""Random inputs of every kind that a kernel takes, and the expected results in float64."""

import dataclasses

import torch
from hypothesis import strategies as st
from torch import Tensor

from curlora.kernels.operators import INTERPRETED

# The most that one rounding changes an entry, relative to the sum of the absolute values of its terms. For float32 and
# float64, in which sums are rounded term by term, it includes all roundings of a sum. Triton's interpreter truncates
# float32 to bfloat16, where a GPU rounds to the nearest value.
ROUNDING = {dtype: torch.finfo(dtype).eps / 2 for dtype in (torch.float16, torch.bfloat16)}
ROUNDING[torch.bfloat16] *= 2 if INTERPRETED else 1
ROUNDING |= {torch.float32: 5e-7, torch.float64: 3e-15}


@dataclasses.dataclass
class Problem:
    output: Tensor
    scaled_U: Tensor  # noqa: N815
    factor: Tensor
    index: Tensor
    offset: Tensor | None
    grad: Tensor
    z: Tensor

    @property
    def forward(self):
        return self.output, self.scaled_U, self.factor, self.index, self.offset

    @property
    def backward(self):
        return self.grad, self.z, self.scaled_U, self.factor, self.index


def make(
    lead=(5,),
    m=40,
    r=3,
    dtype=torch.float32,
    dtype_U=torch.float32,
    offset=True,
    layout="contiguous",
    rows=None,
    seed=0,
):
    """Return a random problem in which every third index repeats an earlier one.

    With ``rows``, there is a ``scaled_U`` for each of so many rows.
    """
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape, dtype=dtype):
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)

    index = torch.randint(0, m, (r,), generator=rng)
    for i in range(2, r, 3):
        index[i] = index[i // 2]
    scaled_U = normal(*(() if rows is None else (rows,)), r, r, dtype=dtype_U) / r**0.5
    tokens = torch.Size(lead).numel()
    return Problem(
        output=laid_out(normal(*lead, m), layout),
        scaled_U=scaled_U.mT.contiguous().mT if layout != "contiguous" else scaled_U,
        factor=normal(m, r),
        index=index,
        offset=normal(r) if offset else None,
        grad=laid_out(normal(*lead, m), layout),
        z=normal(tokens, r, dtype=dtype_U),
    )


def laid_out(tensor, layout):
    """Return a tensor with the same entries and other strides."""
    if layout == "a slice":  # rows are not adjacent, and begin at unaligned addresses
        wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 5), float("nan"), dtype=tensor.dtype)
        wide[..., 3:-2] = tensor
        return wide[..., 3:-2]
    if layout == "transposed" and tensor.ndim > 2:
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "last stride":
        return tensor.mT.contiguous().mT
    return tensor


LAYOUTS = ("contiguous", "a slice", "transposed", "last stride")


@st.composite
def problems(draw, rows=False):
    """Problems with ragged sizes, ranks up to 256, empty batches, duplicate indices, any strides, and all dtypes."""
    r = draw(st.one_of(st.integers(1, 20), st.sampled_from([31, 64, 65, 130, 256])))
    lead = draw(st.sampled_from([(1,), (17,), (3, 7), (2, 1, 5), (0,), (2, 0), (33,)]))
    dtype = draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
    return make(
        lead=lead,
        m=draw(st.sampled_from([1, 7, 16, 40, 67])),
        r=r,
        dtype=dtype,
        dtype_U=draw(st.sampled_from([torch.float32, dtype])),
        offset=draw(st.booleans()),
        layout=draw(st.sampled_from(LAYOUTS)),
        rows=lead[0] if rows else None,
        seed=draw(st.integers(0, 10**6)),
    )


def exact(output, scaled_U, factor, index, offset):
    """Return the result and ``z`` in float64."""
    output, scaled_U, factor = output.double(), scaled_U.double(), factor.double()
    z = output[..., index]
    if offset is not None:
        z = z - offset.double()
    mixed = torch.einsum("b...j,bij->b...i", z, scaled_U) if scaled_U.ndim == 3 else z @ scaled_U.T
    return output + mixed @ factor.T, z.reshape(-1, len(index))


def exact_gradients(grad, z, scaled_U, factor, index):
    """Return the gradients of the output and of ``scaled_U`` in float64."""
    grad, z, scaled_U, factor = (t.double() for t in (grad, z, scaled_U, factor))
    g = grad.reshape(-1, grad.shape[-1]) @ factor
    of_output = grad.reshape(-1, grad.shape[-1]).clone().index_add_(1, index, g @ scaled_U)
    return of_output.view(grad.shape), g.T @ z


def sizes(problem):
    """Return, for each entry of the results and the gradients, the sum of the absolute values of its terms."""

    def unsigned(tensor):
        return tensor.double().abs()

    offset = None if problem.offset is None else -unsigned(problem.offset)
    output, scaled_U, factor = map(unsigned, (problem.output, problem.scaled_U, problem.factor))
    forward = exact(output, scaled_U, factor, problem.index, offset)
    if scaled_U.ndim == 3:
        return forward
    return *forward, *exact_gradients(unsigned(problem.grad), unsigned(problem.z), scaled_U, factor, problem.index)


def assert_near(got, expected, size, *dtypes, roundings=4):
    """Assert that each entry is off by at most ``roundings`` roundings to the coarsest of ``dtypes``.

    Rounded are ``z`` or ``g``, ``mixed`` and the result.
    """
    assert got.shape == expected.shape
    assert torch.isfinite(got).all()
    bound = roundings * max(ROUNDING[dtype] for dtype in dtypes)
    assert ((got.double() - expected).abs() <= bound * size).all()
