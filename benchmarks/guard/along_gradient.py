"""An optimizer to hold against Adam: steps of a stated length, along the mean of past gradients."""

import torch


class AlongGradient(torch.optim.Optimizer):
    """``p -= lr m / rms(m)``, with ``m`` the running mean of gradients and ``rms`` over all parameters together.

    So a step is as long as Adam's first one at the same rate, and goes where the gradient does.
    """

    def __init__(self, parameters, lr, momentum=0.9):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            moved = [p for p in group["params"] if p.grad is not None]
            means = [self.state[p].setdefault("mean", torch.zeros_like(p)) for p in moved]
            for p, mean in zip(moved, means, strict=True):
                mean.lerp_(p.grad, 1 - group["momentum"])
            rms = torch.cat([mean.flatten() for mean in means]).square().mean().sqrt().clamp_min(1e-30)
            for p, mean in zip(moved, means, strict=True):
                p.sub_(group["lr"] * mean / rms)
