"""The forward kernel."""

from sid_fast.kernels._triton import tl, triton
from sid_fast.kernels.dropout import dropout_key, keep_mask
from sid_fast.kernels.group_norm.device import (
    affine,
    block_of_program,
    concat_ptr,
    fold,
    group_sums,
    load_channels,
    load_rows,
    pixel_offsets,
    pixels_of_tile,
    saturated,
    saturating_cast,
    sigmoid,
    store_resampled,
    sum_pair,
    tile_offset,
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
    """Return a tile of cat(h, skip), 0 beyond the image; store h, unless it is x, and resampled.

    x_ptr holds the addresses of cat(x, skip).
    """
    x_ptr += tile_offset(first, channel, LEFT, CHANNELS)
    x = load_rows(x_ptr, pixel_offsets(pixel, channel, LEFT, CHANNELS), exists)
    if h_ptr is not None:
        offset = pixel[:, None] * LEFT
        h_ptr += first * LEFT
        if residual_ptr is not None:
            # Lanes of skip have no residual; lanes that are not owned load another lane's.
            mask = exists
            if LEFT < CHANNELS:
                mask = exists & left
            x += load_rows(residual_ptr + first * LEFT, offset, mask)
        x = x * x_gain[None, :] + x_shift[None, :]
        # Normalise the rounded h: backward only has the stored one.
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
    MEAN_IN_SHIFT: tl.constexpr,
):
    """Return dropout(silu((x - centre)·gain + shift)); MEAN_IN_SHIFT: shift has -centre·gain."""
    if not MEAN_IN_SHIFT:
        x -= centre[None, :]
    y = x * gain[None, :] + shift[None, :]
    if key is not None:
        keep = 1.0 - drop * (1.0 / 65536)
        # Dropout's scale costs nothing: the sigmoid includes it.
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
    scale_shift_stride,
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
    """Normalise GROUPS_PER_BLOCK groups of one sample per program; arguments as in op.py."""
    GROUP: tl.constexpr = CHANNELS // GROUPS
    BLOCKS: tl.constexpr = (GROUPS + GROUPS_PER_BLOCK - 1) // GROUPS_PER_BLOCK
    TARGETS: tl.constexpr = (
        PIXELS * 4 if RESAMPLE == "up" else PIXELS // 4 if RESAMPLE == "down" else PIXELS
    )
    # Fold the mean into the shift for 16-bit inputs: the rounding error of x·gain + (shift -
    # mean·gain) is below the resolution of x.
    MEAN_IN_SHIFT: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth == 16
    sample, channel, owned, left = block_of_program(
        CHANNELS, LEFT, GROUP, GROUPS_PER_BLOCK, BLOCKS, BLOCK_C, VECTOR
    )
    start = sample.to(tl.int64) * PIXELS
    x_ptr = concat_ptr(x_ptr, skip_ptr, start, channel, LEFT, CHANNELS)
    # Subtract each channel's first pixel before summing, so that a large mean costs no precision.
    origin = saturated(tl.load(x_ptr))
    x_gain = tl.where(left, x_scale, 1.0)
    x_shift = tl.zeros([BLOCK_C], tl.float32)
    if residual_ptr is not None:
        residual_ptr += start * LEFT + channel
        origin += saturated(tl.load(residual_ptr, mask=left, other=0.0))
    if h_ptr is not None:
        h_ptr += start * LEFT + channel
        if x_bias_ptr is not None:
            x_shift = saturated(tl.load(x_bias_ptr + channel, mask=left, other=0.0)) * x_gain
        origin = widen(saturating_cast(origin * x_gain + x_shift, h_ptr.dtype.element_ty))
    y_ptr += sample.to(tl.int64) * (TARGETS * CHANNELS) + channel
    if resampled_ptr is not None:
        resampled_ptr += sample.to(tl.int64) * (TARGETS * LEFT) + channel
    add = tl.zeros([BLOCK_C], tl.float32)
    if add_ptr is not None:
        add = load_channels(add_ptr + sample * add_stride, channel)
    key = None
    high = None
    # Load parameters early, unless scale and shift are among them: those would take the tile's
    # registers.
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
            target_first, target, exists, channel, owned[None, :], left[None, :],
            PIXELS, WIDTH, CHANNELS, LEFT, RESAMPLE,
        )  # fmt: skip
        shifted = tl.where(exists, x - origin[None, :], 0.0)
        sums, squares = sum_pair(shifted, shifted * shifted, 0)
    else:
        sums = tl.zeros([BLOCK_HW // FOLD, BLOCK_C], tl.float32)
        squares = tl.zeros([BLOCK_HW // FOLD, BLOCK_C], tl.float32)
        for t in range(tiles):
            first, pixel, target_first, target, exists = pixels_of_tile(
                t, PIXELS, WIDTH, BLOCK_HW, RESAMPLE
            )
            x = _read(
                x_ptr, residual_ptr, h_ptr, resampled_ptr, x_gain, x_shift, t, first, pixel,
                target_first, target, exists, channel, owned[None, :], left[None, :],
                PIXELS, WIDTH, CHANNELS, LEFT, RESAMPLE,
            )  # fmt: skip
            shifted = tl.where(exists, x - origin[None, :], 0.0)
            sums += fold(shifted, FOLD)
            squares += fold(shifted * shifted, FOLD)
        sums, squares = sum_pair(sums, squares, 0)

    # Combine the channels' means and squared deviations into those of the groups.
    means = origin + sums * (1.0 / PIXELS) + add
    squares -= sums * sums * (1.0 / PIXELS)
    mean, squares = group_sums(
        tl.where(owned, means, 0.0), tl.where(owned, squares, 0.0), GROUP, GROUPS_POW2
    )
    mean *= 1.0 / GROUP
    means = tl.where(owned, means - mean, 0.0)
    between, _ = group_sums(means * means, means, GROUP, GROUPS_POW2)
    var = (squares * (1.0 / PIXELS) + between) * (1.0 / GROUP)
    rstd = tl.rsqrt(var + eps)
    if not EARLY:
        scale_shift_row = sample * scale_shift_stride
        gain, shift = affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_shift_row, channel)
        if seed_ptr is not None:
            key, high = dropout_key(seed_ptr, sample)
    gain *= rstd
    centre = mean - add
    if MEAN_IN_SHIFT:
        shift -= centre * gain
    if BLOCK_HW >= PIXELS:
        y = _apply(
            x, centre, gain, shift, key, high, drop, 0, channel,
            BLOCK_HW, CHANNELS, SILU, MEAN_IN_SHIFT,
        )  # fmt: skip
        store_resampled(
            y_ptr, y, 0, target_first, target, exists, owned[None, :],
            PIXELS, WIDTH, CHANNELS, RESAMPLE,
        )  # fmt: skip
    else:
        if h_ptr is not None:
            x_ptr = tl.where(channel < LEFT, h_ptr, x_ptr)
            tl.debug_barrier()  # wait for the other threads' stores of h
        for i in range(tiles):
            t = tiles - 1 - i
            first, pixel, target_first, target, exists = pixels_of_tile(
                t, PIXELS, WIDTH, BLOCK_HW, RESAMPLE
            )
            x = load_rows(
                x_ptr + tile_offset(first, channel, LEFT, CHANNELS),
                pixel_offsets(pixel, channel, LEFT, CHANNELS),
                exists,
            )
            y = _apply(
                x, centre, gain, shift, key, high, drop, t, channel,
                BLOCK_HW, CHANNELS, SILU, MEAN_IN_SHIFT,
            )  # fmt: skip
            store_resampled(
                y_ptr, y, t, target_first, target, exists, owned[None, :],
                PIXELS, WIDTH, CHANNELS, RESAMPLE,
            )  # fmt: skip

    # Last, because nothing in this kernel depends on it.
    stats_ptr += sample * GROUPS + channel // GROUP
    writes_stats = owned & (channel % GROUP == 0)
    tl.store(stats_ptr, mean, mask=writes_stats)
    tl.store(stats_ptr + samples * GROUPS, rstd, mask=writes_stats)
