"""The U-Net of EDM with its low-precision weights (arXiv 2206.00364, §5)."""

from collections.abc import Iterator

import torch
from torch import nn

from sid_fast.models.base import Leaf, Network
from sid_fast.models.edm_unet.config import NetworkConfig
from sid_fast.models.edm_unet.layers import Conv2d, GroupNorm
from sid_fast.models.edm_unet.unet import Conditioning, UNet


class EDMNetwork(Network):
    """DDPM++, NCSN++ or ADM with EDM's preconditioning.

    NCSN++ has no published discriminator; it uses the same feature map as the others, the encoder's
    last one.
    """

    def __init__(self, config: NetworkConfig):
        super().__init__(config)
        self.model = UNet(config)

    @property
    def backbone(self) -> UNet:
        """The U-Net."""
        return self.model

    def compute_in(self, dtype: torch.dtype, frozen: bool = False) -> None:
        """Run F in `dtype` from now on; a 16-bit F computes with copies of its parameters.

        Args:
            dtype: The compute dtype.
            frozen: Convert convolution and affine weights in place, keeping no float32 weights.
        """
        assert not self.compute_copies
        self.compute_dtype = dtype
        if dtype == torch.float32:
            return
        for layer in self.modules():
            if isinstance(layer, Conv2d | GroupNorm) and layer.weight is not None:
                if frozen and isinstance(layer, Conv2d):
                    layer.weight.data = layer.weight.data.to(dtype)
                else:
                    layer.compute_weight = self._add_compute_copy(dtype, (layer.weight,))
                layer.compute_bias = self._add_compute_copy(dtype, (layer.bias,))
        blocks = self.model.blocks()
        for block in blocks:
            if block.skip is not None and block.skip.bias is not None:
                block.residual_bias = self._add_compute_copy(
                    torch.float32, (block.conv1.bias, block.skip.bias)
                )
        weight = self._add_compute_copy(dtype, *((block.affine.weight,) for block in blocks))
        bias = self._add_compute_copy(dtype, *((block.affine.bias,) for block in blocks))
        if self.model.kind.adaptive_scale:
            conv_bias = self._add_compute_copy(
                torch.float32, *((block.conv0.bias,) for block in blocks)
            )
        else:
            conv_bias = self._add_compute_copy(
                dtype, *((b.affine.bias, b.conv0.bias) for b in blocks)
            )
        widths = [len(block.conv0.bias) for block in blocks]
        self.model.conditioning = Conditioning(weight, bias, conv_bias, widths)
        if frozen:
            sources = next(leaf.sources for leaf in self.compute_copies if leaf.tensor is weight)
            for rows, (p,) in sources:
                p.data = weight[rows]

    def _add_compute_copy(
        self, dtype: torch.dtype, *sums: tuple[nn.Parameter, ...]
    ) -> torch.Tensor:
        """Add a copy that concatenates the sums of these parameter tuples along rows."""
        with torch.no_grad():
            values: list[torch.Tensor] = [sum(rest, first) for first, *rest in sums]
            tensor = (values[0] if len(values) == 1 else torch.cat(values)).to(dtype)
        sources, start = [], 0
        for params in sums:
            sources.append((slice(start, start + len(params[0])), params))
            start += len(params[0])
        tensor = tensor.detach().requires_grad_(sums[0][0].requires_grad)
        self.compute_copies.append(Leaf(tensor, sources))
        return tensor

    def cast_copies(self) -> list[torch.Tensor | None]:
        """See Network.cast_copies."""
        copies = {
            params[0]: copy for copy, params in self._copy_sources() if _is_cast(copy, params)
        }
        return [copies.get(p) for p in self.parameters()]

    def _copy_sources(self) -> Iterator[tuple[torch.Tensor, tuple[nn.Parameter, ...]]]:
        for leaf in self.compute_copies:
            for rows, params in leaf.sources:
                yield leaf.tensor.detach()[rows], params

    @torch.no_grad()
    def update_combined_copies(self) -> None:
        """Recompute the copies that are sums of parameters or float32, in a few launches."""
        groups: dict[tuple, list] = {}
        for copy, params in self._copy_sources():
            if not _is_cast(copy, params):
                groups.setdefault((copy.dtype, len(params)), []).append((copy, *params))
        for rows in groups.values():
            copies, totals, *others = zip(*rows, strict=True)
            for other in others:
                totals = torch._foreach_add(totals, other)
            torch._foreach_copy_(copies, totals)


def _is_cast(copy: torch.Tensor, params: tuple[nn.Parameter, ...]) -> bool:
    return len(params) == 1 and copy.dtype != torch.float32
