# SPDX-License-Identifier: Apache-2.0
"""DDPM++, NCSN++ and ADM with EDM's preconditioning, in plain PyTorch and in a single file.

Every pickle that `python -m sid_fast.export` writes carries this text. Programs that load one run
the text without sid_fast: it imports PyTorch alone (2.0 or newer) and is valid Python 3.8. They may
run it once per module of the network, so no class here refers to another's identity.
Parameter names, arguments and formulas are those of arXiv 2206.00364 (EDM) and its published files.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn


class Module(nn.Module):
    """A module that is restored from its parameters, buffers, submodules and plain attributes."""

    def __setstate__(self, state):
        """Restore a pickled state; what PyTorch adds to every module is created anew."""
        nn.Module.__init__(self)
        self.__dict__.update(state)


class Layers(Module, nn.ModuleDict):
    """Modules by name, in the order of the forward pass."""


class Linear(Module):
    """[N, in] -> [N, out], in the dtype of the input."""

    def __init__(self, in_features, out_features, bias=True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x):
        """Apply the layer."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class Conv2d(Module):
    """A square convolution after optional resampling by two; kernel 0 only resamples.

    With fused_resample, a convolution that downsamples pads for the filter too, which follows it.
    """

    # weight and bias are None with kernel 0, resample_filter without resampling.
    weight: nn.Parameter
    bias: nn.Parameter
    resample_filter: torch.Tensor

    def __init__(
        self, in_channels, out_channels, kernel, resample=None, taps=(1, 1), fused_resample=False
    ):
        super().__init__()
        self.resample, self.fused_resample = resample, fused_resample
        shapes = {"weight": (out_channels, in_channels, kernel, kernel), "bias": (out_channels,)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)) if kernel else None)
        row = torch.tensor(taps, dtype=torch.float32)
        square = torch.outer(row, row) / row.sum() ** 2
        self.register_buffer("resample_filter", square[None, None] if resample else None)

    def forward(self, x):
        """Apply the layer to [N, C, H, W]."""
        f_pad = (self.resample_filter.shape[-1] - 1) // 2 if self.resample else 0
        if self.weight is None:
            return self.filter(x, f_pad)
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        w_pad = weight.shape[-1] // 2
        if self.fused_resample and self.resample == "down":
            x = self.filter(F.conv2d(x, weight, padding=w_pad + f_pad), 0)
            return x + bias[:, None, None]
        if self.resample:
            x = self.filter(x, f_pad)
        return F.conv2d(x, weight, bias, padding=w_pad)

    def filter(self, x, padding):
        """Resample each channel with the filter."""
        channels = x.shape[1]
        taps = self.resample_filter.to(x.dtype).expand(channels, -1, -1, -1)
        if self.resample == "down":
            return F.conv2d(x, taps, stride=2, padding=padding, groups=channels)
        return F.conv_transpose2d(x, taps * 4, stride=2, padding=padding, groups=channels)


class GroupNorm(Module):
    """Group normalisation with 32 groups, or fewer to keep four channels in each."""

    def __init__(self, num_channels, eps):
        super().__init__()
        self.num_groups, self.eps = min(32, num_channels // 4), eps
        self.weight = nn.Parameter(torch.empty(num_channels))
        self.bias = nn.Parameter(torch.empty(num_channels))

    def forward(self, x):
        """Normalise [N, C, H, W]."""
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.group_norm(x, self.num_groups, weight, bias, self.eps)


class PositionalEmbedding(Module):
    """Embed [N] as [cos, sin] of x·10000^(−j/(width/2 − endpoint)), j < width/2."""

    def __init__(self, width, endpoint, swap):
        super().__init__()
        self.width, self.endpoint, self.swap = width, endpoint, swap

    def forward(self, x):
        """Embed x; [sin, cos] with swap."""
        half = self.width // 2
        j = torch.arange(half, dtype=torch.float32, device=x.device)
        angles = torch.outer(x, 10000 ** (j / (self.endpoint - half)))
        pair = [angles.sin(), angles.cos()] if self.swap else [angles.cos(), angles.sin()]
        return torch.cat(pair, dim=1)


class FourierEmbedding(Module):
    """Embed [N] as [sin, cos] of 2π·freqs·x."""

    freqs: torch.Tensor

    def __init__(self, width):
        super().__init__()
        self.register_buffer("freqs", torch.empty(width // 2))

    def forward(self, x):
        """Embed x."""
        angles = torch.outer(x, 2 * math.pi * self.freqs)
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class UNetBlock(Module):
    """Residual block: two convolutions with group norms, then optional self-attention."""

    def __init__(
        self, in_channels, out_channels, emb_channels, song, dropout, taps, resample=None,
        attention=False,
    ):  # fmt: skip
        super().__init__()
        self.in_channels, self.dropout = in_channels, dropout
        self.adaptive_scale = not song
        self.skip_scale = math.sqrt(0.5) if song else 1.0
        eps = 1e-6 if song else 1e-5
        self.num_heads = (1 if song else out_channels // 64) if attention else 0

        self.norm0 = GroupNorm(in_channels, eps)
        self.conv0 = Conv2d(in_channels, out_channels, 3, resample, taps)
        self.affine = Linear(emb_channels, out_channels * (2 if self.adaptive_scale else 1))
        self.norm1 = GroupNorm(out_channels, eps)
        self.conv1 = Conv2d(out_channels, out_channels, 3)
        self.skip = None
        if in_channels != out_channels or resample:
            kernel = 1 if in_channels != out_channels or song else 0
            self.skip = Conv2d(in_channels, out_channels, kernel, resample, taps)
        if self.num_heads:
            self.norm2 = GroupNorm(out_channels, eps)
            self.qkv = Conv2d(out_channels, out_channels * 3, 1)
            self.proj = Conv2d(out_channels, out_channels, 1)

    def forward(self, x, emb):
        """Apply the block to x [N, C, H, W] and an embedding [N, E]."""
        h = self.conv0(F.silu(self.norm0(x)))
        condition = self.affine(emb).to(h.dtype)[:, :, None, None]
        if self.adaptive_scale:
            scale, shift = condition.chunk(2, dim=1)
            h = F.silu(torch.addcmul(shift, self.norm1(h), scale + 1))
        else:
            h = F.silu(self.norm1(h + condition))
        h = self.conv1(F.dropout(h, self.dropout, training=self.training))
        h = h + (x if self.skip is None else self.skip(x))
        h = h * self.skip_scale
        if self.num_heads:
            h = (self.proj(self.attend(self.qkv(self.norm2(h)))) + h) * self.skip_scale
        return h

    def attend(self, qkv):
        """Attend from every pixel to all; channels of qkv are ordered [head, channel, q k v]."""
        n, width, height, breadth = qkv.shape
        channels = width // 3 // self.num_heads
        parts = qkv.reshape(n, self.num_heads, channels, 3, height * breadth).unbind(3)
        q, k, v = (part.transpose(-1, -2).contiguous() for part in parts)
        out = F.scaled_dot_product_attention(q, k, v)  # its softmax is in float32
        return out.transpose(1, 2).reshape(n, height, breadth, width // 3).permute(0, 3, 1, 2)


class UNet(Module):
    """The raw network F: c_in·x [N, C, R, R] and c_noise [N] to the shape and dtype of x."""

    def __init__(
        self, img_resolution, img_channels, label_dim, augment_dim, song, embedding_type,
        encoder_type, channel_mult_noise, resample_filter, model_channels, channel_mult,
        num_blocks, attn_resolutions, dropout,
    ):  # fmt: skip
        super().__init__()
        self.song, self.label_dim = song, label_dim
        width, emb_width = model_channels, model_channels * 4
        noise_width = width * channel_mult_noise

        def block(in_channels, out_channels, **options):
            return UNetBlock(
                in_channels, out_channels, emb_width, song, dropout, resample_filter, **options
            )

        fourier = embedding_type == "fourier"
        self.map_noise = (
            FourierEmbedding(noise_width)
            if fourier
            else PositionalEmbedding(noise_width, endpoint=song, swap=song)
        )
        self.map_label = self.map_augment = None
        if label_dim:
            self.map_label = Linear(label_dim, noise_width if song else emb_width, bias=song)
        if augment_dim:
            self.map_augment = Linear(augment_dim, noise_width, bias=False)
        self.map_layer0 = Linear(noise_width, emb_width)
        self.map_layer1 = Linear(emb_width, emb_width)

        self.enc = Layers()
        skips, channels, aux = [], img_channels, img_channels
        for level, mult in enumerate(channel_mult):
            side = img_resolution >> level
            attention = side in attn_resolutions
            if level == 0:
                self.enc[f"{side}x{side}_conv"] = Conv2d(channels, width, 3)
                channels = width
            else:
                self.enc[f"{side}x{side}_down"] = block(channels, channels, resample="down")
                if encoder_type == "residual":
                    self.enc[f"{side}x{side}_aux_residual"] = Conv2d(
                        aux, channels, 3, "down", resample_filter, fused_resample=True
                    )
                    aux = channels
            skips.append(channels)
            for i in range(num_blocks):
                self.enc[f"{side}x{side}_block{i}"] = block(
                    channels, width * mult, attention=attention
                )
                channels = width * mult
                skips.append(channels)

        self.dec = Layers()
        for level, mult in reversed(list(enumerate(channel_mult))):
            side = img_resolution >> level
            attention = side in attn_resolutions
            if level == len(channel_mult) - 1:
                self.dec[f"{side}x{side}_in0"] = block(channels, channels, attention=True)
                self.dec[f"{side}x{side}_in1"] = block(channels, channels)
            else:
                self.dec[f"{side}x{side}_up"] = block(channels, channels, resample="up")
            for i in range(num_blocks + 1):
                self.dec[f"{side}x{side}_block{i}"] = block(
                    channels + skips.pop(),
                    width * mult,
                    attention=attention and (i == num_blocks or not song),
                )
                channels = width * mult
        norm, conv = GroupNorm(channels, 1e-6 if song else 1e-5), Conv2d(channels, img_channels, 3)
        if song:
            self.dec[f"{side}x{side}_aux_norm"], self.dec[f"{side}x{side}_aux_conv"] = norm, conv
        else:
            self.out_norm, self.out_conv = norm, conv

    def embed(self, c_noise, class_labels, augment_labels):
        """Embed noise level, class and augmentation, [N, E]."""
        emb = self.map_noise(c_noise)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels.to(emb.dtype))
        if not self.song:
            emb = self.map_layer1(F.silu(self.map_layer0(emb)))
            return F.silu(emb if self.map_label is None else emb + self.map_label(class_labels))
        if self.map_label is not None:
            emb = emb + self.map_label(class_labels * math.sqrt(self.label_dim))
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def forward(self, x, c_noise, class_labels=None, augment_labels=None):
        """Apply F; class_labels are one-hot [N or 1, label_dim]."""
        emb = self.embed(c_noise, class_labels, augment_labels).to(x.dtype)
        aux = x
        skips: list[torch.Tensor] = []
        for name, layer in self.enc.items():
            if name.endswith("_aux_residual"):
                skips[-1] = x = aux = (x + layer(aux)) / math.sqrt(2)
            else:
                x = layer(x) if name.endswith("_conv") else layer(x, emb)
                skips.append(x)
        for name, layer in self.dec.items():
            if "_aux_" not in name:
                if x.shape[1] < layer.in_channels:
                    x = torch.cat([x, skips.pop()], dim=1)
                x = layer(x, emb)
        norm, conv = list(self.dec.values())[-2:] if self.song else (self.out_norm, self.out_conv)
        return conv(F.silu(norm(x)))


class EDMPrecond(Module):
    """D(x; σ, c) = c_skip·x + c_out·F(c_in·x, c_noise, c), equation 7 of arXiv 2206.00364.

    init_sigma is the noise level of a one-step generator, whose images are
    net(init_sigma * latents, init_sigma, class_labels); it is None for a denoiser. absent_classes
    had no training images.
    """

    def __init__(
        self, img_resolution, img_channels, label_dim=0, use_fp16=False, sigma_min=0,
        sigma_max=float("inf"), sigma_data=0.5, init_sigma=None, absent_classes=(),
        model_type="DhariwalUNet", augment_dim=0, embedding_type="positional",
        encoder_type="standard", decoder_type="standard", channel_mult_noise=1,
        resample_filter=(1, 1), **sizes,
    ):  # fmt: skip
        super().__init__()
        self.img_resolution, self.img_channels = img_resolution, img_channels
        self.label_dim, self.use_fp16 = label_dim, use_fp16
        self.sigma_min, self.sigma_max, self.sigma_data = sigma_min, sigma_max, sigma_data
        self.init_sigma, self.absent_classes = init_sigma, tuple(absent_classes)
        self.model = UNet(
            img_resolution, img_channels, label_dim, augment_dim, model_type == "SongUNet",
            embedding_type, encoder_type, channel_mult_noise, resample_filter, **sizes,
        )  # fmt: skip

    def forward(
        self, x, sigma, class_labels=None, augment_labels=None, force_fp32=False, **ignored
    ):
        """Denoise images.

        Args:
            x: Noisy images, [N, C, R, R].
            sigma: Noise levels σ: [N], [N, 1, 1, 1] or a scalar.
            class_labels: One-hot [N, label_dim]; None means zeros.
            augment_labels: [N, augment_dim], or None.
            force_fp32: Do not use float16.
            ignored: Other options of upstream's networks.

        Returns:
            float32 [N, C, R, R]. With use_fp16, F computes in float16 unless x is on the CPU.
        """
        x = x.float()
        sigma = sigma.float().reshape(-1, 1, 1, 1).expand(x.shape[0], 1, 1, 1)
        half = self.use_fp16 and not force_fp32 and x.device.type != "cpu"
        total = sigma**2 + self.sigma_data**2
        c_skip = self.sigma_data**2 / total
        root = total.sqrt()
        c_out = sigma * self.sigma_data / root
        c_in = root.reciprocal()
        c_noise = sigma.log() / 4
        if not self.label_dim:
            class_labels = None
        elif class_labels is None:
            class_labels = torch.zeros(1, self.label_dim, device=x.device)
        else:
            class_labels = class_labels.float().reshape(-1, self.label_dim)
        scaled = (c_in * x).to(torch.float16 if half else torch.float32)
        raw = self.model(scaled, c_noise.flatten(), class_labels, augment_labels)
        return c_skip * x + c_out * raw.float()

    def round_sigma(self, sigma):
        """Return the noise levels, as a tensor: the network takes any."""
        return torch.as_tensor(sigma)
