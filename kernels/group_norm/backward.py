"""The backward kernel.

Forward saves the norm's input and statistics; backward recomputes the rest. It takes every incoming
gradient of the input and adds them up. For the gradients of weight, bias and x_bias it stores one
sum over pixels per sample; a second, deterministic reduction adds up the samples.
"""

from sid_fast.kernels._triton import tl, triton
from sid_fast.kernels.dropout import dropout_key, keep_mask
from sid_fast.kernels.group_norm.device import (
    affine,
    block_of_program,
    concat_ptr,
    fold,
    group_sums,
    load_channels,
    load_resampled,
    load_rows,
    pixel_offsets,
    pixels_of_tile,
    saturating_cast,
    sigmoid,
    sum_pair,
    tile_offset,
)


@triton.jit
def _centred(
    h_ptr,
    centre,
    first,
    pixel,
    channel,
    exists,
    CHANNELS: tl.constexpr,
    LEFT: tl.constexpr,
    MEAN_IN_SHIFT: tl.constexpr,
):
    """Load a tile of the norm's input and, unless MEAN_IN_SHIFT, subtract the mean."""
    h_ptr += tile_offset(first, channel, LEFT, CHANNELS)
    h = load_rows(h_ptr, pixel_offsets(pixel, channel, LEFT, CHANNELS), exists)
    if not MEAN_IN_SHIFT:
        h -= centre[None, :]
    return h


@triton.jit
def _activation_grad(
    h,
    y_grad_ptr,
    gain,
    shift,
    key,
    high,
    drop,
    t,
    target_first,
    target,
    channel,
    exists,
    BLOCK_HW: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    SILU: tl.constexpr,
    RESAMPLE: tl.constexpr,
):
    """Return the gradient of the activation's input without dropout's scale; 0 beyond the image.

    The caller applies the scale to the gain and the sums.
    """
    grad = load_resampled(y_grad_ptr, target_first, target, exists, WIDTH, CHANNELS, RESAMPLE)
    if SILU:
        u = h * gain[None, :] + shift[None, :]
        s = sigmoid(u, 1.0)
        grad *= s * (1.0 + u * (1.0 - s))
    if key is not None:
        keep = keep_mask(key, high, drop, t, channel, BLOCK_HW, CHANNELS)
        grad = tl.where(keep, grad, 0.0)
    return grad


@triton.jit
def _write_grad(
    h,
    grad,
    gain,
    slope,
    constant,
    h_grad_ptr,
    h_for_skip_grad_ptr,
    resampled_grad_ptr,
    dx_ptr,
    x_scale,
    first,
    pixel,
    target_first,
    target,
    channel,
    exists,
    owned,
    left,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    LEFT: tl.constexpr,
    RESAMPLE: tl.constexpr,
):
    """Store the gradient of x; return the norm's input gradient and that of x, 0 beyond the image.

    The gradient of x adds h_grad, h_for_skip_grad and resampled_grad to the norm's, times x_scale.
    """
    dh = grad * gain[None, :] - (h * slope[None, :] + constant[None, :])
    dh = tl.where(exists, dh, 0.0)
    dx = dh
    offset = pixel_offsets(pixel, channel, LEFT, CHANNELS)
    if h_grad_ptr is not None:
        dx += load_rows(h_grad_ptr + tile_offset(first, channel, LEFT, CHANNELS), offset, exists)
    if h_for_skip_grad_ptr is not None:
        mask = exists
        if LEFT < CHANNELS:
            mask = exists & left
        dx += load_rows(h_for_skip_grad_ptr + first * LEFT, pixel[:, None] * LEFT, mask)
    if resampled_grad_ptr is not None:
        dx += load_resampled(
            resampled_grad_ptr, target_first, target, exists, WIDTH, LEFT, RESAMPLE
        )
    if x_scale is not None:
        dx *= x_scale[None, :]
    dx_ptr += tile_offset(first, channel, LEFT, CHANNELS)
    value = saturating_cast(dx, dx_ptr.dtype.element_ty)
    tl.store(dx_ptr[None, :] + offset, value, mask=exists & owned)
    return dh, dx


@triton.jit
def backward_kernel(
    h_ptr,
    skip_ptr,
    y_grad_ptr,
    h_grad_ptr,
    h_for_skip_grad_ptr,
    skip_grad_ptr,
    resampled_grad_ptr,
    dx_ptr,
    dskip_ptr,
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
    scale_shift_stride,
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
    """Compute the gradients of GROUPS_PER_BLOCK groups of one sample per program; see op.py."""
    GROUP: tl.constexpr = CHANNELS // GROUPS
    BLOCKS: tl.constexpr = (GROUPS + GROUPS_PER_BLOCK - 1) // GROUPS_PER_BLOCK
    TARGETS: tl.constexpr = (
        PIXELS * 4 if RESAMPLE == "up" else PIXELS // 4 if RESAMPLE == "down" else PIXELS
    )
    MEAN_IN_SHIFT: tl.constexpr = h_ptr.dtype.element_ty.primitive_bitwidth == 16  # as in forward
    # Drawing the mask twice costs more than memory traffic, so the first pass over tiles stores the
    # activation's gradient in dx for the second.
    CACHE_GRAD: tl.constexpr = seed_ptr is not None and SILU
    sample, channel, owned, left = block_of_program(
        CHANNELS, LEFT, GROUP, GROUPS_PER_BLOCK, BLOCKS, BLOCK_C, VECTOR
    )
    start = sample.to(tl.int64) * PIXELS
    h_ptr = concat_ptr(h_ptr, skip_ptr, start, channel, LEFT, CHANNELS)
    dx_ptr = concat_ptr(dx_ptr, dskip_ptr, start, channel, LEFT, CHANNELS)
    if h_grad_ptr is not None:
        h_grad_ptr = concat_ptr(h_grad_ptr, skip_grad_ptr, start, channel, LEFT, CHANNELS)
    if h_for_skip_grad_ptr is not None:
        h_for_skip_grad_ptr += start * LEFT + channel
    y_grad_ptr += sample.to(tl.int64) * (TARGETS * CHANNELS) + channel
    if resampled_grad_ptr is not None:
        resampled_grad_ptr += sample.to(tl.int64) * (TARGETS * LEFT) + channel
    if x_scale is not None:
        x_scale = tl.where(left, x_scale, 1.0)
    key = None
    high = None
    if seed_ptr is not None:
        key, high = dropout_key(seed_ptr, sample)

    group = channel // GROUP
    centre = load_channels(stats_ptr + sample * GROUPS, group)
    rstd = load_channels(stats_ptr + (samples + sample) * GROUPS, group)
    if add_ptr is not None:
        centre -= load_channels(add_ptr + sample * add_stride, channel)
    scale_shift_row = sample * scale_shift_stride
    gain, shift = affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_shift_row, channel)
    gain *= rstd
    if MEAN_IN_SHIFT:
        shift -= centre * gain

    if BLOCK_HW >= PIXELS:
        first, pixel, target_first, target, exists = pixels_of_tile(
            0, PIXELS, WIDTH, BLOCK_HW, RESAMPLE
        )
        h = _centred(h_ptr, centre, first, pixel, channel, exists, CHANNELS, LEFT, MEAN_IN_SHIFT)
        grad = _activation_grad(
            h, y_grad_ptr, gain, shift, key, high, drop, 0, target_first, target,
            channel, exists, BLOCK_HW, WIDTH, CHANNELS, SILU, RESAMPLE,
        )  # fmt: skip
        dshift, dgain = sum_pair(grad, grad * h, 0)
    else:
        grads = tl.zeros([BLOCK_HW // FOLD, BLOCK_C], tl.float32)
        products = tl.zeros([BLOCK_HW // FOLD, BLOCK_C], tl.float32)
        for t in range(tiles):
            first, pixel, target_first, target, exists = pixels_of_tile(
                t, PIXELS, WIDTH, BLOCK_HW, RESAMPLE
            )
            h = _centred(
                h_ptr, centre, first, pixel, channel, exists, CHANNELS, LEFT, MEAN_IN_SHIFT
            )
            grad = _activation_grad(
                h, y_grad_ptr, gain, shift, key, high, drop, t, target_first, target,
                channel, exists, BLOCK_HW, WIDTH, CHANNELS, SILU, RESAMPLE,
            )  # fmt: skip
            grads += fold(grad, FOLD)
            products += fold(grad * h, FOLD)
            if CACHE_GRAD:
                tl.store(
                    (dx_ptr + tile_offset(first, channel, LEFT, CHANNELS))[None, :]
                    + pixel_offsets(pixel, channel, LEFT, CHANNELS),
                    saturating_cast(grad, dx_ptr.dtype.element_ty),
                    mask=exists & owned[None, :],
                )
        dshift, dgain = sum_pair(grads, products, 0)
    if MEAN_IN_SHIFT:
        dgain -= centre * dshift
    if seed_ptr is not None:
        scale = 1.0 / (1.0 - drop * (1.0 / 65536))
        dshift *= scale
        dgain *= scale
    # dh = gain·grad minus its projections, per group, onto 1 and onto the normalised input.
    constant, slope = group_sums(
        tl.where(owned, gain * dshift, 0.0), tl.where(owned, gain * dgain, 0.0), GROUP, GROUPS_POW2
    )
    constant *= 1.0 / (GROUP * PIXELS)
    slope *= rstd * rstd * (1.0 / (GROUP * PIXELS))
    if MEAN_IN_SHIFT:
        constant -= centre * slope
    gain_after = gain * scale if seed_ptr is not None else gain

    row = sample * CHANNELS + channel
    dgain *= rstd
    if scale_ptr is not None:
        if dscale_ptr is not None:
            weight = load_channels(weight_ptr, channel)
            dscale = weight * dgain + load_channels(bias_ptr, channel) * dshift
            tl.store(
                dscale_ptr + row, saturating_cast(dscale, dscale_ptr.dtype.element_ty), mask=owned
            )
            tl.store(
                dshift_ptr + row, saturating_cast(dshift, dshift_ptr.dtype.element_ty), mask=owned
            )
        factor = 1.0 + load_channels(scale_ptr, scale_shift_row + channel)
        dgain *= factor
        dshift *= factor
    if dparam_ptr is not None:
        tl.store(dparam_ptr + row, dgain, mask=owned)
        tl.store(dparam_ptr + samples * CHANNELS + row, dshift, mask=owned)

    if BLOCK_HW >= PIXELS:
        dh, dx = _write_grad(
            h, grad, gain_after, slope, constant,
            h_grad_ptr, h_for_skip_grad_ptr, resampled_grad_ptr, dx_ptr,
            x_scale, first, pixel, target_first, target, channel, exists,
            owned[None, :], left[None, :], WIDTH, CHANNELS, LEFT, RESAMPLE,
        )  # fmt: skip
    else:
        dh = tl.zeros([BLOCK_HW // FOLD, BLOCK_C], tl.float32)
        dx = tl.zeros([BLOCK_HW // FOLD, BLOCK_C], tl.float32)
        if CACHE_GRAD:
            tl.debug_barrier()  # wait for the other threads' stores to dx
        for i in range(tiles):
            t = tiles - 1 - i
            first, pixel, target_first, target, exists = pixels_of_tile(
                t, PIXELS, WIDTH, BLOCK_HW, RESAMPLE
            )
            h = _centred(
                h_ptr, centre, first, pixel, channel, exists, CHANNELS, LEFT, MEAN_IN_SHIFT
            )
            if CACHE_GRAD:
                grad = load_rows(
                    dx_ptr + tile_offset(first, channel, LEFT, CHANNELS),
                    pixel_offsets(pixel, channel, LEFT, CHANNELS),
                    exists,
                )
            else:
                grad = _activation_grad(
                    h, y_grad_ptr, gain, shift, key, high, drop, t, target_first,
                    target, channel, exists, BLOCK_HW, WIDTH, CHANNELS, SILU, RESAMPLE,
                )  # fmt: skip
            dh_part, dx_part = _write_grad(
                h, grad, gain_after, slope, constant, h_grad_ptr, h_for_skip_grad_ptr,
                resampled_grad_ptr, dx_ptr, x_scale, first, pixel, target_first, target, channel,
                exists, owned[None, :], left[None, :], WIDTH, CHANNELS, LEFT, RESAMPLE,
            )  # fmt: skip
            if dadd_ptr is not None:
                dh += fold(dh_part, FOLD)
            if dx_bias_ptr is not None:
                dx += fold(dx_part, FOLD)

    if dadd_ptr is not None:
        dadd = saturating_cast(tl.sum(dh, 0), dadd_ptr.dtype.element_ty)
        tl.store(dadd_ptr + row, dadd, mask=owned)
    if dx_bias_ptr is not None:
        tl.store(dx_bias_ptr + sample * LEFT + channel, tl.sum(dx, 0), mask=left)
