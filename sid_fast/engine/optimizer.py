"""Adam over one network, with its moments and, where wanted, its moving average."""

import copy
from collections.abc import Iterable

import torch
from torch import nn

from sid_fast import kernels
from sid_fast.engine import parallel
from sid_fast.losses import Terms


def ema_beta(images: int, batch: int, halflife_kimg: float, rampup_ratio: float) -> float:
    """β of the moving average after a step of `batch` images, `images` having gone before.

    The half-life grows with the images seen, up to halflife_kimg.
    """
    halflife = halflife_kimg * 1000
    if rampup_ratio:
        halflife = min(halflife, images * rampup_ratio)
    return 0.5 ** (batch / max(halflife, 1e-8))


class Optimizer:
    """Holds the gradients, moments and average of a network; every tensor keeps its address."""

    def __init__(self, net: nn.Module, beta1: float, beta2: float, eps: float, ema: bool = False):
        self.net = net.requires_grad_(True)
        self.ema = copy.deepcopy(net).requires_grad_(False).eval() if ema else None
        self.beta1, self.beta2, self.eps = beta1, beta2, eps
        self.params = list(net.parameters())
        self.size = sum(p.numel() for p in self.params)
        for p in self.params:
            p.grad = torch.zeros_like(p)
        self.exp_avg_sq = [torch.zeros_like(p) for p in self.params]
        self.exp_avg = [torch.zeros_like(p) for p in self.params] if beta1 else []
        self.step = torch.zeros((), dtype=torch.float64, device=self.params[0].device)

    def descend(
        self, rounds: Iterable[Terms], scale: float, lr: float, ema_beta: float = 0.0
    ) -> dict[str, torch.Tensor]:
        """Accumulate the gradients of scale·loss over the rounds and processes; update once.

        rounds makes the terms of a round when it is asked for them. Returns scalars over all
        processes, left on the device so that nothing waits for them: loss and distance (see
        losses.Terms; means over the kept samples), dropped samples, nonfinite gradient values,
        skipped: whether no sample was finite, so that nothing has changed, and failed: whether
        it was so or most gradient values were not finite.
        """
        grads = [p.grad for p in self.params]
        torch._foreach_zero_(grads)
        totals = torch.zeros(4, dtype=torch.float64, device=self.step.device)
        for terms in rounds:
            # The processes' gradients are averaged below, their losses are to be summed.
            (terms.loss.sum() * (scale * parallel.world())).backward()
            totals += terms.totals()
        loss, distance, kept, seen = parallel.sum_(totals)
        parallel.average_(grads)
        nonfinite = kernels.adam_ema(
            self.params,
            grads,
            self.exp_avg,
            self.exp_avg_sq,
            list(self.ema.parameters()) if self.ema else [],
            step=self.step,
            apply=kept > 0,
            lr=lr,
            beta1=self.beta1,
            beta2=self.beta2,
            eps=self.eps,
            ema_beta=ema_beta,
        )
        return {
            "loss": loss / kept,
            "distance": distance / kept,
            "dropped": seen - kept,
            "nonfinite": nonfinite,
            "skipped": kept == 0,
            "failed": (kept == 0) | (nonfinite > self.size // 2),
        }

    def tensors(self, prefix: str) -> dict[str, torch.Tensor]:
        """Everything that makes up the state, by name; copying into them restores it."""
        found = {f"{prefix}.step": self.step}
        for name, value in self.net.state_dict().items():
            found[f"{prefix}.net.{name}"] = value
        if self.ema:
            for name, value in self.ema.state_dict().items():
                found[f"{prefix}.ema.{name}"] = value
        names = [name for name, _ in self.net.named_parameters()]
        for kind, values in (("exp_avg", self.exp_avg), ("exp_avg_sq", self.exp_avg_sq)):
            found |= {f"{prefix}.{kind}.{n}": v for n, v in zip(names, values, strict=False)}
        return found
