"""The layers of the three networks, with the published parameter names."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from sid_fast import kernels
from sid_fast.errors import UserError
from sid_fast.networks.config import groups_of

# How a layer's weight and bias are drawn: (rule, factor of the weight, factor of the bias).
Init = tuple[str, float, float]


def draw(shape: tuple[int, ...], rule: str, fan_in: int, fan_out: int) -> torch.Tensor:
    """A parameter drawn by one of the three rules: float32."""
    if rule == "xavier_uniform":
        return (torch.rand(shape) * 2 - 1) * math.sqrt(6 / (fan_in + fan_out))
    if rule == "kaiming_uniform":
        return (torch.rand(shape) * 2 - 1) * math.sqrt(3 / fan_in)
    assert rule == "kaiming_normal"
    return torch.randn(shape) * math.sqrt(1 / fan_in)


class Linear(nn.Module):
    """[N, in] -> [N, out], in the dtype of the input."""

    def __init__(self, fan_in: int, fan_out: int, init: Init, bias: bool = True):
        super().__init__()
        rule, weight_factor, bias_factor = init
        self.weight = nn.Parameter(draw((fan_out, fan_in), rule, fan_in, fan_out) * weight_factor)
        self.bias = (
            nn.Parameter(draw((fan_out,), rule, fan_in, fan_out) * bias_factor) if bias else None
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class Conv2d(nn.Module):
    """A square convolution with optional resampling by two; kernel 0 only resamples.

    `resample` is "up", "down" or None. Resampling comes before the convolution, except in the
    fused form, where "down" filters after it, the paddings of both taken at once.
    """

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
        self.weight = self.bias = None
        if kernel:
            rule, weight_factor, bias_factor = init
            fans = fan_in * kernel**2, fan_out * kernel**2
            shape = (fan_out, fan_in, kernel, kernel)
            self.weight = nn.Parameter(draw(shape, rule, *fans) * weight_factor)
            self.bias = nn.Parameter(draw((fan_out,), rule, *fans) * bias_factor)
        taps = torch.tensor(filter, dtype=torch.float32)
        taps = torch.outer(taps, taps) / taps.sum() ** 2
        self.register_buffer("resample_filter", taps[None, None] if resample else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = None if self.weight is None else self.weight.to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        w_pad = 0 if weight is None else weight.shape[-1] // 2
        if self.resample:
            f_pad = (self.resample_filter.shape[-1] - 1) // 2
            if self.fused and self.resample == "down":
                x = self._filter(F.conv2d(x, weight, padding=w_pad + f_pad), 0)
                return x + bias[:, None, None]
            x = self._filter(x, f_pad)
        return x if weight is None else F.conv2d(x, weight, bias, padding=w_pad)

    def _filter(self, x: torch.Tensor, padding: int) -> torch.Tensor:
        channels = x.shape[1]
        taps = self.resample_filter.to(x.dtype).expand(channels, -1, -1, -1)
        if self.resample == "down":
            return F.conv2d(x, taps, stride=2, padding=padding, groups=channels)
        return F.conv_transpose2d(x, taps * 4, stride=2, padding=padding, groups=channels)


class GroupNorm(nn.Module):
    """GroupNorm with what follows it in a block; see kernels.group_norm."""

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

    def forward(self, x: torch.Tensor, **around) -> torch.Tensor:
        return kernels.group_norm(x, self.weight, self.bias, self.groups, self.eps, **around).y


class PositionalEmbedding(nn.Module):
    """[N] -> [N, width]: [cos, sin] of x·10000^(−j/(width/2 − endpoint)), j < width/2."""

    def __init__(self, width: int, endpoint: bool):
        super().__init__()
        self.width, self.endpoint = width, endpoint

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        half = self.width // 2
        j = torch.arange(half, dtype=torch.float32, device=x.device)
        angles = torch.outer(x, 10000 ** (-j / (half - self.endpoint)))
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class FourierEmbedding(nn.Module):
    """[N] -> [N, width]: [cos, sin] of 2π·freqs·x, the frequencies drawn once."""

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("freqs", torch.randn(width // 2) * 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        angles = torch.outer(x, 2 * math.pi * self.freqs)
        return torch.cat([angles.cos(), angles.sin()], dim=1)
