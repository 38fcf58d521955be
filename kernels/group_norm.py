"""Group normalisation with everything the EDM U-Net does around it, one pass over memory.

A channels-last group is a narrow column: C/groups channels (8 to 96 bytes in 16 bit) of every
pixel. A program therefore takes a slab of adjacent groups of one sample, so that it reads whole
sectors, and all of its pixels. Where they fit, they stay in registers between statistics and
normalisation; where they do not, the program goes over its tiles again in reverse order, so that
what it read last is still in the first-level cache and nothing is read from memory twice.

The backward kernel keeps the input and the statistics only; normalised values, activation and
dropout are recomputed. It writes the sums that make up the gradients of weight and bias per
sample; adding the samples up is a second, deterministic step.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from sid_fast.kernels._triton import tl, triton
from sid_fast.kernels.dispatch import choose

# (channels, pixels) of the group norms of the published networks, 32 groups each: where the
# embedding is added to the input (DDPM++), where it scales and shifts (ADM), and the others.
ADDED = ((128, 4096), (256, 4096), (128, 1024), (256, 1024), (256, 256), (256, 64))
SCALED = (
    *((192, 4096), (384, 4096), (192, 1024), (384, 1024), (576, 1024)),
    *((384, 256), (576, 256), (768, 256), (576, 64), (768, 64)),
)
UNCONDITIONED = (
    *((512, 1024), (512, 256), (512, 64)),
    *((576, 4096), (768, 1024), (960, 1024), (960, 256), (1152, 256), (1344, 256)),
    *((1344, 64), (1536, 64)),
)


def group_norm_ref(
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
    residual: torch.Tensor | None = None,
    residual_scale: float = 1.0,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """group_norm in plain PyTorch; dropout draws from torch's generator."""
    if residual is not None:
        x = summed = (x + residual) * residual_scale
    if add is not None:
        x = x + add[:, :, None, None].to(x.dtype)
    x = F.group_norm(x, groups, weight.to(x.dtype), bias.to(x.dtype), eps)
    if scale is not None:
        scale, shift = (v[:, :, None, None].to(x.dtype) for v in (scale, shift))
        x = torch.addcmul(shift, x, scale + 1)
    if silu:
        x = F.silu(x)
    x = F.dropout(x, dropout) if dropout else x
    return x if residual is None else (x, summed)


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
def _load(ptr, offset, inside):
    return tl.load(ptr + offset, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _slab_of_program(
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    SLAB: tl.constexpr,
    SLABS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Which sample and where it starts; the slab's lanes, their channels and which it owns."""
    sample = tl.program_id(0) // SLABS
    slab = tl.program_id(0) % SLABS
    lane = tl.arange(0, LANES)
    # 8-byte accesses in 16 bit: with 16, the values a channel would take up half the registers.
    channel = tl.max_contiguous(slab * (SLAB * GROUP) + lane, 4)
    owned = (lane < SLAB * GROUP) & (channel < CHANNELS)
    return sample, sample.to(tl.int64) * (PIXELS * CHANNELS), lane, channel, owned


@triton.jit
def _place(t, channel, owned, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, TILE: tl.constexpr):
    """Pixels of tile t, offsets of its elements in the sample, and which of them are the slab's."""
    pixel = t * TILE + tl.arange(0, TILE)
    offset = pixel[:, None] * CHANNELS + channel[None, :]
    inside = owned[None, :]
    if PIXELS % TILE:
        inside &= (pixel < PIXELS)[:, None]
    return pixel, offset, inside


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
def _read(x_ptr, residual_ptr, sum_ptr, residual_scale, offset, inside, WRITE: tl.constexpr):
    """x, or (x + residual)·residual_scale, which it also writes; 0 outside."""
    x = _load(x_ptr, offset, inside)
    if residual_ptr is not None:
        x = (x + _load(residual_ptr, offset, inside)) * residual_scale
        # Rounded as it is stored: backward sees the stored sum and nothing else.
        rounded = x.to(sum_ptr.dtype.element_ty)
        if WRITE:
            tl.store(sum_ptr + offset, rounded, mask=inside)
        x = rounded.to(tl.float32)
    return x


@triton.jit
def _write(
    centred,
    gain,
    shift,
    y_ptr,
    seed_ptr,
    drop,
    pixel,
    offset,
    inside,
    SILU: tl.constexpr,
    SLABS: tl.constexpr,
):
    y = centred * gain[None, :] + shift[None, :]
    if SILU:
        y *= tl.sigmoid(y)
    if seed_ptr is not None:
        y = _dropout(y, seed_ptr, drop, pixel, SLABS)
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _forward_kernel(
    x_ptr,
    residual_ptr,
    sum_ptr,
    y_ptr,
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
    residual_scale,
    drop,
    tiles,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    SLAB: tl.constexpr,
    SLOTS: tl.constexpr,
    LANES: tl.constexpr,
    TILE: tl.constexpr,
    FOLD: tl.constexpr,
    SILU: tl.constexpr,
):
    GROUP: tl.constexpr = CHANNELS // GROUPS
    SLABS: tl.constexpr = (GROUPS + SLAB - 1) // SLAB
    FIRST: tl.constexpr = TILE if TILE < PIXELS else PIXELS
    sample, start, lane, channel, owned = _slab_of_program(
        PIXELS, CHANNELS, GROUP, SLAB, SLABS, LANES
    )
    x_ptr += start
    y_ptr += start
    if residual_ptr is not None:
        residual_ptr += start
        sum_ptr += start
    add = tl.zeros([LANES], tl.float32)
    if add_ptr is not None:
        add += _load(add_ptr + sample * add_stride, channel, owned)

    pixel, offset, inside = _place(0, channel, owned, PIXELS, CHANNELS, TILE)
    x = _read(x_ptr, residual_ptr, sum_ptr, residual_scale, offset, inside, TILE >= PIXELS)
    mean = _group_sums(tl.sum(x, 0) + FIRST * add, lane, GROUP, SLOTS) / (GROUP * FIRST)
    centre = _to_channels(mean, lane, GROUP, SLOTS) - add
    if TILE >= PIXELS:
        centred = tl.where(inside, x - centre[None, :], 0.0)
        squares = tl.sum(centred * centred, 0)
        var = _group_sums(squares, lane, GROUP, SLOTS) / (GROUP * PIXELS)
    else:
        # About the mean of the first tile, so that a large mean cancels no digits.
        sums = tl.zeros([TILE // FOLD, LANES], tl.float32)
        squares = tl.zeros([TILE // FOLD, LANES], tl.float32)
        for t in range(tiles):
            pixel, offset, inside = _place(t, channel, owned, PIXELS, CHANNELS, TILE)
            x = _read(x_ptr, residual_ptr, sum_ptr, residual_scale, offset, inside, True)
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
        _write(centred, gain, shift, y_ptr, seed_ptr, drop, pixel, offset, inside, SILU, SLABS)
    else:
        centre = _to_channels(mean, lane, GROUP, SLOTS) - add
        if residual_ptr is not None:
            x_ptr = sum_ptr
            tl.debug_barrier()  # what the other threads have stored
        for t in range(tiles):
            pixel, offset, inside = _place(tiles - 1 - t, channel, owned, PIXELS, CHANNELS, TILE)
            centred = _load(x_ptr, offset, inside) - centre[None, :]
            _write(centred, gain, shift, y_ptr, seed_ptr, drop, pixel, offset, inside, SILU, SLABS)


@triton.jit
def _recompute(
    h_ptr,
    dy_ptr,
    centre,
    gain,
    shift,
    seed_ptr,
    drop,
    pixel,
    offset,
    inside,
    SILU: tl.constexpr,
    SLABS: tl.constexpr,
):
    """Input less its mean, and the gradient of what the activation was given; 0 outside."""
    centred = _load(h_ptr, offset, inside) - centre[None, :]
    grad = _load(dy_ptr, offset, inside)
    if seed_ptr is not None:
        grad = _dropout(grad, seed_ptr, drop, pixel, SLABS)
    if SILU:
        u = centred * gain[None, :] + shift[None, :]
        s = tl.sigmoid(u)
        grad *= s * (1.0 + u * (1.0 - s))
    return centred, grad


@triton.jit
def _write_grad(
    centred, grad, gain, mean_part, slope, dsum_ptr, dx_ptr, residual_scale, offset, inside
):
    """The gradient of the norm's input, returned, 0 outside; with the residual's it makes dx."""
    dh = grad * gain[None, :] - mean_part[None, :] - centred * slope[None, :]
    dx = dh
    if dsum_ptr is not None:
        dx = (dh + _load(dsum_ptr, offset, inside)) * residual_scale
    tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    return tl.where(inside, dh, 0.0)


@triton.jit
def _backward_kernel(
    h_ptr,
    dy_ptr,
    dsum_ptr,
    dx_ptr,
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
    residual_scale,
    drop,
    tiles,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    SLAB: tl.constexpr,
    SLOTS: tl.constexpr,
    LANES: tl.constexpr,
    TILE: tl.constexpr,
    FOLD: tl.constexpr,
    SILU: tl.constexpr,
):
    GROUP: tl.constexpr = CHANNELS // GROUPS
    SLABS: tl.constexpr = (GROUPS + SLAB - 1) // SLAB
    sample, start, lane, channel, owned = _slab_of_program(
        PIXELS, CHANNELS, GROUP, SLAB, SLABS, LANES
    )
    h_ptr += start
    dy_ptr += start
    dx_ptr += start
    if dsum_ptr is not None:
        dsum_ptr += start

    group = channel // GROUP
    centre = _load(stats_ptr + sample * GROUPS, group, owned)
    rstd = _load(stats_ptr + (samples + sample) * GROUPS, group, owned)
    if add_ptr is not None:
        centre -= _load(add_ptr + sample * add_stride, channel, owned)
    film = sample * film_stride
    gain, shift = _affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, film, channel, owned)
    gain *= rstd

    if TILE >= PIXELS:
        pixel, offset, inside = _place(0, channel, owned, PIXELS, CHANNELS, TILE)
        centred, grad = _recompute(
            h_ptr, dy_ptr, centre, gain, shift, seed_ptr, drop, pixel, offset, inside, SILU, SLABS
        )
        dshift = tl.sum(grad, 0)
        dgain = tl.sum(grad * centred, 0)
    else:
        grads = tl.zeros([TILE // FOLD, LANES], tl.float32)
        products = tl.zeros([TILE // FOLD, LANES], tl.float32)
        for t in range(tiles):
            pixel, offset, inside = _place(t, channel, owned, PIXELS, CHANNELS, TILE)
            centred, grad = _recompute(
                h_ptr,
                dy_ptr,
                centre,
                gain,
                shift,
                seed_ptr,
                drop,
                pixel,
                offset,
                inside,
                SILU,
                SLABS,
            )
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
        weight = _load(weight_ptr, channel, owned)
        dscale = weight * dgain + _load(bias_ptr, channel, owned) * dshift
        tl.store(dscale_ptr + row, dscale.to(dscale_ptr.dtype.element_ty), mask=owned)
        tl.store(dshift_ptr + row, dshift.to(dshift_ptr.dtype.element_ty), mask=owned)
        factor = 1.0 + _load(scale_ptr, film + channel, owned)
        dgain *= factor
        dshift *= factor
    if dparam_ptr is not None:
        tl.store(dparam_ptr + row, dgain, mask=owned)
        tl.store(dparam_ptr + samples * CHANNELS + row, dshift, mask=owned)

    if TILE >= PIXELS:
        dh = _write_grad(
            centred, grad, gain, mean_part, slope, dsum_ptr, dx_ptr, residual_scale, offset, inside
        )
    else:
        dh = tl.zeros([TILE // FOLD, LANES], tl.float32)
        for t in range(tiles):
            pixel, offset, inside = _place(tiles - 1 - t, channel, owned, PIXELS, CHANNELS, TILE)
            centred, grad = _recompute(
                h_ptr,
                dy_ptr,
                centre,
                gain,
                shift,
                seed_ptr,
                drop,
                pixel,
                offset,
                inside,
                SILU,
                SLABS,
            )
            part = _write_grad(
                centred,
                grad,
                gain,
                mean_part,
                slope,
                dsum_ptr,
                dx_ptr,
                residual_scale,
                offset,
                inside,
            )
            dh += _fold(part, FOLD)

    if dadd_ptr is not None:
        tl.store(dadd_ptr + row, tl.sum(dh, 0).to(dadd_ptr.dtype.element_ty), mask=owned)


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


def _launch(x: torch.Tensor, groups: int, backward: bool) -> tuple[dict[str, int], int]:
    """The compile-time constants of a kernel that depend on the shape, and its warps.

    A slab of up to 8192 elements stays in registers, 32 of them a thread. A larger one goes over
    its tiles twice, 64 bytes a thread at a time (of two tensors in backward), and keeps 8 elements
    of every running sum. Slabs over 65536 elements get 16 warps: one such program has a
    multiprocessor and its first-level cache to itself.
    """
    _, channels, height, width = x.shape
    pixels = height * width
    slab, lanes = _slab(channels, groups, pixels)
    tile, fold = _power_of_two(pixels), 1
    warps = max(1, tile * lanes // 1024)
    if warps > 8:
        warps = 8 if tile * lanes <= 65536 else 16
        fold = (4 if backward else 8) // x.element_size()
        tile = warps * 32 * 8 * fold // lanes
    constants = {
        "PIXELS": pixels,
        "CHANNELS": channels,
        "GROUPS": groups,
        "SLAB": slab,
        "SLOTS": _power_of_two(slab),
        "LANES": lanes,
        "TILE": tile,
        "FOLD": fold,
    }
    return constants, warps


def _rows(*values: torch.Tensor | None) -> tuple[tuple[torch.Tensor | None, ...], int]:
    """[N, C] tensors with adjacent channels and one common distance of rows, and that distance."""
    if values[0] is None:
        return values, 0
    strides = {v.stride() for v in values}
    if len(strides) > 1 or values[0].stride(1) != 1:
        values = tuple(v.contiguous() for v in values)
    return values, values[0].stride(0)


@torch.library.custom_op("sid_fast::group_norm", mutates_args=())
def _forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    add: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    residual: torch.Tensor | None,
    seed: torch.Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
    dropout: float,
    residual_scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, (x + residual)·residual_scale (empty without a residual), [2, N, groups] statistics.

    x and residual are dense in channels-last order.
    """
    y, summed, stats = _forward_fake(
        x,
        weight,
        bias,
        add,
        scale,
        shift,
        residual,
        seed,
        groups,
        eps,
        silu,
        dropout,
        residual_scale,
    )
    n = len(x)
    constants, warps = _launch(x, groups, backward=False)
    (add,), add_stride = _rows(add)
    (scale, shift), film_stride = _rows(scale, shift)
    with torch.cuda.device_of(x):
        _forward_kernel[(-(-groups // constants["SLAB"]) * n,)](
            x,
            residual,
            None if residual is None else summed,
            y,
            stats,
            weight,
            bias,
            add,
            scale,
            shift,
            seed,
            n,
            add_stride,
            film_stride,
            eps,
            residual_scale,
            round(dropout * 65536),
            -(-constants["PIXELS"] // constants["TILE"]),
            **constants,
            SILU=silu,
            num_warps=warps,
            num_stages=1,
        )
    return y, summed, stats


@_forward.register_fake
def _forward_fake(
    x, weight, bias, add, scale, shift, residual, seed, groups, eps, silu, dropout, residual_scale
):
    summed = x.new_empty(0) if residual is None else torch.empty_like(x)
    stats = x.new_empty((2, len(x), groups), dtype=torch.float32)
    return torch.empty_like(x), summed, stats


@torch.library.custom_op("sid_fast::group_norm_backward", mutates_args=())
def _backward(
    dy: torch.Tensor,
    dsum: torch.Tensor | None,
    h: torch.Tensor,
    stats: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    add: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    seed: torch.Tensor | None,
    silu: bool,
    dropout: float,
    residual_scale: float,
    parameters: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of h, (weight, bias) as [2, C], add, scale and shift; empty where there is none."""
    dx, dparam, dadd, dscale, dshift = _backward_fake(
        dy,
        dsum,
        h,
        stats,
        weight,
        bias,
        add,
        scale,
        shift,
        seed,
        silu,
        dropout,
        residual_scale,
        parameters,
    )
    n, channels = h.shape[:2]
    groups = stats.shape[2]
    constants, warps = _launch(h, groups, backward=True)
    partial = stats.new_empty((2, n, channels)) if parameters else None
    (add,), add_stride = _rows(add)
    (scale, shift), film_stride = _rows(scale, shift)
    with torch.cuda.device_of(h):
        _backward_kernel[(-(-groups // constants["SLAB"]) * n,)](
            h,
            dy,
            dsum,
            dx,
            stats,
            weight,
            bias,
            partial,
            add,
            None if add is None else dadd,
            scale,
            shift,
            None if scale is None else dscale,
            None if scale is None else dshift,
            seed,
            n,
            add_stride,
            film_stride,
            residual_scale,
            round(dropout * 65536),
            -(-constants["PIXELS"] // constants["TILE"]),
            **constants,
            SILU=silu,
            num_warps=warps,
            num_stages=1,
        )
        if parameters:
            torch.sum(partial, 1, out=dparam)
    return dx, dparam, dadd, dscale, dshift


@_backward.register_fake
def _backward_fake(
    dy,
    dsum,
    h,
    stats,
    weight,
    bias,
    add,
    scale,
    shift,
    seed,
    silu,
    dropout,
    residual_scale,
    parameters,
):
    dparam = stats.new_empty((2, h.shape[1]) if parameters else 0)
    rows = [h.new_empty(0) if v is None else v.new_empty(v.shape) for v in (add, scale, shift)]
    return torch.empty_like(h), dparam, *rows


def _save(ctx, inputs, output):
    x, weight, bias, add, scale, shift, residual, seed, _, _, *ctx.options = inputs
    _, summed, stats = output
    h = x if residual is None else summed
    ctx.save_for_backward(h, stats, weight, bias, add, scale, shift, seed)
    ctx.has_residual = residual is not None
    ctx.set_materialize_grads(False)


def _gradients(ctx, dy, dsum, _):
    h, stats, weight, bias, add, scale, shift, seed = ctx.saved_tensors
    silu, dropout, residual_scale = ctx.options
    if not ctx.has_residual:
        dsum = None
    elif dsum is None:
        dsum = torch.zeros_like(h)
    else:
        dsum = dsum.contiguous(memory_format=torch.channels_last)
    if dy is None:
        dy = torch.zeros_like(h)
    dy = dy.contiguous(memory_format=torch.channels_last)
    parameters = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    dx, dparam, dadd, dscale, dshift = _backward(
        dy,
        dsum,
        h,
        stats,
        weight,
        bias,
        add,
        scale,
        shift,
        seed,
        silu,
        dropout,
        residual_scale,
        parameters,
    )
    dweight, dbias = dparam.to(weight.dtype) if parameters else (None, None)
    return (
        dx,
        dweight,
        dbias,
        None if add is None else dadd,
        *((None, None) if scale is None else (dscale, dshift)),
        dx if ctx.has_residual else None,
        None,
        None,
        None,
        None,
        None,
        None,
    )


_forward.register_autograd(_gradients, setup_context=_save)


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
    residual: torch.Tensor | None = None,
    residual_scale: float = 1.0,
    seed: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """dropout(silu(norm(h + add)·(scale + 1) + shift)) of h = (x + residual)·residual_scale.

    Every part but the norm (Wu and He, arXiv 1803.08494) is optional. x and residual are
    [N, C, H, W], float32 or 16 bit; weight and bias are [C]; add, scale and shift are [N, C],
    scale and shift together. dropout is the probability of a zero, 0 ≤ dropout < 1, 0 outside
    training. seed is an int64 [2] on the device of x, the key and stream of the dropout; without
    one it is drawn from torch's generator. The reference takes torch's own dropout.

    Returns the shape and dtype of x, in channels-last order from the Triton kernel; with a
    residual, that and h.
    """
    if choose() == "reference":
        return group_norm_ref(
            x,
            weight,
            bias,
            groups,
            eps,
            add,
            scale,
            shift,
            silu,
            dropout,
            residual,
            residual_scale,
        )
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout}: must be at least 0 and less than 1")
    if dropout and seed is None:
        seed = torch.randint(-(2**63), 2**63 - 1, (2,), device=x.device)
    x, residual = (
        None if v is None else v.contiguous(memory_format=torch.channels_last)
        for v in (x, residual)
    )
    y, summed, _ = _forward(
        x,
        weight,
        bias,
        add,
        scale,
        shift,
        residual,
        seed if dropout else None,
        groups,
        eps,
        silu,
        dropout,
        residual_scale,
    )
    return y if residual is None else (y, summed)


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
    """(label, kernel, signature, constants, warps, stages) of the PLACES in bf16 and fp32.

    Backward is that of a training network.
    """
    kinds = dict.fromkeys(("stats", "weight", "bias", "dparam", "x_bias", "dx_bias"), "*fp32")
    kinds |= {"seed": "*i64", "eps": "fp32", "x_scale": "fp32"}
    dtypes = {"bf16": 2, "fp32": 4}
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
