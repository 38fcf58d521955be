"""EDM preconditioning: the network that the rest of sid_fast sees (arXiv 2206.00364, §5)."""

from collections.abc import Iterator

import torch
from torch import nn

from sid_fast.models.edm_unet.config import NetworkConfig
from sid_fast.models.edm_unet.layers import WHOLE, Conv2d, GroupNorm, Leaf
from sid_fast.models.edm_unet.unet import Conditioning, UNet


class EDMNetwork(nn.Module):
    """D(x; σ, c) = c_skip·x + c_out·F(c_in·x, c_noise, c) (arXiv 2206.00364, equation 7).

    Only F runs in `compute_dtype`; everything else is float32.
    """

    forward_methods = ("raw",)  # besides forward, what computes with the weights: see fsdp

    def __init__(self, config: NetworkConfig):
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32
        self.model = UNet(config)
        self.copies: list[Leaf] = []

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
        root = total.sqrt()
        c_out = sigma * data / root
        c_in = root.reciprocal()
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
        """Run F in `dtype` from here on; in 16 bit, on low-precision copies of its parameters.

        The copies replace the parameters in autograd: they receive the gradients (see leaves and
        performance.ddp), and whoever changes a parameter refreshes them. A frozen network's
        convolution and affine weights are converted instead, with no float32 kept. To cast the
        parameters at every use, and have gradients arrive at them, set compute_dtype alone.
        """
        assert not self.copies
        self.compute_dtype = dtype
        if dtype == torch.float32:
            return
        for layer in self.modules():
            if isinstance(layer, Conv2d | GroupNorm) and layer.weight is not None:
                if frozen and isinstance(layer, Conv2d):
                    layer.weight.data = layer.weight.data.to(dtype)
                else:
                    layer.compute_weight = self._copy(dtype, (layer.weight,))
                layer.compute_bias = self._copy(dtype, (layer.bias,))
        blocks = self.model.blocks()
        for block in blocks:
            if block.skip is not None and block.skip.bias is not None:
                block.tail_bias = self._copy(torch.float32, (block.conv1.bias, block.skip.bias))
        weight = self._copy(dtype, *((block.affine.weight,) for block in blocks))
        bias = self._copy(dtype, *((block.affine.bias,) for block in blocks))
        if self.model.kind.adaptive_scale:
            conv_bias = self._copy(torch.float32, *((block.conv0.bias,) for block in blocks))
        else:
            conv_bias = self._copy(dtype, *((b.affine.bias, b.conv0.bias) for b in blocks))
        widths = [len(block.conv0.bias) for block in blocks]
        self.model.conditioning = Conditioning(weight, bias, conv_bias, widths)
        if frozen:
            parts = next(leaf.parts for leaf in self.copies if leaf.tensor is weight)
            for rows, (p,) in parts:
                p.data = weight[rows]

    def _copy(self, dtype: torch.dtype, *sums: tuple[nn.Parameter, ...]) -> torch.Tensor:
        """A new leaf: the sums of parameters, concatenated along rows."""
        with torch.no_grad():
            values: list[torch.Tensor] = [sum(rest, first) for first, *rest in sums]
            tensor = (values[0] if len(values) == 1 else torch.cat(values)).to(dtype)
        parts, start = [], 0
        for of in sums:
            parts.append((slice(start, start + len(of[0])), of))
            start += len(of[0])
        tensor = tensor.detach().requires_grad_(sums[0][0].requires_grad)
        self.copies.append(Leaf(tensor, parts))
        return tensor

    def requires_grad_(self, requires_grad: bool = True) -> "EDMNetwork":
        for leaf in self.copies:
            leaf.tensor.requires_grad_(requires_grad)
        return super().requires_grad_(requires_grad)

    def leaves(self) -> list[Leaf]:
        """Every tensor that may receive a gradient: copies and parameters."""
        return [*self.copies, *(Leaf(p, [(WHOLE, (p,))]) for p in self.parameters())]

    def written_copies(self) -> list[torch.Tensor | None]:
        """The 16-bit copy of every parameter or None, in order of parameters().

        The update writes them along with the parameters; add_up writes the other copies.
        """
        found = {of[0]: copy for copy, of in self._parts() if _plain(copy, of)}
        return [found.get(p) for p in self.parameters()]

    def _parts(self) -> Iterator[tuple[torch.Tensor, tuple[nn.Parameter, ...]]]:
        for leaf in self.copies:
            for rows, of in leaf.parts:
                yield leaf.tensor.detach()[rows], of

    @torch.no_grad()
    def add_up(self) -> None:
        """Recompute the copies that are sums of parameters, or float32, in a few launches."""
        groups: dict[tuple, list] = {}
        for copy, of in self._parts():
            if not _plain(copy, of):
                groups.setdefault((copy.dtype, len(of)), []).append((copy, *of))
        for found in groups.values():
            copies, totals, *others = zip(*found, strict=True)
            for other in others:
                totals = torch._foreach_add(totals, other)
            torch._foreach_copy_(copies, totals)

    @torch.no_grad()
    def update_compute_copies(self) -> None:
        """Recompute all copies from their parameters."""
        for p, copy in zip(self.parameters(), self.written_copies(), strict=True):
            if copy is not None:
                copy.copy_(p)
        self.add_up()

    def set_dropout(self, dropout: float, seeds: torch.Tensor | None = None) -> None:
        """Change the probability of every block; the weights do not depend on it.

        seeds: int64 [blocks, 3], a row each as kernels.group_norm takes it, read whenever a block
        runs. Without them masks are drawn from torch's generator.
        """
        for i, block in enumerate(self.model.blocks()):
            block.dropout, block.dropout_seed = dropout, None if seeds is None else seeds[i]


def _plain(copy: torch.Tensor, of: tuple[nn.Parameter, ...]) -> bool:
    return len(of) == 1 and copy.dtype != torch.float32
