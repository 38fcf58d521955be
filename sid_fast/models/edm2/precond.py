"""EDM2's preconditioned network with its log-variance head (arXiv 2312.02696)."""

import dataclasses

import torch
from torch.distributed.tensor import DTensor

from sid_fast import kernels
from sid_fast.errors import UserError
from sid_fast.models.base import ALL_ROWS, Leaf, Network
from sid_fast.models.edm2.config import EDM2Config
from sid_fast.models.edm2.layers import MPConv, MPFourier
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
    def compute_in(self, dtype: torch.dtype, frozen: bool = False) -> None:
        """Run F in `dtype` from now on, with normalised copies of all weights.

        A forward then launches nothing to normalise weights; see kernels.weight_norm. The embedding
        and the log-variance head stay float32.

        Args:
            dtype: The compute dtype; float32 takes copies as well.
            frozen: In a 16-bit dtype, the copies take the place of the weights: these are then of
                no use outside this network, and a state_dict of it has no meaning.
        """
        assert not self.compute_copies
        self.compute_dtype = dtype
        wide = {self.unet.emb_noise, self.unet.emb_label, getattr(self, "logvar_linear", None)}
        layers = [layer for layer in self.modules() if isinstance(layer, MPConv)]
        weights: list[torch.Tensor] = [layer.weight.detach() for layer in layers]
        copies = [
            torch.empty_like(w, dtype=torch.float32 if layer in wide else dtype)
            for layer, w in zip(layers, weights, strict=True)
        ]
        kernels.weight_norm(weights, copies)
        for layer, weight_copy in zip(layers, copies, strict=True):
            layer.compute_weight = weight_copy
            if frozen and dtype != torch.float32:
                layer.weight.data = weight_copy
            else:
                weight_copy.requires_grad_(layer.weight.requires_grad)
                self.compute_copies.append(Leaf(weight_copy, [(ALL_ROWS, (layer.weight,))]))

    def compute_in_alters(self, dtype: torch.dtype) -> bool:
        """See Network.compute_in_alters: a deep copy would keep float32 copies, too."""
        return True

    def update_combined_copies(self) -> None:
        """See Network.update_combined_copies."""
        if self.compute_copies:
            kernels.weight_norm(*self._weights_and_copies())

    def backward_through_copies(self, grads: list[torch.Tensor]) -> None:
        """See Network.backward_through_copies."""
        if self.compute_copies:
            by_parameter = dict(zip(self.parameters(), grads, strict=True))
            weights = [params[0] for leaf in self.compute_copies for _, params in leaf.sources]
            kernels.weight_norm_backward(
                [w.detach() for w in weights], [by_parameter[w] for w in weights]
            )

    def _weights_and_copies(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """List all weights, or this rank's shards of them, and their copies, if there are any."""
        weights, copies = [], []
        for layer in self.modules():
            if isinstance(layer, MPConv):
                weight = layer.weight.detach()
                if isinstance(weight, DTensor):  # shards hold whole rows
                    weight = weight.to_local()
                if weight.numel():
                    weights.append(weight)
                if layer.compute_weight is not None:
                    copies.append(layer.compute_weight.detach())
        return weights, copies

    @torch.no_grad()
    def normalize_weights(self, enabled: torch.Tensor | bool = True) -> None:
        """Normalise all weights in place (forced weight normalisation, arXiv 2312.02696).

        This does not change what the network computes, up to the ε of the normalisation: weights
        are normalised again where they are used. It keeps the effective learning rate from falling
        as the weights grow. The copies are updated in the same launch.

        Args:
            enabled: If False, change nothing.
        """
        weights, copies = self._weights_and_copies()
        if weights:
            chosen = torch.as_tensor(enabled, device=weights[0].device)
            kernels.weight_norm(weights, copies, chosen)

    def constrain_weights(self, enabled: torch.Tensor | bool = True) -> None:
        """Normalise the weights, if force_normalization is set."""
        if self.force_normalization:
            self.normalize_weights(enabled)

    def after_update(self, enabled: torch.Tensor | bool = True) -> None:
        """See Network.after_update; one launch."""
        if self.force_normalization:
            self.normalize_weights(enabled)
        else:
            self.update_combined_copies()
