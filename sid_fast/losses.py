"""The two losses of Score identity Distillation (arXiv 2404.04057).

A sample with a value that is not finite is dropped: its loss is 0, and the gradients of the others
are those of the batch without it. That is done with fixed shapes: kernels.noised puts 0 in its
place before a network sees it, and no 0·NaN can reach a sum over the batch.
"""

import functools
from typing import overload

import torch

from sid_fast import kernels
from sid_fast.kernels import Losses
from sid_fast.kernels.sid_loss import LIMIT
from sid_fast.models import EDMNetwork


def finite(*tensors: torch.Tensor | None) -> torch.Tensor:
    """[N] bool: every value of the sample is finite, and within LIMIT, in every tensor."""
    checks = [
        (t.detach().abs() <= LIMIT).reshape(len(t), -1).all(1) for t in tensors if t is not None
    ]
    return functools.reduce(torch.logical_and, checks)


@overload
def mask_invalid(valid: torch.Tensor, x: torch.Tensor) -> torch.Tensor: ...
@overload
def mask_invalid(valid: torch.Tensor, x: torch.Tensor | None) -> torch.Tensor | None: ...
def mask_invalid(valid: torch.Tensor, x: torch.Tensor | None) -> torch.Tensor | None:
    """x with its dropped samples set to 0, and their gradient too."""
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
    """ℓ = d·((r − y) − α·d) / w of every sample, summed over its pixels.

    images y = G(z) and noise ε ~ N(0, I) are [N, C, R, R], sigma [N] or [N, 1, 1, 1],
    class_labels one-hot [N, label_dim]. With x_t = y + σε, r = f_φ(x_t) the teacher's, f = f_ψ(x_t)
    the fake score's and d = r − f; w = max(mean|y − r|, 1e-5) is held constant. Gradients reach y
    directly and through both networks.
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
    """λ(σ)·(f_ψ(y + σε) − y)² of every sample, summed over its pixels.

    λ = (σ² + σ_data²)/(σ·σ_data)² (EDM, table 1). Arguments as for generator_loss; images are
    already augmented where augment_labels [N, 9] say so, and take no gradient.
    """
    images = images.detach()
    x_t, labels = _noised(fake_score, images, sigma, noise, class_labels, augment_labels)
    raw = fake_score.raw(x_t.network_input, x_t.c_noise, *labels)
    return kernels.fake_score_loss(raw, x_t, images, fake_score.config.sigma_data)


def _noised(net: EDMNetwork, images, sigma, noise, *labels):
    """What the networks read of noised images, and of labels; 0 in what is not finite."""
    valid = finite(*labels) if any(v is not None for v in labels) else None
    images = images.float()
    x_t = kernels.noised(images, sigma, noise, valid, net.compute_dtype, net.config.sigma_data)
    return x_t, [mask_invalid(x_t.valid, v) for v in labels]
