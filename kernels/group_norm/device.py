"""Device functions shared by the forward and the backward kernel.

A program normalises `GROUPS_PER_BLOCK` adjacent groups of one sample. Its elements form a matrix
[pixels, channels], because tensors are channels-last; it processes tiles [BLOCK_HW, BLOCK_C] of
that matrix. A column of a tile is called a lane. LEFT is the number of channels of h, the left part
of cat(h, skip); CHANNELS counts both.

Functions with inline PTX also have a Triton version of that instruction for the interpreter; all
other code is the same in both.
"""

from sid_fast.kernels._triton import INTERPRETED, tl, triton

# --- arithmetic ---------------------------------------------------------------------------------


@triton.jit
def exp2(x):
    """Return 2^x to 2 ulp, 0 below 2^-126: tl.exp2 spends three more instructions on those."""
    if INTERPRETED:
        y = tl.exp2(x)
    else:
        y = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return y


@triton.jit
def reciprocal(x):
    """Return 1/x to 1 ulp, 0 for |x| ≥ 2^126: a division spends four more instructions on those."""
    if INTERPRETED:
        y = 1.0 / x
    else:
        y = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return y


@triton.jit
def sigmoid(x, keep):
    """Divide the sigmoid of x by keep, in four instructions; the division adds none."""
    return reciprocal(exp2(x * -1.4426950408889634) * keep + keep)


@triton.jit
def widen(x):
    """Convert to float32, exactly; two instructions per pair of bfloat16, three without the PTX."""
    if tl.constexpr(x.dtype != tl.bfloat16) or INTERPRETED:
        y = x.to(tl.float32)
    else:
        y = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=&r,=&r,r", [x],
            dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    return y


@triton.jit
def round_to_bfloat16(x):
    """Round to nearest even, in pairs: a single conversion runs at a quarter of the rate."""
    if INTERPRETED:  # the interpreter's conversion truncates
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + (((bits >> 16) & 1) + 0x7FFF)) & -0x10000
        y = tl.where(x == x, bits.to(tl.float32, bitcast=True), x).to(tl.bfloat16)
    else:
        y = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [x],
            dtype=tl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip
    return y


@triton.jit
def saturating_cast(x, DTYPE: tl.constexpr):
    """Cast from float32, with saturation in fp16: ±65504 instead of inf.

    An inf would become NaN in backward and void every weight gradient. NaN is preserved.
    """
    if tl.constexpr(tl.bfloat16 == DTYPE):
        y = round_to_bfloat16(x)
    elif tl.constexpr(tl.float16 == DTYPE):
        y = tl.clamp(x, -65504.0, 65504.0, tl.PropagateNan.ALL).to(DTYPE)
    else:
        y = x.to(DTYPE)
    return y


@triton.jit
def saturated(x):
    """Convert to float32; an fp16 inf becomes ±65504."""
    y = widen(x)
    if tl.constexpr(x.dtype == tl.float16):
        y = tl.clamp(y, -65504.0, 65504.0, tl.PropagateNan.ALL)
    return y


# --- sums ---------------------------------------------------------------------------------------


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def sum_pair(a, b, AXIS: tl.constexpr):
    """Sum a and b in one reduction: one pass through shared memory and half the barriers."""
    return tl.reduce((a, b), AXIS, _add_pairs)


@triton.jit
def fold(tile, FOLD: tl.constexpr):
    """Add up rows of the same thread: [BLOCK_HW, BLOCK_C] -> [BLOCK_HW/FOLD, BLOCK_C]."""
    rows: tl.constexpr = tile.shape[0] // FOLD
    return tl.sum(tl.reshape(tile, [FOLD, rows, tile.shape[1]]), 0)


@triton.jit
def group_sums(a, b, GROUP: tl.constexpr, GROUPS_POW2: tl.constexpr):
    """Sum a and b, [BLOCK_C] each, over the groups; each lane gets the sums of its group."""
    BLOCK_C: tl.constexpr = a.shape[0]
    if GROUP & (GROUP - 1) == 0:  # a group is a few adjacent threads: no barrier
        shape: tl.constexpr = [BLOCK_C // GROUP, GROUP]
        a, b = sum_pair(tl.reshape(a, shape), tl.reshape(b, shape), 1)
        a = tl.reshape(tl.broadcast_to(a[:, None], shape), [BLOCK_C])
        b = tl.reshape(tl.broadcast_to(b[:, None], shape), [BLOCK_C])
    else:
        member = (tl.arange(0, BLOCK_C) // GROUP)[:, None] == tl.arange(0, GROUPS_POW2)[None, :]
        a, b = sum_pair(tl.where(member, a[:, None], 0.0), tl.where(member, b[:, None], 0.0), 0)
        a, b = sum_pair(tl.where(member, a[None, :], 0.0), tl.where(member, b[None, :], 0.0), 1)
    return a, b


# --- addresses ----------------------------------------------------------------------------------


@triton.jit
def block_of_program(
    CHANNELS: tl.constexpr,
    LEFT: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS_PER_BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Return (sample, channel of each lane, owned, left): the program's part of the tensor.

    `owned` marks the lanes with a channel of their own, `left` those of them with a channel of h.
    The other lanes repeat the first channels, so that loads need no mask; sums and stores mask
    them. VECTOR adjacent channels are loaded together.
    """
    sample = tl.program_id(0) // BLOCKS
    block = tl.program_id(0) % BLOCKS
    lane = tl.arange(0, BLOCK_C)
    start = block * (GROUPS_PER_BLOCK * GROUP)
    owned = tl.full([BLOCK_C], True, tl.int1)
    if GROUPS_PER_BLOCK * GROUP != BLOCK_C or CHANNELS % BLOCK_C:
        owned = (lane < GROUPS_PER_BLOCK * GROUP) & (start + lane < CHANNELS)
    channel = start + tl.where(owned, lane, lane % VECTOR)
    channel = tl.multiple_of(tl.max_contiguous(channel, VECTOR), VECTOR)
    left = owned
    if LEFT < CHANNELS:
        left = owned & (channel < LEFT)
    return sample, channel, owned, left


@triton.jit
def concat_ptr(left_ptr, right_ptr, start, channel, LEFT: tl.constexpr, CHANNELS: tl.constexpr):
    """Return the addresses of the channels of pixel `start` in cat(left, right): [BLOCK_C]."""
    ptr = left_ptr + (start * LEFT + channel)
    if right_ptr is not None:
        right = right_ptr + (start * (CHANNELS - LEFT) + (channel - LEFT))
        ptr = tl.where(channel < LEFT, ptr, right)
    return ptr


@triton.jit
def pixel_offsets(pixel, channel, LEFT: tl.constexpr, CHANNELS: tl.constexpr):
    """Return the offsets of pixels from pixel 0 in cat(left, right): [rows, 1 or BLOCK_C]."""
    if LEFT == CHANNELS or 2 * LEFT == CHANNELS:
        offset = pixel[:, None] * LEFT
    else:
        offset = pixel[:, None] * tl.where(channel < LEFT, LEFT, CHANNELS - LEFT)[None, :]
    return offset


@triton.jit
def tile_offset(first, channel, LEFT: tl.constexpr, CHANNELS: tl.constexpr):
    """Return the offset of pixel `first` from pixel 0 in cat(left, right): scalar or [BLOCK_C]."""
    if LEFT == CHANNELS or 2 * LEFT == CHANNELS:
        offset = first * LEFT
    else:
        offset = first * tl.where(channel < LEFT, LEFT, CHANNELS - LEFT)
    return offset


@triton.jit
def first_of_four(pixel, WIDTH: tl.constexpr):
    """Return the upper left of the 2x2 pixels that a pixel of an image of WIDTH is upsampled to."""
    return 2 * (pixel + pixel // WIDTH * WIDTH)


@triton.jit
def pixels_of_tile(
    t, PIXELS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_HW: tl.constexpr, RESAMPLE: tl.constexpr
):
    """Return (first, pixel, target_first, target, exists) of a tile's rows.

    A row is pixel first + pixel of the input and target_first + target of the output (for "up", the
    upper left of its 2x2 pixels). `pixel` and `target` do not depend on the tile, so the addresses
    of a thread's rows differ by constants. A tile is a strip of each quarter of the image, so a
    thread holds the four elements that share random numbers (see keep_mask). `exists` masks rows
    beyond the image; if there are none it is a constant, which costs nothing.
    """
    row = tl.arange(0, BLOCK_HW)
    STRIP: tl.constexpr = BLOCK_HW // 4
    QUARTER: tl.constexpr = (PIXELS + 3) // 4
    if RESAMPLE == "down":
        # Rows a quarter of the tile apart form 2x2 pixels, so that one thread averages them.
        first = 0
        target_first = 0
        target = t * STRIP + row % STRIP
        member = row // STRIP
        pixel = first_of_four(target, WIDTH // 2) + member // 2 * WIDTH + member % 2
    else:
        first = t * STRIP
        pixel = row // STRIP * QUARTER + row % STRIP
        target_first = first
        target = pixel
        if RESAMPLE == "up":
            target_first = 0
            target = first_of_four(first + pixel, WIDTH)
    exists = tl.full([BLOCK_HW], True, tl.int1)
    if PIXELS % BLOCK_HW:
        exists = first + pixel < PIXELS
        if RESAMPLE != "down":
            exists = exists & (first + row % STRIP < QUARTER)
    exists = exists[:, None]
    return first, pixel, target_first, target, exists


@triton.jit
def load_rows(ptr, offset, mask):
    """Load a tile as float32, 0 where masked; ptr is [BLOCK_C]."""
    return saturated(tl.load(ptr[None, :] + offset, mask=mask, other=0.0))


@triton.jit
def load_channels(ptr, channel):
    """Load one value per lane's channel as float32."""
    return saturated(tl.load(ptr + channel))


@triton.jit
def store_resampled(
    ptr,
    value,
    t,
    first,
    target,
    exists,
    owned,
    PIXELS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    RESAMPLE: tl.constexpr,
):
    """Resample a tile and store it."""
    if RESAMPLE == "down":
        rows: tl.constexpr = value.shape[0] // 4
        pixel = t * rows + tl.arange(0, rows)
        value = saturating_cast(fold(value, 4) * 0.25, ptr.dtype.element_ty)
        mask = (pixel < PIXELS // 4)[:, None] & owned
        tl.store(ptr[None, :] + pixel[:, None] * CHANNELS, value, mask=mask)
    else:
        mask = exists & owned
        value = saturating_cast(value, ptr.dtype.element_ty)
        ptr += first * CHANNELS
        tl.store(ptr[None, :] + target[:, None] * CHANNELS, value, mask=mask)
        if RESAMPLE == "up":
            for i in tl.static_range(1, 4):
                pixel = target + (i // 2 * 2 * WIDTH + i % 2)
                tl.store(ptr[None, :] + pixel[:, None] * CHANNELS, value, mask=mask)


@triton.jit
def load_resampled(
    ptr, first, target, exists, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, RESAMPLE: tl.constexpr
):
    """Load a tile's gradient from the resampled output's: the transpose of store_resampled."""
    ptr += first * CHANNELS
    value = load_rows(ptr, target[:, None] * CHANNELS, exists)
    if RESAMPLE == "down":
        value *= 0.25
    if RESAMPLE == "up":
        for i in tl.static_range(1, 4):
            pixel = target + (i // 2 * 2 * WIDTH + i % 2)
            value += load_rows(ptr, pixel[:, None] * CHANNELS, exists)
    return value


@triton.jit
def affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, row, channel):
    """Return (norm·weight + bias)·(scale + 1) + shift as one gain and one shift per channel."""
    gain = load_channels(weight_ptr, channel)
    shift = load_channels(bias_ptr, channel)
    if scale_ptr is not None:
        factor = 1.0 + load_channels(scale_ptr, row + channel)
        gain *= factor
        shift = shift * factor + load_channels(shift_ptr, row + channel)
    return gain, shift
