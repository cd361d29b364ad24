"""Compare each kernel with its formula in float64, on a GPU or in Triton's interpreter.

The allowed error of an entry is a few roundings to its dtype, relative to the sum of the absolute values of its terms.
Sums and gradients of ``U`` are float32. For float32 results the allowed relative error is 1e-5, which is far more than
rounding causes.
"""

import torch

from curlora import kernels
from curlora.functional import gather_update, gather_update_by_row

HALF, FLOAT = "half", "float32"
# dtype, rank, (rows, tokens per row), columns: sizes of real models, and sizes that do not divide a kernel's blocks.
SETTINGS = [
    (torch.bfloat16, 16, (1, 2048), 4096),
    (torch.bfloat16, 16, (64, 1), 4096),
    (torch.bfloat16, 64, (3, 333), 3072),
    (torch.bfloat16, 256, (2, 150), 1024),
    (torch.bfloat16, 5, (7, 13), 1000),
    (torch.float16, 16, (3, 171), 4096),
    (torch.float32, 16, (3, 171), 4096),
    (torch.float32, 64, (2, 50), 1024),
]
TINY = [(dtype, r, (3, 5), 40) for dtype, r, _, _ in SETTINGS]


class WrongError(Exception):
    """A kernel's result differs from its formula by more than is allowed."""


def rows(device, settings):
    """Yield a row for each setting, with the largest error of each result as a share of the allowed error."""
    for dtype, r, lead, m in settings:
        found = errors(dtype, r, lead, m, device)
        row = {"dtype": str(dtype)[6:], "r": r, "tokens": lead[0] * lead[1], "m": m, "of_allowed": found}
        yield row
        wrong = [name for name, error in found.items() if not error <= 1]
        if wrong:
            raise WrongError(f"{', '.join(wrong)}: {row}")


def errors(dtype, r, lead, m, device, seed=0):
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape, dtype=dtype):
        return torch.randn(*shape, generator=rng).to(device, dtype)

    index = torch.randint(0, m, (r,), generator=rng).to(device)
    index[r // 2] = index[0]
    # The batch is not contiguous: its rows are the second dimension in memory, as in some models.
    output, grad = (normal(lead[1], lead[0], m).transpose(0, 1) for _ in range(2))
    U, factor, offset = normal(r, r, dtype=torch.float32) / r**0.5, normal(m, r) / r**0.5, normal(r)
    by_row = normal(lead[0], r, r, dtype=torch.float32) / r**0.5
    exact = {
        **formula(output, U, factor, index, offset, grad),
        "mixed_batch": formula(output, by_row, factor, index, offset),
    }
    sizes = formula(output, U, factor, index, offset, grad, unsigned=True)
    sizes["mixed_batch"] = formula(output, by_row, factor, index, offset, unsigned=True)

    poison(output, U)
    with kernels.use("triton"):
        first, again = (kernel(output, U, factor, index, offset, grad) for _ in range(2))
        poison(output)
        first["mixed_batch"] = gather_update_by_row(output, by_row, factor, index, offset)
    found = {}
    for name, got in first.items():
        rounded = dtype if name != "scaled_U" else torch.float32
        allowed = 1e-5 if rounded == torch.float32 else (4 + r // 32) * torch.finfo(rounded).eps / 2
        found[name] = float(
            ((got.double() - exact[name]).abs() / (allowed * sizes[name])).nan_to_num(float("inf")).max()
        )
    found["again"] = float(any(not torch.equal(first[name], again[name]) for name in again)) * 9
    return {name: round(error, 3) for name, error in found.items()}


def kernel(output, U, factor, index, offset, grad):
    leaves = output.detach().requires_grad_(), U.detach().requires_grad_()
    result = gather_update(*leaves, factor, index, offset)
    gradients = torch.autograd.grad(result, leaves, grad)
    return {"forward": result.detach(), "output": gradients[0], "scaled_U": gradients[1]}


def formula(output, U, factor, index, offset, grad=None, unsigned=False):
    """Return the results in float64. With ``unsigned`` all terms are absolute values, so nothing cancels."""
    output, U, factor, offset = ((t.double().abs() if unsigned else t.double()) for t in (output, U, factor, offset))
    z = output[..., index] + offset if unsigned else output[..., index] - offset
    result = output + (z @ U.mT) @ factor.T
    if grad is None:
        return result
    grad = grad.double().abs() if unsigned else grad.double()
    g = grad @ factor
    return {
        "forward": result,
        "output": grad.clone().index_add_(-1, index, g @ U),
        "scaled_U": g.flatten(0, -2).T @ z.flatten(0, -2),
    }


def poison(*like):
    """Fill memory with NaN and free it, so that entries which the next kernel does not write are NaN."""
    for tensor in like:
        for _ in range(4):
            torch.full(tensor.shape, float("nan"), dtype=tensor.dtype, device=tensor.device)
