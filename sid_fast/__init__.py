"""Fast Score identity Distillation (SiD) of EDM diffusion models into one-step generators.

`load_network` loads a teacher, and `Distiller` distils it with `Settings`. The commands are
`python -m sid_fast.train`, `.generate`, `.evaluate`, `.pretrain` and `.plan`.
"""

from sid_fast import augment, losses, noise, sampling
from sid_fast.config.types import Settings, SiDASettings
from sid_fast.distiller import Distiller
from sid_fast.methods.sid import Draw
from sid_fast.models.registry import load_network, save_network

__all__ = [
    "Distiller",
    "Draw",
    "Settings",
    "SiDASettings",
    "augment",
    "load_network",
    "losses",
    "noise",
    "sampling",
    "save_network",
]
