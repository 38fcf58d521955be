"""The non-leaky geometric augmentation of EDM training, with fixed shapes.

Geometry as in Karras et al., arXiv 2006.06676, appendix B; the warp itself is in kernels.augment.
Nothing here reads a value back to the host, and no size depends on the data.
"""

import math
from typing import Protocol

import torch

from sid_fast import kernels

LABEL_DIM = 9

Parameters = dict[str, torch.Tensor]


class Source(Protocol):
    """Where random numbers come from: methods.base.RandomStream."""

    def uniform(self, name: str, *shape: int) -> torch.Tensor: ...

    def normal(self, name: str, *shape: int) -> torch.Tensor: ...


def draw(rng: Source, p: float) -> Parameters:
    """Parameters of the warps of rng's samples at probability multiplier p.

    Each is [n], translate [2, n] in parts of an eighth of the size; 0 where not applied.
    """
    u = rng.uniform("augment", 10).t()
    normals = rng.normal("augment", 4).t()
    xflip, yflip = (u[:2] < 0.5).long()  # xflip has a multiplier of 1e8: always tossed
    rotate, aniso_rotate = (u[2:4] * 2 - 1) * math.pi
    applied = u[4:9] < p
    return {
        "xflip": xflip,
        "yflip": yflip * applied[0],
        "scale": normals[0] * applied[1],
        "rotate": rotate * applied[2],
        "aniso": normals[1] * applied[3],
        "aniso_rotate": aniso_rotate * (u[9] < 0.5),
        "translate": normals[2:] * applied[4],
    }


def apply(images: torch.Tensor, parameters: Parameters) -> tuple[torch.Tensor, torch.Tensor]:
    """Warp images by the parameters of `draw`.

    images is float32 [N, C, H, W]. Returns the warped images, same shape, and their labels,
    float32 [N, 9].
    """
    return kernels.augment(images, parameters)
