"""The layers of DDPM++, NCSN++ and ADM, with upstream's parameter names."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from sid_fast import kernels
from sid_fast.errors import UserError
from sid_fast.kernels.attention import blocked_order
from sid_fast.kernels.dispatch import choose
from sid_fast.models.edm_unet.config import groups_of

# Initialisation of a layer: (rule, scale of the weight, scale of the bias).
Init = tuple[str, float, float]


def init_parameter(
    shape: tuple[int, ...], rule: str, fan_in: int, fan_out: int, scale: float
) -> torch.Tensor:
    """Draw an initial float32 parameter by rule, times a scale."""
    if torch.get_default_device().type == "meta":  # arithmetic imports torch._dynamo, for seconds
        return torch.empty(shape)
    if rule == "xavier_uniform":
        return (torch.rand(shape) * 2 - 1) * math.sqrt(6 / (fan_in + fan_out)) * scale
    if rule == "kaiming_uniform":
        return (torch.rand(shape) * 2 - 1) * math.sqrt(3 / fan_in) * scale
    assert rule == "kaiming_normal"
    return torch.randn(shape) * math.sqrt(1 / fan_in) * scale


def weight_of(layer: "Linear | Conv2d | GroupNorm", dtype: torch.dtype) -> torch.Tensor:
    """Return a layer's weight in the compute dtype: its low-precision copy, or else a cast."""
    return layer.weight.to(dtype) if layer.compute_weight is None else layer.compute_weight


def bias_of(layer: "Linear | Conv2d | GroupNorm", dtype: torch.dtype) -> torch.Tensor:
    """Return a layer's bias in the compute dtype: its low-precision copy, or else a cast."""
    return layer.bias.to(dtype) if layer.compute_bias is None else layer.compute_bias


class Linear(nn.Module):
    """[N, in] -> [N, out], in the dtype of the input."""

    bias: nn.Parameter  # may be None; typed as in PyTorch's own layers
    # Copies in the compute type; see EDMNetwork.compute_in.
    compute_weight: torch.Tensor | None = None
    compute_bias: torch.Tensor | None = None

    def __init__(self, fan_in: int, fan_out: int, init: Init, bias: bool = True):
        super().__init__()
        rule, weight_factor, bias_factor = init
        self.weight = nn.Parameter(
            init_parameter((fan_out, fan_in), rule, fan_in, fan_out, weight_factor)
        )
        self.register_parameter(
            "bias",
            nn.Parameter(init_parameter((fan_out,), rule, fan_in, fan_out, bias_factor))
            if bias
            else None,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer to [N, in]."""
        bias = None if self.bias is None else bias_of(self, x.dtype)
        return F.linear(x, weight_of(self, x.dtype), bias)


class Conv2d(nn.Module):
    """A square convolution with optional resampling by two.

    Resampling precedes the convolution, except with `fused` "down": then the convolution pads for
    both and the filter follows.

    Args:
        fan_in: Input channels.
        fan_out: Output channels.
        kernel: Kernel size; 0 only resamples.
        init: Initialisation of weight and bias.
        resample: "up", "down" or None.
        filter: Taps of the resampling filter along one axis.
        fused: Filter after the convolution when downsampling.
    """

    # May be None: weight and bias with kernel 0, resample_filter without resampling.
    weight: nn.Parameter
    bias: nn.Parameter
    resample_filter: torch.Tensor
    # Copies in the compute type; see EDMNetwork.compute_in.
    compute_weight: torch.Tensor | None = None
    compute_bias: torch.Tensor | None = None

    def __init__(
        self,
        fan_in: int,
        fan_out: int,
        kernel: int,
        init: Init,
        resample: str | None = None,
        filter: tuple[int, ...] = (1, 1),
        fused: bool = False,
    ):
        super().__init__()
        self.resample, self.fused = resample, fused
        if not kernel:
            self.register_parameter("weight", None)
            self.register_parameter("bias", None)
        else:
            rule, weight_factor, bias_factor = init
            fans = fan_in * kernel**2, fan_out * kernel**2
            shape = (fan_out, fan_in, kernel, kernel)
            self.weight = nn.Parameter(init_parameter(shape, rule, *fans, weight_factor))
            self.bias = nn.Parameter(init_parameter((fan_out,), rule, *fans, bias_factor))
        taps = [[a * b / sum(filter) ** 2 for b in filter] for a in filter]
        self.register_buffer("resample_filter", torch.tensor([[taps]]) if resample else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply resampling and convolution to [N, C, H, W]."""
        f_pad = (self.resample_filter.shape[-1] - 1) // 2 if self.resample else 0
        if self.weight is None:
            return self._filter(x, f_pad) if self.resample else x
        weight, bias = weight_of(self, x.dtype), bias_of(self, x.dtype)
        w_pad = weight.shape[-1] // 2
        if self.fused and self.resample == "down":
            x = self._filter(F.conv2d(x, weight, padding=w_pad + f_pad), 0)
            return x + bias[:, None, None]
        if self.resample:
            x = self._filter(x, f_pad)
        return F.conv2d(x, weight, bias, padding=w_pad)

    def _filter(self, x: torch.Tensor, padding: int) -> torch.Tensor:
        channels = x.shape[1]
        taps = self.resample_filter.to(x.dtype).expand(channels, -1, -1, -1)
        if self.resample == "down":
            return F.conv2d(x, taps, stride=2, padding=padding, groups=channels)
        return F.conv_transpose2d(x, taps * 4, stride=2, padding=padding, groups=channels)


class BlockedRows(nn.Module):
    """Base of a 1x1 convolution to q, k and v, its rows in the order that kernels.attention reads.

    A state_dict stores the rows in upstream's order, with q, k and v interleaved within a head.
    """

    weight: nn.Parameter
    heads: int

    def order(self) -> torch.Tensor:
        """Map our rows to upstream's: the upstream index of each row; argsort inverts it."""
        return blocked_order(len(self.weight) // 3, self.heads)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, _ in self.named_parameters(prefix.removesuffix("."), recurse=False):
            destination[name] = destination[name][self.order().argsort()]

    def _load_from_state_dict(self, state_dict, prefix, *others):
        for name, _ in self.named_parameters(prefix.removesuffix("."), recurse=False):
            if name in state_dict:
                state_dict[name] = state_dict[name][self.order()]
        super()._load_from_state_dict(state_dict, prefix, *others)


class QKV(BlockedRows, Conv2d):
    """The 1x1 convolution before attention."""

    def __init__(self, channels: int, heads: int, init: Init):
        super().__init__(channels, channels * 3, 1, init)
        self.heads = heads


class GroupNorm(nn.Module):
    """GroupNorm with optional fused operations; see kernels.group_norm.

    The eager backend takes its parameters in the compute dtype, the kernels in float32.
    """

    compute_weight: torch.Tensor | None = None
    compute_bias: torch.Tensor | None = None

    def __init__(self, channels: int, eps: float):
        super().__init__()
        self.groups, self.eps = groups_of(channels), eps
        if channels % self.groups:
            raise UserError(
                f"network: model_channels and channel_mult give a layer of {channels} channels, "
                f"which does not divide into {self.groups} groups"
            )
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor, **options) -> kernels.GroupNormOutput:
        """Normalise [N, C, H, W]; options as for kernels.group_norm."""
        weight: torch.Tensor = self.weight
        bias: torch.Tensor = self.bias
        if choose("group_norm", x.device) == "eager":
            weight, bias = weight_of(self, x.dtype), bias_of(self, x.dtype)
        return kernels.group_norm(x, weight, bias, self.groups, self.eps, **options)


def channel_mean(x: torch.Tensor) -> torch.Tensor:
    """Return the mean over channels of [N, C, H, W] as float32 [N, 1, H, W].

    Its gradient is a broadcast view, so the backward pass adds one term to the gradient of x and
    copies no feature map.
    """
    return _ChannelMean.apply(x)


class _ChannelMean(torch.autograd.Function):
    """PyTorch's own backward would materialise the broadcast gradient in float32, then cast it."""

    @staticmethod
    def forward(ctx, x):
        ctx.channels, ctx.dtype = x.shape[1], x.dtype
        return x.mean(1, keepdim=True, dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad):
        return (grad / ctx.channels).to(ctx.dtype).expand(-1, ctx.channels, -1, -1)


class PositionalEmbedding(nn.Module):
    """Sinusoidal embedding [cos, sin] of x·10000^(−j/(width/2 − endpoint)), j < width/2.

    Maps [N] to [N, width]. swap: [sin, cos] instead.
    """

    def __init__(self, width: int, endpoint: bool, swap: bool):
        super().__init__()
        self.width, self.endpoint, self.swap = width, endpoint, swap

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Embed x [N]."""
        half = self.width // 2
        j = torch.arange(half, dtype=torch.float32, device=x.device)
        angles = torch.outer(x, 10000 ** (j / (self.endpoint - half)))
        halves = [angles.sin(), angles.cos()] if self.swap else [angles.cos(), angles.sin()]
        return torch.cat(halves, dim=1)


class FourierEmbedding(nn.Module):
    """Random Fourier features [sin, cos] of 2π·freqs·x; maps [N] to [N, width]."""

    freqs: torch.Tensor

    def __init__(self, width: int):
        super().__init__()
        freqs = torch.randn(width // 2)
        self.register_buffer(
            "freqs", freqs if freqs.is_meta else freqs * 16
        )  # as in init_parameter

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Embed x [N]."""
        angles = torch.outer(x, 2 * math.pi * self.freqs)
        return torch.cat([angles.sin(), angles.cos()], dim=1)
