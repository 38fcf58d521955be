"""What every network family shares: EDM's preconditioning, dropout seeds, and the interface.

A family is a subclass of Network around a U-Net; models.registry lists the families.
"""

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import nn

if TYPE_CHECKING:  # edm_unet imports this module
    from typing import Self  # of Python 3.11

    from sid_fast.models.edm_unet.config import NetworkConfig

Heads = Literal["decoder", "encoder", "both"]


class Leaf(NamedTuple):
    """An autograd leaf that a network computes with: a parameter, or a copy of several.

    Attributes:
        tensor: The leaf; it receives the gradient.
        sources: Row ranges of the tensor, each with the parameters whose sum it holds. The gradient
            of these rows is the gradient of each of the parameters.
    """

    tensor: torch.Tensor
    sources: list[tuple[slice, tuple[nn.Parameter, ...]]]


ALL_ROWS = slice(None)


class Network(nn.Module):
    """D(x; σ, c) = c_skip·x + c_out·F(c_in·x, c_noise, c) (arXiv 2206.00364, equation 7).

    Only F runs in `compute_dtype`; everything else is float32.
    """

    # Normalise weights in place after each update; see EDM2Network.constrain_weights.
    force_normalization: bool = False
    # Also before the network is sampled, as upstream does to the EMA; see before_sampling.
    normalize_before_sampling: bool = False

    # Methods besides forward that use the weights; see fsdp.
    forward_methods: tuple[str, ...] = (
        "raw", "logits", "denoise_and_logits", "raw_logits", "raw_and_logits",
    )  # fmt: skip

    upstream_fp16 = False  # what the pickle that it comes from tells upstream's tools; see export

    def __init__(self, config: "NetworkConfig"):
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32
        self.compute_copies: list[Leaf] = []  # of parameters, which F computes with; see compute_in

    @property
    def backbone(self) -> Any:
        """The U-Net F, with a method `blocks` that lists its residual blocks in forward order."""
        raise NotImplementedError

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
        return c_skip * x + c_out * self.backbone(*inputs).float()

    def logits(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        augment_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Apply SiDA's discriminator: the encoder alone (arXiv 2410.14919).

        Arguments are those of forward.

        Returns:
            The channel mean of the encoder's last feature map, float32 [N, 1, H', W']; positive
            where the image is taken for real.
        """
        _, _, _, inputs = self._scaled(x, sigma, class_labels, augment_labels)
        return self.backbone(*inputs, heads="encoder")

    def denoise_and_logits(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        augment_labels: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the outputs of forward and of logits from one pass."""
        x, c_skip, c_out, inputs = self._scaled(x, sigma, class_labels, augment_labels)
        raw, logits = self.backbone(*inputs, heads="both")
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
        return self.backbone(network_input, c_noise, labels, augment_labels)

    def raw_logits(
        self,
        network_input: torch.Tensor,
        c_noise: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        augment_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the logits of raw's arguments."""
        labels = self._labels(class_labels, network_input)
        return self.backbone(network_input, c_noise, labels, augment_labels, heads="encoder")

    def raw_and_logits(
        self,
        network_input: torch.Tensor,
        c_noise: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        augment_labels: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the outputs of raw and of raw_logits from one pass."""
        labels = self._labels(class_labels, network_input)
        return self.backbone(network_input, c_noise, labels, augment_labels, heads="both")

    def _scaled(self, x, sigma, class_labels, augment_labels):
        """Return x in float32, c_skip, c_out, and the arguments of F."""
        x = x.float()
        sigma = sigma.float().reshape(-1, 1, 1, 1)
        if sigma.shape[0] != x.shape[0]:  # torch.export would make len(x) a constant
            sigma = sigma.expand(x.shape[0], 1, 1, 1)
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

    def as_generator(self, init_sigma: float, dropout: float) -> "Self":
        """Copy the network as a one-step generator with these values of its configuration."""
        generator = copy.deepcopy(self)
        generator.config = dataclasses.replace(self.config, init_sigma=init_sigma, dropout=dropout)
        return generator

    def compute_in(self, dtype: torch.dtype, frozen: bool = False) -> None:
        """Run F in `dtype` from now on.

        A family may let F compute with copies of the parameters. The copies replace the parameters
        in autograd, so they receive the gradients (see leaves and performance.ddp). Call
        update_compute_copies after changing parameters.

        To cast parameters at every use instead, so that they get the gradients, only set
        compute_dtype.

        Args:
            dtype: The compute dtype.
            frozen: The parameters will not change: a family may convert them in place.
        """
        self.compute_dtype = dtype

    def compute_in_alters(self, dtype: torch.dtype) -> bool:
        """Whether compute_in(dtype, frozen=True) leaves the network unfit for another use."""
        return dtype != torch.float32

    def requires_grad_(self, requires_grad: bool = True) -> "Self":
        """Set requires_grad of the parameters and of the copies that F computes with."""
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
        return [None for _ in self.parameters()]

    def backward_through_copies(self, grads: list[torch.Tensor]) -> None:
        """Turn gradients with respect to the copies into those of the parameters, in place.

        Runs once an update, on gradients summed over micro-batches and ranks: does nothing where a
        copy's gradient is its parameters' gradient.

        Args:
            grads: In the order of parameters().
        """

    def constrain_weights(self, enabled: torch.Tensor | bool = True) -> None:
        """Keep the weights where the family wants them, after an update; not unless `enabled`."""

    def before_sampling(self) -> None:
        """Prepare for a sample grid or an evaluation."""
        if self.normalize_before_sampling:
            self.constrain_weights()

    def after_update(self, enabled: torch.Tensor | bool = True) -> None:
        """Constrain the weights that Adam has updated, and update the copies.

        Args:
            enabled: Whether the update was; if False, no weight changes.
        """
        self.constrain_weights(enabled)
        self.update_combined_copies()

    def update_combined_copies(self) -> None:
        """Recompute the copies that are no casts of single parameters."""

    @torch.no_grad()
    def update_compute_copies(self) -> None:
        """Recompute all copies from their parameters."""
        for p, cast in zip(self.parameters(), self.cast_copies(), strict=True):
            if cast is not None:
                cast.copy_(p)
        self.update_combined_copies()

    def set_dropout(self, dropout: float, seeds: torch.Tensor | None = None) -> None:
        """Set the dropout probability of every block.

        Args:
            dropout: The probability.
            seeds: int64 [blocks, 3], a row per block as kernels.group_norm takes it, read at every
                forward. Without seeds, masks come from torch's generator. A pass through the
                encoder alone uses the next stream of every block.
        """
        self.backbone.encoder_seeds = None
        if dropout and seeds is not None:
            next_stream = torch.tensor([0, 1, 0], device=seeds.device)
            self.backbone.encoder_seeds = partial(torch.add, seeds, next_stream)
        for i, block in enumerate(self.backbone.blocks()):
            block.dropout, block.dropout_seed = dropout, None if seeds is None else seeds[i]


def encoder_block_seeds(
    encoder_seeds: Callable[[], torch.Tensor] | None, training: bool, heads: Heads
) -> Iterator[torch.Tensor | None]:
    """Yield the dropout seed [3] of each encoder block in a pass; None: the block's own.

    A pass through the encoder alone draws other masks: the discriminator sees a real and a
    generated image in one step, with independent dropout.

    Args:
        encoder_seeds: Returns the seeds of such a pass, [blocks, 3]; see Network.set_dropout.
        training: Whether dropout acts.
        heads: What the pass returns.
    """
    if heads != "encoder" or encoder_seeds is None or not training:
        return itertools.repeat(None)
    return iter(encoder_seeds().unbind())
