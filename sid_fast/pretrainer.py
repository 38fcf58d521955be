"""One step of training an EDM teacher on real images (arXiv 2206.00364)."""

from typing import ClassVar

import numpy as np
import torch

from sid_fast import augment, noise
from sid_fast.config.settings import PretrainSettings, check, identity_of, rounds_of
from sid_fast.draws import dropout_seed, seed_of
from sid_fast.engine import parallel, precision
from sid_fast.engine.checkpoint import digest
from sid_fast.engine.fit import naming
from sid_fast.engine.optimizer import Optimizer, ema_beta
from sid_fast.kernels import Losses
from sid_fast.losses import fake_score_loss
from sid_fast.networks import EDMNetwork


class Pretrainer:
    """Trains a network to denoise real images.

    net: an untrained network on the device to use. images uint8 [N, C, R, R] and labels
    int64 [N] or None, as ImageDataset has them; they stay on the host.
    """

    shown: ClassVar = {"loss": "loss", "distance": "‖D-y‖²"}

    def __init__(
        self,
        net: EDMNetwork,
        settings: PretrainSettings,
        images: np.ndarray,
        labels: np.ndarray | None,
        seed: int = 0,
        layout: parallel.Layout = parallel.WHOLE,
    ):
        check(settings)
        self.device = next(net.parameters()).device
        settings = precision.settle(settings, self.device)
        self.rounds = rounds_of(settings, parallel.world())
        self.settings, self.seed = settings, seed
        self.net = net
        if self.device.type == "cuda" and layout.mesh is None:
            net.to(memory_format=torch.channels_last)
        self.net.set_dropout(settings.dropout)
        self.optimizer = Optimizer(
            net,
            settings.beta1,
            settings.beta2,
            settings.eps,
            precision.TYPES[settings.precision],
            layout,
            ema=True,
        )
        self.ema = self.optimizer.ema
        self.data = torch.from_numpy(images)
        self.labels = None if labels is None else torch.from_numpy(labels)
        self.identity = identity_of(settings) | {
            "seed": seed,
            **{f"network {k}": v for k, v in net.config.to_dict().items()},
            "data": digest([self.data]),
            "labels": None if labels is None else digest([self.labels]),
        }
        self.rng = torch.Generator()
        self.steps = self.images = 0

    def step(self) -> dict[str, torch.Tensor]:
        """Update the network and its average once; scalars as from Distiller.step."""
        s = self.settings
        n = s.batch_size // self.rounds // parallel.world()
        self.rng.manual_seed(seed_of(self.seed, "draws", self.steps, parallel.rank()))
        lr = s.lr * min(1.0, (self.images + s.batch_size) / max(s.lr_rampup_kimg * 1000, 1e-8))
        self.net.train()
        with dropout_seed(s.dropout, self.device, self.seed, self.steps, parallel.rank()):
            for i in range(self.rounds):
                with naming(f"step, round {i + 1} of {self.rounds}"):
                    losses, last = self.round(*self.draw(n)), i == self.rounds - 1
                    self.optimizer.accumulate(losses, 1 / s.batch_size, last)
        beta = ema_beta(self.images, s.batch_size, s.ema_halflife_kimg, s.ema_rampup_ratio)
        metrics = self.optimizer.update(lr, beta)
        self.steps += 1
        self.images += s.batch_size
        return metrics

    def round(self, y, sigma, eps, labels, augment_labels) -> Losses:
        """λ(σ)·(D(y + σε) − y)² on real images: the fake score's loss, on other data."""
        return fake_score_loss(self.net, y, sigma, eps, labels, augment_labels)

    def draw(self, n: int) -> tuple[torch.Tensor | None, ...]:
        """n augmented images in [-1, 1], noise levels, noise and labels, on the device."""
        index = torch.randint(len(self.data), (n,), generator=self.rng)
        y = self.data[index].float() / 127.5 - 1
        labels = None
        if self.labels is not None:
            classes = self.labels[index][:, None]
            labels = torch.zeros(n, self.net.config.label_dim).scatter_(1, classes, 1.0)
        augment_labels = None
        if self.settings.augment_p:
            y, augment_labels = augment.apply(y, augment.draw(n, self.settings.augment_p, self.rng))
        sigma = noise.fake_score_sigma(torch.randn(n, 1, 1, 1, generator=self.rng))
        eps = torch.randn(y.shape, generator=self.rng)
        values = y, sigma, eps, labels, augment_labels
        return tuple(None if v is None else v.to(self.device) for v in values)

    def tensors(self) -> dict[str, torch.Tensor]:
        """As Distiller.tensors."""
        return self.optimizer.tensors("teacher")

    def refresh(self) -> None:
        """As Distiller.refresh."""
        self.net.refresh()
