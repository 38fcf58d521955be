"""EDM: a teacher trained on real images (Karras et al., 2022, arXiv 2206.00364).

    λ(σ)·‖D(y + σ·ε) − y‖²          λ = (σ² + σ_data²)/(σ·σ_data)²,  ln σ ~ N(P_mean, P_std²)

y is an augmented training image. SiD's fake score minimises the same loss on generated images.
"""

import dataclasses
from typing import ClassVar

import torch

from sid_fast import augment, losses, noise
from sid_fast.config.types import NetworkOptions, PretrainSettings
from sid_fast.data.datasets import ImageDataset
from sid_fast.data.feed import ImageFeed
from sid_fast.data.images import to_float
from sid_fast.kernels import Losses
from sid_fast.methods.base import Method, Phase, RandomStream, noise_distribution
from sid_fast.models import Network, NetworkConfig


def teacher_config(
    options: NetworkOptions, settings: PretrainSettings, data: ImageDataset
) -> NetworkConfig:
    """Return the configuration of the network that a run trains on a data set."""
    return NetworkConfig(
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
    ).with_classes(data.classes)


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
        """Return the learning rate, ramped up linearly over the first lr_rampup_kimg."""
        s = self.settings
        return s.lr * min(1.0, (images + s.batch_size) / max(s.lr_rampup_kimg * 1000, 1e-8))

    def sample_inputs(self, rng: RandomStream) -> RealImages:
        """Take n images, augment them, and sample their noise levels and noise."""
        assert self.feed is not None
        images, labels = self.feed.take(rng.counter, rng.n)
        y, augment_labels = to_float(images), None
        if self.settings.augment_p:
            y, augment_labels = augment.apply(y, augment.draw(rng, self.settings.augment_p))
        sigma = noise.fake_score_sigma(rng.normal("sigma", 1, 1, 1), *self.noise)
        eps = rng.normal("noise", *y.shape[1:])
        return RealImages(y, sigma, eps, labels, augment_labels)
