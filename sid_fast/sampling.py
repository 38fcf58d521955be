"""Sampling: latents to images, by a one-step generator or the teacher's Heun sampler."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from sid_fast.errors import UserError
from sid_fast.io import progress
from sid_fast.models import Network, NetworkConfig
from sid_fast.noise import sampler_sigmas


def one_step(
    net: Callable[..., torch.Tensor],
    latents: torch.Tensor,
    class_labels: torch.Tensor | None,
    init_sigma: float,
) -> torch.Tensor:
    """Generate G(z) = D(σ_init·z; σ_init, c), float32, from latents z ~ N(0, I), [N, C, R, R]."""
    sigma = torch.full((len(latents),), init_sigma, device=latents.device)
    return net(latents * init_sigma, sigma, class_labels)


@torch.no_grad()
def heun(
    net: Callable[..., torch.Tensor],
    latents: torch.Tensor,
    class_labels: torch.Tensor | None = None,
    num_steps: int = 18,
) -> torch.Tensor:
    """Sample by solving the probability-flow ODE (arXiv 2206.00364, algorithm 1, no churn).

    The solver runs in float64, the network in float32; it is called 2·num_steps − 1 times.

    Args:
        net: Denoiser D(x; σ, c).
        latents: z ~ N(0, I), [N, C, R, R].
        class_labels: One-hot [N, label_dim], or None.
        num_steps: Number of noise levels.

    Returns:
        Images, float64 [N, C, R, R].
    """

    def slope(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return (x - net(x.float(), sigma.float(), class_labels).double()) / sigma

    sigmas = sampler_sigmas(num_steps).to(latents.device)
    x = latents.double() * sigmas[0]
    for i, (now, then) in enumerate(itertools.pairwise(sigmas)):
        d = slope(x, now)
        euler = x + (then - now) * d
        last = i == num_steps - 1  # at σ = 0, where the slope is undefined
        x = euler if last else x + (then - now) * (d + slope(euler, then)) / 2
    return x


def to_uint8(x: torch.Tensor) -> torch.Tensor:
    """Convert float images [N, C, H, W] in [-1, 1] to uint8, clamping values outside."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))  # 16 bit cannot represent n + 0.5
    return (x * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def seed_inputs(
    seeds: list[int], network: NetworkConfig, only: int | None, classes: Sequence[int] = ()
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a latent and a class for each seed, independently of the other seeds.

    only: use this class for all. classes: class numbers to draw from; empty: the network's.

    Returns:
        Latents [N, C, R, R] and class indices [N], 0 for an unconditional network.
    """
    choices = (classes or network.classes) if network.label_dim else range(1)
    latents, labels = [], []
    for seed in seeds:
        rng = torch.Generator().manual_seed(seed)
        shape = (network.channels, network.resolution, network.resolution)
        latents.append(torch.randn(shape, generator=rng))
        drawn = int(torch.randint(len(choices), (), generator=rng))
        labels.append(choices[int(drawn)] if only is None else only)
    return torch.stack(latents), torch.tensor(labels)


def group_size(device: torch.device, resolution: int) -> int:
    """Return the batch size of network calls, fixed since rounding depends on it."""
    return max(16, 64**2 // resolution**2) if device.type == "cpu" else 128


@torch.no_grad()
def generate_images(
    net: Network,
    latents: torch.Tensor,
    classes: torch.Tensor,
    init_sigma: float | None = None,
    steps: int = 1,
    call: Callable[..., torch.Tensor] | None = None,
) -> torch.Tensor:
    """Generate images in batches of a fixed size.

    An image does not depend on the others in its batch: the last batch is padded to full size.

    Args:
        net: The network.
        latents: [N, C, R, R], as from seed_inputs.
        classes: Class indices, [N].
        init_sigma: σ_init; required for one step.
        steps: 1 for one-step generation, more for Heun's method.
        call: Called in place of the network, e.g. a CUDA graph of it.

    Returns:
        uint8 images [N, C, R, R], on the CPU; float32 of a network that makes latents.

    Raises:
        UserError: The network's output is not finite.
    """
    denoise: Callable[..., torch.Tensor] = call or net
    device = next(net.parameters()).device
    size = group_size(device, net.config.resolution)
    labels = torch.eye(net.config.label_dim)[classes] if net.config.label_dim else None
    images = []
    for i in range(0, len(latents), size):
        rows = torch.arange(i, i + size) % len(latents)
        share = min(size, len(latents) - i) / (1 if steps == 1 else 2 * steps - 1)

        def counted(*inputs: Any, share: float = share) -> torch.Tensor:
            x = denoise(*inputs)
            progress.ahead(share)
            return x

        z = latents[rows].to(device)
        c = None if labels is None else labels[rows].to(device)
        if steps == 1:
            assert init_sigma is not None
            x = one_step(counted, z, c, init_sigma)
        else:
            x = heun(counted, z, c, steps)
        if not x.isfinite().all():
            raise UserError(
                "the network's images have NaN or infinite pixels: its weights are finite but too "
                "large; give another network, such as an earlier snapshot"
            )
        images.append((x.float() if net.config.is_latent else to_uint8(x)).cpu())
    return torch.cat(images)[: len(latents)]
