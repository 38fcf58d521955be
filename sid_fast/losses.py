"""The two losses of Score identity Distillation (arXiv 2404.04057).

A sample with a non-finite value is dropped: its loss is 0, and the other samples get the gradients
of a batch without it. Shapes stay fixed: kernels.noised zeroes the sample before the networks, so
no 0·NaN enters a sum over the batch.
"""

import functools
from typing import overload

import torch

from sid_fast import kernels
from sid_fast.kernels import Losses
from sid_fast.kernels.sid_loss import LIMIT
from sid_fast.models import EDMNetwork


def finite(*tensors: torch.Tensor | None) -> torch.Tensor:
    """Return a mask [N]: all values of the sample, in every tensor, are at most LIMIT in size."""
    checks = [
        (t.detach().abs() <= LIMIT).reshape(len(t), -1).all(1) for t in tensors if t is not None
    ]
    return functools.reduce(torch.logical_and, checks)


@overload
def mask_invalid(valid: torch.Tensor, x: torch.Tensor) -> torch.Tensor: ...
@overload
def mask_invalid(valid: torch.Tensor, x: torch.Tensor | None) -> torch.Tensor | None: ...
def mask_invalid(valid: torch.Tensor, x: torch.Tensor | None) -> torch.Tensor | None:
    """Set the invalid samples of x [N, …] to 0, and their gradients too."""
    if x is None:
        return None
    return torch.where(valid.reshape(-1, *[1] * (x.dim() - 1)), x, 0.0)


def generator_loss(
    teacher: EDMNetwork,
    fake_score: EDMNetwork,
    images: torch.Tensor,
    sigma: torch.Tensor,
    noise: torch.Tensor,
    alpha: float,
    class_labels: torch.Tensor | None = None,
) -> Losses:
    """Compute SiD's generator loss ℓ = d·((r − y) − α·d)/w per sample (SiD, equation 23).

    x_t = y + σε, r = f_φ(x_t), d = r − f_ψ(x_t); the weight w = max(mean|y − r|, 1e-5) is held
    constant. Gradients reach y directly and through both networks.

    Args:
        teacher: f_φ.
        fake_score: f_ψ.
        images: The generator's images y, [N, C, R, R].
        sigma: Noise levels σ, [N] or [N, 1, 1, 1].
        noise: ε ~ N(0, I), [N, C, R, R].
        alpha: α.
        class_labels: One-hot [N, label_dim], or None.

    Returns:
        Losses summed over the pixels of each sample, [N].
    """
    x_t, labels = _noised(teacher, images, sigma, noise, class_labels)
    raw_r, raw_f = (
        net.raw(x_t.network_input, x_t.c_noise, *labels) for net in (teacher, fake_score)
    )
    return kernels.generator_loss(raw_r, raw_f, x_t, images, alpha, teacher.config.sigma_data)


def fake_score_loss(
    fake_score: EDMNetwork,
    images: torch.Tensor,
    sigma: torch.Tensor,
    noise: torch.Tensor,
    class_labels: torch.Tensor | None = None,
    augment_labels: torch.Tensor | None = None,
) -> Losses:
    """Compute the denoising loss λ(σ)·‖f_ψ(y + σε) − y‖² per sample (EDM, table 1).

    λ = (σ² + σ_data²)/(σ·σ_data)². Arguments are those of generator_loss; images get no gradient.
    augment_labels [N, 9] describe the augmentation already applied to the images.
    """
    images = images.detach()
    x_t, labels = _noised(fake_score, images, sigma, noise, class_labels, augment_labels)
    raw = fake_score.raw(x_t.network_input, x_t.c_noise, *labels)
    return kernels.fake_score_loss(raw, x_t, images, fake_score.config.sigma_data)


def _noised(net: EDMNetwork, images, sigma, noise, *labels):
    """Noise the images and mask invalid samples in the images and labels."""
    valid = finite(*labels) if any(v is not None for v in labels) else None
    images = images.float()
    x_t = kernels.noised(images, sigma, noise, valid, net.compute_dtype, net.config.sigma_data)
    return x_t, [mask_invalid(x_t.valid, v) for v in labels]
