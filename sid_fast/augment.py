"""The non-leaky geometric augmentation of EDM training, with fixed shapes.

Geometry as in Karras et al., arXiv 2006.06676, appendix B; the warp itself is in kernels.augment.
Nothing here reads a value back to the host, and no size depends on the data.
"""

import math

import torch

from sid_fast import kernels

LABEL_DIM = 9

Parameters = dict[str, torch.Tensor]


def draw(n: int, p: float, rng: torch.Generator) -> Parameters:
    """Parameters of n warps at probability multiplier p, on the device of rng.

    Each is [n], translate [2, n] in parts of an eighth of the size; 0 where not applied.
    """

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, n, generator=rng, device=rng.device)

    def uniform() -> torch.Tensor:
        return torch.rand(n, generator=rng, device=rng.device)

    def sometimes(value: torch.Tensor, probability: float) -> torch.Tensor:
        return torch.where(uniform() < probability, value, torch.zeros_like(value))

    def angle() -> torch.Tensor:
        return (uniform() * 2 - 1) * math.pi

    def coin() -> torch.Tensor:
        return (uniform() < 0.5).long()

    return {
        "xflip": coin(),  # multiplier 1e8: always tossed
        "yflip": sometimes(coin(), p),
        "scale": sometimes(normal(), p),
        "rotate": sometimes(angle(), p),
        "aniso": sometimes(normal(), p),
        "aniso_rotate": sometimes(angle(), 0.5),
        "translate": sometimes(normal(2), p),
    }


def apply(images: torch.Tensor, parameters: Parameters) -> tuple[torch.Tensor, torch.Tensor]:
    """Warp images by the parameters of `draw`.

    images is float32 [N, C, H, W]. Returns the warped images, same shape, and their labels,
    float32 [N, 9].
    """
    return kernels.augment(images, parameters)
