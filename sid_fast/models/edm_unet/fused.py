"""The U-Net of unet.py, with every element-wise pass fused into a neighbouring kernel.

Only convolutions, matmuls, attention and group norms read or write feature maps:

- A block returns its residual sum, (h + residual + bias)·skip_scale, as a `DeferredResidual`. The
  next group norm computes it while reading, and writes it out for its other consumers.
- norm1 adds the bias of conv0, the attention kernel that of qkv.
- The decoder never concatenates: norm0 reads both tensors, and the 1x1 skip convolution is two
  matmuls, the second accumulating onto the first.
- norm0 resamples as it writes.
- 1x1 convolutions are matmuls on the channels-last view.

A tensor with two consumers is returned as two outputs (h and h_for_skip, see
kernels.GroupNormOutput), so that the group norm's backward kernel sums their gradients, instead of
an extra autograd pass.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F

from sid_fast import kernels
from sid_fast.models.edm_unet.layers import Conv2d, GroupNorm, bias_of, channel_mean, weight_of

if TYPE_CHECKING:  # unet imports this module
    from sid_fast.models.edm_unet.unet import Block, Heads, UNet


class DeferredResidual(NamedTuple):
    """The unevaluated sum (x + residual + bias)·scale; x and residual [N, C, H, W], bias [C]."""

    x: torch.Tensor
    residual: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    scale: float = 1.0


def unet(
    net: "UNet",
    image: torch.Tensor,
    embedding: torch.Tensor,
    heads: "Heads",
    seeds: Iterator[torch.Tensor | None],
) -> Any:
    """Apply UNet.forward to images [N, channels, R, R] and an embedding [N, E], in their dtype.

    heads is as for UNet.forward; seeds are those of the encoder's blocks, see Block.forward.
    """
    encoder: list[Any] = list(net.enc.values())
    decoder: list[Any] = [layer for name, layer in net.dec.items() if "_aux_" not in name]
    first, *encoder = encoder
    bottom, *decoder = decoder
    image = image.contiguous(memory_format=torch.channels_last)
    conditions = iter(net.conditions(embedding, with_conv_bias=True))
    x, skips = DeferredResidual(conv_nobias(first, image), bias=first.bias), []
    for layer in encoder:
        x, h_for_skip = layer(x, next(conditions), seed=next(seeds))
        skips.append(h_for_skip)
    if heads == "encoder":
        return logits_of(x)
    x, h = bottom(x, next(conditions))
    skips.append(h)
    for layer in decoder:
        skip = skips.pop() if x.x.shape[1] < layer.fan_in else None
        x, _ = layer(x, next(conditions), skip)
    norm, conv = net.output_layers()
    out = conv_nobias(conv, normalise(norm, x).y) + bias_of(conv, image.dtype)[:, None, None]
    return out if heads == "decoder" else (out, channel_mean(h))


def logits_of(x: DeferredResidual) -> torch.Tensor:
    """Return the channel mean of a residual sum without computing the sum: float32 [N, 1, H, W]."""
    total = channel_mean(x.x)
    if x.residual is not None:
        total = total + channel_mean(x.residual)
    if x.bias is not None:
        total = total + x.bias.float().mean()
    return total * x.scale


def block(
    layer: "Block",
    x: DeferredResidual,
    embedding: torch.Tensor | dict[str, torch.Tensor],
    skip: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
) -> tuple[DeferredResidual, torch.Tensor]:
    """Apply a Block to cat(x, skip).

    Args:
        layer: The block.
        x: The previous block's output.
        embedding: [N, E], or norm1's conditioning arguments, which then include conv0's bias.
        skip: Encoder output to concatenate, or None.
        seed: See Block.forward.

    Returns:
        The block's output, and x evaluated as a tensor, for the skip connection.
    """
    start = normalise(layer.norm0, x, skip=skip, resample=layer.conv0.resample)
    h = conv_nobias(layer.conv0, start.y)
    options = embedding if isinstance(embedding, dict) else condition(layer, embedding)
    options = options | layer.active_dropout(seed)
    h = conv_nobias(layer.conv1, normalise(layer.norm1, DeferredResidual(h), **options).y)

    residual = start.resampled if layer.conv0.resample else start.h
    assert residual is not None
    bias: torch.Tensor = layer.conv1.bias
    if layer.skip is not None and layer.skip.weight is not None:
        residual = conv1x1(weight_of(layer.skip, residual.dtype), residual, start.skip)
        bias = bias + layer.skip.bias if layer.residual_bias is None else layer.residual_bias
    x = DeferredResidual(h, residual, bias, layer.skip_scale)
    if layer.heads:
        middle = normalise(layer.norm2, x, silu=False)
        qkv = conv1x1(weight_of(layer.qkv, h.dtype), middle.y)
        attended = kernels.attention(qkv, layer.heads, bias=layer.qkv.bias)
        h = conv1x1(weight_of(layer.proj, h.dtype), attended)
        x = DeferredResidual(h, middle.h, layer.proj.bias, layer.skip_scale)
    return x, start.h_for_skip


def normalise(norm: GroupNorm, x: DeferredResidual, **options) -> kernels.GroupNormOutput:
    """Evaluate x and normalise it, in one kernel; options as for kernels.group_norm."""
    return norm(x.x, residual=x.residual, x_bias=x.bias, x_scale=x.scale, **options)


def conv_nobias(conv: Conv2d, x: torch.Tensor) -> torch.Tensor:
    """Convolve without bias or resampling."""
    return convolve(x, weight_of(conv, x.dtype))


def convolve(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Convolve with padding k//2; with a frozen weight autograd does not keep x."""
    if x.requires_grad and not weight.requires_grad:
        return _FrozenConv.apply(x, weight)
    return F.conv2d(x, weight, padding=weight.shape[-1] // 2)


class _FrozenConv(torch.autograd.Function):
    """A convolution without weight gradient; PyTorch's own would save its input regardless."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2)

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        return F.conv_transpose2d(grad, weight, padding=weight.shape[-1] // 2), None


def condition(layer: "Block", embedding: torch.Tensor) -> dict[str, torch.Tensor]:
    """Compute norm1's conditioning arguments (Block.condition), with conv0's bias added."""
    if layer.adaptive_scale:
        return layer.condition(embedding) | {"add": layer.conv0.bias.expand(len(embedding), -1)}
    bias = (layer.affine.bias + layer.conv0.bias).to(embedding.dtype)
    return {"add": F.linear(embedding, weight_of(layer.affine, embedding.dtype), bias)}


def conv1x1(
    weight: torch.Tensor,
    x: torch.Tensor,
    skip: torch.Tensor | None = None,
    gains: tuple[float, float] = (1.0, 1.0),
) -> torch.Tensor:
    """Apply a 1x1 convolution [C', C, 1, 1] to cat(x, skip), as one matmul per tensor.

    gains: factors of x and skip; only with skip.
    """
    n, _, height, width = x.shape
    weight = weight.flatten(1)
    if skip is None:
        out = _pixels(x) @ weight.t()
    else:
        out = _ConcatMatmul.apply(_pixels(x), _pixels(skip), weight, gains)
    return out.reshape(n, height, width, -1).permute(0, 3, 1, 2)


class _ConcatMatmul(torch.autograd.Function):
    """Compute cat(α·a, β·b) @ weight.t() and its gradients without concatenating or scaling."""

    @staticmethod
    def forward(ctx, a, b, weight, gains):
        ctx.save_for_backward(a, b, weight)
        ctx.gains = gains
        left, right = weight[:, : a.shape[1]], weight[:, a.shape[1] :]
        return _product(a, left.t(), gains[0]).addmm_(b, right.t(), alpha=gains[1])

    @staticmethod
    def backward(ctx, grad):
        a, b, weight = ctx.saved_tensors
        left = a.shape[1]
        halves, needs = (weight[:, :left], weight[:, left:]), ctx.needs_input_grad
        grads = [
            _product(grad, half, gain) if need else None
            for half, gain, need in zip(halves, ctx.gains, needs, strict=False)
        ]
        if not needs[2]:
            return *grads, None, None
        grad_weight = torch.empty_like(weight)
        grad_weight[:, :left].addmm_(grad.t(), a, beta=0, alpha=ctx.gains[0])
        grad_weight[:, left:].addmm_(grad.t(), b, beta=0, alpha=ctx.gains[1])
        return *grads, grad_weight, None


def _product(a: torch.Tensor, b: torch.Tensor, gain: float) -> torch.Tensor:
    """Compute gain·(a @ b) in one matmul."""
    if gain == 1:
        return a @ b
    return a.new_empty(a.shape[0], b.shape[1]).addmm_(a, b, beta=0, alpha=gain)


def _pixels(x: torch.Tensor) -> torch.Tensor:
    """Reshape [N, C, H, W] to [N·H·W, C]; a view of a channels-last tensor."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
