"""Compare the kernels of ``curlora::backward`` with PyTorch's operators and with a copy.

python benchmarks/fused/backward.py --tokens 2048 --ranks 16     # on a GPU
"""

import timing
import torch

from curlora import kernels
from curlora.functional import gather_update


def row(tokens, m, r, dtype, device):
    inputs = timing.problems(tokens, m, r, dtype, device)
    graphs = {}
    for one in inputs:
        leaves = one["output"].requires_grad_(), one["scaled_U"].requires_grad_()
        for choice in ("torch", "triton"):
            with kernels.use(choice):
                graphs[choice, id(one)] = gather_update(**one), leaves

    def by(choice):
        def call(one):
            # The output serves as the gradient: it has the same size, and is no longer in the cache.
            result, leaves = graphs[choice, id(one)]
            torch.autograd.grad(result, leaves, one["output"].detach(), retain_graph=True)

        return call

    times = timing.compared({choice: by(choice) for choice in ("torch", "triton")}, inputs, device)
    return {"kernel": "backward", "tokens": tokens, "m": m, "r": r, "dtype": str(dtype)[6:], **times}


if __name__ == "__main__":
    timing.main(row, __doc__)
