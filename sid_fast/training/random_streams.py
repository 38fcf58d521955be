"""Seeds: every random number of a run is a function of its seed and of what it is for."""

import numpy as np
import torch

from sid_fast.models import NetworkConfig

# What a seed is derived for; the order is part of what a run's seed means.
RNG_STREAMS = ("draws", "unused", "gallery", "weights")


def seed_of(seed: int, purpose: str) -> int:
    """A 64-bit seed for one purpose, from the run's seed."""
    key = (RNG_STREAMS.index(purpose),)
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)[0])


def counter_of(seed: int, device: torch.device) -> torch.Tensor:
    """int64 [3] on the device, as kernels.random reads it: the key of a seed, and two zeros."""
    key = np.array([seed_of(seed, "draws")], dtype=np.uint64).view(np.int64)
    return torch.tensor([int(key[0]), 0, 0], device=device)


def fixed_grid_inputs(
    config: NetworkConfig, seed: int, n: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Fixed latents [n, C, R, R] and labels, class after class, to look at and to measure."""
    rng = torch.Generator().manual_seed(seed_of(seed, "gallery"))
    shape = (n, config.channels, config.resolution, config.resolution)
    labels = None
    if config.label_dim:
        labels = torch.eye(config.label_dim)[torch.arange(n) % config.label_dim]
    return torch.randn(shape, generator=rng), labels
