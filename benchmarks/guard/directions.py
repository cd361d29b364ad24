"""Measure how much of a task's natural gradient an adapter with few columns and rows can follow.

For each layer, ``G`` is the gradient of the task's loss with respect to a full linking matrix, of all columns and all
rows of ``W``; its natural norm is ``tr(G^T B^-1 G A^-1)``, with ``A = E[y0 y0^T]`` and ``B = E[(W^T d)(W^T d)^T]`` of
the guard's text (K-FAC, damped by a tenth). It is, to first order, the square of what is learned for a given KL
divergence. Compares the share of it, over two halves of the examples, in: columns and rows drawn at random; those with
the highest ratio of the task's energy to the general energy; and linear combinations of columns and rows, which are
the singular vectors of ``G`` as it is, or of the whitened ``B^-1/2 G A^-1/2``. Writes ``directions.jsonl``.

    export CURLORA_DATA_DIR=...
    python benchmarks/guard/directions.py --model DIR
"""

import argparse
from pathlib import Path

import torch
from chat_data import HELD_OUT, examples
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from curlora.guard.coordinates import coordinates
from curlora.text.own_text import own_text
from results import add

RESULTS = Path(__file__).parent / "directions.jsonl"
LAYERS, PROJECTIONS = (16, 24), ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")
RANKS, DAMPING, EXAMPLES = (8, 16, 32, 64), 0.1, 96


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder, or a hub id")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).requires_grad_(False)
    modules = {
        f"{layer}.{name}": module
        for layer in LAYERS
        for name, module in ((n.split(".")[-1], m) for n, m in model.model.layers[layer].named_modules())
        if name in PROJECTIONS
    }
    of_task = [Sums(modules), Sums(modules)]
    task = examples(tokenizer, "gsm8k")[HELD_OUT : HELD_OUT + EXAMPLES]
    for number, (row, prompt) in enumerate(task):
        with of_task[number % 2] as sums:
            sums.tokens += backward(model, torch.tensor(row), torch.arange(len(row)) >= prompt, sampled=False)
    of_text = Sums(modules, moments=True)
    text = own_text(model, tokenizer, seed=0, progress=False)
    torch.manual_seed(0)
    for ids, counted in zip(text, text.counted, strict=True):
        if counted[1:].any():
            with of_text as sums:
                sums.tokens += backward(model, ids, counted, sampled=True)
    RESULTS.unlink(missing_ok=True)
    shares = {}
    for name in modules:
        for key, value in captured(name, of_task, of_text).items():
            shares[key] = shares.get(key, 0.0) + value
    total = shares.pop("all")
    for (basis, r), value in shares.items():
        add(RESULTS, {"basis": basis, "r": r, "share": round(value / total, 4)})


def backward(model, ids, counted, *, sampled):
    """Run the model on one row and back, toward its tokens or sampled ones; return how many were predicted."""
    inputs = model.model.embed_tokens(ids[None]).requires_grad_()
    logits = model(inputs_embeds=inputs, use_cache=False).logits[0, :-1][counted[1:]]
    targets = torch.distributions.Categorical(logits=logits.detach()).sample() if sampled else ids[1:][counted[1:]]
    cross_entropy(logits, targets, reduction="sum").backward()
    return len(targets)


class Sums:
    """Sums over tokens, by layer: ``G``, energies of both sides and, of general text, their second moments."""

    def __init__(self, modules, moments=False):
        self.modules, self.moments = modules, moments
        self.G, self.A, self.B, self.tokens = {}, {}, {}, 0

    def __enter__(self):
        self.hooks = [module.register_forward_hook(self.listen(name)) for name, module in self.modules.items()]
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()

    def listen(self, name):
        def hook(module, inputs, output):
            y0 = output.detach()[0]

            def back(gradient):
                through = gradient[0] @ module.weight
                self.G[name] = self.G.get(name, 0) + through.T @ y0
                for total, values in ((self.A, y0), (self.B, through)):
                    moment = values.T @ values if self.moments else values.square().sum(0)
                    total[name] = total.get(name, 0) + moment

            output.register_hook(back)

        return hook


def captured(name, of_task, of_text):
    """Return the natural norm in each basis, of one half's gradient times the other's. ``G`` is the first half's."""
    first, second = (half.G[name].double() / half.tokens for half in of_task)
    B, A = (side[name].double() / of_text.tokens for side in (of_text.B, of_text.A))
    white_B, white_A, *roots = coordinates(B, A, DAMPING)
    B, A = (root @ root for root in roots)  # damped

    def norm(P, Q):
        found, other = P.T @ first @ Q, P.T @ second @ Q
        found = torch.linalg.solve(P.T @ B @ P, found)
        return float((torch.linalg.solve(Q.T @ A @ Q, found.T).T * other).sum())

    n, m = first.shape
    eye_n, eye_m = torch.eye(n, dtype=torch.float64), torch.eye(m, dtype=torch.float64)
    by_task = [sum(getattr(half, side)[name] for half in of_task).double() for side in "AB"]
    ratio_A, ratio_B = by_task[0] / A.diagonal(), by_task[1] / B.diagonal()
    plain = torch.linalg.svd(first, full_matrices=False)
    white = torch.linalg.svd(white_B @ first @ white_A, full_matrices=False)
    generator = torch.Generator().manual_seed(0)
    order_n, order_m = torch.randperm(n, generator=generator), torch.randperm(m, generator=generator)
    found = {"all": norm(eye_n, eye_m)}
    for r in RANKS:
        found["random", r] = norm(eye_n[:, order_n[:r]], eye_m[:, order_m[:r]])
        found["ratio", r] = norm(eye_n[:, ratio_B.topk(r).indices], eye_m[:, ratio_A.topk(r).indices])
        found["combinations, G", r] = norm(plain.U[:, :r], plain.Vh[:r].T)
        found["combinations, whitened G", r] = norm(white_B @ white.U[:, :r], white_A @ white.Vh[:r].T)
    return found


if __name__ == "__main__":
    main()
