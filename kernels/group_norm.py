"""Group normalisation with everything the EDM U-Net does around it, one pass over memory.

Before the norm: the end of the block before (bias of its convolution, residual, scale), the
decoder's concatenation, conditioning; after it: conditioning, activation, dropout, resampling by
two. Two tensors are normalised as one where they lie; a group may straddle the seam.

A channels-last group is a narrow column: C/groups channels (8 to 96 bytes in 16 bit) of every
pixel. A program therefore takes a slab of adjacent groups of one sample, so that it reads whole
sectors, and all of its pixels. Where they fit, they stay in registers between statistics and
normalisation; where they do not, the program goes over its tiles again in reverse order, so that
what it read last is still in the first-level cache and nothing is read from memory twice.

The backward kernel keeps the input and the statistics only; normalised values, activation and
dropout are recomputed. It takes every incoming gradient of the input apart and adds them up
itself. It writes the sums that make up the gradients of weight, bias and x_bias per sample; adding
the samples up is a second, deterministic step.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from sid_fast.kernels import _apex
from sid_fast.kernels._triton import tl, triton
from sid_fast.kernels.dispatch import choose


class Normed(NamedTuple):
    """What a group norm gives; each output takes a gradient of its own.

    y is the result, [N, C, H', W']; h the sum that was normalised, [N, C1, H, W], x itself where
    there was nothing to add; fork is h once more, for a second consumer; beside what was
    normalised with h, passed through for its second consumer; resampled is h, resampled as y is.
    Adding up the gradients of several consumers thus takes no pass of its own.
    """

    y: torch.Tensor
    h: torch.Tensor
    fork: torch.Tensor
    beside: torch.Tensor | None
    resampled: torch.Tensor | None


def group_norm_ref(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    *,
    beside: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    x_bias: torch.Tensor | None = None,
    x_scale: float = 1.0,
    add: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    silu: bool = True,
    dropout: float = 0.0,
    resample: str | None = None,
) -> Normed:
    """group_norm in plain PyTorch; dropout draws from torch's generator."""
    h = x if residual is None else x + residual
    if x_bias is not None:
        h = h + x_bias[:, None, None].to(h.dtype)
    if x_scale != 1:
        h = h * x_scale
    y = h if beside is None else torch.cat([h, beside], dim=1)
    if add is not None:
        y = y + add[:, :, None, None].to(y.dtype)
    y = F.group_norm(y, groups, weight.to(y.dtype), bias.to(y.dtype), eps)
    if scale is not None:
        scale, shift = (v[:, :, None, None].to(y.dtype) for v in (scale, shift))
        y = torch.addcmul(shift, y, scale + 1)
    if silu:
        y = F.silu(y)
    if dropout:
        y = F.dropout(y, dropout)
    if resample is None:
        return Normed(y, h, h, beside, None)
    change = {"down": _halved, "up": _doubled}[resample]
    return Normed(change(y), h, h, beside, change(h))


def _halved(x: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(x, 2)


def _doubled(x: torch.Tensor) -> torch.Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


@triton.jit
def _group_sums(channel_values, lane, GROUP: tl.constexpr, SLOTS: tl.constexpr):
    member = (lane // GROUP)[:, None] == tl.arange(0, SLOTS)[None, :]
    return tl.sum(tl.where(member, channel_values[:, None], 0.0), 0)


@triton.jit
def _to_channels(group_values, lane, GROUP: tl.constexpr, SLOTS: tl.constexpr):
    member = (lane // GROUP)[:, None] == tl.arange(0, SLOTS)[None, :]
    return tl.sum(tl.where(member, group_values[None, :], 0.0), 1)


@triton.jit
def _fold(tile, FOLD: tl.constexpr):
    """[TILE, LANES] -> [TILE/FOLD, LANES]: sums of rows that one thread holds."""
    rows: tl.constexpr = tile.shape[0] // FOLD
    return tl.sum(tl.reshape(tile, [FOLD, rows, tile.shape[1]]), 0)


@triton.jit
def _into(x, TYPE: tl.constexpr):
    """x in a type. Beyond float16's range lies its largest number and no infinity, which a step of

    backward would turn into NaN, and that into the loss of every weight's gradient; NaN stays.
    """
    if tl.float16 == TYPE:
        x = tl.clamp(x, -65504.0, 65504.0, tl.PropagateNan.ALL)
    return x.to(TYPE)


@triton.jit
def _load(ptr, offset, inside):
    value = tl.load(ptr + offset, mask=inside, other=0.0)
    return _into(value.to(tl.float32), value.dtype).to(tl.float32)


@triton.jit
def _slab_of_program(
    CHANNELS: tl.constexpr,
    LEFT: tl.constexpr,
    GROUP: tl.constexpr,
    SLAB: tl.constexpr,
    SLABS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Which sample; the slab's lanes, their channels, which it owns, and which of those are h's."""
    sample = tl.program_id(0) // SLABS
    slab = tl.program_id(0) % SLABS
    lane = tl.arange(0, LANES)
    # 8-byte accesses in 16 bit: with 16, the values a channel would take up half the registers.
    channel = tl.max_contiguous(slab * (SLAB * GROUP) + lane, 4)
    owned = (lane < SLAB * GROUP) & (channel < CHANNELS)
    return sample, lane, channel, owned, owned & (channel < LEFT)


@triton.jit
def _joined(left_ptr, right_ptr, start, channel, LEFT: tl.constexpr, CHANNELS: tl.constexpr):
    """Where every channel of pixel `start` lies in cat(left, right)."""
    ptr = left_ptr + (start * LEFT + channel)
    if right_ptr is not None:
        right = right_ptr + (start * (CHANNELS - LEFT) + (channel - LEFT))
        ptr = tl.where(channel < LEFT, ptr, right)
    return ptr


@triton.jit
def _first_of_four(pixel, WIDTH: tl.constexpr):
    """A pixel's upper left one of four at twice the resolution; WIDTH is the coarse one's."""
    return 2 * (pixel + pixel // WIDTH * WIDTH)


@triton.jit
def _place(
    t,
    channel,
    owned,
    left,
    PIXELS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    LEFT: tl.constexpr,
    TILE: tl.constexpr,
    RESAMPLE: tl.constexpr,
):
    """Where tile t is.

    Its pixels; theirs in y (the first of four for "up"); the offsets of its elements from pixel 0;
    which of them are the slab's, and which of those are h's.
    """
    row = tl.arange(0, TILE)
    if RESAMPLE == "down":
        # Rows a quarter of the tile apart are 2x2 pixels, so that one thread averages them.
        target = t * (TILE // 4) + row % (TILE // 4)
        member = row // (TILE // 4)
        pixel = _first_of_four(target, WIDTH // 2) + member // 2 * WIDTH + member % 2
    elif RESAMPLE == "up":
        pixel = t * TILE + row
        target = _first_of_four(pixel, WIDTH)
    else:
        pixel = t * TILE + row
        target = pixel
    inside = owned[None, :]
    if LEFT < CHANNELS:
        stride = tl.where(channel < LEFT, LEFT, CHANNELS - LEFT)
        offset = pixel[:, None] * stride[None, :]
        near = left[None, :]
    else:
        offset = pixel[:, None] * CHANNELS + tl.zeros_like(channel)[None, :]
        near = inside
    if PIXELS % TILE:
        inside &= (pixel < PIXELS)[:, None]
        near &= (pixel < PIXELS)[:, None]
    return pixel, target, offset, inside, near


@triton.jit
def _store_resampled(
    ptr,
    value,
    t,
    target,
    inside,
    owned,
    PIXELS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    RESAMPLE: tl.constexpr,
):
    """A tile, resampled, to where ptr has its channels."""
    if RESAMPLE == "down":
        rows: tl.constexpr = value.shape[0] // 4
        pixel = t * rows + tl.arange(0, rows)
        value = _into(_fold(value, 4) * 0.25, ptr.dtype.element_ty)
        inside = owned[None, :] & (pixel < PIXELS // 4)[:, None]
        tl.store(ptr[None, :] + pixel[:, None] * CHANNELS, value, mask=inside)
    else:
        value = _into(value, ptr.dtype.element_ty)
        tl.store(ptr[None, :] + target[:, None] * CHANNELS, value, mask=inside)
        if RESAMPLE == "up":
            for i in tl.static_range(1, 4):
                pixel = target + (i // 2 * 2 * WIDTH + i % 2)
                tl.store(ptr[None, :] + pixel[:, None] * CHANNELS, value, mask=inside)


@triton.jit
def _load_resampled(
    ptr, target, inside, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, RESAMPLE: tl.constexpr
):
    """The transpose of _store_resampled: the gradient of a tile from that of what was stored."""
    value = _load(ptr[None, :], target[:, None] * CHANNELS, inside)
    if RESAMPLE == "down":
        value *= 0.25
    if RESAMPLE == "up":
        for i in tl.static_range(1, 4):
            pixel = target + (i // 2 * 2 * WIDTH + i % 2)
            value += _load(ptr[None, :], pixel[:, None] * CHANNELS, inside)
    return value


@triton.jit
def _affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, row, channel, owned):
    """norm·weight + bias, times (scale + 1), plus shift: as one gain and one shift a channel."""
    gain = _load(weight_ptr, channel, owned)
    shift = _load(bias_ptr, channel, owned)
    if scale_ptr is not None:
        factor = 1.0 + _load(scale_ptr, row + channel, owned)
        gain *= factor
        shift = shift * factor + _load(shift_ptr, row + channel, owned)
    return gain, shift


@triton.jit
def _dropout(values, seed_ptr, drop, pixel, SLABS: tl.constexpr):
    """Zero with probability drop/65536 and scale the rest; one Philox block serves 8 channels."""
    TILE: tl.constexpr = values.shape[0]
    LANES: tl.constexpr = values.shape[1]
    slab = tl.program_id(0) % SLABS
    stream = tl.load(seed_ptr + 1)
    block = (pixel[:, None] * SLABS + slab) * (LANES // 8) + tl.arange(0, LANES // 8)[None, :]
    zero = block * 0
    a, b, c, d = tl.philox(
        tl.load(seed_ptr),
        block,
        zero + tl.program_id(0) // SLABS,
        zero + stream.to(tl.int32),
        zero + (stream >> 32).to(tl.int32),
    )
    words = tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), [TILE, LANES // 2])
    halves = tl.reshape(tl.join(words & 0xFFFF, words >> 16), [TILE, LANES]).to(tl.int32)
    return tl.where(halves >= drop, values * (65536.0 / (65536 - drop)), 0.0)


@triton.jit
def _read(x_ptr, residual_ptr, h_ptr, x_bias, x_scale, offset, inside, near, WRITE: tl.constexpr):
    """cat(h, beside) of a tile, 0 outside; x_ptr has x and beside. Writes h unless it is x."""
    x = _load(x_ptr[None, :], offset, inside)
    if h_ptr is not None:
        if residual_ptr is not None:
            x += _load(residual_ptr[None, :], offset, near)
        x = tl.where(inside, (x + x_bias[None, :]) * x_scale[None, :], 0.0)
        # Rounded as it is stored: backward sees the stored sum and nothing else.
        rounded = _into(x, h_ptr.dtype.element_ty)
        if WRITE:
            tl.store(h_ptr[None, :] + offset, rounded, mask=near)
        x = rounded.to(tl.float32)
    return x


@triton.jit
def _activated(
    centred, gain, shift, seed_ptr, drop, pixel, SILU: tl.constexpr, SLABS: tl.constexpr
):
    y = centred * gain[None, :] + shift[None, :]
    if SILU:
        y *= tl.sigmoid(y)
    if seed_ptr is not None:
        y = _dropout(y, seed_ptr, drop, pixel, SLABS)
    return y


@triton.jit
def _forward_kernel(
    x_ptr,
    beside_ptr,
    residual_ptr,
    x_bias_ptr,
    h_ptr,
    y_ptr,
    resampled_ptr,
    stats_ptr,
    weight_ptr,
    bias_ptr,
    add_ptr,
    scale_ptr,
    shift_ptr,
    seed_ptr,
    samples,
    add_stride,
    film_stride,
    eps,
    x_scale,
    drop,
    tiles,
    PIXELS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    LEFT: tl.constexpr,
    GROUPS: tl.constexpr,
    SLAB: tl.constexpr,
    SLOTS: tl.constexpr,
    LANES: tl.constexpr,
    TILE: tl.constexpr,
    FOLD: tl.constexpr,
    SILU: tl.constexpr,
    RESAMPLE: tl.constexpr,
):
    GROUP: tl.constexpr = CHANNELS // GROUPS
    SLABS: tl.constexpr = (GROUPS + SLAB - 1) // SLAB
    FIRST: tl.constexpr = TILE if TILE < PIXELS else PIXELS
    TARGETS: tl.constexpr = (
        PIXELS * 4 if RESAMPLE == "up" else PIXELS // 4 if RESAMPLE == "down" else PIXELS
    )
    sample, lane, channel, owned, left = _slab_of_program(CHANNELS, LEFT, GROUP, SLAB, SLABS, LANES)
    start = sample.to(tl.int64) * PIXELS
    x_ptr = _joined(x_ptr, beside_ptr, start, channel, LEFT, CHANNELS)
    if residual_ptr is not None:
        residual_ptr += start * LEFT + channel
    if h_ptr is not None:
        h_ptr += start * LEFT + channel
    y_ptr += sample.to(tl.int64) * (TARGETS * CHANNELS) + channel
    if resampled_ptr is not None:
        resampled_ptr += sample.to(tl.int64) * (TARGETS * LEFT) + channel
    x_bias = tl.zeros([LANES], tl.float32)
    if x_bias_ptr is not None:
        x_bias += _load(x_bias_ptr, channel, left)
    x_scale = tl.where(left, x_scale, 1.0)
    add = tl.zeros([LANES], tl.float32)
    if add_ptr is not None:
        add += _load(add_ptr + sample * add_stride, channel, owned)

    pixel, target, offset, inside, near = _place(
        0, channel, owned, left, PIXELS, WIDTH, CHANNELS, LEFT, TILE, RESAMPLE
    )
    x = _read(x_ptr, residual_ptr, h_ptr, x_bias, x_scale, offset, inside, near, TILE >= PIXELS)
    mean = _group_sums(tl.sum(x, 0) + FIRST * add, lane, GROUP, SLOTS) / (GROUP * FIRST)
    centre = _to_channels(mean, lane, GROUP, SLOTS) - add
    if TILE >= PIXELS:
        if resampled_ptr is not None:
            _store_resampled(
                resampled_ptr, x, 0, target, inside, owned, PIXELS, WIDTH, LEFT, RESAMPLE
            )
        centred = tl.where(inside, x - centre[None, :], 0.0)
        squares = tl.sum(centred * centred, 0)
        var = _group_sums(squares, lane, GROUP, SLOTS) / (GROUP * PIXELS)
    else:
        # About the mean of the first tile, so that a large mean cancels no digits.
        sums = tl.zeros([TILE // FOLD, LANES], tl.float32)
        squares = tl.zeros([TILE // FOLD, LANES], tl.float32)
        for t in range(tiles):
            pixel, target, offset, inside, near = _place(
                t, channel, owned, left, PIXELS, WIDTH, CHANNELS, LEFT, TILE, RESAMPLE
            )
            x = _read(x_ptr, residual_ptr, h_ptr, x_bias, x_scale, offset, inside, near, True)
            if resampled_ptr is not None:
                _store_resampled(
                    resampled_ptr, x, t, target, inside, owned, PIXELS, WIDTH, LEFT, RESAMPLE
                )
            centred = tl.where(inside, x - centre[None, :], 0.0)
            sums += _fold(centred, FOLD)
            squares += _fold(centred * centred, FOLD)
        moved = _group_sums(tl.sum(sums, 0), lane, GROUP, SLOTS) / (GROUP * PIXELS)
        var = _group_sums(tl.sum(squares, 0), lane, GROUP, SLOTS) / (GROUP * PIXELS)
        var -= moved * moved
        mean += moved
    rstd = tl.rsqrt(var + eps)

    slot = tl.arange(0, SLOTS)
    group = tl.program_id(0) % SLABS * SLAB + slot
    exists = (slot < SLAB) & (group < GROUPS)
    tl.store(stats_ptr + sample * GROUPS + group, mean, mask=exists)
    tl.store(stats_ptr + (samples + sample) * GROUPS + group, rstd, mask=exists)

    film = sample * film_stride
    gain, shift = _affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, film, channel, owned)
    gain *= _to_channels(rstd, lane, GROUP, SLOTS)
    if TILE >= PIXELS:
        y = _activated(centred, gain, shift, seed_ptr, drop, pixel, SILU, SLABS)
        _store_resampled(y_ptr, y, 0, target, inside, owned, PIXELS, WIDTH, CHANNELS, RESAMPLE)
    else:
        centre = _to_channels(mean, lane, GROUP, SLOTS) - add
        if h_ptr is not None:
            x_ptr = tl.where(channel < LEFT, h_ptr, x_ptr)
            tl.debug_barrier()  # what the other threads have stored
        for i in range(tiles):
            t = tiles - 1 - i
            pixel, target, offset, inside, near = _place(
                t, channel, owned, left, PIXELS, WIDTH, CHANNELS, LEFT, TILE, RESAMPLE
            )
            centred = _load(x_ptr[None, :], offset, inside) - centre[None, :]
            y = _activated(centred, gain, shift, seed_ptr, drop, pixel, SILU, SLABS)
            _store_resampled(y_ptr, y, t, target, inside, owned, PIXELS, WIDTH, CHANNELS, RESAMPLE)


@triton.jit
def _recompute(
    h_ptr,
    y_grad_ptr,
    centre,
    gain,
    shift,
    seed_ptr,
    drop,
    pixel,
    target,
    offset,
    inside,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    SILU: tl.constexpr,
    RESAMPLE: tl.constexpr,
    SLABS: tl.constexpr,
):
    """Input less its mean, and the gradient of what the activation was given; 0 outside."""
    centred = _load(h_ptr[None, :], offset, inside) - centre[None, :]
    grad = _load_resampled(y_grad_ptr, target, inside, WIDTH, CHANNELS, RESAMPLE)
    if seed_ptr is not None:
        grad = _dropout(grad, seed_ptr, drop, pixel, SLABS)
    if SILU:
        u = centred * gain[None, :] + shift[None, :]
        s = tl.sigmoid(u)
        grad *= s * (1.0 + u * (1.0 - s))
    return centred, grad


@triton.jit
def _write_grad(
    centred,
    grad,
    gain,
    mean_part,
    slope,
    h_grad_ptr,
    fork_grad_ptr,
    resampled_grad_ptr,
    dx_ptr,
    x_scale,
    target,
    offset,
    inside,
    near,
    WIDTH: tl.constexpr,
    LEFT: tl.constexpr,
    RESAMPLE: tl.constexpr,
):
    """The gradients of the norm's input and, with all that came in, of x; both 0 outside."""
    dh = grad * gain[None, :] - mean_part[None, :] - centred * slope[None, :]
    dh = tl.where(inside, dh, 0.0)
    dx = dh
    if h_grad_ptr is not None:
        dx += _load(h_grad_ptr[None, :], offset, inside)
    if fork_grad_ptr is not None:
        dx += _load(fork_grad_ptr[None, :], offset, near)
    if resampled_grad_ptr is not None:
        dx += _load_resampled(resampled_grad_ptr, target, inside, WIDTH, LEFT, RESAMPLE)
    dx *= x_scale[None, :]
    tl.store(dx_ptr[None, :] + offset, _into(dx, dx_ptr.dtype.element_ty), mask=inside)
    return dh, dx


@triton.jit
def _backward_kernel(
    h_ptr,
    beside_ptr,
    y_grad_ptr,
    h_grad_ptr,
    fork_grad_ptr,
    beside_grad_ptr,
    resampled_grad_ptr,
    dx_ptr,
    dbeside_ptr,
    dx_bias_ptr,
    stats_ptr,
    weight_ptr,
    bias_ptr,
    dparam_ptr,
    add_ptr,
    dadd_ptr,
    scale_ptr,
    shift_ptr,
    dscale_ptr,
    dshift_ptr,
    seed_ptr,
    samples,
    add_stride,
    film_stride,
    x_scale,
    drop,
    tiles,
    PIXELS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    LEFT: tl.constexpr,
    GROUPS: tl.constexpr,
    SLAB: tl.constexpr,
    SLOTS: tl.constexpr,
    LANES: tl.constexpr,
    TILE: tl.constexpr,
    FOLD: tl.constexpr,
    SILU: tl.constexpr,
    RESAMPLE: tl.constexpr,
):
    GROUP: tl.constexpr = CHANNELS // GROUPS
    SLABS: tl.constexpr = (GROUPS + SLAB - 1) // SLAB
    TARGETS: tl.constexpr = (
        PIXELS * 4 if RESAMPLE == "up" else PIXELS // 4 if RESAMPLE == "down" else PIXELS
    )
    sample, lane, channel, owned, left = _slab_of_program(CHANNELS, LEFT, GROUP, SLAB, SLABS, LANES)
    start = sample.to(tl.int64) * PIXELS
    h_ptr = _joined(h_ptr, beside_ptr, start, channel, LEFT, CHANNELS)
    dx_ptr = _joined(dx_ptr, dbeside_ptr, start, channel, LEFT, CHANNELS)
    if h_grad_ptr is not None:
        h_grad_ptr = _joined(h_grad_ptr, beside_grad_ptr, start, channel, LEFT, CHANNELS)
    if fork_grad_ptr is not None:
        fork_grad_ptr += start * LEFT + channel
    y_grad_ptr += sample.to(tl.int64) * (TARGETS * CHANNELS) + channel
    if resampled_grad_ptr is not None:
        resampled_grad_ptr += sample.to(tl.int64) * (TARGETS * LEFT) + channel
    x_scale = tl.where(left, x_scale, 1.0)

    group = channel // GROUP
    centre = _load(stats_ptr + sample * GROUPS, group, owned)
    rstd = _load(stats_ptr + (samples + sample) * GROUPS, group, owned)
    if add_ptr is not None:
        centre -= _load(add_ptr + sample * add_stride, channel, owned)
    film = sample * film_stride
    gain, shift = _affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, film, channel, owned)
    gain *= rstd

    if TILE >= PIXELS:
        pixel, target, offset, inside, near = _place(
            0, channel, owned, left, PIXELS, WIDTH, CHANNELS, LEFT, TILE, RESAMPLE
        )
        centred, grad = _recompute(
            h_ptr, y_grad_ptr, centre, gain, shift, seed_ptr, drop, pixel, target, offset, inside,
            WIDTH, CHANNELS, SILU, RESAMPLE, SLABS,
        )  # fmt: skip
        dshift = tl.sum(grad, 0)
        dgain = tl.sum(grad * centred, 0)
    else:
        grads = tl.zeros([TILE // FOLD, LANES], tl.float32)
        products = tl.zeros([TILE // FOLD, LANES], tl.float32)
        for t in range(tiles):
            pixel, target, offset, inside, near = _place(
                t, channel, owned, left, PIXELS, WIDTH, CHANNELS, LEFT, TILE, RESAMPLE
            )
            centred, grad = _recompute(
                h_ptr, y_grad_ptr, centre, gain, shift, seed_ptr, drop, pixel, target, offset,
                inside, WIDTH, CHANNELS, SILU, RESAMPLE, SLABS,
            )  # fmt: skip
            grads += _fold(grad, FOLD)
            products += _fold(grad * centred, FOLD)
        dshift = tl.sum(grads, 0)
        dgain = tl.sum(products, 0)
    # dh = gain·grad less its parts along 1 and along the normalised values, in every group.
    mean_part = _group_sums(gain * dshift, lane, GROUP, SLOTS) / (GROUP * PIXELS)
    mean_part = _to_channels(mean_part, lane, GROUP, SLOTS)
    slope = _group_sums(gain * dgain, lane, GROUP, SLOTS) / (GROUP * PIXELS)
    slope = _to_channels(slope, lane, GROUP, SLOTS) * rstd * rstd

    row = sample * CHANNELS + channel
    dgain *= rstd
    if scale_ptr is not None:
        if dscale_ptr is not None:
            weight = _load(weight_ptr, channel, owned)
            dscale = weight * dgain + _load(bias_ptr, channel, owned) * dshift
            tl.store(dscale_ptr + row, _into(dscale, dscale_ptr.dtype.element_ty), mask=owned)
            tl.store(dshift_ptr + row, _into(dshift, dshift_ptr.dtype.element_ty), mask=owned)
        factor = 1.0 + _load(scale_ptr, film + channel, owned)
        dgain *= factor
        dshift *= factor
    if dparam_ptr is not None:
        tl.store(dparam_ptr + row, dgain, mask=owned)
        tl.store(dparam_ptr + samples * CHANNELS + row, dshift, mask=owned)

    if TILE >= PIXELS:
        dh, dx = _write_grad(
            centred, grad, gain, mean_part, slope, h_grad_ptr, fork_grad_ptr, resampled_grad_ptr,
            dx_ptr, x_scale, target, offset, inside, near, WIDTH, LEFT, RESAMPLE,
        )  # fmt: skip
    else:
        dh = tl.zeros([TILE // FOLD, LANES], tl.float32)
        dx = tl.zeros([TILE // FOLD, LANES], tl.float32)
        for t in range(tiles):
            pixel, target, offset, inside, near = _place(
                tiles - 1 - t, channel, owned, left, PIXELS, WIDTH, CHANNELS, LEFT, TILE, RESAMPLE
            )
            centred, grad = _recompute(
                h_ptr, y_grad_ptr, centre, gain, shift, seed_ptr, drop, pixel, target, offset,
                inside, WIDTH, CHANNELS, SILU, RESAMPLE, SLABS,
            )  # fmt: skip
            dh_part, dx_part = _write_grad(
                centred, grad, gain, mean_part, slope, h_grad_ptr, fork_grad_ptr,
                resampled_grad_ptr, dx_ptr, x_scale, target, offset, inside, near, WIDTH, LEFT,
                RESAMPLE,
            )  # fmt: skip
            if dadd_ptr is not None:
                dh += _fold(dh_part, FOLD)
            if dx_bias_ptr is not None:
                dx += _fold(dx_part, FOLD)

    if dadd_ptr is not None:
        tl.store(dadd_ptr + row, _into(tl.sum(dh, 0), dadd_ptr.dtype.element_ty), mask=owned)
    if dx_bias_ptr is not None:
        tl.store(dx_bias_ptr + sample * LEFT + channel, tl.sum(dx, 0), mask=left)


def _power_of_two(n: int) -> int:
    """The least power of two ≥ n."""
    return 1 << (n - 1).bit_length()


def _slab(channels: int, groups: int, pixels: int) -> tuple[int, int]:
    """How many groups a program takes, and over how many lanes (a power of two) they lie.

    32 lanes are 64 bytes in 16 bit. Small images take more, so that a program has enough to do;
    so do groups that would leave over a quarter of the lanes idle. Among the slabs that fill the
    lanes, whole 16-byte pieces come first, then slabs of equal size.
    """
    group = channels // groups
    lanes = max(32, min(128, 4096 // _power_of_two(pixels)))
    while lanes < channels:
        fits = [k for k in range(1, groups + 1) if 3 * lanes <= 4 * k * group <= 4 * lanes]
        if fits:
            return max(fits, key=lambda k: (k * group % 8 == 0, groups % k == 0, k)), lanes
        lanes *= 2
    return groups, max(8, _power_of_two(channels))


# Where ptxas would rather keep a word in memory than give up a program on a multiprocessor:
# (channels, side, type, resample, backward), and by how much less a thread of these holds.
SPREAD = {
    (384, 32, torch.float32, "up", True): 2,
    (576, 16, torch.float32, None, False): 2,
    (256, 32, torch.bfloat16, "down", False): 2,
    (256, 32, torch.float16, "down", False): 2,
    (384, 32, torch.float16, None, False): 2,
    (1152, 16, torch.float16, None, False): 2,
    (192, 32, torch.float16, None, True): 4,
    (256, 64, torch.float16, None, True): 2,
}


def _launch(
    shape: tuple[int, ...],
    left: int,
    dtype: torch.dtype,
    groups: int,
    silu: bool,
    resample: str | None,
    backward: bool,
) -> dict[str, Any]:
    """The compile-time constants of a kernel, and its warps, for [N, C, H, W].

    A slab of up to 8192 elements stays in registers, 32 of them a thread; 16 in the backward of
    float32, where 32 spilled on sm_100. A larger one goes over its tiles twice, 64 bytes a thread
    at a time (of two tensors in backward), and keeps 8 elements of every running sum. Slabs over
    65536 elements get 16 warps: one such program has a multiprocessor and its first-level cache to
    itself; float32's backward, which spilled so, stays with 8.
    """
    _, channels, height, width = shape
    pixels = height * width
    slab, lanes = _slab(channels, groups, pixels)
    tile, fold = _power_of_two(pixels), 1
    held = 16 if backward and dtype == torch.float32 else 32
    warps = max(1, tile * lanes // (32 * held))
    if tile * lanes > 8192:
        warps = 8 if tile * lanes <= 65536 or held == 16 else 16
        fold = (4 if backward else 8) // dtype.itemsize
        tile = warps * 32 * 8 * fold // lanes
    less = SPREAD.get((channels, width, dtype, resample, backward), 1)
    tile, warps = (tile, warps * less) if tile >= pixels else (tile // less, warps)
    return {
        "PIXELS": pixels,
        "WIDTH": width,
        "CHANNELS": channels,
        "LEFT": left,
        "GROUPS": groups,
        "SLAB": slab,
        "SLOTS": _power_of_two(slab),
        "LANES": lanes,
        "TILE": tile,
        "FOLD": fold,
        "SILU": silu,
        "RESAMPLE": resample,
        "num_warps": warps,
        "num_stages": 1,
    }


def _rows(*values: torch.Tensor | None) -> tuple[tuple[torch.Tensor | None, ...], int]:
    """[N, C] tensors with adjacent channels and one common distance of rows, and that distance."""
    if values[0] is None:
        return values, 0
    strides = {v.stride() for v in values}
    if len(strides) > 1 or values[0].stride(1) != 1:
        values = tuple(v.contiguous() for v in values)
    return values, values[0].stride(0)


def _resampled_size(x: torch.Tensor, resample: str | None) -> list[int]:
    height, width = x.shape[2:]
    if resample == "up":
        return [2 * height, 2 * width]
    return [height // 2, width // 2] if resample == "down" else [height, width]


def _empty(x: torch.Tensor, channels: int, size: list[int]) -> torch.Tensor:
    shape = (len(x), channels, *size)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@torch.library.custom_op("sid_fast::group_norm", mutates_args=())
def _forward(
    x: torch.Tensor,
    beside: torch.Tensor | None,
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
    """y, h (empty where it is x), resampled h (empty without), [2, N, groups] statistics.

    x, beside and residual are dense in channels-last order.
    """
    y, h, resampled, stats = out = _forward_fake(
        x, beside, residual, x_bias, weight, bias, add, scale, shift, seed,
        x_scale, groups, eps, silu, dropout, resample,
    )  # fmt: skip
    n, channels = y.shape[:2]
    constants = _launch(
        (n, channels, *x.shape[2:]), x.shape[1], x.dtype, groups, silu, resample, False
    )
    (add,), add_stride = _rows(add)
    (scale, shift), film_stride = _rows(scale, shift)
    with torch.cuda.device_of(x):
        _forward_kernel[(-(-groups // constants["SLAB"]) * n,)](
            x, beside, residual, x_bias, h if h.numel() else None, y,
            resampled if resample else None, stats, weight, bias, add, scale, shift, seed,
            n, add_stride, film_stride, eps, x_scale, round(dropout * 65536),
            -(-constants["PIXELS"] // constants["TILE"]), **constants,
        )  # fmt: skip
    return out


@_forward.register_fake
def _forward_fake(
    x, beside, residual, x_bias, weight, bias, add, scale, shift, seed,
    x_scale, groups, eps, silu, dropout, resample,
):  # fmt: skip
    size = _resampled_size(x, resample)
    same = residual is None and x_bias is None and x_scale == 1
    return (
        _empty(x, len(weight), size),
        x.new_empty(0) if same else torch.empty_like(x),
        x.new_empty(0) if resample is None else _empty(x, x.shape[1], size),
        x.new_empty((2, len(x), groups), dtype=torch.float32),
    )


@torch.library.custom_op("sid_fast::group_norm_backward", mutates_args=())
def _backward(
    y_grad: torch.Tensor,
    h_grad: torch.Tensor | None,
    fork_grad: torch.Tensor | None,
    beside_grad: torch.Tensor | None,
    resampled_grad: torch.Tensor | None,
    h: torch.Tensor,
    beside: torch.Tensor | None,
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
    """Gradients of x, beside, x_bias, (weight, bias) as [2, C], add, scale and shift.

    wanted says which of x_bias, weight or bias, add, scale or shift to find; what is not wanted or
    not there is empty. h_grad and beside_grad come together if there is a beside.
    """
    dx, dbeside, dx_bias, dparam, dadd, dscale, dshift = out = _backward_fake(
        y_grad, h_grad, fork_grad, beside_grad, resampled_grad, h, beside, stats, weight, bias,
        add, scale, shift, seed, x_scale, silu, dropout, resample, wanted,
    )  # fmt: skip
    n, channels, groups = len(h), len(weight), stats.shape[2]
    constants = _launch(
        (n, channels, *h.shape[2:]), h.shape[1], h.dtype, groups, silu, resample, True
    )
    has_x_bias, has_param, has_add, has_film = wanted
    x_bias_sums = stats.new_empty((n, h.shape[1])) if has_x_bias else None
    param_sums = stats.new_empty((2, n, channels)) if has_param else None
    (add,), add_stride = _rows(add)
    (scale, shift), film_stride = _rows(scale, shift)
    with torch.cuda.device_of(h):
        _backward_kernel[(-(-groups // constants["SLAB"]) * n,)](
            h, beside, y_grad, h_grad, fork_grad, beside_grad, resampled_grad,
            dx, None if beside is None else dbeside, x_bias_sums, stats, weight, bias, param_sums,
            add, dadd if has_add else None, scale, shift,
            *((dscale, dshift) if has_film else (None, None)), seed,
            n, add_stride, film_stride, x_scale, round(dropout * 65536),
            -(-constants["PIXELS"] // constants["TILE"]), **constants,
        )  # fmt: skip
        if has_x_bias:
            torch.sum(x_bias_sums, 0, out=dx_bias)
        if has_param:
            torch.sum(param_sums, 1, out=dparam)
    return out


@_backward.register_fake
def _backward_fake(
    y_grad, h_grad, fork_grad, beside_grad, resampled_grad, h, beside, stats, weight, bias,
    add, scale, shift, seed, x_scale, silu, dropout, resample, wanted,
):  # fmt: skip
    has_x_bias, has_param, has_add, has_film = wanted
    return (
        torch.empty_like(h),
        h.new_empty(0) if beside is None else torch.empty_like(beside),
        stats.new_empty(h.shape[1] if has_x_bias else 0),
        stats.new_empty((2, len(weight)) if has_param else 0),
        add.new_empty(add.shape) if has_add else h.new_empty(0),
        *(v.new_empty(v.shape) if has_film else h.new_empty(0) for v in (scale, shift)),
    )


def _dense(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.contiguous(memory_format=torch.channels_last)


class _GroupNorm(torch.autograd.Function):
    """The two kernels; every output is a tensor of its own, so that each brings its gradient."""

    @staticmethod
    def forward(ctx, x, beside, residual, x_bias, weight, bias, add, scale, shift, seed, *options):
        y, h, resampled, stats = _forward(
            x, beside, residual, x_bias, weight, bias, add, scale, shift, seed, *options
        )
        if not h.numel():
            h = x.view_as(x)
        ctx.save_for_backward(h, beside, stats, weight, bias, add, scale, shift, seed)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return (
            y,
            h,
            h.view_as(h),
            None if beside is None else beside.view_as(beside),
            resampled if resampled.numel() else None,
        )

    @staticmethod
    def backward(ctx, *grads):
        h, beside, stats, weight, bias, add, scale, shift, seed = ctx.saved_tensors
        x_scale, _, _, silu, dropout, resample = ctx.options
        y_grad, h_grad, fork_grad, beside_grad, resampled_grad = map(_dense, grads)
        if y_grad is None:
            y_grad = _empty(h, len(weight), _resampled_size(h, resample)).zero_()
        if (h_grad is None) != (beside_grad is None) and beside is not None:
            h_grad = torch.zeros_like(h) if h_grad is None else h_grad
            beside_grad = torch.zeros_like(beside) if beside_grad is None else beside_grad
        needs = ctx.needs_input_grad
        wanted = [needs[3], needs[4] or needs[5], needs[6], needs[7] or needs[8]]
        dx, dbeside, dx_bias, dparam, dadd, dscale, dshift = _backward(
            y_grad, h_grad, fork_grad, beside_grad, resampled_grad, h, beside, stats, weight, bias,
            add, scale, shift, seed, x_scale, silu, dropout, resample, wanted,
        )  # fmt: skip
        has_x_bias, has_param, has_add, has_film = wanted
        return (
            dx,
            None if beside is None else dbeside,
            dx if needs[2] else None,
            dx_bias if has_x_bias else None,
            *(dparam.to(weight.dtype).unbind() if has_param else (None, None)),
            dadd if has_add else None,
            *((dscale, dshift) if has_film else (None, None)),
            *[None] * (1 + len(ctx.options)),
        )


def group_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    *,
    beside: torch.Tensor | None = None,
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
) -> Normed:
    """resample(dropout(silu(norm(cat(h, beside) + add)·(scale + 1) + shift))), and h.

    h = (x + residual + x_bias)·x_scale. Every part but the norm (Wu and He, arXiv 1803.08494) is
    optional. x and residual are [N, C1, H, W], float32 or 16 bit; beside is [N, C2, H, W] of the
    dtype of x; C = C1 + C2. weight and bias are [C]; x_bias is [C1], float32; add, scale and shift
    are [N, C], scale and shift together. resample is None, "down" (the mean of 2x2 pixels) or "up"
    (every pixel becomes 2x2). dropout is the probability of a zero, 0 ≤ dropout < 1, 0 outside
    training. seed is an int64 [2] on the device of x, the key and stream of the dropout; without
    one it is drawn from torch's generator. The reference takes torch's own dropout.

    Outputs have the dtype of x, in channels-last order from the Triton kernel. ValueError for a
    combination that has no kernel (resample with dropout or beside) or for shapes that do not fit.
    """
    parts = {
        "residual": residual, "x_bias": x_bias, "add": add, "scale": scale, "shift": shift,
    }  # fmt: skip
    _check(x, weight, groups, beside, dropout, resample, parts)
    implementation = choose("group_norm")
    if implementation == "apex" and _apex.takes(x, groups):
        alone = beside is None and all(part is None for part in parts.values())
        if alone and x_scale == 1 and not dropout and resample is None:
            y = _apex.group_norm(x, weight, bias, groups, eps, silu)
            return Normed(y, x, x, None, None)
    if implementation == "reference":
        return group_norm_ref(
            x, weight, bias, groups, eps, beside=beside, x_scale=x_scale, silu=silu,
            dropout=dropout, resample=resample, **parts,
        )  # fmt: skip
    if dropout and seed is None:
        seed = torch.randint(-(2**63), 2**63 - 1, (2,), device=x.device)
    x, beside, residual = map(_dense, (x, beside, residual))
    out = _GroupNorm.apply(
        x, beside, residual, x_bias, weight, bias, add, scale, shift, seed if dropout else None,
        x_scale, groups, eps, silu, dropout, resample,
    )  # fmt: skip
    return Normed(*out)


def _check(x, weight, groups, beside, dropout, resample, parts) -> None:
    n, left, *size = x.shape
    right = 0 if beside is None else beside.shape[1]
    channels = left + right
    if channels != len(weight) or channels % groups:
        raise ValueError(
            f"{channels} channels: weight has {len(weight)}, and they must divide into "
            f"groups={groups}"
        )
    shapes = {"residual": (n, left, *size), "beside": (n, right, *size), "x_bias": (left,)}
    for name, value in {"beside": beside, **parts}.items():
        shape = shapes.get(name, (n, channels))
        if value is not None and value.shape != shape:
            raise ValueError(f"{name} is {tuple(value.shape)}: must be {shape}")
    if beside is not None and beside.dtype != x.dtype:
        raise ValueError(f"beside is {beside.dtype}: must be {x.dtype} as x is")
    if (parts["scale"] is None) != (parts["shift"] is None):
        raise ValueError("scale and shift come together: only one is given")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout}: must be at least 0 and less than 1")
    if resample not in (None, "down", "up"):
        raise ValueError(f"resample={resample!r}: choose from None, 'down', 'up'")
    if resample and (dropout or beside is not None):
        raise ValueError(f"resample={resample!r} goes with neither dropout nor beside")
    if resample == "down" and any(side % 2 for side in size):
        raise ValueError(f"resample='down' of {size[0]}x{size[1]} pixels: sides must be even")


# Where the published networks normalise: form -> (channels, side). norm0 of a block normalises what
# the block before gave it: all of it ("plain", after attention), or convolution, bias and residual
# ("sum"), with a skip connection beside it in the decoder: (of x, of the connection, side). norm1
# has the embedding added (DDPM++), or scale and shift besides the bias of the convolution (ADM).
# norm2, before attention, has no activation.
PLACES = {
    "plain": ((384, 32), (576, 16), (256, 16), (256, 8), (768, 8)),
    "plain down": ((384, 32), (256, 16), (576, 16)),
    "plain up": ((384, 32), (256, 16), (576, 16), (768, 8)),
    "plain beside": (
        *((384, 192, 32), (384, 384, 32), (576, 384, 16), (576, 576, 16)),
        *((768, 576, 8), (768, 768, 8)),
    ),
    "sum": (
        *((128, 64), (192, 64), (256, 32), (128, 32), (192, 32)),
        *((256, 16), (384, 16), (256, 8), (576, 8)),
    ),
    "sum down": ((128, 64), (192, 64), (256, 32)),
    "sum up": ((256, 32), (256, 8)),
    "sum beside": (
        *((128, 128, 64), (256, 128, 64), (192, 192, 64), (384, 192, 64)),
        *((256, 128, 32), (256, 256, 32), (576, 384, 32), (256, 256, 16), (768, 576, 16)),
        *((256, 256, 8), (768, 768, 8)),
    ),
    "norm1 add": ((128, 64), (256, 64), (128, 32), (256, 32), (256, 16), (256, 8)),
    "norm1 film": (
        *((192, 64), (384, 64), (192, 32), (384, 32), (576, 32)),
        *((384, 16), (576, 16), (768, 16), (576, 8), (768, 8)),
    ),
    "norm2": ((384, 32), (256, 16), (576, 16), (256, 8), (768, 8)),
}


# Which arguments a part of a form brings, forward and backward.
_ALWAYS = "x y stats weight bias", "h y_grad dx stats weight bias dparam"
_ARGUMENTS = {
    "plain": ("", "h_grad fork_grad"),
    "sum": ("residual x_bias h", "h_grad fork_grad dx_bias"),
    "norm1": ("seed", "seed"),
    "norm2": ("residual x_bias h", "h_grad dx_bias"),
    "add": ("add", "add dadd"),
    "film": ("add scale shift", "add dadd scale shift dscale dshift"),
    "beside": ("beside", "beside beside_grad dbeside"),
    "down": ("resampled", "resampled_grad"),
    "up": ("resampled", "resampled_grad"),
}
# Outputs that a part leaves without a consumer: h is used resampled, and the encoder alone forks.
_UNUSED = {"down": {"h_grad"}, "up": {"h_grad", "fork_grad"}, "beside": {"fork_grad"}}


def _arguments(form: str, backward: bool) -> set[str]:
    given = set(_ALWAYS[backward].split())
    for part in form.split():
        given |= set(_ARGUMENTS[part][backward].split())
    return given.difference(*(_UNUSED.get(part, ()) for part in form.split()))


def _resample_of(form: str) -> str | None:
    return next((part for part in form.split() if part in ("down", "up")), None)


def bytes_moved(
    form: str, place: tuple[int, ...], samples: int, itemsize: int, backward: bool
) -> int:
    """What a launch must read and write of activations; form and place as in PLACES.

    The second pass over a sample finds it in the cache. Backward is that of a training network.
    """
    *channels, side = place
    left, total = channels[0], sum(channels)
    width = {"down": side // 2, "up": side * 2, None: side}[_resample_of(form)]
    elements = {
        **dict.fromkeys(("x", "residual", "h", "h_grad", "fork_grad", "dx"), left * side**2),
        **dict.fromkeys(("beside", "beside_grad", "dbeside"), (total - left) * side**2),
        **dict.fromkeys(("y", "y_grad"), total * width**2),
        **dict.fromkeys(("resampled", "resampled_grad"), left * width**2),
    }
    return samples * itemsize * sum(elements.get(v, 0) for v in _arguments(form, backward))


def configurations() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], int, int]]:
    """(label, kernel, signature, constants, warps, stages) of the PLACES in every type.

    Backward is that of a training network.
    """
    kinds = dict.fromkeys(("stats", "weight", "bias", "dparam", "x_bias", "dx_bias"), "*fp32")
    kinds |= {"seed": "*i64", "eps": "fp32", "x_scale": "fp32"}
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    kernels = {"forward": _forward_kernel, "backward": _backward_kernel}
    for form, (way, kernel), dtype in itertools.product(PLACES, kernels.items(), dtypes):
        given = _arguments(form, way == "backward")
        for place in PLACES[form]:
            *channels, side = place
            shape = (1, sum(channels), side, side)
            around = form != "norm2", _resample_of(form), way == "backward"
            constants = _launch(shape, channels[0], dtypes[dtype], 32, *around)
            warps, stages = constants.pop("num_warps"), constants.pop("num_stages")
            signature = {}
            for argument in kernel.arg_names:
                name = argument.removesuffix("_ptr")
                if name != argument and name not in given:
                    constants[argument] = None
                elif argument not in constants:
                    kind = "i32" if name == argument else f"*{dtype}"
                    signature[argument] = kinds.get(name, kind)
            label = f"{way} {form} {'+'.join(map(str, channels))}@{side}x{side} {dtype}"
            yield label, kernel, signature, constants, warps, stages
