"""Seeds: every random number of a run is a function of its seed and of its purpose."""

import numpy as np
import torch

from sid_fast.models import NetworkConfig

# Purposes for which seeds are derived. Seeds depend on the position: never reorder.
RNG_STREAMS = ("draws", "unused", "gallery", "weights")


def seed_of(seed: int, purpose: str) -> int:
    """Derive a 64-bit seed for one purpose from the run's seed."""
    key = (RNG_STREAMS.index(purpose),)
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)[0])


def counter_of(seed: int, device: torch.device) -> torch.Tensor:
    """Make the counter of kernels.random: int64 [3], (key derived from the seed, 0, 0)."""
    key = np.array([seed_of(seed, "draws")], dtype=np.uint64).view(np.int64)
    return torch.tensor([int(key[0]), 0, 0], device=device)


def fixed_grid_inputs(
    config: NetworkConfig, seed: int, n: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Draw n fixed latents [n, C, R, R] and one-hot labels that cycle through config.classes."""
    rng = torch.Generator().manual_seed(seed_of(seed, "gallery"))
    shape = (n, config.channels, config.resolution, config.resolution)
    labels = None
    if config.label_dim:
        classes = torch.tensor(config.classes)
        labels = torch.eye(config.label_dim)[classes[torch.arange(n) % len(classes)]]
    return torch.randn(shape, generator=rng), labels
