"""Adam over one network, with its moments and, where wanted, its moving average."""

import copy
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import nn

from sid_fast import kernels
from sid_fast.engine import parallel
from sid_fast.errors import OutOfMemory
from sid_fast.losses import Terms

Round = TypeVar("Round")


def ema_beta(images: int, batch: int, halflife_kimg: float, rampup_ratio: float) -> float:
    """β of the moving average after a step of `batch` images, `images` having gone before.

    The half-life grows with the images seen, up to halflife_kimg.
    """
    halflife = halflife_kimg * 1000
    if rampup_ratio:
        halflife = min(halflife, images * rampup_ratio)
    return 0.5 ** (batch / max(halflife, 1e-8))


class Optimizer:
    """Holds the gradients, moments and average of a network; every tensor keeps its address.

    name: of the phase, for messages. layout says how network, average and all else lie over the
    processes; the network and its average are sharded in place where it says so.
    """

    def __init__(
        self,
        net: nn.Module,
        beta1: float,
        beta2: float,
        eps: float,
        ema: bool = False,
        name: str = "network",
        layout: parallel.Layout = parallel.WHOLE,
    ):
        self.net = net.requires_grad_(True)
        self.ema = copy.deepcopy(net).requires_grad_(False).eval() if ema else None
        self.beta1, self.beta2, self.eps, self.name = beta1, beta2, eps, name
        layout.shard(self.net)
        if self.ema:
            layout.shard(self.ema)
        # While weights are gathered the modules hold those: the parts have to be kept by name.
        self.named = dict(net.named_parameters())
        self.named_ema = dict(self.ema.named_parameters()) if self.ema else {}
        self.params = list(self.named.values())
        self.size = sum(p.numel() for p in self.params)
        self.gradients = layout.gradients(net)
        self.exp_avg_sq = [torch.zeros_like(p) for p in self.params]
        self.exp_avg = [torch.zeros_like(p) for p in self.params] if beta1 else []
        self.step = torch.zeros((), dtype=torch.float64, device=self.params[0].device)

    def descend(
        self,
        terms_of: Callable[[Round], Terms],
        rounds: Sequence[Round],
        scale: float,
        lr: float,
        ema_beta: float = 0.0,
    ) -> dict[str, torch.Tensor]:
        """Accumulate the gradients of scale·loss over the rounds and processes; update once.

        terms_of makes the terms of a round. Returns scalars over all
        processes, left on the device so that nothing waits for them: loss and distance (see
        losses.Terms; means over the kept samples), dropped samples, nonfinite gradient values,
        skipped: whether no sample was finite, so that nothing has changed, and failed: whether
        it was so or most gradient values were not finite.
        """
        self.gradients.zero()
        totals = torch.zeros(4, dtype=torch.float64, device=self.step.device)
        for number, round in enumerate(rounds, start=1):
            try:
                terms = terms_of(round)
                # The processes' gradients are averaged, their losses are to be summed.
                loss = terms.loss.sum() * (scale * parallel.world())
                self.gradients.backward(loss, last=number == len(rounds))
            except torch.OutOfMemoryError as error:
                what = ". ".join(str(error).split(". ")[:2])  # what was asked for; then statistics
                raise OutOfMemory(
                    f"{self.name} step, round {number} of {len(rounds)}: {what}"
                ) from error
            totals += terms.totals()
        loss, distance, kept, seen = parallel.sum_(totals)
        self.gradients.wait()
        nonfinite = kernels.adam_ema(
            parallel.local(self.params),
            parallel.local([p.grad for p in self.params]),
            parallel.local(self.exp_avg),
            parallel.local(self.exp_avg_sq),
            parallel.local(list(self.named_ema.values())),
            step=self.step,
            apply=kept > 0,
            lr=lr,
            beta1=self.beta1,
            beta2=self.beta2,
            eps=self.eps,
            ema_beta=ema_beta,
        )
        self.gradients.updated()
        nonfinite = self.gradients.total(nonfinite)
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

        Sharded tensors are DTensors. Buffers are constants and left out.
        """
        found = {f"{prefix}.step": self.step}
        found |= {f"{prefix}.net.{name}": p for name, p in self.named.items()}
        found |= {f"{prefix}.ema.{name}": p for name, p in self.named_ema.items()}
        for kind, values in (("exp_avg", self.exp_avg), ("exp_avg_sq", self.exp_avg_sq)):
            found |= {f"{prefix}.{kind}.{n}": v for n, v in zip(self.named, values, strict=False)}
        return found
