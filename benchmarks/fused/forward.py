"""Compare the kernel of ``curlora::forward`` with PyTorch's operators and with a copy.

python benchmarks/fused/forward.py --tokens 2048 --ranks 16     # on a GPU
"""

import timing
import torch

from curlora import kernels
from curlora.functional import gather_update


def row(tokens, m, r, dtype, device):
    inputs = timing.problems(tokens, m, r, dtype, device)

    def by(choice):
        @torch.no_grad()
        def call(one):
            with kernels.use(choice):
                gather_update(**one)

        return call

    times = timing.compared({choice: by(choice) for choice in ("torch", "triton")}, inputs, device)
    return {"kernel": "forward", "tokens": tokens, "m": m, "r": r, "dtype": str(dtype)[6:], **times}


if __name__ == "__main__":
    timing.main(row, __doc__)
