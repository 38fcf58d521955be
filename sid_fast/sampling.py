"""The teacher's many-step sampler (arXiv 2206.00364, algorithm 1 without churn)."""

import itertools
from collections.abc import Callable

import torch

from sid_fast.noise import sampler_sigmas


@torch.no_grad()
def heun(
    net: Callable[..., torch.Tensor],
    latents: torch.Tensor,
    class_labels: torch.Tensor | None = None,
    num_steps: int = 18,
) -> torch.Tensor:
    """Solve the probability-flow ODE from latents ~ N(0, I), [N, C, R, R], to images.

    The state is float64, the network float32; 2·num_steps − 1 network calls. Returns float64
    [N, C, R, R].
    """

    def slope(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return (x - net(x.float(), sigma.float(), class_labels).double()) / sigma

    sigmas = sampler_sigmas(num_steps).to(latents.device)
    x = latents.double() * sigmas[0]
    for i, (now, then) in enumerate(itertools.pairwise(sigmas)):
        d = slope(x, now)
        euler = x + (then - now) * d
        last = i == num_steps - 1  # to σ = 0, where the slope is not defined
        x = euler if last else x + (then - now) * (d + slope(euler, then)) / 2
    return x
