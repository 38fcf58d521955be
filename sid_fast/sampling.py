"""From latents to images: in one step, or by the teacher's sampler."""

import itertools
from collections.abc import Callable

import torch

from sid_fast.models import EDMNetwork, NetworkConfig
from sid_fast.noise import sampler_sigmas


def one_step(
    net: Callable[..., torch.Tensor],
    latents: torch.Tensor,
    class_labels: torch.Tensor | None,
    init_sigma: float,
) -> torch.Tensor:
    """G(z) = D(σ_init·z; σ_init, c) of latents z ~ N(0, I), [N, C, R, R]; float32, same shape."""
    sigma = torch.full((len(latents),), init_sigma, device=latents.device)
    return net(latents * init_sigma, sigma, class_labels)


@torch.no_grad()
def heun(
    net: Callable[..., torch.Tensor],
    latents: torch.Tensor,
    class_labels: torch.Tensor | None = None,
    num_steps: int = 18,
) -> torch.Tensor:
    """Solve the probability-flow ODE from latents ~ N(0, I), [N, C, R, R], to images.

    Karras et al., arXiv 2206.00364, algorithm 1 without churn. The state is float64, the network
    float32; 2·num_steps − 1 network calls. Returns float64 [N, C, R, R].
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


def to_uint8(x: torch.Tensor) -> torch.Tensor:
    """Float images [N, C, H, W], nominally in [-1, 1], to uint8 pixels."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))  # half precision cannot hold n + 0.5
    return (x * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def seed_inputs(
    seeds: list[int], network: NetworkConfig, only: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents [N, C, R, R] and classes [N] (0 where there are none), by each seed alone."""
    latents, classes = [], []
    for seed in seeds:
        rng = torch.Generator().manual_seed(seed)
        shape = (network.channels, network.resolution, network.resolution)
        latents.append(torch.randn(shape, generator=rng))
        drawn = torch.randint(max(network.label_dim, 1), (), generator=rng)
        classes.append(drawn if only is None else torch.tensor(only))
    return torch.stack(latents), torch.stack(classes)


def group_size(device: torch.device, resolution: int) -> int:
    """Images in every network call: a fixed number, since a network's rounding depends on it."""
    return max(16, 64**2 // resolution**2) if device.type == "cpu" else 128


@torch.no_grad()
def generate_images(
    net: EDMNetwork,
    latents: torch.Tensor,
    classes: torch.Tensor,
    init_sigma: float | None = None,
    steps: int = 1,
    call: Callable[..., torch.Tensor] | None = None,
) -> torch.Tensor:
    """uint8 images [N, C, R, R], on the CPU, of latents and classes as seed_inputs gives them.

    An image does not depend on its neighbours: the network is always called with whole groups,
    the last one filled up. One step is G(z) = D(σ_init·z; σ_init); more are Heun's method.
    call: what is called in place of the network, such as its replay from a CUDA graph.
    """
    call = call or net
    device = next(net.parameters()).device
    size = group_size(device, net.config.resolution)
    labels = torch.eye(net.config.label_dim)[classes] if net.config.label_dim else None
    images = []
    for i in range(0, len(latents), size):
        rows = torch.arange(i, i + size) % len(latents)
        z = latents[rows].to(device)
        c = None if labels is None else labels[rows].to(device)
        if steps == 1:
            assert init_sigma is not None
            x = one_step(call, z, c, init_sigma)
        else:
            x = heun(call, z, c, steps)
        images.append(to_uint8(x).cpu())
    return torch.cat(images)[: len(latents)]
