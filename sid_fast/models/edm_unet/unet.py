"""The U-Net and residual block shared by DDPM++, NCSN++ and ADM."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from sid_fast import kernels
from sid_fast.kernels.dispatch import choose
from sid_fast.models.base import Heads, encoder_block_seeds
from sid_fast.models.edm_unet import fused
from sid_fast.models.edm_unet.config import ARCHITECTURES, Architecture, NetworkConfig
from sid_fast.models.edm_unet.layers import (
    QKV,
    Conv2d,
    FourierEmbedding,
    GroupNorm,
    Init,
    Linear,
    PositionalEmbedding,
    channel_mean,
)


def initialisation(architecture: Architecture) -> tuple[Init, Init, Init]:
    """Return the init rules of ordinary layers, the last layer of a residual branch, and qkv."""
    if architecture.model_type == "SongUNet":
        rule = "xavier_uniform"
        return (rule, 1, 0), (rule, 1e-5, 0), (rule, math.sqrt(0.2), 0)
    rule, factor = "kaiming_uniform", math.sqrt(1 / 3)
    return (rule, factor, factor), (rule, 0, 0), (rule, factor, factor)


# Conditioning arguments of a block's norm1: "add", or "scale" and "shift"; [N, C] each.
Condition = dict[str, torch.Tensor]


class Conditioning(NamedTuple):
    """The affine layers of all blocks as one matmul, so the embedding gets a single gradient.

    Rows are in block order: C per block, or 2C (scale, then shift) with adaptive scale.

    Attributes:
        weight: [ΣC, E], or [2ΣC, E] with adaptive scale.
        bias: As many rows as weight.
        conv_bias: [ΣC], for fused backends, in which norm1 adds conv0's bias. It is bias +
            conv0.bias; with adaptive scale it is conv0.bias alone, in float32.
        widths: C of each block.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    conv_bias: torch.Tensor
    widths: list[int]

    def conditions(self, embedding: torch.Tensor, with_conv_bias: bool) -> list[Condition]:
        """Compute every block's norm1 arguments from the embedding [N, E]."""
        if len(self.bias) == sum(self.widths):
            bias = self.conv_bias if with_conv_bias else self.bias
            parts = F.linear(embedding, self.weight, bias).split(self.widths, dim=1)
            return [{"add": part} for part in parts]
        twice = [width for width in self.widths for _ in range(2)]
        parts = F.linear(embedding, self.weight, self.bias).split(twice, dim=1)
        pairs = zip(parts[::2], parts[1::2], strict=True)
        conditions = [{"scale": scale, "shift": shift} for scale, shift in pairs]
        if with_conv_bias:
            adds = self.conv_bias.expand(len(embedding), -1).split(self.widths, dim=1)
            conditions = [c | {"add": add} for c, add in zip(conditions, adds, strict=True)]
        return conditions


class Block(nn.Module):
    """Residual block: two convolutions with group norms, then optional self-attention.

    Maps [N, C, H, W] and an embedding [N, E] to [N, C', H', W'].
    """

    residual_bias: torch.Tensor | None = None  # conv1.bias + skip.bias; see EDMNetwork.compute_in

    def __init__(
        self,
        config: NetworkConfig,
        fan_in: int,
        fan_out: int,
        resample: str | None = None,
        attention: bool = False,
    ):
        super().__init__()
        kind = ARCHITECTURES[config.architecture]
        init, init_last, init_qkv = initialisation(kind)
        self.fan_in = fan_in
        self.skip_scale = kind.skip_scale
        self.adaptive_scale = kind.adaptive_scale
        self.dropout = config.dropout
        self.dropout_seed: torch.Tensor | None = None
        self.heads = fan_out // (kind.head_channels or fan_out) if attention else 0

        self.norm0 = GroupNorm(fan_in, kind.eps)
        self.conv0 = Conv2d(fan_in, fan_out, 3, init, resample, kind.filter)
        self.affine = Linear(
            config.model_channels * 4, fan_out * (2 if kind.adaptive_scale else 1), init
        )
        self.norm1 = GroupNorm(fan_out, kind.eps)
        self.conv1 = Conv2d(fan_out, fan_out, 3, init_last)
        self.skip = None
        if fan_in != fan_out or resample:
            kernel = 1 if fan_in != fan_out or kind.resample_proj else 0
            self.skip = Conv2d(fan_in, fan_out, kernel, init, resample, kind.filter)
        if attention:
            self.norm2 = GroupNorm(fan_out, kind.eps)
            self.qkv = QKV(fan_out, self.heads, init_qkv)
            self.proj = Conv2d(fan_out, fan_out, 1, init_last)

    def forward(
        self,
        x,
        embedding: torch.Tensor | Condition,
        skip: torch.Tensor | None = None,
        seed: torch.Tensor | None = None,
    ):
        """Apply the block.

        Args:
            x: Feature map, or a fused.DeferredResidual; then returns as fused.block does.
            embedding: [N, E], or this block's Condition computed from it.
            skip: Feature map to concatenate with x; only with a DeferredResidual.
            seed: Replaces dropout_seed; None: does not.
        """
        if isinstance(x, fused.DeferredResidual):
            return fused.block(self, x, embedding, skip, seed)
        h = self.conv0(self.norm0(x).y)
        condition = embedding if isinstance(embedding, dict) else self.condition(embedding)
        h = self.norm1(h, **self.active_dropout(seed), **condition).y
        h = self.conv1(h) + (x if self.skip is None else self.skip(x))
        h = h * self.skip_scale
        if self.heads:
            qkv = self.qkv(self.norm2(h, silu=False).y)
            h = (self.proj(kernels.attention(qkv, self.heads)) + h) * self.skip_scale
        return h

    def active_dropout(self, seed: torch.Tensor | None = None) -> dict[str, Any]:
        """Return the dropout arguments of norm1; none in eval mode."""
        if not (self.training and self.dropout):
            return {}
        return {"dropout": self.dropout, "seed": self.dropout_seed if seed is None else seed}

    def condition(self, embedding: torch.Tensor) -> Condition:
        """Compute norm1's conditioning arguments from the embedding [N, E]."""
        affine = self.affine(embedding)
        if not self.adaptive_scale:
            return {"add": affine}
        scale, shift = affine.chunk(2, dim=1)
        return {"scale": scale, "shift": shift}


class UNet(nn.Module):
    """The raw network F of EDM: [N, channels, R, R] and c_noise [N] to the same shape and dtype."""

    conditioning: Conditioning | None = None  # see EDMNetwork.compute_in
    # Returns the dropout seeds [blocks, 3] of a pass through the encoder alone; see
    # EDMNetwork.set_dropout.
    encoder_seeds: Callable[[], torch.Tensor] | None = None

    def __init__(self, config: NetworkConfig):
        super().__init__()
        self.config = config
        self.kind = kind = ARCHITECTURES[config.architecture]
        init, init_last, _ = initialisation(kind)
        width, emb_width = config.model_channels, config.model_channels * 4
        noise_width = width * kind.embedding_width

        self.map_noise = (
            FourierEmbedding(noise_width)
            if kind.embedding == "fourier"
            else PositionalEmbedding(noise_width, kind.swap_embedding, kind.swap_embedding)
        )
        song = kind.model_type == "SongUNet"
        self.map_label = self.map_augment = None
        if config.label_dim:
            label_init = init if song else ("kaiming_normal", math.sqrt(config.label_dim), 0)
            label_width = noise_width if song else emb_width
            self.map_label = Linear(config.label_dim, label_width, label_init, bias=song)
        if config.augment_dim:
            self.map_augment = Linear(config.augment_dim, noise_width, init, bias=False)
        self.map_layer0 = Linear(noise_width, emb_width, init)
        self.map_layer1 = Linear(emb_width, emb_width, init)

        self.enc = nn.ModuleDict()
        skips, fan, aux = [], config.channels, config.channels
        for level, mult in enumerate(config.channel_mult):
            side = config.resolution >> level
            attends = side in config.attention_resolutions
            if level == 0:
                self.enc[f"{side}x{side}_conv"] = Conv2d(fan, width, 3, init)
                fan = width
            else:
                self.enc[f"{side}x{side}_down"] = Block(config, fan, fan, "down")
                if kind.residual_encoder:
                    self.enc[f"{side}x{side}_aux_residual"] = Conv2d(
                        aux, fan, 3, init, "down", kind.filter, fused=True
                    )
                    aux = fan
            skips.append(fan)
            for i in range(config.num_blocks):
                self.enc[f"{side}x{side}_block{i}"] = Block(
                    config, fan, width * mult, attention=attends
                )
                fan = width * mult
                skips.append(fan)

        self.dec = nn.ModuleDict()
        for level, mult in reversed(list(enumerate(config.channel_mult))):
            side = config.resolution >> level
            attends = side in config.attention_resolutions
            if level == len(config.channel_mult) - 1:
                self.dec[f"{side}x{side}_in0"] = Block(config, fan, fan, attention=True)
                self.dec[f"{side}x{side}_in1"] = Block(config, fan, fan)
            else:
                self.dec[f"{side}x{side}_up"] = Block(config, fan, fan, "up")
            for i in range(config.num_blocks + 1):
                last = i == config.num_blocks
                self.dec[f"{side}x{side}_block{i}"] = Block(
                    config,
                    fan + skips.pop(),
                    width * mult,
                    attention=attends and (last or kind.attention_everywhere),
                )
                fan = width * mult
        norm, conv = GroupNorm(fan, kind.eps), Conv2d(fan, config.channels, 3, init_last)
        if song:
            self.dec[f"{side}x{side}_aux_norm"], self.dec[f"{side}x{side}_aux_conv"] = norm, conv
        else:
            self.out_norm, self.out_conv = norm, conv

    def embed(
        self,
        c_noise: torch.Tensor,
        labels: torch.Tensor | None,
        augment_labels: torch.Tensor | None,
    ) -> torch.Tensor:
        """Embed noise level, class and augmentation into one vector per sample, [N, E]."""
        emb = self.map_noise(c_noise)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        assert self.map_label is None or labels is not None  # EDMNetwork replaces None by zeros
        if self.kind.model_type == "SongUNet":
            if self.map_label is not None and labels is not None:
                emb = emb + self.map_label(labels * math.sqrt(self.config.label_dim))
            return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None:
            emb = emb + self.map_label(labels)
        return F.silu(emb)

    def forward(
        self,
        x: torch.Tensor,
        c_noise: torch.Tensor,
        labels: torch.Tensor | None = None,
        augment_labels: torch.Tensor | None = None,
        heads: Heads = "decoder",
    ) -> Any:
        """Apply F, or its encoder as the discriminator of SiDA, or both.

        The logits are the channel mean of the encoder's last feature map, float32 [N, 1, H', W']
        (arXiv 2410.14919). Skip connections play no part in them.

        Args:
            x: c_in·x, [N, channels, R, R].
            c_noise: ln(σ)/4, [N].
            labels: One-hot [N or 1, label_dim]; None if unconditional.
            augment_labels: [N, augment_dim], or None.
            heads: What to return: F ("decoder"), the logits ("encoder"; the decoder does not run),
                or the pair of them ("both").
        """
        embedding = self.embed(c_noise, labels, augment_labels).to(x.dtype)
        seeds = encoder_block_seeds(self.encoder_seeds, self.training, heads)
        # The group norm kernels can fuse resampling only with the filter [1, 1].
        if choose("block", x.device) != "eager" and self.kind.filter == (1, 1):
            return fused.unet(self, x, embedding, heads, seeds)
        conditions = iter(self.conditions(embedding))
        skips: list[torch.Tensor] = []
        aux = x
        for name, layer in self.enc.items():
            if name.endswith("_aux_residual"):
                skips[-1] = x = aux = (x + layer(aux)) / math.sqrt(2)
                continue
            if isinstance(layer, Block):
                x = layer(x, next(conditions), seed=next(seeds))
            else:
                x = layer(x)
            skips.append(x)
        if heads == "encoder":
            return channel_mean(x)
        logits = channel_mean(x) if heads == "both" else None
        for layer in self.dec.values():
            if isinstance(layer, Block):
                if x.shape[1] < layer.fan_in:
                    x = torch.cat([x, skips.pop()], dim=1)
                x = layer(x, next(conditions))
        norm, conv = self.output_layers()
        out = conv(norm(x).y)
        return out if logits is None else (out, logits)

    def blocks(self) -> list[Block]:
        """List the residual blocks, in forward order."""
        return [module for module in self.modules() if isinstance(module, Block)]

    def conditions(
        self, embedding: torch.Tensor, with_conv_bias: bool = False
    ) -> Sequence[torch.Tensor | Condition]:
        """Return the `embedding` argument of each block, in order."""
        if self.conditioning is None:
            return [embedding] * len(self.blocks())
        return self.conditioning.conditions(embedding, with_conv_bias)

    def output_layers(self) -> tuple[GroupNorm, Conv2d]:
        """Return the output norm and convolution; SongUNet names them as decoder layers."""
        if self.kind.model_type == "SongUNet":
            norm, conv = tuple(self.dec.values())[-2:]
            assert isinstance(norm, GroupNorm)
            assert isinstance(conv, Conv2d)
            return norm, conv
        return self.out_norm, self.out_conv
