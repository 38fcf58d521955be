"""The two losses of Score identity Distillation (arXiv 2404.04057).

A sample with a non-finite value is dropped: its loss is 0, and the gradients of the others are
those of the batch without it. That is done with fixed shapes: an input that is not finite is
replaced before the networks see it, and an output before the loss does, so that no 0·NaN can
reach a sum over the batch.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

Network = Callable[..., torch.Tensor]


class Terms(NamedTuple):
    """What a loss says of each sample, [N]."""

    loss: torch.Tensor
    distance: torch.Tensor  # ‖f_φ − f_ψ‖² (generator) or ‖f_ψ − y‖² (fake score)
    kept: torch.Tensor  # bool: every value was finite

    def totals(self) -> torch.Tensor:
        """[loss, distance, kept, samples], summed over the samples; float64 [4]."""
        values = self.loss.detach(), self.distance, self.kept, torch.ones_like(self.distance)
        return torch.stack([v.sum(dtype=torch.float64) for v in values])


# A value beyond this is as good as infinite: no image, noise or label comes near it, and below
# it nothing overflows inside a float32 network, where it would reach every weight's gradient.
LIMIT = 1e6


def finite(*tensors: torch.Tensor | None) -> torch.Tensor:
    """[N] bool: every value of the sample is finite, and within LIMIT, in every tensor."""
    checks = [
        (t.detach().abs() <= LIMIT).reshape(len(t), -1).all(1) for t in tensors if t is not None
    ]
    return torch.stack(checks).all(0)


def keep(kept: torch.Tensor, x: torch.Tensor | None) -> torch.Tensor | None:
    """x with its dropped samples set to 0, and their gradient too."""
    if x is None:
        return None
    return torch.where(kept.reshape(-1, *[1] * (x.dim() - 1)), x, 0.0)


def _clean(images, sigma, noise, *labels):
    """[N] bool of the samples whose inputs are finite, and the inputs without the others."""
    sigma = sigma.float().reshape(-1, 1, 1, 1).expand(len(images), 1, 1, 1)
    kept = finite(images, sigma, noise, *labels) & (sigma.flatten() >= 1 / LIMIT)
    # σ = 1 where it is dropped: preconditioning divides by it and takes its logarithm.
    sigma = torch.where(kept.reshape(-1, 1, 1, 1), sigma, 1.0)
    return kept, keep(kept, images.float()), sigma, *(keep(kept, v) for v in (noise, *labels))


def generator_terms(
    teacher: Network,
    fake_score: Network,
    images: torch.Tensor,
    sigma: torch.Tensor,
    noise: torch.Tensor,
    alpha: float,
    class_labels: torch.Tensor | None = None,
) -> Terms:
    """generator_loss with its diagnostics: ℓ = d·((r − y) − α·d) / w."""
    kept, y, sigma, noise, labels = _clean(images, sigma, noise, class_labels)
    if y.requires_grad:
        # A network may overflow on a finite sample; kept is final by the time this runs.
        y.register_hook(lambda grad: keep(kept, grad))
    x_t = y + sigma * noise
    r = teacher(x_t, sigma, labels)
    f = fake_score(x_t, sigma, labels)
    kept = kept & finite(r, f)
    r, f, y = keep(kept, r), keep(kept, f), keep(kept, y)
    d = r - f
    w = (y - r).detach().abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-5)
    loss = (d * ((r - y) - alpha * d) / w).sum((1, 2, 3))
    return Terms(loss, d.detach().square().sum((1, 2, 3)), kept)


def generator_loss(
    teacher: Network,
    fake_score: Network,
    images: torch.Tensor,
    sigma: torch.Tensor,
    noise: torch.Tensor,
    alpha: float,
    class_labels: torch.Tensor | None = None,
) -> torch.Tensor:
    """The generator's loss, summed over pixels, float32 [N]; 0 for a dropped sample.

    images y = G(z) and noise ε ~ N(0, I) are [N, C, R, R], sigma [N] or [N, 1, 1, 1],
    class_labels one-hot [N, label_dim]. With x_t = y + σε, r = teacher(x_t), f = fake_score(x_t)
    and d = r − f it is d·((r − y) − α·d) / w, w = max(mean|y − r|, 1e-5) held constant. Gradients
    reach y directly and through both networks.
    """
    return generator_terms(teacher, fake_score, images, sigma, noise, alpha, class_labels).loss


def fake_score_terms(
    fake_score: Network,
    images: torch.Tensor,
    sigma: torch.Tensor,
    noise: torch.Tensor,
    class_labels: torch.Tensor | None = None,
    augment_labels: torch.Tensor | None = None,
    sigma_data: float = 0.5,
) -> Terms:
    """fake_score_loss with the samples it kept."""
    kept, y, sigma, noise, labels, augment_labels = _clean(
        images.detach(), sigma, noise, class_labels, augment_labels
    )
    f = fake_score(y + sigma * noise, sigma, labels, augment_labels)
    kept = kept & finite(f)
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    distance = (keep(kept, f) - keep(kept, y)).square().sum((1, 2, 3))
    return Terms(weight.flatten() * distance, distance.detach(), kept)


def fake_score_loss(
    fake_score: Network,
    images: torch.Tensor,
    sigma: torch.Tensor,
    noise: torch.Tensor,
    class_labels: torch.Tensor | None = None,
    augment_labels: torch.Tensor | None = None,
) -> torch.Tensor:
    """λ(σ)·(f_ψ(y + σε) − y)², summed over pixels, float32 [N]; 0 for a dropped sample.

    λ = (σ² + σ_data²)/(σ·σ_data)² (EDM, table 1). Arguments as for generator_loss; images are
    already augmented where augment_labels [N, 9] say so, and take no gradient.
    """
    return fake_score_terms(fake_score, images, sigma, noise, class_labels, augment_labels).loss
