"""PyTorch implementations of the SiD step, with which the training benchmark compares sid_fast.

They share sid_fast's eager networks, random draws and augmentation, and nothing of its step. The
published augmentation sizes its padding from the data, which costs one more host synchronisation.
"""

import copy
import dataclasses
from unittest import mock

import torch

from benchmarks.kernels import sdpa
from sid_fast import augment, kernels
from sid_fast.config.types import Settings
from sid_fast.methods.base import RandomStream
from sid_fast.methods.sid import Draw, SiD
from sid_fast.models import Network
from sid_fast.training.optimizer import ema_beta
from sid_fast.training.random_streams import counter_of


class PublishedBaseline:
    """The step as in the published recipe (arXiv 2404.04057, algorithm 1).

    Eager, NCHW, a boolean mask over the batch, the loss read by the host, gradient clean-up and EMA
    tensor by tensor.

    Args:
        teacher: the pretrained network.
        settings: of a run; one micro-batch of batch_size images.
        dtype: the networks compute in it and cast their weights at every use.
    """

    def __init__(self, teacher: Network, settings: Settings, dtype: torch.dtype):
        self.settings = settings
        self.method = SiD(teacher, settings)
        self.teacher = teacher.requires_grad_(False).eval()
        self.generator, self.fake_score = self.method.generator, self.method.fake_score
        self.ema = copy.deepcopy(teacher)
        self.emas = [self.ema]
        for net in (self.teacher, self.generator, self.fake_score):
            net.compute_dtype = dtype
        for net in (self.generator, self.fake_score):
            net.requires_grad_(True).set_dropout(settings.dropout)
        s = settings
        self.fake_adam = self.adam(self.fake_score, s.fake_lr, s.fake_beta1)
        self.generator_adam = self.adam(self.generator, s.generator_lr, s.generator_beta1)
        self.counter = counter_of(0, next(teacher.parameters()).device)
        self.images = 0

    def adam(self, net: Network, lr: float, beta1: float) -> torch.optim.Adam:
        """Make the optimiser of a network."""
        s = self.settings
        return torch.optim.Adam(net.parameters(), lr=lr, betas=(beta1, s.beta2), eps=s.eps or 1e-8)

    def step(self) -> None:
        """Update fake score, generator and EMA."""
        s = self.settings
        self.update("fake", self.fake_score, self.fake_adam, s.fake_loss_scale)
        self.update("generator", self.generator, self.generator_adam, s.generator_loss_scale)
        self.update_ema(
            ema_beta(self.images, s.batch_size, s.ema_halflife_kimg, s.ema_rampup_ratio)
        )
        self.images += s.batch_size
        self.counter[1].add_(1)

    def update(self, phase: str, net: Network, adam: torch.optim.Optimizer, scale: float) -> None:
        """Take one optimiser step of a network."""
        rng = RandomStream(self.counter, phase, self.settings.batch_size)
        draw = next(p for p in self.method.phases if p.name == phase).sample_inputs(rng)
        adam.zero_grad(set_to_none=True)
        loss = self.fake_loss(draw) if phase == "fake" else self.generator_loss(draw)
        loss = self.mask_invalid(loss).sum() * (scale / self.settings.batch_size)
        loss.backward()
        self.report(loss)
        self.clean_gradients(net)
        adam.step()

    def generate(self, draw: Draw) -> torch.Tensor:
        """Run the generator on the draw's latents."""
        sigma = torch.full((len(draw.z),), self.settings.init_sigma, device=draw.z.device)
        return self.generator(draw.z * self.settings.init_sigma, sigma, draw.class_labels)

    def fake_loss(self, draw: Draw) -> torch.Tensor:
        """Compute the fake score's denoising loss, per element."""
        with torch.no_grad():
            self.generator.eval()
            y, labels = self.generate(draw), None
            if draw.augment is not None:
                y, labels = augment.apply(y, draw.augment)
        self.fake_score.requires_grad_(True).train()
        data = self.teacher.config.sigma_data
        weight = (draw.sigma**2 + data**2) / (draw.sigma * data) ** 2
        x_t = y + draw.sigma * draw.noise
        f = self.fake_score(x_t, draw.sigma, draw.class_labels, labels)
        return weight * (f - y) ** 2

    def generator_loss(self, draw: Draw) -> torch.Tensor:
        """Compute the generator's SiD loss, per element."""
        self.generator.train()
        y = self.generate(draw)
        self.fake_score.requires_grad_(False).eval()
        x_t = y + draw.sigma * draw.noise
        r, f = (net(x_t, draw.sigma, draw.class_labels) for net in (self.teacher, self.fake_score))
        with torch.no_grad():
            w = (y - r).abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-5)
        d = r - f
        return d * ((r - y) - self.settings.alpha * d) / w

    def mask_invalid(self, loss: torch.Tensor) -> torch.Tensor:
        """Drop samples with a non-finite loss; the result's size synchronises with the host."""
        return loss[torch.isfinite(loss).flatten(1).all(1)]

    def report(self, loss: torch.Tensor) -> None:
        """Read the loss on the host."""
        loss.item()

    def clean_gradients(self, net: Network) -> None:
        """Replace non-finite gradients."""
        for p in net.parameters():
            if p.grad is not None:
                torch.nan_to_num_(p.grad, nan=0.0, posinf=1e5, neginf=-1e5)

    @torch.no_grad()
    def update_ema(self, beta: float) -> None:
        """Move the EMA towards the generator."""
        for average, p in zip(self.ema.parameters(), self.generator.parameters(), strict=True):
            average.copy_(p.lerp(average, beta))


class OptimisedBaseline(PublishedBaseline):
    """The same step with PyTorch's own optimisations.

    Channels-last, torch.compile over whole networks in `mode`, fused attention, fused Adam, one
    foreach call for the EMA, no host synchronisation.
    """

    def __init__(self, teacher: Network, settings: Settings, dtype: torch.dtype, mode: str):
        teacher.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # no stub
        super().__init__(teacher, settings, dtype)
        torch._dynamo.config.recompile_limit = 64
        for net in (self.teacher, self.generator, self.fake_score):
            net.backbone.compile(mode=mode, dynamic=False)

    def adam(self, net: Network, lr: float, beta1: float) -> torch.optim.Adam:
        """Make the fused optimiser of a network."""
        s, cuda = self.settings, next(net.parameters()).is_cuda
        betas = beta1, s.beta2
        return torch.optim.Adam(
            net.parameters(), lr=lr, betas=betas, eps=s.eps or 1e-8, fused=True, capturable=cuda
        )

    def step(self) -> None:
        """Update fake score, generator and EMA."""
        torch.compiler.cudagraph_mark_step_begin()  # for modes that capture CUDA graphs
        with mock.patch.object(kernels, "attention", sdpa):
            super().step()

    def generate(self, draw: Draw) -> torch.Tensor:
        """Run the generator on channels-last latents."""
        z = draw.z.contiguous(memory_format=torch.channels_last)
        return super().generate(dataclasses.replace(draw, z=z))

    def mask_invalid(self, loss: torch.Tensor) -> torch.Tensor:
        """Zero the non-finite elements of the loss."""
        return torch.where(torch.isfinite(loss), loss, 0.0)

    def report(self, loss: torch.Tensor) -> None:
        """Leave the loss on the device."""

    @torch.no_grad()
    def update_ema(self, beta: float) -> None:
        """Move the EMA towards the generator."""
        torch._foreach_lerp_(
            list(self.ema.parameters()), list(self.generator.parameters()), 1 - beta
        )
