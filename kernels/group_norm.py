"""Group normalisation with everything the EDM U-Net does around it."""

import torch
import torch.nn.functional as F


def group_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    add: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    silu: bool = True,
    dropout: float = 0.0,
) -> torch.Tensor:
    """dropout(silu(norm(x + add)·(scale + 1) + shift)), every part but the norm optional.

    x is [N, C, H, W]; weight and bias are [C]; add, scale and shift are [N, C]. scale and shift
    come together. dropout is the probability of a zero, 0 outside training. Returns the shape
    and dtype of x.
    """
    if add is not None:
        x = x + add[:, :, None, None].to(x.dtype)
    x = F.group_norm(x, groups, weight.to(x.dtype), bias.to(x.dtype), eps)
    if scale is not None:
        scale, shift = (v[:, :, None, None].to(x.dtype) for v in (scale, shift))
        x = torch.addcmul(shift, x, scale + 1)
    if silu:
        x = F.silu(x)
    return F.dropout(x, dropout) if dropout else x
