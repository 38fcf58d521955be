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

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F

from sid_fast import kernels
from sid_fast.models.edm_unet.layers import Conv2d, GroupNorm, bias_of, weight_of

if TYPE_CHECKING:  # it imports this module
    from sid_fast.models.edm_unet.unet import Block, UNet


class DeferredResidual(NamedTuple):
    """(x + residual + bias)·scale, still to be added up; x and residual [N, C, H, W], bias [C]."""

    x: torch.Tensor
    residual: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    scale: float = 1.0


def unet(net: "UNet", image: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
    """F of [N, channels, R, R], in its dtype."""
    encoder: list[Any] = list(net.enc.values())
    decoder: list[Any] = [layer for name, layer in net.dec.items() if "_aux_" not in name]
    first, *encoder = encoder
    bottom, *decoder = decoder
    image = image.contiguous(memory_format=torch.channels_last)  # and so all that is made of it
    conditions = iter(net.conditions(embedding, with_conv_bias=True))
    x, skips = DeferredResidual(convolve(first, image), bias=first.bias), []
    for layer in (*encoder, bottom):
        x, h_for_skip = layer(x, next(conditions))
        skips.append(h_for_skip)
    for layer in decoder:
        skip = skips.pop() if x.x.shape[1] < layer.fan_in else None
        x, _ = layer(x, next(conditions), skip)
    norm, last = net.tail()
    return convolve(last, normalise(norm, x).y) + bias_of(last, image.dtype)[:, None, None]


def block(
    layer: "Block",
    x: DeferredResidual,
    embedding: torch.Tensor | dict[str, torch.Tensor],
    skip: torch.Tensor | None = None,
) -> tuple[DeferredResidual, torch.Tensor]:
    """A Block of cat(x, skip), and x added up, for the decoder to read.

    embedding may be norm1's conditioning, conv0's bias included.
    """
    start = normalise(layer.norm0, x, skip=skip, resample=layer.conv0.resample)
    h = convolve(layer.conv0, start.y)
    around = embedding if isinstance(embedding, dict) else condition(layer, embedding)
    around = around | layer.active_dropout()
    h = convolve(layer.conv1, normalise(layer.norm1, DeferredResidual(h), **around).y)

    residual = start.resampled if layer.conv0.resample else start.h
    assert residual is not None
    bias: torch.Tensor = layer.conv1.bias
    if layer.skip is not None and layer.skip.weight is not None:
        residual = product(weight_of(layer.skip, residual.dtype), residual, start.skip)
        bias = bias + layer.skip.bias if layer.tail_bias is None else layer.tail_bias
    x = DeferredResidual(h, residual, bias, layer.skip_scale)
    if layer.heads:
        middle = normalise(layer.norm2, x, silu=False)
        qkv = product(weight_of(layer.qkv, h.dtype), middle.y)
        attended = kernels.attention(qkv, layer.heads, bias=layer.qkv.bias)
        h = product(weight_of(layer.proj, h.dtype), attended)
        x = DeferredResidual(h, middle.h, layer.proj.bias, layer.skip_scale)
    return x, start.h_for_skip


def normalise(norm: GroupNorm, x: DeferredResidual, **around) -> kernels.GroupNormOutput:
    return norm(x.x, residual=x.residual, x_bias=x.bias, x_scale=x.scale, **around)


def convolve(conv: Conv2d, x: torch.Tensor) -> torch.Tensor:
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


def condition(layer: "Block", embedding: torch.Tensor) -> dict[str, torch.Tensor]:
    """Block.condition, with conv0's bias."""
    if layer.adaptive_scale:
        return layer.condition(embedding) | {"add": layer.conv0.bias.expand(len(embedding), -1)}
    bias = (layer.affine.bias + layer.conv0.bias).to(embedding.dtype)
    return {"add": F.linear(embedding, weight_of(layer.affine, embedding.dtype), bias)}


def product(
    weight: torch.Tensor, x: torch.Tensor, skip: torch.Tensor | None = None
) -> torch.Tensor:
    """A 1x1 convolution [C', C, 1, 1] of cat(x, skip): one product, or two that add up."""
    n, _, height, width = x.shape
    weight = weight.flatten(1)
    if skip is None:
        out = _pixels(x) @ weight.t()
    else:
        out = _Joined.apply(_pixels(x), _pixels(skip), weight)
    return out.reshape(n, height, width, -1).permute(0, 3, 1, 2)


class _Joined(torch.autograd.Function):
    """cat(a, b) @ weight.t() as two products; the weight's gradient is written without a cat."""

    @staticmethod
    def forward(ctx, a, b, weight):
        ctx.save_for_backward(a, b, weight)
        out = a @ weight[:, : a.shape[1]].t()
        return out.addmm_(b, weight[:, a.shape[1] :].t())

    @staticmethod
    def backward(ctx, grad):
        a, b, weight = ctx.saved_tensors
        left = a.shape[1]
        needs = ctx.needs_input_grad
        grads = [
            grad @ half if need else None
            for half, need in zip((weight[:, :left], weight[:, left:]), needs, strict=False)
        ]
        if not needs[2]:
            return *grads, None
        whole = torch.empty_like(weight)
        whole[:, :left].addmm_(grad.t(), a, beta=0)
        whole[:, left:].addmm_(grad.t(), b, beta=0)
        return *grads, whole


def _pixels(x: torch.Tensor) -> torch.Tensor:
    """[N, C, H, W] -> [N·H·W, C]: a view of a channels-last tensor."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
