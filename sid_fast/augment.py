"""EDM's non-leaky geometric augmentation (Karras et al., arXiv 2006.06676, appendix B).

Samples the parameters; kernels.augment warps the images. No host sync, no data-dependent shapes.
"""

import math
from typing import Protocol

import torch

from sid_fast import kernels

LABEL_DIM = 9

Parameters = dict[str, torch.Tensor]


class Source(Protocol):
    """A source of random numbers for n samples, such as methods.base.RandomStream."""

    def uniform(self, name: str, *shape: int) -> torch.Tensor:
        """Draw from U[0, 1): [n, *shape]."""
        ...

    def normal(self, name: str, *shape: int) -> torch.Tensor:
        """Draw from N(0, 1): [n, *shape]."""
        ...


def draw(rng: Source, p: float) -> Parameters:
    """Sample augmentation parameters for the n samples of rng.

    Args:
        rng: Source of random numbers.
        p: Probability of each transformation, except x-flips, whose probability is always 1/2.

    Returns:
        Parameters by name, [n] each; translate is [2, n], in eighths of the image size. They are 0
        where a transformation is not applied.
    """
    u = rng.uniform("augment", 10).t()
    normals = rng.normal("augment", 4).t()
    xflip, yflip = (u[:2] < 0.5).long()  # xflip's multiplier is 1e8: it ignores p
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
    """Augment images with the parameters from `draw`.

    Args:
        images: float32 [N, C, H, W].
        parameters: From `draw`, for N samples.

    Returns:
        The augmented images, and their augmentation labels, float32 [N, 9].
    """
    return kernels.augment(images, parameters)
