"""A third method, as a newcomer would write it: a network learns to denoise one fixed image."""

import dataclasses

import torch

from sid_fast import Settings, losses
from sid_fast.kernels import Losses
from sid_fast.methods.base import Method, Phase
from sid_fast.performance import fsdp
from sid_fast.training.step import Trainer
from tests.helpers.networks import small_teacher

SETTINGS = Settings(
    batch_size=8, micro_batch=2, dropout=0.2, eps=1.0, ema_halflife_kimg=1, precision="fp32"
)


@dataclasses.dataclass
class Inputs:
    noise: torch.Tensor
    sigma: torch.Tensor


class FixedImage(Method):
    averaged = "denoiser"
    progress = {"loss": "loss"}  # noqa: RUF012
    frozen = {}  # noqa: RUF012

    def __init__(self, image, net=None):
        self.image, self.net = image, net or small_teacher()
        self.networks = {"denoiser": self.net}
        self.phases = (Phase("", "denoiser", self.sample_inputs, self.loss, lambda images: 1e-2),)

    def sample_inputs(self, rng):
        return Inputs(rng.normal("noise", *self.image.shape), rng.uniform("sigma", 1, 1, 1) + 0.1)

    def loss(self, inputs):
        valid = losses.finite(inputs.noise)
        noisy = self.image + inputs.sigma * losses.mask_invalid(valid, inputs.noise)
        squares = (self.net(noisy, inputs.sigma) - self.image).square().flatten(1).sum(1)
        return Losses(squares, squares.detach(), torch.ones_like(squares), valid)


class TwoForwards(FixedImage):
    """A loss with two forwards of the network before one backward, by two of its methods."""

    def loss(self, inputs):
        first = super().loss(inputs)
        flat_sigma = inputs.sigma.flatten()
        raw = self.net.raw(self.image + inputs.noise, flat_sigma.log() / 4).float()
        more = raw.square().flatten(1).sum(1)
        return first._replace(loss=first.loss + more)


def trainer(plan=fsdp.SINGLE_PROCESS, settings=SETTINGS, seed=0, method=FixedImage, **options):
    image = torch.linspace(-1, 1, 64).reshape(1, 8, 8)
    return Trainer(method(image), settings, seed, plan, **options)
