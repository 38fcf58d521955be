"""EDM preconditioning around the U-Net, and its low-precision weights (arXiv 2206.00364, §5)."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import nn

from sid_fast.models.edm_unet.config import NetworkConfig
from sid_fast.models.edm_unet.layers import ALL_ROWS, Conv2d, GroupNorm, Leaf
from sid_fast.models.edm_unet.unet import Conditioning, UNet


class EDMNetwork(nn.Module):
    """D(x; σ, c) = c_skip·x + c_out·F(c_in·x, c_noise, c) (arXiv 2206.00364, equation 7).

    Only F runs in `compute_dtype`; everything else is float32.
    """

    # Methods besides forward that use the weights; see fsdp.
    forward_methods = ("raw", "logits", "denoise_and_logits", "raw_logits", "raw_and_logits")

    def __init__(self, config: NetworkConfig):
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32
        self.model = UNet(config)
        self.compute_copies: list[Leaf] = []

    def forward(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        augment_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Denoise images.

        Args:
            x: Noisy images, [N, C, R, R].
            sigma: Noise levels σ: [N], [N, 1, 1, 1] or a scalar.
            class_labels: One-hot [N, label_dim]; None means zeros.
            augment_labels: [N, augment_dim], or None.

        Returns:
            D(x; σ, c), float32 [N, C, R, R].
        """
        x, c_skip, c_out, inputs = self._scaled(x, sigma, class_labels, augment_labels)
        return c_skip * x + c_out * self.model(*inputs).float()

    def logits(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        augment_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Apply SiDA's discriminator: the encoder alone (arXiv 2410.14919).

        Arguments are those of forward. NCSN++ has no published discriminator; it uses the same
        feature map, the encoder's last one.

        Returns:
            The channel mean of the encoder's last feature map, float32 [N, 1, H', W']; positive
            where the image is taken for real.
        """
        _, _, _, inputs = self._scaled(x, sigma, class_labels, augment_labels)
        return self.model(*inputs, heads="encoder")

    def denoise_and_logits(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        augment_labels: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the outputs of forward and of logits from one pass."""
        x, c_skip, c_out, inputs = self._scaled(x, sigma, class_labels, augment_labels)
        raw, logits = self.model(*inputs, heads="both")
        return c_skip * x + c_out * raw.float(), logits

    def raw(
        self,
        network_input: torch.Tensor,
        c_noise: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        augment_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Apply F alone to c_in·x, in the compute dtype, and c_noise = ln(σ)/4, [N]."""
        labels = self._labels(class_labels, network_input)
        return self.model(network_input, c_noise, labels, augment_labels)

    def raw_logits(
        self,
        network_input: torch.Tensor,
        c_noise: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        augment_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the logits of raw's arguments."""
        labels = self._labels(class_labels, network_input)
        return self.model(network_input, c_noise, labels, augment_labels, heads="encoder")

    def raw_and_logits(
        self,
        network_input: torch.Tensor,
        c_noise: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        augment_labels: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the outputs of raw and of raw_logits from one pass."""
        labels = self._labels(class_labels, network_input)
        return self.model(network_input, c_noise, labels, augment_labels, heads="both")

    def _scaled(self, x, sigma, class_labels, augment_labels):
        """Return x in float32, c_skip, c_out, and the arguments of F."""
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
        labels = self._labels(class_labels, x)
        return x, c_skip, c_out, (scaled, c_noise.flatten(), labels, augment_labels)

    def _labels(self, class_labels: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
        if not self.config.label_dim:
            return None
        if class_labels is None:
            class_labels = torch.zeros(1, self.config.label_dim, device=x.device)
        return class_labels.float().reshape(-1, self.config.label_dim)

    def compute_in(self, dtype: torch.dtype, frozen: bool = False) -> None:
        """Run F in `dtype` from now on; a 16-bit F computes with copies of its parameters.

        The copies replace the parameters in autograd, so they receive the gradients (see leaves and
        performance.ddp). Call update_compute_copies after changing parameters.

        To cast parameters at every use instead, so that they get the gradients, only set
        compute_dtype.

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

    def requires_grad_(self, requires_grad: bool = True) -> "EDMNetwork":
        """Set requires_grad of the parameters and their low-precision copies."""
        for leaf in self.compute_copies:
            leaf.tensor.requires_grad_(requires_grad)
        return super().requires_grad_(requires_grad)

    def leaves(self) -> list[Leaf]:
        """List every tensor that may receive a gradient: copies and parameters."""
        return [*self.compute_copies, *(Leaf(p, [(ALL_ROWS, (p,))]) for p in self.parameters())]

    def cast_copies(self) -> list[torch.Tensor | None]:
        """Return each parameter's 16-bit copy, or None, in the order of parameters().

        The Adam kernel writes them with the parameters; update_combined_copies updates the rest.
        """
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

    @torch.no_grad()
    def update_compute_copies(self) -> None:
        """Recompute all copies from their parameters."""
        for p, copy in zip(self.parameters(), self.cast_copies(), strict=True):
            if copy is not None:
                copy.copy_(p)
        self.update_combined_copies()

    def set_dropout(self, dropout: float, seeds: torch.Tensor | None = None) -> None:
        """Set the dropout probability of every block.

        Args:
            dropout: The probability.
            seeds: int64 [blocks, 3], a row per block as kernels.group_norm takes it, read at every
                forward. Without seeds, masks come from torch's generator. A pass through the
                encoder alone uses the next stream of every block.
        """
        self.model.encoder_seeds = None
        if dropout and seeds is not None:
            next_stream = torch.tensor([0, 1, 0], device=seeds.device)
            self.model.encoder_seeds = partial(torch.add, seeds, next_stream)
        for i, block in enumerate(self.model.blocks()):
            block.dropout, block.dropout_seed = dropout, None if seeds is None else seeds[i]


def _is_cast(copy: torch.Tensor, params: tuple[nn.Parameter, ...]) -> bool:
    return len(params) == 1 and copy.dtype != torch.float32
