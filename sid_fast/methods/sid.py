"""Score identity Distillation (Zhou et al., ICML 2024, arXiv 2404.04057), algorithm 1.

The generator G_θ and the fake score f_ψ start from the weights of the frozen teacher f_φ. With
y = G_θ(σ_init·z), x_t = y + σ·ε and z, ε ~ N(0, I), each step minimises two losses in turn:

    (1)  ψ:  λ(σ)·‖f_ψ(x_t) − y‖²     λ = (σ² + σ_data²)/(σ·σ_data)²,  ln σ ~ N(P_mean, P_std²)
    (2)  θ:  dᵀ((r − y) − α·d) / w    r = f_φ(x_t),  d = r − f_ψ(x_t),  w = mean|y − r|

(1) fits f_ψ to the distribution of y, with y held constant. (2), the paper's equation 23, moves G_θ
along the difference d of the two scores, with w held constant.
"""

import copy
import dataclasses
from typing import ClassVar

import torch

from sid_fast import augment, losses, noise, sampling
from sid_fast.augment import Parameters
from sid_fast.config.types import Settings
from sid_fast.errors import UserError
from sid_fast.kernels import Losses
from sid_fast.methods.base import (
    Method,
    Phase,
    RandomStream,
    noise_distribution,
    one_hot_labels,
)
from sid_fast.models import EDM2Network, Network


@dataclasses.dataclass(frozen=True)
class Draw:
    """Random inputs of n samples in one phase.

    Attributes:
        z: Latents ~ N(0, I), [n, C, R, R]; multiplied by σ_init later.
        sigma: Noise levels σ, [n, 1, 1, 1].
        noise: ε ~ N(0, I), [n, C, R, R].
        class_labels: One-hot [n, label_dim], or None.
        augment: Augmentation parameters (sid_fast.augment), or None.
        real: Real images in [−1, 1] for the fake score of SiDA, float32 [n, C, R, R], or None.
        real_augment: Their augmentation parameters, or None.
    """

    z: torch.Tensor
    sigma: torch.Tensor
    noise: torch.Tensor
    class_labels: torch.Tensor | None = None
    augment: Parameters | None = None
    real: torch.Tensor | None = None
    real_augment: Parameters | None = None


class SiD(Method):
    """Distils a teacher into a one-step generator.

    Args:
        teacher: The network to distil.
        settings: Training settings.
        label_weights: Relative class frequencies, [label_dim]; uniform if None.

    Raises:
        UserError: The teacher does not support the settings.
    """

    averaged = "generator"
    # Networks that upstream normalises after each update: both, or the generator alone.
    published_normalization: ClassVar[str] = "both"
    progress: ClassVar[dict[str, str]] = {
        "fake/loss": "fake",
        "generator/loss": "generator",
        "generator/distance": "‖f_φ-f_ψ‖²",
    }

    def __init__(
        self, teacher: Network, settings: Settings, label_weights: torch.Tensor | None = None
    ):
        s = settings
        check_family(teacher, s)
        if s.augment_p and not teacher.config.augment_dim:
            raise UserError(
                f"augment_p={s.augment_p}: the teacher takes no augmentation labels, so "
                "augmented images would leak into the generator; use augment_p 0"
            )
        self.settings = settings
        self.label_cumulative = None
        if label_weights is not None:  # summed on the host: CUDA's cumsum is not deterministic
            device = next(teacher.parameters()).device
            self.label_cumulative = label_weights.cpu().double().cumsum(0).to(device)
        self.teacher = teacher
        self.generator = teacher.as_generator(s.init_sigma, s.dropout)
        self.fake_score = copy.deepcopy(teacher)
        self.noise = noise_distribution(s, teacher.config)
        if isinstance(self.fake_score, EDM2Network):
            if s.log_variance == "off":
                self.fake_score.without_log_variance()
            self._force_normalization(s.forced_normalization)
        self.networks = {"fake_score": self.fake_score, "generator": self.generator}
        self.frozen = {"teacher": teacher}
        self.phases = (
            Phase(
                "fake", "fake_score", self.sample_fake_inputs, self.fake_score_loss,
                lambda images: s.fake_lr, s.fake_beta1, s.fake_loss_scale,
            ),
            Phase(
                "generator", "generator", self.sample_generator_inputs, self.generator_loss,
                lambda images: s.generator_lr, s.generator_beta1, s.generator_loss_scale,
            ),
        )  # fmt: skip

    def fake_score_loss(self, draw: Draw) -> Losses:
        """Compute equation (1) per sample, on augmented y if augment_p > 0."""
        labels = None
        with torch.no_grad():
            y = self.generate(draw)
            if draw.augment is not None:
                y, labels = augment.apply(y, draw.augment)
        return losses.fake_score_loss(
            self.fake_score, y, draw.sigma, draw.noise, draw.class_labels, labels
        )

    def generator_loss(self, draw: Draw) -> Losses:
        """Compute equation (2) per sample; gradients reach y directly and through f_φ and f_ψ."""
        y = self.generate(draw)
        return losses.generator_loss(
            self.teacher, self.fake_score, y, draw.sigma, draw.noise, self.settings.alpha,
            draw.class_labels,
        )  # fmt: skip

    def generate(self, draw: Draw) -> torch.Tensor:
        """Generate y = G_θ(σ_init·z).

        Samples with non-finite inputs are zeroed before the network, so that no NaN enters its
        gradients, and set to NaN after it, so that the loss drops them.
        """
        finite = losses.finite(draw.z, draw.class_labels)
        z = losses.mask_invalid(finite, draw.z)
        labels = losses.mask_invalid(finite, draw.class_labels)
        y = sampling.one_step(self.generator, z, labels, self.settings.init_sigma)
        return torch.where(finite.reshape(-1, 1, 1, 1), y, torch.nan)

    def sample_fake_inputs(self, rng: RandomStream) -> Draw:
        """Sample the inputs of (1)."""
        parameters = augment.draw(rng, self.settings.augment_p) if self.settings.augment_p else None
        return self._sample(rng, self.fake_score_sigma(rng), parameters)

    def fake_score_sigma(self, rng: RandomStream) -> torch.Tensor:
        """Sample the noise levels of (1), [n, 1, 1, 1]."""
        return noise.fake_score_sigma(rng.normal("sigma", 1, 1, 1), *self.noise)

    def sample_generator_inputs(self, rng: RandomStream) -> Draw:
        """Sample the inputs of (2): t ~ U[0, tmax/1000), σ = σ(t)."""
        t = rng.uniform("sigma", 1, 1, 1) * (self.settings.tmax / 1000)
        return self._sample(rng, noise.generator_sigma(t))

    def _sample(
        self,
        rng: RandomStream,
        sigma: torch.Tensor,
        parameters: Parameters | None = None,
        labels: torch.Tensor | None = None,
    ) -> Draw:
        config = self.teacher.config
        shape = config.channels, config.resolution, config.resolution
        if labels is None:
            labels = one_hot_labels(rng, config.label_dim, self.label_cumulative)
        return Draw(rng.normal("z", *shape), sigma, rng.normal("noise", *shape), labels, parameters)

    def _force_normalization(self, choice: str) -> None:
        """Choose the networks whose weights are normalised after each update; see Settings."""
        published = self.published_normalization
        networks = published if choice in ("auto", "upstream") else choice
        self.generator.force_normalization = networks != "none"
        self.fake_score.force_normalization = networks == "both"
        # Copied to the EMA.
        self.generator.normalize_before_sampling = (choice, published) == ("upstream", "generator")


def check_family(teacher: Network, settings: Settings) -> None:
    """Raise UserError for settings that the teacher's family does not have."""
    edm2 = isinstance(teacher, EDM2Network)
    for name in ("forced_normalization", "log_variance"):
        if not edm2 and (value := getattr(settings, name)) != "auto":
            raise UserError(
                f"{name}={value} is of EDM2 networks, and the teacher is a {teacher.config} "
                "network: leave it out"
            )
    if settings.log_variance == "on" and not teacher.config.has_log_variance:
        raise UserError(
            "log_variance=on: the teacher has no log-variance head; give a teacher that has one, "
            "or use log_variance off"
        )
