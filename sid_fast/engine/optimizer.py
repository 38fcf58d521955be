"""Adam over one network, with its moments and, where wanted, its moving average."""

import copy

import torch
from torch import nn

from sid_fast import kernels
from sid_fast.engine import parallel
from sid_fast.kernels import Losses


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
        device = self.params[0].device
        self.step = torch.zeros((), dtype=torch.float64, device=device)
        self.shadow: list[torch.Tensor | None] | None = None
        self.totals = torch.zeros(
            4, dtype=torch.float64, device=device
        )  # loss, distance, kept, seen

    def compute_in(self, dtype: torch.dtype) -> None:
        """Run the network in `dtype`; updates write the shadows of its weights from here on."""
        self.net.compute_in(dtype)
        shadows = self.net.shadows()
        self.shadow = shadows if any(s is not None for s in shadows) else None

    def accumulate(self, losses: Losses, scale: float) -> None:
        """Add a round's gradients of scale·loss, summed over its samples and all processes."""
        # The processes' gradients are averaged in update, their losses are to be summed.
        (losses.loss.sum() * (scale * parallel.world())).backward()
        values = losses.loss.detach(), losses.distance, losses.kept, torch.ones_like(losses.kept)
        self.totals += torch.stack([v.sum(dtype=torch.float64) for v in values])

    def update(
        self,
        lr: float | torch.Tensor,
        ema_beta: float | torch.Tensor = 0.0,
        apply: bool | torch.Tensor = True,
    ) -> dict[str, torch.Tensor]:
        """Update once from the rounds since the last update; without `apply`, forget them.

        Returns scalars over all processes, left on the device so that nothing waits for them:
        loss and distance (see kernels.Losses; means over the kept samples), dropped samples,
        nonfinite gradient values, skipped: whether no sample was finite, so that nothing has
        changed, and failed: whether it was so or most gradient values were not finite.
        """
        grads = [p.grad for p in self.params]
        loss, distance, kept, seen = parallel.sum_(self.totals.clone())
        parallel.average_(grads)
        nonfinite = kernels.adam_ema(
            self.params,
            grads,
            self.exp_avg,
            self.exp_avg_sq,
            list(self.ema.parameters()) if self.ema else [],
            shadow=self.shadow,
            step=self.step,
            apply=(kept > 0) & apply,
            lr=lr,
            beta1=self.beta1,
            beta2=self.beta2,
            eps=self.eps,
            ema_beta=ema_beta,
        )
        self.totals.zero_()
        torch._foreach_zero_(grads)
        return {
            "loss": loss / kept,
            "distance": distance / kept,
            "dropped": seen - kept,
            "nonfinite": nonfinite,
            "skipped": kept == 0,
            "failed": (kept == 0) | (nonfinite > self.size // 2),
        }

    def tensors(self, prefix: str) -> dict[str, torch.Tensor]:
        """Everything that makes up the state, by name; copying into them restores it.

        Shadows are made anew from the weights (EDMNetwork.refresh); buffers are constants.
        """
        found = {f"{prefix}.step": self.step}
        found |= {f"{prefix}.net.{name}": p for name, p in self.net.named_parameters()}
        if self.ema:
            found |= {f"{prefix}.ema.{name}": p for name, p in self.ema.named_parameters()}
        names = [name for name, _ in self.net.named_parameters()]
        for kind, values in (("exp_avg", self.exp_avg), ("exp_avg_sq", self.exp_avg_sq)):
            found |= {f"{prefix}.{kind}.{n}": v for n, v in zip(names, values, strict=False)}
        return found
