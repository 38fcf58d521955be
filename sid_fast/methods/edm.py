"""EDM: a teacher trained on real images (Karras et al., 2022, arXiv 2206.00364).

    λ(σ)·‖D(y + σ·ε) − y‖²          λ = (σ² + σ_data²)/(σ·σ_data)²,  ln σ ~ N(P_mean, P_std²)

y is an augmented training image. SiD's fake score minimises the same loss on generated images. An
EDM2 network (arXiv 2312.02696) divides the loss by e^u, u being its log-variance head, and adds u.
"""

import dataclasses
from typing import ClassVar

import torch

from sid_fast import augment, losses, noise
from sid_fast.config.types import NetworkOptions, PretrainSettings
from sid_fast.data.datasets import Dataset
from sid_fast.data.feed import ImageFeed
from sid_fast.data.latents import require_kind
from sid_fast.errors import UserError
from sid_fast.kernels import Losses
from sid_fast.methods.base import (
    Method,
    Phase,
    RandomStream,
    noise_distribution,
    real_images,
)
from sid_fast.models import EDM2Config, Network, NetworkConfig


def teacher_config(
    options: NetworkOptions, settings: PretrainSettings, data: Dataset
) -> NetworkConfig:
    """Return the configuration of the network that a run trains on a data set.

    Raises:
        UserError: An option is out of range or does not fit the others.
    """
    family = EDM2Config if options.architecture == "edm2" else NetworkConfig
    if family is EDM2Config and settings.augment_p:
        raise UserError(
            f"augment_p={settings.augment_p:g}: EDM2 networks take no augmentation labels: leave "
            "out --augment-p"
        )
    network = family(
        architecture=options.architecture,
        resolution=data.resolution,
        channels=data.channels,
        label_dim=data.label_dim,
        augment_dim=augment.LABEL_DIM if settings.augment_p else 0,
        model_channels=options.model_channels,
        channel_mult=options.channel_mult,
        num_blocks=options.num_blocks,
        attention_resolutions=options.attention_resolutions,
        dropout=settings.dropout,
    )
    way = "give images, or --architecture edm2"
    require_kind(data, network.is_latent, f"a {network.architecture} network", way)
    return network.with_classes(data.classes)


@dataclasses.dataclass(frozen=True)
class RealImages:
    """Inputs of n samples.

    Attributes:
        y: Augmented images in [−1, 1], float32 [n, C, R, R].
        sigma: Noise levels σ, [n, 1, 1, 1].
        noise: ε, like y.
        class_labels: One-hot [n, label_dim], or None.
        augment_labels: [n, 9], or None without augmentation.
    """

    y: torch.Tensor
    sigma: torch.Tensor
    noise: torch.Tensor
    class_labels: torch.Tensor | None
    augment_labels: torch.Tensor | None


class EDM(Method):
    """Trains a denoiser by denoising score matching.

    Args:
        net: The untrained network.
        settings: Training settings.
        feed: Images, with labels if the network takes any. Without a feed nothing can be sampled.
    """

    averaged = "teacher"
    progress: ClassVar = {"loss": "loss", "distance": "‖D-y‖²"}

    def __init__(self, net: Network, settings: PretrainSettings, feed: ImageFeed | None = None):
        self.net, self.settings, self.feed = net, settings, feed
        self.networks, self.frozen = {"teacher": net}, {}
        net.force_normalization = True  # EDM2 alone has it
        self.noise = noise_distribution(settings, net.config)
        self.phases = (
            Phase("", "teacher", self.sample_inputs, self.loss, self.lr, settings.beta1),
        )

    def loss(self, inputs: RealImages) -> Losses:
        """Compute the denoising loss of each sample, [n]."""
        return losses.fake_score_loss(
            self.net, inputs.y, inputs.sigma, inputs.noise, inputs.class_labels,
            inputs.augment_labels,
        )  # fmt: skip

    def lr(self, images: int) -> float:
        """Return the learning rate of a step that starts at so many images.

        It rises linearly over lr_rampup_kimg, and falls with 1/√steps from lr_decay_batches on.
        """
        s = self.settings
        seen = images + s.batch_size  # at the end of the step
        lr = s.lr * min(1.0, seen / max(s.lr_rampup_kimg * 1000, 1e-8))
        if s.lr_decay_batches:
            lr /= max(1.0, seen / s.batch_size / s.lr_decay_batches) ** 0.5
        return lr

    def sample_inputs(self, rng: RandomStream) -> RealImages:
        """Take n images, augment them, and sample their noise levels and noise."""
        assert self.feed is not None
        y, labels = real_images(self.feed, rng)
        augment_labels = None
        if self.settings.augment_p:
            y, augment_labels = augment.apply(y, augment.draw(rng, self.settings.augment_p))
        sigma = noise.fake_score_sigma(rng.normal("sigma", 1, 1, 1), *self.noise)
        eps = rng.normal("noise", *y.shape[1:])
        return RealImages(y, sigma, eps, labels, augment_labels)
