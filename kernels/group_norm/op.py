"""The public group norm, its gradient, and the torch operators that launch the kernels."""

import torch

from sid_fast.kernels import _apex
from sid_fast.kernels._operator import operator
from sid_fast.kernels.dispatch import choose
from sid_fast.kernels.group_norm import host
from sid_fast.kernels.group_norm.backward import backward_kernel
from sid_fast.kernels.group_norm.eager import GroupNormOutput, group_norm_eager
from sid_fast.kernels.group_norm.forward import forward_kernel
from sid_fast.kernels.group_norm.host import rows
from sid_fast.kernels.group_norm.launch import launch


def _resampled_size(x: torch.Tensor, resample: str | None) -> list[int]:
    height, width = x.shape[2:]
    if resample == "up":
        return [2 * height, 2 * width]
    return [height // 2, width // 2] if resample == "down" else [height, width]


def _empty(x: torch.Tensor, channels: int, size: list[int]) -> torch.Tensor:
    shape = (len(x), channels, *size)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _launch_forward(
    x: torch.Tensor,
    skip: torch.Tensor | None,
    residual: torch.Tensor | None,
    x_bias: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    add: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    seed: torch.Tensor | None,
    x_scale: float,
    groups: int,
    eps: float,
    silu: bool,
    dropout: float,
    resample: str | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return y, h (empty if h is x), resampled h (empty without resampling) and the statistics.

    x, skip and residual must be dense and channels-last. The statistics are mean and 1/std, float32
    [2, N, groups].
    """
    y, h, resampled, stats = out = _forward_fake(
        x, skip, residual, x_bias, weight, bias, add, scale, shift, seed,
        x_scale, groups, eps, silu, dropout, resample,
    )  # fmt: skip
    n, channels = y.shape[:2]
    blocks, tiles, constants = launch(
        (channels, *x.shape[2:]), x.shape[1], x.dtype, groups, silu, resample, False
    )
    (add,), add_stride = rows(add)
    (scale, shift), scale_shift_stride = rows(scale, shift)
    with torch.cuda.device_of(x):
        forward_kernel[(blocks * n,)](
            x, skip, residual, x_bias, h if h.numel() else None, y,
            resampled if resample else None, stats, weight, bias, add, scale, shift, seed,
            n, add_stride, scale_shift_stride, eps, x_scale, round(dropout * 65536), tiles,
            **constants,
        )  # fmt: skip
    return out


def _forward_fake(
    x, skip, residual, x_bias, weight, bias, add, scale, shift, seed,
    x_scale, groups, eps, silu, dropout, resample,
):  # fmt: skip
    size = _resampled_size(x, resample)
    h_is_x = residual is None and x_bias is None and x_scale == 1
    return (
        _empty(x, len(weight), size),
        x.new_empty(0) if h_is_x else torch.empty_like(x),
        x.new_empty(0) if resample is None else _empty(x, x.shape[1], size),
        x.new_empty((2, len(x), groups), dtype=torch.float32),
    )


def _launch_backward(
    y_grad: torch.Tensor,
    h_grad: torch.Tensor | None,
    h_for_skip_grad: torch.Tensor | None,
    skip_grad: torch.Tensor | None,
    resampled_grad: torch.Tensor | None,
    h: torch.Tensor,
    skip: torch.Tensor | None,
    stats: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    add: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    seed: torch.Tensor | None,
    x_scale: float,
    silu: bool,
    dropout: float,
    resample: str | None,
    wanted: list[bool],
) -> tuple[
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
]:
    """Return the gradients of x, skip, x_bias, (weight, bias) as [2, C], add, scale and shift.

    wanted: whether to compute those of x_bias, of weight and bias, of add, of scale and shift. A
    gradient that is not wanted, or whose input is None, is empty. With a skip, h_grad and skip_grad
    must be both given or both None.
    """
    dx, dskip, dx_bias, dparam, dadd, dscale, dshift = out = _backward_fake(
        y_grad, h_grad, h_for_skip_grad, skip_grad, resampled_grad, h, skip, stats, weight, bias,
        add, scale, shift, seed, x_scale, silu, dropout, resample, wanted,
    )  # fmt: skip
    n, channels, groups = len(h), len(weight), stats.shape[2]
    blocks, tiles, constants = launch(
        (channels, *h.shape[2:]), h.shape[1], h.dtype, groups, silu, resample, True
    )
    has_x_bias, has_param, has_add, has_scale_shift = wanted
    x_bias_sums = stats.new_empty((n, h.shape[1])) if has_x_bias else None
    param_sums = stats.new_empty((2, n, channels)) if has_param else None
    (add,), add_stride = rows(add)
    (scale, shift), scale_shift_stride = rows(scale, shift)
    with torch.cuda.device_of(h):
        backward_kernel[(blocks * n,)](
            h, skip, y_grad, h_grad, h_for_skip_grad, skip_grad, resampled_grad,
            dx, None if skip is None else dskip, x_bias_sums, stats, weight, bias, param_sums,
            add, dadd if has_add else None, scale, shift,
            *((dscale, dshift) if has_scale_shift else (None, None)), seed,
            n, add_stride, scale_shift_stride, None if x_scale == 1 else x_scale,
            round(dropout * 65536), tiles, **constants,
        )  # fmt: skip
        if x_bias_sums is not None:
            torch.sum(x_bias_sums, 0, out=dx_bias)
        if param_sums is not None:
            torch.sum(param_sums, 1, out=dparam)
    return out


def _backward_fake(
    y_grad, h_grad, h_for_skip_grad, skip_grad, resampled_grad, h, skip, stats, weight, bias,
    add, scale, shift, seed, x_scale, silu, dropout, resample, wanted,
):  # fmt: skip
    has_x_bias, has_param, has_add, has_scale_shift = wanted
    return (
        torch.empty_like(h),
        h.new_empty(0) if skip is None else torch.empty_like(skip),
        stats.new_empty(h.shape[1] if has_x_bias else 0),
        stats.new_empty((2, len(weight)) if has_param else 0),
        add.new_empty(add.shape) if has_add else h.new_empty(0),
        *(v.new_empty(v.shape) if has_scale_shift else h.new_empty(0) for v in (scale, shift)),
    )


_forward = operator("group_norm", _launch_forward, _forward_fake)
_backward = operator("group_norm_backward", _launch_backward, _backward_fake)


def _channels_last(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.contiguous(memory_format=torch.channels_last)


class _GroupNorm(torch.autograd.Function):
    """The two kernels; each output is a separate tensor, so that each receives its own gradient."""

    @staticmethod
    def forward(ctx, x, skip, residual, x_bias, weight, bias, add, scale, shift, seed, *options):
        y, h, resampled, stats = _forward(
            x, skip, residual, x_bias, weight, bias, add, scale, shift, seed, *options
        )
        if not h.numel():
            h = x.view_as(x)
        ctx.save_for_backward(h, skip, stats, weight, bias, add, scale, shift, seed)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return (
            y,
            h,
            h.view_as(h),
            None if skip is None else skip.view_as(skip),
            resampled if resampled.numel() else None,
        )

    @staticmethod
    def backward(ctx, *grads):
        h, skip, stats, weight, bias, add, scale, shift, seed = ctx.saved_tensors
        x_scale, _, _, silu, dropout, resample = ctx.options
        y_grad, h_grad, h_for_skip_grad, skip_grad, resampled_grad = map(_channels_last, grads)
        if y_grad is None:
            y_grad = _empty(h, len(weight), _resampled_size(h, resample)).zero_()
        if (h_grad is None) != (skip_grad is None) and skip is not None:
            h_grad = torch.zeros_like(h) if h_grad is None else h_grad
            skip_grad = torch.zeros_like(skip) if skip_grad is None else skip_grad
        needs = ctx.needs_input_grad
        wanted = [needs[3], needs[4] or needs[5], needs[6], needs[7] or needs[8]]
        dx, dskip, dx_bias, dparam, dadd, dscale, dshift = _backward(
            y_grad, h_grad, h_for_skip_grad, skip_grad, resampled_grad, h, skip, stats,
            weight, bias, add, scale, shift, seed, x_scale, silu, dropout, resample, wanted,
        )  # fmt: skip
        has_x_bias, has_param, has_add, has_scale_shift = wanted
        return (
            dx,
            None if skip is None else dskip,
            dx if needs[2] else None,
            dx_bias if has_x_bias else None,
            *(dparam.to(weight.dtype).unbind() if has_param else (None, None)),
            dadd if has_add else None,
            *((dscale, dshift) if has_scale_shift else (None, None)),
            *[None] * (1 + len(ctx.options)),
        )


def group_norm(
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
    """Return resample(dropout(silu(norm(cat(h, skip) + add)·(scale + 1) + shift))), and h.

    h = (x + residual + x_bias)·x_scale. Everything but the norm (Wu and He, arXiv 1803.08494) is
    optional. With a seed, for a given C, H and W, the dropout mask depends only on key, stream,
    sample index, channel and pixel (Philox 2x32-10), not on groups, dtype, batch size, backend or
    launch configuration.

    Args:
        x: [N, C1, H, W], float32 or 16 bit.
        weight: [C], where C = C1 + C2.
        bias: [C].
        groups: number of groups; must divide C.
        eps: added to the variance.
        skip: [N, C2, H, W], of the dtype of x; concatenated to h.
        residual: [N, C1, H, W].
        x_bias: [C1], float32.
        x_scale: factor of h.
        add: [N, C], added before the norm.
        scale: [N, C], given together with shift.
        shift: [N, C], given together with scale.
        silu: apply SiLU.
        dropout: probability of zeroing an element, 0 ≤ dropout < 1; 0 outside training.
        seed: int64 [3] on the device of x: key, stream, index of the first sample. Without a seed,
            dropout draws from torch's generator.
        resample: None, "down" (mean of 2x2 pixels) or "up" (repeat each pixel 2x2).

    Returns:
        Tensors of the dtype of x; the Triton kernel writes them channels-last.

    Raises:
        ValueError: if an argument is out of range, shapes do not match, or resample is combined
            with dropout or skip, which has no kernel.
    """
    fused = {
        "residual": residual, "x_bias": x_bias, "add": add, "scale": scale, "shift": shift,
    }  # fmt: skip
    _check(x, weight, groups, skip, dropout, resample, fused)
    backend = choose("group_norm", x.device)
    if backend == "apex" and _apex.is_supported(x, groups):
        norm_only = skip is None and all(value is None for value in fused.values())
        if norm_only and x_scale == 1 and not dropout and resample is None:
            y = _apex.group_norm(x, weight, bias, groups, eps, silu)
            return GroupNormOutput(y, x, x, None, None)
    if backend == "cuda":
        conditioning = (weight, bias, add, scale, shift)
        scaled = None if x_scale == 1 else x_scale
        unfused = (skip, residual, x_bias, scaled, dropout or None, resample)
        if host.is_supported(x, conditioning, unfused):
            y = host.group_norm(x, weight, bias, groups, eps, add, scale, shift, silu)
            return GroupNormOutput(y, x, x, None, None)
        backend = "eager"
    if backend == "eager":
        return group_norm_eager(
            x, weight, bias, groups, eps, skip=skip, x_scale=x_scale, silu=silu,
            dropout=dropout, seed=seed, resample=resample, **fused,
        )  # fmt: skip
    if dropout and seed is None:
        seed = torch.randint(-(2**63), 2**63 - 1, (3,), device=x.device)
    out = _GroupNorm.apply(
        *map(_channels_last, (x, skip, residual)), x_bias, weight, bias, add, scale, shift,
        seed if dropout else None, x_scale, groups, eps, silu, dropout, resample,
    )  # fmt: skip
    return GroupNormOutput(*out)


def _check(x, weight, groups, skip, dropout, resample, fused) -> None:
    n, left, *size = x.shape
    right = 0 if skip is None else skip.shape[1]
    channels = left + right
    if channels != len(weight) or channels % groups:
        raise ValueError(
            f"{channels} channels: must equal the length of weight ({len(weight)}) and be a "
            f"multiple of groups={groups}"
        )
    shapes = {"residual": (n, left, *size), "skip": (n, right, *size), "x_bias": (left,)}
    for name, value in {"skip": skip, **fused}.items():
        shape = shapes.get(name, (n, channels))
        if value is not None and value.shape != shape:
            raise ValueError(f"{name} is {tuple(value.shape)}: must be {shape}")
    if skip is not None and skip.dtype != x.dtype:
        raise ValueError(f"skip is {skip.dtype}: must be {x.dtype}, like x")
    if (fused["scale"] is None) != (fused["shift"] is None):
        raise ValueError("only one of scale and shift is given: give both or neither")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout}: must be at least 0 and less than 1")
    if resample not in (None, "down", "up"):
        raise ValueError(f"resample={resample!r}: choose from None, 'down', 'up'")
    if resample and (dropout or skip is not None):
        raise ValueError(f"resample={resample!r} cannot be combined with dropout or skip")
    if resample == "down" and any(side % 2 for side in size):
        raise ValueError(f"resample='down' of {size[0]}x{size[1]} pixels: sides must be even")
