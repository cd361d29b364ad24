"""Compare the kernel of ``curlora::mixed_batch`` (a ``U`` for each row) with PyTorch's operators and one shared ``U``.

python benchmarks/fused/mixed_batch.py --tokens 64 2048 --ranks 16     # 64 rows, so 1 and 32 tokens per row
"""

import timing
import torch

from curlora import kernels
from curlora.functional import gather_update, gather_update_by_row

ROWS = 64


def row(tokens, m, r, dtype, device, rows=ROWS):
    rows = min(rows, tokens)
    inputs = timing.problems(tokens, m, r, dtype, device, rows)

    def by(choice, shared=False):
        @torch.no_grad()
        def call(one):
            batch = one["output"].view(rows, -1, m)
            with kernels.use(choice):
                if shared:
                    gather_update(batch, one["scaled_U"][0], one["factor"], one["index"], one["offset"])
                else:
                    gather_update_by_row(batch, *(one[k] for k in ("scaled_U", "factor", "index", "offset")))

        return call

    calls = {choice: by(choice) for choice in ("torch", "triton")} | {"one U for all": by("triton", shared=True)}
    times = timing.compared(calls, inputs, device)
    return {"kernel": "mixed_batch", "rows": rows, "tokens": tokens, "m": m, "r": r, "dtype": str(dtype)[6:], **times}


if __name__ == "__main__":
    timing.main(row, __doc__)
