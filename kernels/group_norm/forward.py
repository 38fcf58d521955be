"""The forward kernel."""

from sid_fast.kernels._triton import tl, triton
from sid_fast.kernels.dropout import dropout_key, keep_mask
from sid_fast.kernels.group_norm.device import (
    affine,
    block_of_program,
    fold,
    group_sums,
    joined,
    load_channels,
    load_rows,
    offsets,
    pixels_of_tile,
    saturated,
    saturating_cast,
    sigmoid,
    step,
    store_resampled,
    sum_pair,
    widen,
)


@triton.jit
def _read(
    x_ptr,
    residual_ptr,
    h_ptr,
    resampled_ptr,
    x_gain,
    x_shift,
    t,
    first,
    pixel,
    target_first,
    target,
    exists,
    channel,
    owned,
    left,
    PIXELS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    LEFT: tl.constexpr,
    RESAMPLE: tl.constexpr,
):
    """A tile of cat(h, skip), 0 where there is no pixel. Stores h unless it is x, and resampled.

    x_ptr has x and skip.
    """
    x_ptr += step(first, channel, LEFT, CHANNELS)
    x = load_rows(x_ptr, offsets(pixel, channel, LEFT, CHANNELS), exists)
    if h_ptr is not None:
        offset = pixel[:, None] * LEFT
        h_ptr += first * LEFT
        if residual_ptr is not None:
            # Lanes of skip have none; those without a channel read what others read.
            near = exists
            if LEFT < CHANNELS:
                near = exists & left
            x += load_rows(residual_ptr + first * LEFT, offset, near)
        x = x * x_gain[None, :] + x_shift[None, :]
        # Rounded as it is stored: backward sees the stored sum and nothing else.
        rounded = saturating_cast(x, h_ptr.dtype.element_ty)
        tl.store(h_ptr[None, :] + offset, rounded, mask=exists & left)
        x = widen(rounded)
        x = tl.where(exists, x, 0.0)
    if resampled_ptr is not None:
        store_resampled(
            resampled_ptr, x, t, target_first, target, exists, owned, PIXELS, WIDTH, LEFT, RESAMPLE
        )
    return x


@triton.jit
def _apply(
    x,
    centre,
    gain,
    shift,
    key,
    high,
    drop,
    t,
    channel,
    BLOCK_HW: tl.constexpr,
    CHANNELS: tl.constexpr,
    SILU: tl.constexpr,
    FOLDED: tl.constexpr,
):
    """dropout(silu((x - centre)·gain + shift)); FOLDED: shift contains the centre."""
    if not FOLDED:
        x -= centre[None, :]
    y = x * gain[None, :] + shift[None, :]
    if key is not None:
        keep = 1.0 - drop * (1.0 / 65536)
        # The scale of what is kept costs nothing: it is in the sigmoid.
        y *= sigmoid(y, keep) if SILU else 1.0 / keep
        y = tl.where(keep_mask(key, high, drop, t, channel, BLOCK_HW, CHANNELS), y, 0.0)
    elif SILU:
        y *= sigmoid(y, 1.0)
    return y


@triton.jit
def forward_kernel(
    x_ptr,
    skip_ptr,
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
    GROUPS_PER_BLOCK: tl.constexpr,
    GROUPS_POW2: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_HW: tl.constexpr,
    FOLD: tl.constexpr,
    VECTOR: tl.constexpr,
    SILU: tl.constexpr,
    RESAMPLE: tl.constexpr,
):
    GROUP: tl.constexpr = CHANNELS // GROUPS
    BLOCKS: tl.constexpr = (GROUPS + GROUPS_PER_BLOCK - 1) // GROUPS_PER_BLOCK
    TARGETS: tl.constexpr = (
        PIXELS * 4 if RESAMPLE == "up" else PIXELS // 4 if RESAMPLE == "down" else PIXELS
    )
    # 16-bit inputs are coarser than the rounding that (x - mean)·gain + shift in one product costs.
    FOLDED: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth == 16
    sample, channel, owned, near = block_of_program(
        CHANNELS, LEFT, GROUP, GROUPS_PER_BLOCK, BLOCKS, BLOCK_C, VECTOR
    )
    start = sample.to(tl.int64) * PIXELS
    x_ptr = joined(x_ptr, skip_ptr, start, channel, LEFT, CHANNELS)
    # The first pixel, near the mean, is subtracted before summing: a large mean costs no digits.
    origin = saturated(tl.load(x_ptr))
    x_gain = tl.where(near, x_scale, 1.0)
    x_shift = tl.zeros([BLOCK_C], tl.float32)
    if residual_ptr is not None:
        residual_ptr += start * LEFT + channel
        origin += saturated(tl.load(residual_ptr, mask=near, other=0.0))
    if h_ptr is not None:
        h_ptr += start * LEFT + channel
        if x_bias_ptr is not None:
            x_shift = saturated(tl.load(x_bias_ptr + channel, mask=near, other=0.0)) * x_gain
        origin = widen(saturating_cast(origin * x_gain + x_shift, h_ptr.dtype.element_ty))
    y_ptr += sample.to(tl.int64) * (TARGETS * CHANNELS) + channel
    if resampled_ptr is not None:
        resampled_ptr += sample.to(tl.int64) * (TARGETS * LEFT) + channel
    add = tl.zeros([BLOCK_C], tl.float32)
    if add_ptr is not None:
        add = load_channels(add_ptr + sample * add_stride, channel)
    key = None
    high = None
    # Loaded before they are needed, except that film's many would take the tile's registers.
    EARLY: tl.constexpr = scale_ptr is None
    if EARLY:
        gain, shift = affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, 0, channel)
        if seed_ptr is not None:
            key, high = dropout_key(seed_ptr, sample)

    if BLOCK_HW >= PIXELS:
        first, pixel, target_first, target, exists = pixels_of_tile(
            0, PIXELS, WIDTH, BLOCK_HW, RESAMPLE
        )
        x = _read(
            x_ptr, residual_ptr, h_ptr, resampled_ptr, x_gain, x_shift, 0, first, pixel,
            target_first, target, exists, channel, owned[None, :], near[None, :],
            PIXELS, WIDTH, CHANNELS, LEFT, RESAMPLE,
        )  # fmt: skip
        moved = tl.where(exists, x - origin[None, :], 0.0)
        sums, squares = sum_pair(moved, moved * moved, 0)
    else:
        sums = tl.zeros([BLOCK_HW // FOLD, BLOCK_C], tl.float32)
        squares = tl.zeros([BLOCK_HW // FOLD, BLOCK_C], tl.float32)
        for t in range(tiles):
            first, pixel, target_first, target, exists = pixels_of_tile(
                t, PIXELS, WIDTH, BLOCK_HW, RESAMPLE
            )
            x = _read(
                x_ptr, residual_ptr, h_ptr, resampled_ptr, x_gain, x_shift, t, first, pixel,
                target_first, target, exists, channel, owned[None, :], near[None, :],
                PIXELS, WIDTH, CHANNELS, LEFT, RESAMPLE,
            )  # fmt: skip
            moved = tl.where(exists, x - origin[None, :], 0.0)
            sums += fold(moved, FOLD)
            squares += fold(moved * moved, FOLD)
        sums, squares = sum_pair(sums, squares, 0)

    # The channels' means and squared deviations from them make up those of a group.
    means = origin + sums * (1.0 / PIXELS) + add
    squares -= sums * sums * (1.0 / PIXELS)
    mean, squares = group_sums(
        tl.where(owned, means, 0.0), tl.where(owned, squares, 0.0), GROUP, GROUPS_POW2
    )
    mean *= 1.0 / GROUP
    means = tl.where(owned, means - mean, 0.0)
    spread, _ = group_sums(means * means, means, GROUP, GROUPS_POW2)
    var = (squares * (1.0 / PIXELS) + spread) * (1.0 / GROUP)
    rstd = tl.rsqrt(var + eps)
    if not EARLY:
        film = sample * film_stride
        gain, shift = affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, film, channel)
        if seed_ptr is not None:
            key, high = dropout_key(seed_ptr, sample)
    gain *= rstd
    centre = mean - add
    if FOLDED:
        shift -= centre * gain
    if BLOCK_HW >= PIXELS:
        y = _apply(
            x, centre, gain, shift, key, high, drop, 0, channel,
            BLOCK_HW, CHANNELS, SILU, FOLDED,
        )  # fmt: skip
        store_resampled(
            y_ptr, y, 0, target_first, target, exists, owned[None, :],
            PIXELS, WIDTH, CHANNELS, RESAMPLE,
        )  # fmt: skip
    else:
        if h_ptr is not None:
            x_ptr = tl.where(channel < LEFT, h_ptr, x_ptr)
            tl.debug_barrier()  # what the other threads have stored
        for i in range(tiles):
            t = tiles - 1 - i
            first, pixel, target_first, target, exists = pixels_of_tile(
                t, PIXELS, WIDTH, BLOCK_HW, RESAMPLE
            )
            x = load_rows(
                x_ptr + step(first, channel, LEFT, CHANNELS),
                offsets(pixel, channel, LEFT, CHANNELS),
                exists,
            )
            y = _apply(
                x, centre, gain, shift, key, high, drop, t, channel,
                BLOCK_HW, CHANNELS, SILU, FOLDED,
            )  # fmt: skip
            store_resampled(
                y_ptr, y, t, target_first, target, exists, owned[None, :],
                PIXELS, WIDTH, CHANNELS, RESAMPLE,
            )  # fmt: skip

    # Last, where no thread waits for it.
    stats_ptr += sample * GROUPS + channel // GROUP
    one = owned & (channel % GROUP == 0)
    tl.store(stats_ptr, mean, mask=one)
    tl.store(stats_ptr + samples * GROUPS, rstd, mask=one)
