"""EDM: a teacher trained on real images (Karras et al., 2022, arXiv 2206.00364).

    λ(σ)·‖D(y + σ·ε) − y‖²          λ = (σ² + σ_data²)/(σ·σ_data)²,  ln σ ~ N(−1.2, 1.2²)

y is an augmented training image. SiD's fake score minimises the same loss on generated images.
"""

import dataclasses
from typing import ClassVar

import numpy as np
import torch

from sid_fast import augment, losses, noise
from sid_fast.config.types import PretrainSettings
from sid_fast.kernels import Losses
from sid_fast.methods.base import Method, Phase, RandomStream
from sid_fast.models import EDMNetwork


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
        images: uint8 [N, C, R, R], kept in host memory.
        labels: Class indices, int64 [N], or None; kept in host memory.
    """

    averaged = "teacher"
    progress: ClassVar = {"loss": "loss", "distance": "‖D-y‖²"}

    def __init__(
        self,
        net: EDMNetwork,
        settings: PretrainSettings,
        images: np.ndarray,
        labels: np.ndarray | None,
    ):
        self.net, self.settings = net, settings
        self.images = torch.from_numpy(images)
        self.labels = None if labels is None else torch.from_numpy(labels)
        self.networks, self.frozen = {"teacher": net}, {}
        self.phases = (
            Phase("", "teacher", self.sample_inputs, self.loss, self.lr, settings.beta1),
        )

    def loss(self, inputs: RealImages) -> Losses:
        """Compute the denoising loss of each sample, [n]."""
        return losses.fake_score_loss(self.net, *dataclasses.astuple(inputs))

    def lr(self, images: int) -> float:
        """Return the learning rate, ramped up linearly over the first lr_rampup_kimg."""
        s = self.settings
        return s.lr * min(1.0, (images + s.batch_size) / max(s.lr_rampup_kimg * 1000, 1e-8))

    def sample_inputs(self, rng: RandomStream) -> RealImages:
        """Sample and augment n images, and sample their noise levels and noise."""
        device = rng.counter.device
        u = rng.on_host().uniform("images", 2).double()  # two draws of 24 bits: 48-bit index
        index = ((u[:, 0] + u[:, 1] * 2**-24) * len(self.images)).long()
        y = (self.images[index].float() / 127.5 - 1).to(device)
        labels = augment_labels = None
        if self.labels is not None:
            labels = torch.zeros(rng.n, self.net.config.label_dim)
            labels = labels.scatter_(1, self.labels[index][:, None], 1.0).to(device)
        if self.settings.augment_p:
            y, augment_labels = augment.apply(y, augment.draw(rng, self.settings.augment_p))
        sigma = noise.fake_score_sigma(rng.normal("sigma", 1, 1, 1))
        eps = rng.normal("noise", *y.shape[1:])
        return RealImages(y, sigma, eps, labels, augment_labels)
