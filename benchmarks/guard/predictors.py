"""Ways to predict forgetting, beside what is measured: layer by layer, and with the terms across layers.

One adapter learns SST-2 as in ``sweep.py``. Its ``U`` is scaled down and up, and for each scale the divergence from the
base is measured on the guard's own text, by its rows of 128 tokens and of 512, and on other articles, and predicted

- by the guard: two moments for each layer, damped;
- by the same moments without damping;
- by gradients of rows of the guard's text, ``1/2 sum over rows of (g . u)^2 / tokens``, of each layer by itself (what
  the moments would be if they were not split in two), and of all layers together, with the terms across them. One
  half of the draws of answers beside the other tells how much of it is noise.

Adds a line to ``predictors.jsonl`` for each adapter.

    python benchmarks/guard/predictors.py --model DIR
"""

import argparse
from pathlib import Path

import torch
from sweep import ready
from torch.nn.functional import kl_div

import curlora
from results import add

RESULTS = Path(__file__).parent / "predictors.jsonl"
ADAPTERS = {
    "guarded": dict(method="guarded", lr=0.06, rise=0.02),
    "guarded, redrawn": dict(method="guarded", lr=0.06, rise=0.02, choose="task"),
}
SCALES = (0.3, 1.0, 2.0, 4.0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder, or a hub id")
    parser.add_argument("--cache", type=Path, default=Path("study_cache"))
    parser.add_argument("--adapters", nargs="+", default=list(ADAPTERS), choices=list(ADAPTERS))
    parser.add_argument("--draws", type=int, default=4, help="of answers, for each row")
    options = parser.parse_args()
    for name in options.adapters:
        run, _ = ready(options, r=16, **ADAPTERS[name])
        run.learn("sst2", 0, 1)
        add(RESULTS, {"adapter": name, "draws": options.draws, "scales": compared(run, options.draws)})


def compared(run, draws):
    mixings = [U for _, U in run.trained]
    learned = [U.detach().clone() for U in mixings]
    rows = [piece for row in run.data["guard"]["rows"] for piece in row.split(128)]
    scaled(mixings, learned, 0)
    calibration = curlora.calibrate(run.model, rows, progress=False)
    guards = {
        "guard": curlora.Guard(run.model, calibration), "undamped": curlora.Guard(run.model, calibration, damping=1e-6)
    }  # fmt: skip
    shares = row_shares(run, rows, draws, learned)  # (draws, rows, layers)
    tokens = sum(len(row) - 1 for row in rows)
    base = [states(run, row) for row in rows]
    lines = []
    for scale in SCALES:
        scaled(mixings, learned, scale)
        line = {
            "scale": scale,
            "own": drift(run, rows, base),
            "own, 512": drift(run, run.data["guard"]["rows"]),
            "articles": run.text("articles")["drift"],
        }
        line |= {name: guard.drift() for name, guard in guards.items()}
        unit = scale**2 / 2 / tokens / draws
        line["rows, each layer"] = unit * shares.square().sum().item()
        line["rows, across layers"] = unit * shares.sum(-1).square().sum().item()
        halves = [half.sum(-1).square().sum().item() * 2 * unit for half in shares.chunk(2)]
        line["across, by half of the draws"] = halves
        lines.append({key: value if key == "scale" else rounded(value) for key, value in line.items()})
    return lines


def scaled(mixings, learned, factor):
    with torch.no_grad():
        for U, value in zip(mixings, learned, strict=True):
            U.copy_(factor * value)


def row_shares(run, rows, draws, learned):
    """``g . u`` of each draw, row and layer: by how much the log-probability of drawn answers to a row moves."""
    generator = torch.Generator().manual_seed(0)
    mixings = [U for _, U in run.trained]
    found = torch.zeros(draws, len(rows), len(mixings), dtype=torch.float64)
    for j, row in enumerate(rows):
        log_p = run.log_p(row)
        for i in range(draws):
            answers = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
            gradients = torch.autograd.grad(log_p.gather(1, answers).sum(), mixings, retain_graph=i + 1 < draws)
            for k, (g, u) in enumerate(zip(gradients, learned, strict=True)):
                found[i, j, k] = (g.double() * u.double()).sum()
    return found


@torch.no_grad()
def states(run, row):
    return run.base.model(input_ids=row[None], use_cache=False).last_hidden_state[0, :-1]


@torch.no_grad()
def drift(run, rows, base=None):
    """From the states of the base, or those that the run has kept of rows of 512 tokens."""
    total = count = 0
    for i, row in enumerate(rows):
        before = run.base_log_p(row) if base is None else run.base.lm_head(base[i]).log_softmax(-1)
        total += kl_div(run.log_p(row), before, reduction="sum", log_target=True).item()
        count += len(row) - 1
    return total / count


def rounded(value):
    return [rounded(one) for one in value] if isinstance(value, list) else float(f"{value:.4g}")


if __name__ == "__main__":
    main()
