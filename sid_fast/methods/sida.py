"""SiDA: SiD with real images and an adversarial term (Zhou et al., ICLR 2025, arXiv 2410.14919).

The discriminator costs no parameters: it is the encoder of the fake score f_ψ, whose logits ℓ_ψ are
the channel means of its last feature map. f_ψ learns to denoise generated images y, and to tell
them from real images x* under the same noise; G_θ minimises SiD's loss and a non-saturating
adversarial one:

    (1)  ψ:  λ(σ)·‖f_ψ(y + σε) − y‖² + λ(σ)·(B^r + B^f)/2
             B^r = mean softplus(−ℓ_ψ(x* + σε)),  B^f = mean softplus(ℓ_ψ(y + σε))
    (2)  θ:  ½·dᵀ((r − y) − α·d)/w + ½·B^g/w
             B^g = mean softplus(−clamp(ℓ_ψ(y + σε), −10, 10))

with λ, d, r, w and y as in methods.sid, and means over a group of samples and all positions. In (1)
y has the class labels of x*. Training starts with (1) alone. G_θ joins at generator_start_kimg, at
first with SiD's loss alone at weight 1; from adversarial_start_kimg on, both terms of (2) have
weight ½. SiD²A is the same method, started from a finished SiD generator.
"""

import dataclasses
from typing import ClassVar

import torch
import torch.nn.functional as F

from sid_fast import augment, losses
from sid_fast.config.types import SiDASettings
from sid_fast.data.datasets import Dataset
from sid_fast.data.feed import ImageFeed
from sid_fast.data.latents import require_kind
from sid_fast.errors import UserError
from sid_fast.losses import SiDAFakeScoreLosses, SiDAGeneratorLosses
from sid_fast.methods.base import Phase, RandomStream, real_images
from sid_fast.methods.sid import Draw, SiD
from sid_fast.models import Network, NetworkConfig


class SiDA(SiD):
    """Networks, phases and losses of SiDA.

    Args:
        teacher: f_φ.
        settings: SiDA's settings.
        label_weights: Relative class frequencies in the generator's phase, [label_dim]; uniform if
            None.
        feed: Real images for the fake score's phase; without them its inputs cannot be sampled.
        generator: Network of the teacher's shape that G_θ starts from; default: the teacher.

    Raises:
        UserError: The teacher does not allow these settings or this generator.
    """

    published_normalization: ClassVar = "generator"
    progress: ClassVar = SiD.progress | {
        "fake/discriminator": "discriminator",
        "generator/adversarial": "adversarial",
        "fake/real_logit": "logit real",
        "fake/fake_logit": "fake",
        "fake/real_share": "positive real",
        "fake/fake_share": "fake",
        "fake/clipped": "clipped",
    }
    # Of a step, the fake score's: 4 + 3e of 11 + 3e forward passes, with e = 0.27 to 0.33 for the
    # encoder.
    fake_work: ClassVar = 0.41

    def __init__(
        self,
        teacher: Network,
        settings: SiDASettings,
        label_weights: torch.Tensor | None = None,
        feed: ImageFeed | None = None,
        generator: Network | None = None,
    ):
        super().__init__(teacher, settings, label_weights)
        if generator is not None:
            check_generator(generator.config, self.generator.config)
            self.generator.load_state_dict(generator.state_dict())
        self.feed, self.group = feed, settings.adversarial_group
        s, config = settings, self.teacher.config
        values = config.channels * config.resolution**2  # per image
        self.generator_start = start = round(s.generator_start_kimg * 1000)
        adversarial_start = round(s.adversarial_start_kimg * 1000)

        def adversarial_weight(images: int) -> float:
            """Return the weight of the adversarial loss; the rest is SiD's."""
            return 0.5 if images > adversarial_start else 0.0

        self.phases = (
            Phase(
                "fake", "fake_score", self.sample_fake_inputs, self.fake_score_loss,
                lambda images: s.fake_lr, s.fake_beta1,
                terms={
                    "loss": lambda images: s.fake_loss_scale,
                    "discriminator": lambda images: s.discriminator_loss_scale,
                },
                metrics=(
                    "loss", "distance", "discriminator", "real_logit", "fake_logit", "real_share",
                    "fake_share",
                ),
                grad_clip=s.fake_grad_clip,
            ),
            Phase(
                "generator", "generator", self.sample_generator_inputs, self.generator_loss,
                lambda images: s.generator_lr, s.generator_beta1,
                terms={
                    "loss": lambda images: (
                        s.generator_loss_scale * (1 - adversarial_weight(images))
                    ),
                    "adversarial": lambda images: (
                        s.adversarial_loss_scale * values * adversarial_weight(images)
                    ),
                },
                metrics=("loss", "distance", "adversarial", "logit", "share"),
                active=lambda images: images > start,
            ),
        )  # fmt: skip

    def work(self, images: int) -> float:
        """See Method.work: steps without the generator take only fake_work."""
        batch = self.settings.batch_size
        alone = (self.generator_start // batch + 1) * batch  # steps that start no later
        return images - (1 - self.fake_work) * min(images, alone)

    def fake_score_loss(self, draw: Draw) -> SiDAFakeScoreLosses:  # type: ignore[override]
        """Equation (1), with y and x* augmented independently; `terms` weights the two losses."""
        if draw.real is None:
            raise UserError("real=None: a Draw for the fake score of SiDA needs real images")
        labels = real_labels = None
        with torch.no_grad():
            y, real = self.generate(draw), draw.real
            if draw.augment is not None:
                y, labels = augment.apply(y, draw.augment)
            if draw.real_augment is not None:
                real, real_labels = augment.apply(real, draw.real_augment)
        return losses.sida_fake_score_loss(
            self.fake_score, y, real, draw.sigma, draw.noise, draw.class_labels, labels,
            real_labels, min(self.group, len(y)),
        )  # fmt: skip

    def generator_loss(self, draw: Draw) -> SiDAGeneratorLosses:  # type: ignore[override]
        """Equation (2); `terms` weights the two losses."""
        y = self.generate(draw)
        return losses.sida_generator_loss(
            self.teacher, self.fake_score, y, draw.sigma, draw.noise, self.settings.alpha,
            draw.class_labels, min(self.group, len(y)),
        )  # fmt: skip

    def sample_fake_inputs(self, rng: RandomStream) -> Draw:
        """Sample the inputs of rng.n samples for the fake score's phase, with their real images."""
        if self.feed is None:
            raise UserError("data=None: SiDA trains on real images; give a data set")
        real, labels = real_images(self.feed, rng)
        label_dim = self.teacher.config.label_dim
        if labels is not None:  # the data set may lack the last classes, or the teacher any
            labels = F.pad(labels, [0, label_dim - labels.shape[1]]) if label_dim else None
        fake_parameters = real_parameters = None
        if p := self.settings.augment_p:
            fake_parameters = augment.draw(rng, p)
            real_parameters = augment.draw(RandomStream(rng.counter, "real images", rng.n), p)
        sigma = self.fake_score_sigma(rng)
        draw = self._sample(rng, sigma, fake_parameters, labels)
        return dataclasses.replace(draw, real=real, real_augment=real_parameters)


def check_generator(
    found: NetworkConfig, wanted: NetworkConfig, name: str = "the generator"
) -> None:
    """Raise UserError for a network of another shape, or trained at another noise level."""
    for field in dataclasses.fields(NetworkConfig):
        a, b = getattr(found, field.name), getattr(wanted, field.name)
        if field.name == "init_sigma" and a is not None and a != b:
            raise UserError(f"{name} was trained with init_sigma={a}; use that, not {b}")
        if field.name not in ("init_sigma", "dropout", "absent_classes") and a != b:
            raise UserError(
                f"{name} has {field.name}={a}, the teacher {field.name}={b}: give a "
                "generator that was distilled from a teacher of the same shape"
            )


def check_images(data: Dataset, network: NetworkConfig) -> None:
    """Raise UserError for real images that the network cannot have been trained on."""
    require_kind(data, network.is_latent, "the teacher", "give the teacher's own data set")
    for name in ("resolution", "channels"):
        if getattr(data, name) != getattr(network, name):
            raise UserError(
                f"{data.path} has {name} {getattr(data, name)}, the teacher makes images of "
                f"{name} {getattr(network, name)}: give the teacher's own data set"
            )
    if network.label_dim and (data.labels is None or data.label_dim > network.label_dim):
        classes = f"{data.label_dim} classes" if data.label_dim else "no labels"
        raise UserError(
            f"{data.path} has {classes}, the teacher knows {network.label_dim}: give the teacher's "
            "own data set"
        )
