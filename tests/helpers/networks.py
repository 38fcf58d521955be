"""Networks that train in milliseconds, and settings for them."""

import dataclasses

import torch

from sid_fast import Distiller
from sid_fast.models import EDM2Config, EDM2Network, EDMNetwork, NetworkConfig

FAST = dict(batch_size=4, fake_lr=1e-3, generator_lr=1e-3)
SMALL = NetworkConfig(
    "ddpmpp", resolution=8, channels=1, model_channels=16, channel_mult=(1, 2), num_blocks=1,
    attention_resolutions=(4,), label_dim=10, augment_dim=9,
)  # fmt: skip

SMALL_EDM2 = EDM2Config(
    resolution=8, channels=3, label_dim=3, model_channels=64, channel_mult=(1,), num_blocks=1,
    attention_resolutions=(8,), logvar_channels=8,
)  # fmt: skip


def small_edm2(**fields: object) -> EDM2Network:
    """Return a network whose gains are not 0, so that every branch matters."""
    torch.manual_seed(0)
    net = EDM2Network(dataclasses.replace(SMALL_EDM2, **fields))
    for name, p in net.named_parameters():
        if name.endswith("_gain"):
            p.data.fill_(0.5)
    return net.requires_grad_(False).eval()


TINY = dataclasses.replace(SMALL, channel_mult=(1,), attention_resolutions=())  # half the blocks


def small_teacher(config: NetworkConfig = SMALL) -> EDMNetwork:
    torch.manual_seed(0)
    net = EDMNetwork(config)
    for p in net.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.1)
    return net


def weights(distiller: Distiller) -> torch.Tensor:
    nets = distiller.fake_score, distiller.generator, distiller.ema
    return torch.cat([p.detach().flatten() for net in nets for p in net.parameters()])
