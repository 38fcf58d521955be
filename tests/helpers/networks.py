"""A network that trains in milliseconds, and settings for it."""

import torch

from sid_fast import Distiller
from sid_fast.models import EDMNetwork, NetworkConfig

FAST = dict(batch_size=4, fake_lr=1e-3, generator_lr=1e-3)
SMALL = NetworkConfig(
    "ddpmpp", resolution=8, channels=1, model_channels=16, channel_mult=(1, 2), num_blocks=1,
    attention_resolutions=(4,), label_dim=10, augment_dim=9,
)  # fmt: skip


def small_teacher() -> EDMNetwork:
    torch.manual_seed(0)
    net = EDMNetwork(SMALL)
    for p in net.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.1)
    return net


def weights(distiller: Distiller) -> torch.Tensor:
    nets = distiller.fake_score, distiller.generator, distiller.ema
    return torch.cat([p.detach().flatten() for net in nets for p in net.parameters()])
