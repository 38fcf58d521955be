"""EDM preconditioning: the network that the rest of sid_fast sees (arXiv 2206.00364, §5)."""

import torch
from torch import nn

from sid_fast.networks.config import NetworkConfig
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
        if self.config.label_dim:
            if class_labels is None:
                class_labels = x.new_zeros(1, self.config.label_dim)
            class_labels = class_labels.float().reshape(-1, self.config.label_dim)
        else:
            class_labels = None

        data = self.config.sigma_data
        total = sigma**2 + data**2
        c_skip = data**2 / total
        c_out = sigma * data / total.sqrt()
        c_in = 1 / total.sqrt()
        c_noise = sigma.log() / 4
        raw = self.model(
            (c_in * x).to(self.compute_dtype), c_noise.flatten(), class_labels, augment_labels
        )
        return c_skip * x + c_out * raw.float()

    def set_dropout(self, dropout: float) -> None:
        """Change the probability of every block; the weights do not depend on it."""
        for module in self.modules():
            if isinstance(module, Block):
                module.dropout = dropout
