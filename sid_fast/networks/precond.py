"""EDM preconditioning: the network that the rest of sid_fast sees (arXiv 2206.00364, §5)."""

from collections.abc import Iterator

import torch
from torch import nn

from sid_fast.networks.config import NetworkConfig
from sid_fast.networks.layers import Conv2d
from sid_fast.networks.unet import Block, UNet


class EDMNetwork(nn.Module):
    """D(x; σ, c) = c_skip·x + c_out·F(c_in·x, c_noise, c) (arXiv 2206.00364, equation 7).

    Only F runs in `compute_dtype`; everything else is float32.
    """

    def __init__(self, config: NetworkConfig):
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32
        self.model = UNet(config)

    def forward(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        augment_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The denoised images, float32 [N, C, R, R].

        x is [N, C, R, R]; sigma is [N], [N, 1, 1, 1] or a scalar; class_labels are one-hot
        [N, label_dim], None meaning a zero vector; augment_labels are [N, augment_dim] or None.
        """
        x = x.float()
        sigma = sigma.float().reshape(-1, 1, 1, 1)
        if sigma.shape[0] != len(x):
            sigma = sigma.expand(len(x), 1, 1, 1)
        data = self.config.sigma_data
        total = sigma**2 + data**2
        c_skip = data**2 / total
        c_out = sigma * data / total.sqrt()
        c_in = 1 / total.sqrt()
        c_noise = sigma.log() / 4
        scaled = (c_in * x).to(self.compute_dtype)
        raw = self.model(scaled, c_noise.flatten(), self._labels(class_labels, x), augment_labels)
        return c_skip * x + c_out * raw.float()

    def raw(
        self,
        network_input: torch.Tensor,
        c_noise: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        augment_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """F alone, of c_in·x in the compute type and c_noise [N] = ln(σ)/4; see kernels.noised."""
        labels = self._labels(class_labels, network_input)
        return self.model(network_input, c_noise, labels, augment_labels)

    def _labels(self, class_labels: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
        if not self.config.label_dim:
            return None
        if class_labels is None:
            class_labels = torch.zeros(1, self.config.label_dim, device=x.device)
        return class_labels.float().reshape(-1, self.config.label_dim)

    def compute_in(self, dtype: torch.dtype, frozen: bool = False) -> None:
        """Run F in `dtype` from here on.

        Weights of convolutions, and of the layers that condition a block, get a copy in a 16-bit
        type, in their own memory order, as `shadow`: whoever changes a weight changes its shadow
        (see refresh). A frozen network is converted instead, and keeps no float32 weights.
        """
        self.compute_dtype = dtype
        for layer in self.computing():
            layer.shadow = None
            if frozen:
                layer.weight.data = layer.weight.data.to(dtype)
            elif dtype != layer.weight.dtype:
                layer.shadow = layer.weight.detach().to(dtype)

    def computing(self) -> Iterator[nn.Module]:
        """The layers that run in the compute type, rather than on the embedding in float32."""
        for layer in self.modules():
            if isinstance(layer, Conv2d) and layer.weight is not None:
                yield layer
            elif isinstance(layer, Block):
                yield layer.affine

    def shadows(self) -> list[torch.Tensor | None]:
        """The shadow of every parameter, None where it has none, in the order of parameters()."""
        found = {id(layer.weight): layer.shadow for layer in self.computing()}
        return [found.get(id(p)) for p in self.parameters()]

    @torch.no_grad()
    def refresh(self) -> None:
        """Make all shadows anew from their weights."""
        for p, shadow in zip(self.parameters(), self.shadows(), strict=True):
            if shadow is not None:
                shadow.copy_(p)

    def set_dropout(self, dropout: float) -> None:
        """Change the probability of every block; the weights do not depend on it."""
        for module in self.modules():
            if isinstance(module, Block):
                module.dropout = dropout
