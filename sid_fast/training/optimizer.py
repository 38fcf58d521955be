"""Adam over one network, with its moments and, where wanted, its moving average."""

import copy

import torch

from sid_fast import kernels
from sid_fast.kernels import Losses
from sid_fast.models import EDMNetwork
from sid_fast.performance import fsdp


def ema_beta(images: int, batch: int, halflife_kimg: float, rampup_ratio: float) -> float:
    """β of the moving average after a step of `batch` images, `images` having gone before.

    The half-life grows with the images seen, up to halflife_kimg.
    """
    halflife = halflife_kimg * 1000
    if rampup_ratio:
        halflife = min(halflife, images * rampup_ratio)
    return 0.5 ** (batch / max(halflife, 1e-8))


class AdamWithEMA:
    """Holds the gradients, moments and average of a network; every tensor keeps its address.

    dtype is what the network computes in; its parameters stay float32, and have 16-bit copies that
    every update writes (EDMNetwork.compute_in). sharding says how network, average and all else lie
    over the processes; the network and its average are sharded in place where it says so, and then
    have no copies: what is gathered is 16 bit.
    """

    def __init__(
        self,
        net: EDMNetwork,
        beta1: float,
        beta2: float,
        eps: float,
        dtype: torch.dtype = torch.float32,
        sharding: fsdp.ShardingPlan = fsdp.WHOLE,
        ema: bool = False,
    ):
        self.net = net.requires_grad_(True)
        self.ema = copy.deepcopy(net).requires_grad_(False).eval() if ema else None
        self.beta1, self.beta2, self.eps = beta1, beta2, eps
        for each in filter(None, (self.net, self.ema)):
            each.compute_dtype = dtype
            sharding.shard(each, dtype)
        self.compute_weights: list[torch.Tensor | None] | None = None
        if sharding.mesh is None and dtype != torch.float32:
            self.net.compute_in(dtype)
            self.compute_weights = self.net.written_copies()
        # While weights are gathered the modules hold those: the parts have to be kept by name.
        self.named = dict(net.named_parameters())
        self.named_ema = dict(self.ema.named_parameters()) if self.ema else {}
        self.params = list(self.named.values())
        self.size = sum(p.numel() for p in self.params)
        self.gradients = sharding.gradients(net)
        self.exp_avg_sq = [torch.zeros_like(p) for p in self.params]
        self.exp_avg = [torch.zeros_like(p) for p in self.params] if beta1 else []
        # This rank's part of each tensor, which is the memory itself.
        self.local_params = fsdp.local(self.params)
        lists = self.exp_avg, self.exp_avg_sq, list(self.named_ema.values())
        self.local_state = [fsdp.local(tensors) for tensors in lists]
        device = self.params[0].device
        self.step_count = torch.zeros((), dtype=torch.float64, device=device)
        # loss, distance, kept and seen of the rounds so far
        self.totals = torch.zeros(4, dtype=torch.float64, device=device)

    def backward(self, losses: Losses, scale: float, sync_grads: bool = True) -> None:
        """Add a round's gradients of scale·loss, summed over its samples and all processes.

        In the last round before an update the processes begin to average.
        """
        # The processes' gradients are averaged, their losses are to be summed.
        self.gradients.backward(losses.loss, scale * self.gradients.ranks, sync_grads)
        loss, distance, kept = losses.loss.detach(), losses.distance, losses.kept
        values = torch.stack([loss, distance, kept.to(loss.dtype), torch.ones_like(loss)])
        self.totals += values.sum(1, dtype=torch.float64)

    def step(
        self,
        lr: float | torch.Tensor,
        ema_beta: float | torch.Tensor = 0.0,
        enabled: bool | torch.Tensor = True,
    ) -> dict[str, torch.Tensor]:
        """Update once from the rounds since the last update; unless `enabled`, forget them.

        Returns scalars over all processes, left on the device so that nothing waits for them:
        loss and distance (see kernels.Losses; means over the kept samples), dropped samples,
        nonfinite gradient values, skipped: whether no sample was finite, so that nothing has
        changed, and failed: whether it was so or most gradient values were not finite.
        """
        loss, distance, kept, seen = self.gradients.all_reduce(self.totals.clone())
        self.gradients.wait()
        nonfinite = kernels.adam_ema(
            self.local_params,
            self.gradients.local(),
            *self.local_state,
            compute_weights=self.compute_weights,
            step=self.step_count,
            enabled=(kept > 0) & enabled,
            lr=lr,
            beta1=self.beta1,
            beta2=self.beta2,
            eps=self.eps,
            ema_beta=ema_beta,
        )
        self.net.add_up()
        self.gradients.updated()
        nonfinite = self.gradients.total(nonfinite)
        self.totals.zero_()
        self.gradients.zero()
        skipped = kept == 0
        return {
            "loss": loss / kept,
            "distance": distance / kept,
            "dropped": seen - kept,
            "nonfinite": nonfinite,
            "skipped": skipped,
            "failed": skipped | (nonfinite > self.size // 2),
        }

    def state_dict(self, prefix: str) -> dict[str, torch.Tensor]:
        """Everything that makes up the state, by name; copying into them restores it.

        Sharded tensors are DTensors. Copies are made anew from the parameters
        (EDMNetwork.update_compute_copies); buffers are constants.
        """
        found = {f"{prefix}.step": self.step_count}
        found |= {f"{prefix}.net.{name}": p for name, p in self.named.items()}
        found |= {f"{prefix}.ema.{name}": p for name, p in self.named_ema.items()}
        for kind, values in (("exp_avg", self.exp_avg), ("exp_avg_sq", self.exp_avg_sq)):
            found |= {f"{prefix}.{kind}.{n}": v for n, v in zip(self.named, values, strict=False)}
        return found
