"""The losses of Score identity Distillation (arXiv 2404.04057) and of SiDA (arXiv 2410.14919).

A sample with a non-finite value is dropped: its loss is 0, and the other samples get the gradients
of a batch without it. Shapes stay fixed: kernels.noised zeroes the sample before the networks, so
no 0·NaN enters a sum over the batch.

A fake score with a log-variance head u(σ) (arXiv 2312.02696) divides every loss by e^u. Its own
denoising loss also gains u per element, which trains the head: u then tends to the logarithm of the
mean weighted error at σ. A frozen fake score passes no gradient through u, as u depends on σ alone.
"""

import functools
from typing import NamedTuple, overload

import torch

from sid_fast import kernels
from sid_fast.errors import UserError
from sid_fast.kernels import Losses
from sid_fast.kernels.sid_loss import LIMIT
from sid_fast.models import EDM2Network, Network


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
    teacher: Network,
    fake_score: Network,
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
    losses = kernels.generator_loss(raw_r, raw_f, x_t, images, alpha, teacher.config.sigma_data)
    return losses._replace(loss=_divided(losses.loss, _log_variance(fake_score, x_t.c_noise)))


def fake_score_loss(
    fake_score: Network,
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
    losses = kernels.fake_score_loss(raw, x_t, images, fake_score.config.sigma_data)
    u = _log_variance(fake_score, x_t.c_noise)
    return losses._replace(loss=_denoising(losses, u, images))


class SiDAGeneratorLosses(NamedTuple):
    """Per-sample results of sida_generator_loss, [N]; both losses of a dropped sample are 0.

    Only `loss` and `adversarial` have gradients.

    Attributes:
        loss: SiD's loss, summed over the pixels.
        adversarial: B/ω.
        distance: See kernels.Losses.
        weight: ω.
        kept: Whether the sample is valid.
        logit: Mean of the sample's logits.
        share: Fraction of its logits that are positive: taken for real.
    """

    loss: torch.Tensor
    adversarial: torch.Tensor
    distance: torch.Tensor
    weight: torch.Tensor
    kept: torch.Tensor
    logit: torch.Tensor
    share: torch.Tensor


class SiDAFakeScoreLosses(NamedTuple):
    """Per-sample results of sida_fake_score_loss, [N]; both losses of a dropped sample are 0.

    Only `loss` and `discriminator` have gradients.

    Attributes:
        loss: The denoising loss, summed over the pixels.
        discriminator: λ·(B^r + B^f)/2.
        distance: See kernels.Losses.
        weight: λ.
        kept: Whether the sample is valid.
        real_logit: Mean logit of the real image.
        fake_logit: Mean logit of the generated image.
        real_share: Fraction of the real image's logits that are positive: taken for real.
        fake_share: The same of the generated image.
    """

    loss: torch.Tensor
    discriminator: torch.Tensor
    distance: torch.Tensor
    weight: torch.Tensor
    kept: torch.Tensor
    real_logit: torch.Tensor
    fake_logit: torch.Tensor
    real_share: torch.Tensor
    fake_share: torch.Tensor


def sida_generator_loss(
    teacher: Network,
    fake_score: Network,
    images: torch.Tensor,
    sigma: torch.Tensor,
    noise: torch.Tensor,
    alpha: float,
    class_labels: torch.Tensor | None = None,
    group: int | None = None,
) -> SiDAGeneratorLosses:
    """Compute the generator's losses in SiDA: generator_loss, and the adversarial B/ω.

    B is the mean of softplus(−clamp(ℓ, −10, 10)) over the valid samples and all positions of a
    group, with ℓ the fake score's logits of x_t; ω is the weight of generator_loss, held constant.
    Gradients of both reach y. A sample with a non-finite logit leaves both.

    Args:
        teacher: See generator_loss, also for the next arguments.
        fake_score: f_ψ, whose encoder is the discriminator.
        images: y = G(z), [N, C, R, R].
        sigma: σ, [N] or [N, 1, 1, 1].
        noise: ε ~ N(0, I), like images.
        alpha: α.
        class_labels: One-hot [N, label_dim], or None.
        group: Consecutive samples that form a group; None: all of them.

    Raises:
        UserError: N is not a multiple of the group.
    """
    group = _group(images, group)
    x_t, labels = _noised(teacher, images, sigma, noise, class_labels)
    raw_r = teacher.raw(x_t.network_input, x_t.c_noise, *labels)
    raw_f, logits = fake_score.raw_and_logits(x_t.network_input, x_t.c_noise, *labels)
    sid = kernels.generator_loss(raw_r, raw_f, x_t, images, alpha, teacher.config.sigma_data)
    gan = kernels.adversarial_loss(logits, sid.weight, sid.kept, group)
    u = _log_variance(fake_score, x_t.c_noise)
    sid_loss, adversarial = _divided(sid.loss, u), _divided(gan.loss, u)
    loss, distance = (mask_invalid(gan.kept, v) for v in (sid_loss, sid.distance))
    return SiDAGeneratorLosses(
        loss, adversarial, distance, sid.weight, gan.kept, gan.logit, gan.share
    )


def sida_fake_score_loss(
    fake_score: Network,
    images: torch.Tensor,
    real: torch.Tensor,
    sigma: torch.Tensor,
    noise: torch.Tensor,
    class_labels: torch.Tensor | None = None,
    augment_labels: torch.Tensor | None = None,
    real_augment_labels: torch.Tensor | None = None,
    group: int | None = None,
) -> SiDAFakeScoreLosses:
    """Compute the fake score's losses in SiDA: fake_score_loss, and λ·(B^r + B^f)/2.

    B^r and B^f are the means of softplus(−ℓ^r) and softplus(ℓ^f) over the valid samples and all
    positions of a group; ℓ^r and ℓ^f are the logits of the noised real and generated images, under
    the same σ, ε and class labels. A sample leaves both losses if anything of either image is
    non-finite. Neither image takes a gradient.

    Args:
        fake_score: f_ψ.
        images: Generated images y, [N, C, R, R].
        real: Real images, like images.
        sigma: σ, [N] or [N, 1, 1, 1].
        noise: ε ~ N(0, I), like images.
        class_labels: One-hot [N, label_dim], or None.
        augment_labels: Augmentation of images, [N, 9], or None.
        real_augment_labels: Augmentation of real, [N, 9], or None.
        group: Consecutive samples that form a group; None: all of them.

    Raises:
        UserError: N is not a multiple of the group.
    """
    group = _group(images, group)
    images, real = images.detach(), real.detach()
    f_t, (labels, augment, real_augment) = _noised(
        fake_score, images, sigma, noise, class_labels, augment_labels, real_augment_labels
    )
    r_t, _ = _noised(fake_score, real, sigma, noise, valid=f_t.valid)
    # Real images first: backward then ends with their encoder pass, during which the ranks exchange
    # the decoder's gradients.
    real_logits = fake_score.raw_logits(r_t.network_input, f_t.c_noise, labels, real_augment)
    raw, fake_logits = fake_score.raw_and_logits(f_t.network_input, f_t.c_noise, labels, augment)
    f_t = f_t._replace(valid=r_t.valid)
    score = kernels.fake_score_loss(raw, f_t, images, fake_score.config.sigma_data)
    gan = kernels.discriminator_loss(real_logits, fake_logits, score.weight, score.kept, group)
    u = _log_variance(fake_score, f_t.c_noise)
    score_loss, discriminator = _denoising(score, u, images), _divided(gan.loss, u)
    loss, distance = (mask_invalid(gan.kept, v) for v in (score_loss, score.distance))
    return SiDAFakeScoreLosses(
        loss, discriminator, distance, score.weight, gan.kept,
        gan.real_logit, gan.fake_logit, gan.real_share, gan.fake_share,
    )  # fmt: skip


def _log_variance(fake_score: Network, c_noise: torch.Tensor) -> torch.Tensor | None:
    """Return u of each sample, [N]; None if the fake score has no log-variance head."""
    if isinstance(fake_score, EDM2Network) and fake_score.config.logvar_channels:
        return fake_score.log_variance(c_noise)
    return None


def _divided(loss: torch.Tensor, u: torch.Tensor | None) -> torch.Tensor:
    """Return loss/e^u."""
    return loss if u is None else loss * (-u).exp()


def _denoising(losses: Losses, u: torch.Tensor | None, images: torch.Tensor) -> torch.Tensor:
    """Return loss/e^u + u per element of the image; 0 for a dropped sample."""
    if u is None:
        return losses.loss
    return _divided(losses.loss, u) + mask_invalid(losses.kept, u) * images[0].numel()


def _group(images: torch.Tensor, group: int | None) -> int:
    group = len(images) if group is None else group
    if group < 1 or len(images) % group:
        nearest = max(round(len(images) / max(group, 1)), 1) * max(group, 1)
        raise UserError(
            f"group={group} does not divide {len(images)} images; the nearest number that it "
            f"divides is {nearest}"
        )
    return group


def _noised(net: Network, images, sigma, noise, *labels, valid=None):
    """Noise the images and mask invalid samples in the images and labels.

    valid: [N], False for samples already known to be invalid; only without labels.
    """
    if any(v is not None for v in labels):
        valid = finite(*labels)
    images = images.float()
    x_t = kernels.noised(images, sigma, noise, valid, net.compute_dtype, net.config.sigma_data)
    return x_t, [mask_invalid(x_t.valid, v) for v in labels]
