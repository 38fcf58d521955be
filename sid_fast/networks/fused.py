"""The U-Net without idle passes: convolutions, matrix products, attention and group norms alone.

Whatever else the plain form (unet.py) does to a feature map rides along with one of the four:

- a block's tail, (h + skip + biases)·skip_scale, is left as a `Sum`: the next group norm adds it up
  while it reads, and writes it out for whoever else needs it;
- conv0's bias goes into norm1's addend, qkv's into the attention kernel;
- the decoder's cat is never made: norm0 reads the two parts as one, and the 1x1 skip is two
  products, the second added onto the first;
- resampling is part of norm0's write;
- 1x1 convolutions are matrix products on the channels-last view.

Backward, each tensor that two read comes with two names (h and fork, see kernels.Normed), so that
the group norm's backward kernel adds the gradients up and not a pass of autograd's.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from sid_fast import kernels
from sid_fast.kernels.dispatch import choose
from sid_fast.networks.layers import weight_of


class Sum(NamedTuple):
    """(x + residual + bias)·scale, still to be added up; x and residual [N, C, H, W], bias [C]."""

    x: torch.Tensor
    residual: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    scale: float = 1.0


def serves(net: nn.Module) -> bool:
    """Whether a UNet runs in this form; filters longer than [1, 1] do not fit into a write."""
    return choose("block") != "reference" and net.kind.filter == (1, 1)


def unet(net: nn.Module, image: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
    """F of [N, channels, R, R], in its dtype."""
    first, *encoder = net.enc.values()
    bottom, *decoder = [layer for name, layer in net.dec.items() if "_aux_" not in name]
    image = image.contiguous(memory_format=torch.channels_last)  # and so all that is made of it
    x, skips = Sum(convolve(first, image), bias=first.bias), []
    for layer in (*encoder, bottom):
        x, fork = layer(x, embedding)
        skips.append(fork)
    for layer in decoder:
        beside = skips.pop() if x.x.shape[1] < layer.fan_in else None
        x, _ = layer(x, embedding, beside)
    norm, last = net.tail()
    return convolve(last, normalise(norm, x).y) + last.bias.to(image.dtype)[:, None, None]


def block(
    layer: nn.Module, x: Sum, embedding: torch.Tensor, beside: torch.Tensor | None = None
) -> tuple[Sum, torch.Tensor]:
    """A Block of cat(x, beside), and x added up, for the decoder to read."""
    start = normalise(layer.norm0, x, beside=beside, resample=layer.conv0.resample)
    h = convolve(layer.conv0, start.y)
    if layer.adaptive_scale:
        scale, shift = condition(layer.affine, embedding, layer.affine.bias).chunk(2, dim=1)
        around = {"scale": scale, "shift": shift, "add": layer.conv0.bias.expand(len(h), -1)}
    else:
        around = {"add": condition(layer.affine, embedding, layer.affine.bias + layer.conv0.bias)}
    dropout = layer.dropout if layer.training else 0.0
    h = convolve(layer.conv1, normalise(layer.norm1, Sum(h), dropout=dropout, **around).y)

    residual = start.resampled if layer.conv0.resample else start.h
    bias = layer.conv1.bias
    if layer.skip is not None and layer.skip.weight is not None:
        residual = product(weight_of(layer.skip, residual.dtype), residual, start.beside)
        bias = bias + layer.skip.bias
    x = Sum(h, residual, bias, layer.skip_scale)
    if layer.heads:
        middle = normalise(layer.norm2, x, silu=False)
        qkv = product(weight_of(layer.qkv, h.dtype), middle.y)
        attended = kernels.attention(qkv, layer.heads, bias=layer.qkv.bias)
        h = product(weight_of(layer.proj, h.dtype), attended)
        x = Sum(h, middle.h, layer.proj.bias, layer.skip_scale)
    return x, start.fork


def normalise(norm: nn.Module, x: Sum, **around) -> kernels.Normed:
    return norm(x.x, residual=x.residual, x_bias=x.bias, x_scale=x.scale, **around)


def convolve(conv: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The convolution alone: no bias, no resampling."""
    weight = weight_of(conv, x.dtype)
    if not weight.requires_grad:
        return _FrozenConv.apply(x, weight)
    return F.conv2d(x, weight, padding=weight.shape[-1] // 2)


class _FrozenConv(torch.autograd.Function):
    """A convolution whose weight takes no gradient; PyTorch's would keep its input for one."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2)

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        return F.conv_transpose2d(grad, weight, padding=weight.shape[-1] // 2), None


def condition(affine: nn.Module, embedding: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.linear(embedding, weight_of(affine, embedding.dtype), bias.to(embedding.dtype))


def product(
    weight: torch.Tensor, x: torch.Tensor, beside: torch.Tensor | None = None
) -> torch.Tensor:
    """A 1x1 convolution [C', C, 1, 1] of cat(x, beside): one product, or two that add up."""
    n, channels, height, width = x.shape
    weight = weight.flatten(1)
    if beside is None:
        out = _pixels(x) @ weight.t()
    else:
        out = _pixels(x) @ weight[:, :channels].t()
        out.addmm_(_pixels(beside), weight[:, channels:].t())
    return out.reshape(n, height, width, -1).permute(0, 3, 1, 2)


def _pixels(x: torch.Tensor) -> torch.Tensor:
    """[N, C, H, W] -> [N·H·W, C]: a view of a channels-last tensor."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
