"""Magnitude-preserving layers (arXiv 2312.02696), with upstream's parameter names.

Each layer keeps the expected magnitude of its input: from values of mean square 1 it makes values
of mean square 1. There are no biases and no group norms.
"""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from sid_fast.models.edm_unet.fused import conv1x1, convolve
from sid_fast.models.edm_unet.layers import BlockedRows

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
    """A convolution, or a linear layer, whose weight is normalised.

    Happens wherever the weight is used, unless the layer has a normalised copy of it.

    Args:
        fan_in: Input channels.
        fan_out: Output channels.
        kernel: Kernel size, for [N, C, H, W]; None: a linear layer, for [N, C].
    """

    # w/(ε + rms(w))/√fan_in in the compute dtype; see EDM2Network.compute_in.
    compute_weight: torch.Tensor | None = None

    def __init__(self, fan_in: int, fan_out: int, kernel: int | None = None):
        super().__init__()
        size = () if kernel is None else (kernel, kernel)
        self.weight = nn.Parameter(torch.randn(fan_out, fan_in, *size))

    def forward(self, x: torch.Tensor, gain: torch.Tensor | None = None) -> torch.Tensor:
        """Apply the layer in the dtype of x; `gain` [1] scales the output."""
        if self.weight.dim() == 4:
            weight = self.scaled_weight(x.dtype, gain)
            return conv1x1(weight, x) if weight.shape[-1] == 1 else convolve(x, weight)
        if gain is None or self.compute_weight is None:
            return F.linear(x, self.scaled_weight(x.dtype, gain))
        # The output is smaller than the copy.
        return (F.linear(x, self.scaled_weight(x.dtype)) * gain).to(x.dtype)

    def scaled_weight(self, dtype: torch.dtype, gain: torch.Tensor | None = None) -> torch.Tensor:
        """Return the normalised weight times gain/√fan_in, in a dtype.

        The product with the gain is one in float32: a rounded gain would scale all outputs wrongly.
        """
        if self.compute_weight is not None:
            weight = self.compute_weight
            return (weight if gain is None else weight * gain).to(dtype)
        scale = 1 / math.sqrt(self.weight[0].numel())
        weight = normalize_weight(self.weight) * (scale if gain is None else gain * scale)
        return weight.to(dtype)


class QKV(BlockedRows, MPConv):
    """The 1x1 convolution before attention.

    Args:
        channels: Input channels; a third of the output channels.
        heads: Attention heads.
    """

    def __init__(self, channels: int, heads: int):
        super().__init__(channels, channels * 3, 1)
        self.heads = heads
