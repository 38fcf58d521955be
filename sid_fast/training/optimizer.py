"""Adam for one network, with gradient accumulation and EMAs of the weights."""

import copy
from collections.abc import Sequence
from typing import Any

import torch

from sid_fast import kernels
from sid_fast.models import Network
from sid_fast.performance import fsdp


def ema_beta(images: int, batch: int, halflife_kimg: float, rampup_ratio: float) -> float:
    """Return the EMA decay β for a step of `batch` images that starts at `images`.

    The half-life is rampup_ratio·images, at most halflife_kimg (no ramp-up if the ratio is 0).
    """
    halflife = halflife_kimg * 1000
    if rampup_ratio:
        halflife = min(halflife, images * rampup_ratio)
    return 0.5 ** (batch / max(halflife, 1e-8))


class AdamWithEMA:
    """Gradients, Adam moments and EMA of one network; every tensor keeps its address.

    Parameters stay float32. In a 16-bit compute dtype, every update also writes their low-precision
    copies (Network.compute_in). A sharded network needs none: FSDP2 gathers weights in 16 bit.

    Args:
        net: The network; sharded in place if `sharding` says so.
        beta1: Adam's β₁; 0 keeps no first moment.
        beta2: Adam's β₂.
        eps: Adam's ε.
        dtype: The network's compute dtype.
        sharding: How network, EMA and moments are distributed over the ranks.
        emas: Number of EMAs of the weights to keep.
        metrics: The fields of the losses whose means `step` returns.
        grad_clip: Limit of each gradient value; None: no limit.
    """

    def __init__(
        self,
        net: Network,
        beta1: float,
        beta2: float,
        eps: float,
        dtype: torch.dtype = torch.float32,
        sharding: fsdp.ShardingPlan = fsdp.SINGLE_PROCESS,
        emas: int = 0,
        metrics: tuple[str, ...] = ("loss", "distance"),
        grad_clip: float | None = None,
    ):
        self.net = net.requires_grad_(True)
        self.emas = [copy.deepcopy(net).requires_grad_(False).eval() for _ in range(emas)]
        self.beta1, self.beta2, self.eps = beta1, beta2, eps
        self.metrics, self.grad_clip = metrics, grad_clip
        for each in (self.net, *self.emas):
            each.compute_dtype = dtype
            sharding.shard(each, dtype)
        self.compute_weights: list[torch.Tensor | None] | None = None
        self.net.constrain_weights()
        if sharding.mesh is None:
            self.net.compute_in(dtype)
            if any(cast is not None for cast in self.net.cast_copies()):
                self.compute_weights = self.net.cast_copies()
        # While weights are gathered, modules hold the full tensors: keep the shards by name.
        self.named = dict(net.named_parameters())
        self.named_emas = [dict(ema.named_parameters()) for ema in self.emas]
        self.params = list(self.named.values())
        self.size = sum(p.numel() for p in self.params)
        self.grad_sync = sharding.grad_sync(net)
        self.exp_avg_sq = [torch.zeros_like(p) for p in self.params]
        self.exp_avg = [torch.zeros_like(p) for p in self.params] if beta1 else []
        # Views of this rank's shards.
        self.local_params = fsdp.local_shards(self.params)
        self.local_moments = fsdp.local_shards(self.exp_avg), fsdp.local_shards(self.exp_avg_sq)
        self.local_emas = [fsdp.local_shards(list(ema.values())) for ema in self.named_emas]
        device = self.params[0].device
        self.step_count = torch.zeros((), dtype=torch.float64, device=device)
        self.clipped = None
        if grad_clip is not None:
            self.clipped = torch.zeros((), dtype=torch.int64, device=device)
        # Sums over the micro-batches so far: the metrics, valid samples, all samples.
        self.totals = torch.zeros(len(metrics) + 2, dtype=torch.float64, device=device)

    def backward(
        self, loss: torch.Tensor, losses: Any, scale: float, sync_grads: bool = True
    ) -> None:
        """Accumulate the gradients of scale·Σ loss over the samples of one micro-batch.

        Args:
            loss: [N].
            losses: The method's NamedTuple, for the metrics.
            scale: Factor of the loss.
            sync_grads: Set for the last micro-batch before an update; starts summing over all
                ranks.
        """
        # DDP and FSDP average over ranks; multiplying by their number gives the sum.
        self.grad_sync.backward(loss, scale * self.grad_sync.ranks, sync_grads)
        metrics = [getattr(losses, name).detach() for name in self.metrics]
        values = torch.stack([*metrics, losses.kept.to(loss.dtype), torch.ones_like(loss)])
        self.totals += values.sum(1, dtype=torch.float64)

    def step(
        self,
        lr: float | torch.Tensor,
        ema_betas: Sequence[float | torch.Tensor] = (),
        enabled: bool | torch.Tensor = True,
    ) -> dict[str, torch.Tensor]:
        """Update from the gradients accumulated since the last step.

        Args:
            lr: Learning rate.
            ema_betas: Decay of each EMA.
            enabled: If False, discard the gradients and change nothing.

        Returns:
            Scalars over all ranks, on the device, so reading them is the only host sync:
            the metrics: means over the valid samples;
            `dropped`: number of invalid samples; `nonfinite`: number of gradient values that were
            not finite; `clipped`: number of those clipped, with a grad_clip; `skipped`: no sample
            was valid, so nothing changed; `failed`: skipped, or more than half of the gradient
            values were not finite.
        """
        *sums, valid, samples = self.grad_sync.all_reduce(self.totals.clone())
        self.grad_sync.wait()
        self.net.backward_through_copies(self.grad_sync.local_grads())
        enabled = torch.logical_and(valid > 0, torch.as_tensor(enabled, device=valid.device))
        nonfinite = kernels.adam_ema(
            self.local_params,
            self.grad_sync.local_grads(),
            *self.local_moments,
            self.local_emas[0] if self.emas else [],
            compute_weights=self.compute_weights,
            step=self.step_count,
            enabled=enabled,
            lr=lr,
            beta1=self.beta1,
            beta2=self.beta2,
            eps=self.eps,
            ema_beta=ema_betas[0] if self.emas else 0.0,
            clip=self.grad_clip,
            clipped=self.clipped,
        )
        for ema, beta in zip(self.local_emas[1:], ema_betas[1:], strict=True):
            _update_ema(ema, self.local_params, beta, enabled)
        self.grad_sync.after_update()
        self.net.after_update(enabled)
        nonfinite = self.grad_sync.sum_over_shards(nonfinite)
        metrics = {name: value / valid for name, value in zip(self.metrics, sums, strict=True)}
        if self.clipped is not None:
            metrics["clipped"] = self.grad_sync.sum_over_shards(self.clipped.clone())
        self.totals.zero_()
        self.grad_sync.zero()
        skipped = valid == 0
        return metrics | {
            "dropped": samples - valid,
            "nonfinite": nonfinite,
            "skipped": skipped,
            "failed": skipped | (nonfinite > self.size // 2),
        }

    def state_dict(self, prefix: str) -> dict[str, torch.Tensor]:
        """Return the live state tensors by name; copying into them restores the state.

        Sharded tensors are DTensors. Low-precision copies are not part of it: rebuild them with
        Network.update_compute_copies. Buffers are constants.
        """
        state = {f"{prefix}.step": self.step_count}
        state |= {f"{prefix}.net.{name}": p for name, p in self.named.items()}
        for i, ema in enumerate(self.named_emas):
            kind = f"ema{i + 1}" if i else "ema"
            state |= {f"{prefix}.{kind}.{name}": p for name, p in ema.items()}
        for kind, values in (("exp_avg", self.exp_avg), ("exp_avg_sq", self.exp_avg_sq)):
            state |= {f"{prefix}.{kind}.{n}": v for n, v in zip(self.named, values, strict=False)}
        return state


@torch.no_grad()
def _update_ema(
    ema: list[torch.Tensor],
    params: list[torch.Tensor],
    beta: float | torch.Tensor,
    enabled: torch.Tensor,
) -> None:
    """Update an EMA that the Adam kernel does not: ema ← ema + (1 − β)·(p − ema), if enabled."""
    weight = torch.where(enabled, 1 - beta, 0.0).to(torch.float32)
    change = torch._foreach_sub(params, ema)
    torch._foreach_mul_(change, weight)  # a device scalar, so that a CUDA graph can replay it
    torch._foreach_add_(ema, change)
