"""The group norm in plain PyTorch: the kernels' reference in tests, and the backend on a CPU."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from sid_fast.kernels.dropout import dropout as drop


class GroupNormOutput(NamedTuple):
    """Outputs of a group norm.

    Each consumer of h and skip gets a separate output, so the backward kernel receives every
    incoming gradient and adds them up itself, without another pass over memory.

    Attributes:
        y: the result, [N, C, H', W'].
        h: the pre-norm activation, [N, C1, H, W]; x itself if nothing was added or scaled.
        h_for_skip: alias of h for a second consumer, the skip connection.
        skip: the skip tensor, passed through; None without one.
        resampled: h, resampled like y; None without resampling.
    """

    y: torch.Tensor
    h: torch.Tensor
    h_for_skip: torch.Tensor
    skip: torch.Tensor | None
    resampled: torch.Tensor | None


def group_norm_eager(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    *,
    skip: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    x_bias: torch.Tensor | None = None,
    x_scale: float = 1.0,
    add: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    silu: bool = True,
    dropout: float = 0.0,
    seed: torch.Tensor | None = None,
    resample: str | None = None,
) -> GroupNormOutput:
    """Apply `group_norm` in plain PyTorch; dropout without a seed uses torch's generator."""
    h = x if residual is None else x + residual
    if x_bias is not None:
        h = h + x_bias[:, None, None].to(h.dtype)
    if x_scale != 1:
        h = h * x_scale
    y = h if skip is None else torch.cat([h, skip], dim=1)
    if add is not None:
        y = y + add[:, :, None, None].to(y.dtype)
    y = F.group_norm(y, groups, weight.to(y.dtype), bias.to(y.dtype), eps)
    if scale is not None and shift is not None:
        scale, shift = (v[:, :, None, None].to(y.dtype) for v in (scale, shift))
        y = torch.addcmul(shift, y, scale + 1)
    if silu:
        y = F.silu(y)
    if dropout:
        y = F.dropout(y, dropout) if seed is None else drop(y, dropout, seed)
    if resample is None:
        return GroupNormOutput(y, h, h, skip, None)
    resampled = {"down": _downsample, "up": _upsample}[resample]
    return GroupNormOutput(resampled(y), h, h, skip, resampled(h))


def _downsample(x: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(x, 2)


def _upsample(x: torch.Tensor) -> torch.Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")
