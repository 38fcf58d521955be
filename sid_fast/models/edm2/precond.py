"""EDM2's preconditioned network with its log-variance head (arXiv 2312.02696)."""

import dataclasses

import torch
from torch.distributed.tensor import DTensor

from sid_fast.errors import UserError
from sid_fast.models.base import Network
from sid_fast.models.edm2.config import EDM2Config
from sid_fast.models.edm2.layers import MPConv, MPFourier, normalize_weight
from sid_fast.models.edm2.unet import UNet


class EDM2Network(Network):
    """An EDM2 U-Net with EDM's preconditioning and, if it has one, a log-variance head."""

    config: EDM2Config
    forward_methods = (*Network.forward_methods, "log_variance")

    def __init__(self, config: EDM2Config):
        super().__init__(config)
        self.unet = UNet(config)
        if config.logvar_channels:
            self.logvar_fourier = MPFourier(config.logvar_channels)
            self.logvar_linear = MPConv(config.logvar_channels, 1)

    @property
    def backbone(self) -> UNet:
        """The U-Net."""
        return self.unet

    def log_variance(self, c_noise: torch.Tensor) -> torch.Tensor:
        """Return u, the log-variance of the denoising loss, float32 [N], for c_noise = ln(σ)/4.

        Raises:
            UserError: The network has no head.
        """
        if not self.config.logvar_channels:
            raise UserError(
                "network: logvar_channels=0: it has no log-variance head, as a one-step generator "
                "has none; give the teacher's own network"
            )
        u = self.logvar_linear(self.logvar_fourier(c_noise.flatten()))
        return u.sum(1)  # [N, 1] to [N]; FSDP2 wants no view

    def as_generator(self, init_sigma: float, dropout: float) -> "EDM2Network":
        """See Network.as_generator; a generator has no log-variance head."""
        return super().as_generator(init_sigma, dropout).without_log_variance()

    def without_log_variance(self) -> "EDM2Network":
        """Remove the log-variance head, if there is one; returns the network itself."""
        if self.config.logvar_channels:
            self.config = dataclasses.replace(self.config, logvar_channels=0)
            del self.logvar_fourier, self.logvar_linear
        return self

    @torch.no_grad()
    def normalize_weights(self, enabled: torch.Tensor | bool = True) -> None:
        """Normalise all weights in place (forced weight normalisation, arXiv 2312.02696).

        This does not change what the network computes, up to the ε of the normalisation: weights
        are normalised again where they are used. It keeps the effective learning rate from falling
        as the weights grow.

        Args:
            enabled: If False, change nothing.
        """
        for layer in self.modules():
            if isinstance(layer, MPConv):
                weight: torch.Tensor = layer.weight
                if isinstance(weight, DTensor):  # shards hold whole rows
                    weight = weight.to_local()
                if weight.numel():
                    chosen = torch.as_tensor(enabled, device=weight.device)
                    weight.copy_(torch.where(chosen, normalize_weight(weight), weight))

    def constrain_weights(self, enabled: torch.Tensor | bool = True) -> None:
        """Normalise the weights, if force_normalization is set."""
        if self.force_normalization:
            self.normalize_weights(enabled)
