"""EDM2's U-Net and residual block (arXiv 2312.02696)."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from sid_fast import kernels
from sid_fast.kernels.mp import cat_gains, mp_silu_eager, mp_sum_eager
from sid_fast.models.base import Heads, encoder_block_seeds
from sid_fast.models.edm2.config import EDM2Config
from sid_fast.models.edm2.layers import CLIP, QKV, MPConv, MPFourier, ScalarGain
from sid_fast.models.edm_unet.fused import conv1x1
from sid_fast.models.edm_unet.layers import channel_mean

RESIDUAL_SHARE = 0.3  # of a residual branch in mp_sum
LABEL_SHARE = 0.5  # of the class in the embedding
SKIP_SHARE = 0.5  # of the skip connection in mp_cat


class Block(ScalarGain):
    """Residual block: two convolutions, then optional self-attention.

    Maps [N, C, H, W] and an embedding [N, E] to [N, C', H', W'].

    Args:
        config: The network's configuration.
        fan_in: C; in the decoder with the channels of the skip connection, if it has one.
        fan_out: C'.
        encoder: An encoder block normalises its input per pixel, after changing its width.
        resample: "up", "down" or None.
        attention: End in self-attention.
    """

    gain_name = "emb_gain"

    def __init__(
        self,
        config: EDM2Config,
        fan_in: int,
        fan_out: int,
        encoder: bool,
        resample: str | None = None,
        attention: bool = False,
    ):
        super().__init__()
        self.fan_in, self.encoder, self.resample = fan_in, encoder, resample
        self.dropout = config.dropout
        self.dropout_seed: torch.Tensor | None = None
        self.heads = fan_out // config.head_channels if attention else 0
        self.emb_gain = nn.Parameter(torch.zeros(1))
        self.conv_res0 = MPConv(fan_out if encoder else fan_in, fan_out, 3)
        self.emb_linear = MPConv(config.embedding_channels, fan_out)
        self.conv_res1 = MPConv(fan_out, fan_out, 3)
        self.conv_skip = MPConv(fan_in, fan_out, 1) if fan_in != fan_out else None
        if attention:
            self.attn_qkv = QKV(fan_out, self.heads)
            self.attn_proj = MPConv(fan_out, fan_out, 1)

    def forward(
        self,
        x: torch.Tensor,
        embedding: torch.Tensor,
        skip: torch.Tensor | None = None,
        seed: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Apply the block.

        Args:
            x: Feature map.
            embedding: [N, E].
            skip: Feature map to concatenate with x, in the decoder.
            seed: Replaces dropout_seed; None: does not.

        Returns:
            The result twice, for the next block and for the skip connection, so that the kernel
            which adds the residual sums both gradients.
        """
        if self.resample == "down":
            x = F.avg_pool2d(x, 2)
        elif self.resample == "up":
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        if self.encoder:
            x = x if self.conv_skip is None else self.conv_skip(x)
            x, activated = kernels.pixel_norm(x)
        else:
            activated, x, skip = kernels.mp_cat_silu(x, skip, SKIP_SHARE)
        y = kernels.scaled_silu(
            self.conv_res0(activated),
            self.emb_linear(embedding, self.emb_gain),
            self.dropout if self.training else 0.0,
            self.dropout_seed if seed is None else seed,
        )
        y = self.conv_res1(y)
        if not self.encoder and self.conv_skip is not None:
            weight, gains = self.conv_skip.scaled_weight(x.dtype), (1.0, 1.0)
            if skip is not None:
                gains = cat_gains(x.shape[1], skip.shape[1], SKIP_SHARE)
            x = conv1x1(weight, x, skip, gains)
        if not self.heads:
            return kernels.mp_sum(x, y, RESIDUAL_SHARE, CLIP)
        x, again = kernels.mp_sum(x, y, RESIDUAL_SHARE)
        qkv = kernels.pixel_norm(self.attn_qkv(x), 3 * self.heads, silu=False).n
        y = self.attn_proj(kernels.attention(qkv, self.heads))
        return kernels.mp_sum(again, y, RESIDUAL_SHARE, CLIP)


class UNet(ScalarGain):
    """The raw network F: [N, channels, R, R] and c_noise [N] to the same shape and dtype."""

    gain_name = "out_gain"
    # Returns the dropout seeds [blocks, 3] of a pass through the encoder alone; see
    # Network.set_dropout.
    encoder_seeds: Callable[[], torch.Tensor] | None = None

    def __init__(self, config: EDM2Config):
        super().__init__()
        self.config = config
        width, emb_width = config.model_channels, config.embedding_channels
        self.out_gain = nn.Parameter(torch.zeros(1))
        self.emb_fourier = MPFourier(width)
        self.emb_noise = MPConv(width, emb_width)
        self.emb_label = MPConv(config.label_dim, emb_width) if config.label_dim else None

        self.enc = nn.ModuleDict()
        skips, fan = [], config.channels + 1
        for level, mult in enumerate(config.channel_mult):
            side = config.resolution >> level
            attends = side in config.attention_resolutions
            if level == 0:
                self.enc[f"{side}x{side}_conv"] = MPConv(fan, width * mult, 3)
                fan = width * mult
            else:
                self.enc[f"{side}x{side}_down"] = Block(config, fan, fan, True, "down")
            skips.append(fan)
            for i in range(config.num_blocks):
                self.enc[f"{side}x{side}_block{i}"] = Block(
                    config, fan, width * mult, True, attention=attends
                )
                fan = width * mult
                skips.append(fan)

        self.dec = nn.ModuleDict()
        for level, mult in reversed(list(enumerate(config.channel_mult))):
            side = config.resolution >> level
            attends = side in config.attention_resolutions
            if level == len(config.channel_mult) - 1:
                self.dec[f"{side}x{side}_in0"] = Block(config, fan, fan, False, attention=True)
                self.dec[f"{side}x{side}_in1"] = Block(config, fan, fan, False)
            else:
                self.dec[f"{side}x{side}_up"] = Block(config, fan, fan, False, "up")
            for i in range(config.num_blocks + 1):
                self.dec[f"{side}x{side}_block{i}"] = Block(
                    config, fan + skips.pop(), width * mult, False, attention=attends
                )
                fan = width * mult
        self.out_conv = MPConv(fan, config.channels, 3)

    def embed(self, c_noise: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """Embed noise level and class into one vector per sample, [N, E]."""
        emb = self.emb_noise(self.emb_fourier(c_noise))
        if self.emb_label is not None:
            assert labels is not None  # Network replaces None by zeros
            label = self.emb_label(labels * math.sqrt(self.config.label_dim))
            emb = mp_sum_eager(emb, label.expand_as(emb), LABEL_SHARE)
        return mp_silu_eager(emb)

    def forward(
        self,
        x: torch.Tensor,
        c_noise: torch.Tensor,
        labels: torch.Tensor | None = None,
        augment_labels: torch.Tensor | None = None,
        heads: Heads = "decoder",
    ) -> Any:
        """Apply F, or its encoder as the discriminator of SiDA, or both.

        Args:
            x: c_in·x, [N, channels, R, R].
            c_noise: ln(σ)/4, [N].
            labels: One-hot [N or 1, label_dim]; None if unconditional.
            augment_labels: Must be None: the family takes no augmentation labels.
            heads: See edm_unet.unet.UNet.forward.
        """
        assert augment_labels is None
        embedding = self.embed(c_noise, labels).to(x.dtype)
        seeds = encoder_block_seeds(self.encoder_seeds, self.training, heads)
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        x = x.contiguous(memory_format=torch.channels_last)
        skips: list[torch.Tensor] = []
        for layer in self.enc.values():
            if isinstance(layer, Block):
                x, skip = layer(x, embedding, seed=next(seeds))
            else:
                x = skip = layer(x)
            skips.append(skip)
        if heads == "encoder":
            return channel_mean(x)
        logits = channel_mean(x) if heads == "both" else None
        for block in self.dec.values():
            assert isinstance(block, Block)
            x, _ = block(x, embedding, skips.pop() if x.shape[1] < block.fan_in else None)
        out = self.out_conv(x, self.out_gain)
        return out if logits is None else (out, logits)

    def blocks(self) -> list[Block]:
        """List the residual blocks, in forward order."""
        return [module for module in self.modules() if isinstance(module, Block)]
