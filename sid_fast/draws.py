"""Every random number of a step is drawn here; the step itself is a pure function of them."""

import contextlib
import dataclasses
from collections.abc import Iterator

import numpy as np
import torch

from sid_fast import noise
from sid_fast.augment import Parameters
from sid_fast.augment import draw as draw_warp
from sid_fast.config.settings import Settings
from sid_fast.networks import NetworkConfig

PHASES = ("fake", "generator")  # of a step, in order

# What random numbers are for; the order is part of what a seed means.
PURPOSES = ("draws", "dropout", "gallery", "weights")


@dataclasses.dataclass(frozen=True)
class Draw:
    """The random numbers of one round.

    z [N, C, R, R] before ×σ_init; sigma [N, 1, 1, 1]; noise [N, C, R, R] before ×σ;
    class_labels one-hot [N, label_dim] or None; augment the parameters of the warp (see
    sid_fast.augment) or None.
    """

    z: torch.Tensor
    sigma: torch.Tensor
    noise: torch.Tensor
    class_labels: torch.Tensor | None = None
    augment: Parameters | None = None


def seed_of(seed: int, purpose: str, *counters: int) -> int:
    """A 64-bit seed for one purpose, from the run's seed and counters (step, rank).

    Randomness is counted rather than carried along: the numbers of a step depend on nothing but
    these, so a resumed run draws what an unbroken one would.
    """
    key = (PURPOSES.index(purpose), *counters)
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)[0])


@contextlib.contextmanager
def dropout_seed(
    dropout: float, device: torch.device, seed: int, step: int, rank: int
) -> Iterator[None]:
    """Dropout drawn from torch's own generators, seeded for the block and left as they were."""
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(cuda, enabled=dropout > 0):
        if dropout:
            torch.manual_seed(seed_of(seed, "dropout", step, rank))
        yield


def one_hot(
    n: int, label_dim: int, rng: torch.Generator, weights: torch.Tensor | None = None
) -> torch.Tensor | None:
    """n labels, uniform or in proportion to weights [label_dim]; float32 [n, label_dim]."""
    if not label_dim:
        return None
    if weights is None:
        classes = torch.randint(label_dim, (n,), generator=rng, device=rng.device)
    else:
        # torch.multinomial waits for the device when it is asked for a single one.
        shares = weights.double().cumsum(0)
        at = torch.rand(n, generator=rng, device=rng.device, dtype=torch.float64) * shares[-1]
        classes = torch.searchsorted(shares[:-1], at, right=True)
    return torch.zeros(n, label_dim, device=rng.device).scatter_(1, classes[:, None], 1.0)


def gallery(config: NetworkConfig, seed: int, n: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Fixed latents [n, C, R, R] and labels, class after class, to look at and to measure."""
    rng = torch.Generator().manual_seed(seed_of(seed, "gallery"))
    shape = (n, config.channels, config.resolution, config.resolution)
    labels = None
    if config.label_dim:
        labels = torch.eye(config.label_dim)[torch.arange(n) % config.label_dim]
    return torch.randn(shape, generator=rng), labels


def draw_round(
    phase: str,
    n: int,
    config: NetworkConfig,
    settings: Settings,
    rng: torch.Generator,
    label_weights: torch.Tensor | None = None,
) -> Draw:
    """The draws of n images for a round of `phase`, "fake" or "generator", on rng's device."""
    shape = (n, config.channels, config.resolution, config.resolution)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=rng, device=rng.device)

    z = normal(*shape)
    labels = one_hot(n, config.label_dim, rng, label_weights)
    warp = None
    if phase == "fake":
        sigma = noise.fake_score_sigma(normal(n, 1, 1, 1))
        if settings.augment_p:
            warp = draw_warp(n, settings.augment_p, rng)
    else:
        t = torch.rand((n, 1, 1, 1), generator=rng, device=rng.device) * settings.tmax / 1000
        sigma = noise.generator_sigma(t)
    return Draw(z, sigma, normal(*shape), labels, warp)
