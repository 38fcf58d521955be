"""Magnitude-preserving layers (arXiv 2312.02696), with upstream's parameter names.

Each layer keeps the expected magnitude of its input: from values of mean square 1 it makes values
of mean square 1. There are no biases and no group norms.
"""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

EPS = 1e-4  # of normalize
CLIP = 256.0  # limit of a block's output; float16 ends at 65504


def normalize(x: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """Scale x to a root mean square of 1 over `dims`.

    The norm is computed in float32 at least; the result has the dtype of x.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=wide)
    rms = norm * math.sqrt(norm.numel() / x.numel())
    return x / (rms + EPS).to(x.dtype)


def normalize_weight(weight: torch.Tensor) -> torch.Tensor:
    """Scale every output channel of a weight to a root mean square of 1."""
    return normalize(weight, tuple(range(1, weight.dim())))


def pixel_norm(x: torch.Tensor) -> torch.Tensor:
    """Scale every pixel of [N, C, H, W] to a root mean square of 1 over the channels."""
    return normalize(x, (1,))


def mp_silu(x: torch.Tensor) -> torch.Tensor:
    """Apply SiLU, divided by the root mean square it makes of N(0, 1)."""
    return F.silu(x) / 0.596


def mp_sum(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    """Interpolate from a to b; independent a and b keep their magnitude."""
    return torch.lerp(a, b, t) / math.sqrt((1 - t) ** 2 + t**2)


def mp_cat(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    """Concatenate channels; b contributes the share t to the magnitude."""
    n_a, n_b = a.shape[1], b.shape[1]
    scale = math.sqrt((n_a + n_b) / ((1 - t) ** 2 + t**2))
    return torch.cat([a * (scale * (1 - t) / n_a**0.5), b * (scale * t / n_b**0.5)], dim=1)


class ScalarGain(nn.Module):
    """A module with a trained gain, a parameter of shape [1]: FSDP2 cannot shard a scalar.

    A state_dict holds it as a scalar, as published files do.
    """

    gain_name: ClassVar[str]

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        name = prefix + self.gain_name
        destination[name] = destination[name].reshape(())

    def _load_from_state_dict(self, state_dict, prefix, *others):
        if (name := prefix + self.gain_name) in state_dict:
            state_dict[name] = state_dict[name].reshape(1)
        super()._load_from_state_dict(state_dict, prefix, *others)


class MPFourier(nn.Module):
    """Random Fourier features √2·cos(x·freqs + phases); maps [N] to float32 [N, width]."""

    freqs: torch.Tensor
    phases: torch.Tensor

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(width))
        self.register_buffer("phases", 2 * math.pi * torch.rand(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Embed x [N]."""
        return math.sqrt(2) * (torch.outer(x.float(), self.freqs) + self.phases).cos()


class MPConv(nn.Module):
    """A convolution, or a linear layer, whose weight is normalised wherever it is used.

    Args:
        fan_in: Input channels.
        fan_out: Output channels.
        kernel: Kernel size, for [N, C, H, W]; None: a linear layer, for [N, C].
    """

    def __init__(self, fan_in: int, fan_out: int, kernel: int | None = None):
        super().__init__()
        size = () if kernel is None else (kernel, kernel)
        self.weight = nn.Parameter(torch.randn(fan_out, fan_in, *size))

    def forward(self, x: torch.Tensor, gain: torch.Tensor | float = 1.0) -> torch.Tensor:
        """Apply the layer in the dtype of x; `gain` scales the output."""
        fan_in = self.weight[0].numel()
        weight = (normalize_weight(self.weight) * (gain / math.sqrt(fan_in))).to(x.dtype)
        if weight.dim() == 2:
            return F.linear(x, weight)
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2)
