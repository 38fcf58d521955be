"""The geometric transform of the non-leaky augmentation (arXiv 2006.06676, appendix B).

A band-limited affine resampling with fixed shapes. A program transforms one channel of one image.
Each pixel of the canvas, which has twice the resolution, is a weighted sum of at most 7 × 7 pixels
of the image; the weights combine the upsampling filter and bilinear interpolation. Downsampling
multiplies the canvas by a banded matrix from either side. The canvas stays in registers, and only
the result is written to memory.
"""

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from sid_fast.kernels._operator import operator
from sid_fast.kernels._triton import tl, triton
from sid_fast.kernels.dispatch import choose

BLOCK = 16
# Decomposition low-pass of the sym6 wavelet.
SYM6 = (
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633,
    0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252,
    -0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148,
)  # fmt: skip
PARAMETERS = ("xflip", "yflip", "scale", "rotate", "aniso", "aniso_rotate", "translate")

Parameters = dict[str, torch.Tensor]


def augment(images: torch.Tensor, parameters: Parameters) -> tuple[torch.Tensor, torch.Tensor]:
    """Transform images by the parameters of sid_fast.augment.draw, in float32, without a gradient.

    Args:
        images: [N, C, H, W].
        parameters: tensors by the names in PARAMETERS: [N], `translate` [2, N].

    Returns:
        The transformed images, of the same shape and dtype, channels-last; and the augmentation
        labels, float32 [N, 9].
    """
    return _augment(images, *(parameters[name] for name in PARAMETERS))


def _run_augment(
    images: torch.Tensor,
    xflip: torch.Tensor,
    yflip: torch.Tensor,
    scale: torch.Tensor,
    rotate: torch.Tensor,
    aniso: torch.Tensor,
    aniso_rotate: torch.Tensor,
    translate: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    values = xflip, yflip, scale, rotate, aniso, aniso_rotate, translate
    out = _augment_like(images, *values)
    if choose("augment", images.device) == "eager":
        transformed, labels = augment_eager(images, dict(zip(PARAMETERS, values, strict=True)))
        out[0].copy_(transformed)
        return out[0], labels
    n, channels, height, width = images.shape
    rows, columns = (max(16, triton.next_power_of_2(size)) for size in (height, width))
    with torch.cuda.device_of(images):
        _augment_kernel[(n, channels)](
            images, *images.stride(), *(v.contiguous() for v in values), *out,
            _taps(images.device), n, channels, height, width, rows, columns, BLOCK, num_warps=8,
        )  # fmt: skip
    return out


def _augment_like(images, *parameters):
    transformed = torch.empty_like(images, memory_format=torch.channels_last)
    return transformed, images.new_empty(len(images), 9, dtype=torch.float32)


_augment = operator("augment", _run_augment, _augment_like)


def labels_of(parameters: Parameters) -> torch.Tensor:
    """Return the augmentation labels that condition the network, float32 [N, 9]."""
    q = {name: value.float() for name, value in parameters.items()}
    return torch.stack(
        [
            q["xflip"],
            q["yflip"],
            q["scale"],
            q["rotate"].cos() - 1,
            q["rotate"].sin(),
            q["aniso"] * q["aniso_rotate"].cos(),
            q["aniso"] * q["aniso_rotate"].sin(),
            q["translate"][0],
            q["translate"][1],
        ],
        dim=1,
    )


def _matrix(*rows: tuple) -> torch.Tensor:
    """Stack entries, which are tensors [N] or numbers, to [N, 3, 3]."""
    example = next(v for row in rows for v in row if isinstance(v, torch.Tensor))
    full = [
        v if isinstance(v, torch.Tensor) else torch.full_like(example, v) for r in rows for v in r
    ]
    return torch.stack(full, dim=-1).unflatten(-1, (3, 3))


def _rotation(a: torch.Tensor) -> torch.Tensor:
    return _matrix((a.cos(), -a.sin(), 0), (a.sin(), a.cos(), 0), (0, 0, 1))


def _scaling(x, y) -> torch.Tensor:
    return _matrix((x, 0, 0), (0, y, 0), (0, 0, 1))


def _translation(x, y) -> torch.Tensor:
    return _matrix((1, 0, x), (0, 1, y), (0, 0, 1))


def lookup(parameters: Parameters, height: int, width: int) -> torch.Tensor:
    """Return the matrix from output to input pixels, relative to the image centre, [N, 3, 3].

    M = S(1/s₀) · R(w) · R(−r) S(1/s, s) R(r) · T(−0.125·size·n); x points right, y down.
    """
    q = {name: v if v.is_floating_point() else v.float() for name, v in parameters.items()}
    shrink = 2 ** (-0.2 * q["scale"])
    stretch = 2 ** (0.2 * q["aniso"])
    r = q["aniso_rotate"]
    return (
        _scaling(shrink, shrink)
        @ _rotation(q["rotate"])
        @ _rotation(-r)
        @ _scaling(1 / stretch, stretch)
        @ _rotation(r)
        @ _translation(-0.125 * width * q["translate"][0], -0.125 * height * q["translate"][1])
    )


def _filter_axes(x: torch.Tensor, taps: torch.Tensor, stride: int, padding: int) -> torch.Tensor:
    channels = x.shape[1]
    taps = taps.expand(channels, 1, -1)
    for step, pad, kernel in (
        ((1, stride), (0, padding), taps[:, :, None, :]),
        ((stride, 1), (padding, 0), taps[:, :, :, None]),
    ):
        x = F.conv2d(x, kernel, stride=step, padding=pad, groups=channels)
    return x


def augment_eager(
    images: torch.Tensor, parameters: Parameters
) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply `augment` in plain PyTorch: in float64 if images and parameters are, else float32."""
    n, channels, height, width = images.shape
    x = images if images.dtype == torch.float64 else images.float()
    for name, axis in (("xflip", 3), ("yflip", 2)):
        x = torch.where(parameters[name].bool()[:, None, None, None], x.flip(axis), x)

    # Reflect the whole image on every side: padding by what the parameters need would synchronise
    # the host with the device.
    x = F.pad(x, [width - 1, width - 1, height - 1, height - 1], mode="reflect")
    taps = _taps(x.device, x.dtype)[1:-2]
    up = x.new_zeros(n, channels, x.shape[2], 2, x.shape[3], 2)
    up[:, :, :, 0, :, 0] = x
    up = up.flatten(4).flatten(2, 3)
    up = _filter_axes(up, taps.flip(0), stride=1, padding=(len(SYM6) + 1) // 2)[..., :-1, :-1]

    margin = len(SYM6) // 4  # the filter's radius, in output pixels
    canvas = (height + 2 * margin) * 2, (width + 2 * margin) * 2
    one = torch.ones(n, device=x.device, dtype=x.dtype)
    # Convert to pixels of twice the resolution, whose centre is off by half a pixel; then to
    # grid_sample's [-1, 1].
    matrix = (
        _translation(-0.5 * one, -0.5 * one)
        @ _scaling(2 * one, 2 * one)
        @ lookup(parameters, height, width)
        @ _scaling(0.5 * one, 0.5 * one)
        @ _translation(0.5 * one, 0.5 * one)
    )
    to_unit = _scaling(2 / up.shape[3] * one, 2 / up.shape[2] * one)
    from_unit = _scaling(canvas[1] / 2 * one, canvas[0] / 2 * one)
    matrix = to_unit @ matrix @ from_unit
    grid = F.affine_grid(matrix[:, :2], [n, channels, *canvas], align_corners=False)
    x = F.grid_sample(up, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    x = _filter_axes(x, taps, stride=2, padding=(len(SYM6) - 1) // 2)
    return x[..., margin:-margin, margin:-margin], labels_of(parameters)


def bytes_moved(elements: int, itemsize: int = 4) -> int:
    """Return the bytes that transforming `elements` of images must read and write at least."""
    return elements * 2 * itemsize


def flop(images: int, channels: int, height: int, width: int) -> int:
    """Return the FLOP: 7 × 7 pixels per canvas pixel, and the 12-tap filter along both axes."""
    rows, columns = 2 * (height + 6), 2 * (width + 6)
    return images * channels * (rows * columns * 7 * 16 + (rows + height) * width * 24)


@functools.cache
def _taps(device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the filter with one zero before and two after it; copied to the device once."""
    return torch.tensor([0.0, *SYM6, 0.0, 0.0], device=device, dtype=dtype)


@triton.jit
def _neighbour(taps, v, k, flip, SIZE: tl.constexpr):
    """Return the index and the weight of the k-th of the 7 pixels that contribute at v.

    v is a coordinate at twice the resolution of the reflected image, which has 3·SIZE − 2 pixels
    along the axis. The upsampled value at integer u is Σ taps[5 + u − 2m]·pixel m over pixels m. v
    lies between two such u, to which 7 pixels contribute.
    """
    low = tl.floor(v)
    u = low.to(tl.int32)
    m = (u >> 1) - 3 + k
    tap = taps + (12 + (u & 1) - 2 * k)  # the tensor has a zero before the first tap
    below, above = tl.load(tap, mask=k < 7, other=0.0), tl.load(tap + 1, mask=k < 7, other=0.0)
    end: tl.constexpr = 2 * (3 * SIZE - 2)
    below = tl.where((u >= 0) & (u < end), below * (1 - (v - low)), 0.0)
    above = tl.where((u >= -1) & (u < end - 1), above * (v - low), 0.0)
    weight = tl.where((m >= 0) & (2 * m < end), below + above, 0.0)
    pixel = tl.abs(m - (SIZE - 1))
    pixel = tl.where(pixel > SIZE - 1, 2 * (SIZE - 1) - pixel, pixel)
    pixel = tl.minimum(tl.maximum(pixel, 0), SIZE - 1)
    return tl.where(flip != 0, SIZE - 1 - pixel, pixel), weight


@triton.jit
def _halving(taps, at, to):
    """Return entries of the matrix that filters, downsamples and crops the canvas."""
    tap = at - 2 * to
    return tl.load(taps + tap, mask=(tap >= 0) & (tap <= 12), other=0.0)


@triton.jit
def _cos_sin(x):
    """Return cos x and sin x to 2^-23 for up to a few thousand turns; libdevice's need a stack."""
    quarter = tl.floor(x * 0.6366197723675814 + 0.5)
    # π/2 = 201/128 + remainder; products of 201/128 and a small integer are exact.
    x = (x - quarter * 1.5703125) - quarter * 0.0004838267948966
    xx = x * x
    # Taylor series: within an eighth of a turn, the truncation error is below 2e-9.
    sin = x + x * xx * (-1 / 6 + xx * (1 / 120 + xx * (-1 / 5040 + xx * (1 / 362880))))
    cos = 1 + xx * (-1 / 2 + xx * (1 / 24 + xx * (-1 / 720 + xx * (1 / 40320 - xx / 3628800))))
    quarter = quarter.to(tl.int32)
    swapped = (quarter & 1) != 0
    cos, sin = tl.where(swapped, sin, cos), tl.where(swapped, cos, sin)
    return tl.where(((quarter + 1) & 2) != 0, -cos, cos), tl.where((quarter & 2) != 0, -sin, sin)


@triton.jit
def _augment_kernel(
    images, stride_n, stride_c, stride_h, stride_w, xflip, yflip, scale, rotate, aniso,
    aniso_rotate, translate, transformed, labels, taps, samples,
    CHANNELS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1)
    flip_x, flip_y = tl.load(xflip + n).to(tl.int32), tl.load(yflip + n).to(tl.int32)
    zoom = tl.load(scale + n).to(tl.float32)
    angle = tl.load(rotate + n).to(tl.float32)
    stretch = tl.load(aniso + n).to(tl.float32)
    frame = tl.load(aniso_rotate + n).to(tl.float32)
    move_x = tl.load(translate + n).to(tl.float32)
    move_y = tl.load(translate + samples + n).to(tl.float32)
    cos, sin = _cos_sin(angle)
    cos_frame, sin_frame = _cos_sin(frame)
    if c == 0:
        labels += n * 9
        tl.store(labels, flip_x.to(tl.float32))
        tl.store(labels + 1, flip_y.to(tl.float32))
        tl.store(labels + 2, zoom)
        tl.store(labels + 3, cos - 1)
        tl.store(labels + 4, sin)
        tl.store(labels + 5, stretch * cos_frame)
        tl.store(labels + 6, stretch * sin_frame)
        tl.store(labels + 7, move_x)
        tl.store(labels + 8, move_y)

    # S(1/s₀)·R(w)·R(−r)·S(1/s, s)·R(r) = [[xx, xy], [yx, yy]]
    shrink = tl.exp2(-0.2 * zoom)
    along, across = tl.exp2(-0.2 * stretch), tl.exp2(0.2 * stretch)
    k_xx = along * cos_frame * cos_frame + across * sin_frame * sin_frame
    k_yy = along * sin_frame * sin_frame + across * cos_frame * cos_frame
    k_xy = (across - along) * cos_frame * sin_frame
    xx, xy = shrink * (cos * k_xx - sin * k_xy), shrink * (cos * k_xy - sin * k_yy)
    yx, yy = shrink * (sin * k_xx + cos * k_xy), shrink * (sin * k_xy + cos * k_yy)
    move_x *= -0.125 * WIDTH
    move_y *= -0.125 * HEIGHT
    # Translation at twice the resolution, relative to the corner of the reflected image.
    shift_x = 2 * (xx * move_x + xy * move_y) + (3 * WIDTH - 2) - 1
    shift_y = 2 * (yx * move_x + yy * move_y) + (3 * HEIGHT - 2) - 1

    image = images + n * stride_n + c * stride_c
    block = tl.arange(0, BLOCK)
    index = tl.arange(0, BLOCK * BLOCK)
    eight = tl.arange(0, 8)[None, :]
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    out = tl.zeros([ROWS, COLUMNS], tl.float32)
    for top in range(0, 2 * (HEIGHT + 6), BLOCK):
        y = (top + index // BLOCK + 1 - (HEIGHT + 6)).to(tl.float32)
        halved = tl.zeros([BLOCK, COLUMNS], tl.float32)
        for left in range(0, 2 * (WIDTH + 6), BLOCK):
            x = (left + index % BLOCK + 1 - (WIDTH + 6)).to(tl.float32)
            u = xx * x + xy * y + shift_x
            v = yx * x + yy * y + shift_y
            column, weight = _neighbour(taps, u[:, None], eight, flip_x, WIDTH)
            canvas = tl.zeros([BLOCK * BLOCK], tl.float32)
            for k in range(7):
                row, row_weight = _neighbour(taps, v, k, flip_y, HEIGHT)
                pixels = tl.load(image + row[:, None] * stride_h + column * stride_w)
                canvas += row_weight * tl.sum(weight * pixels.to(tl.float32), axis=1)
            canvas = canvas.reshape(BLOCK, BLOCK)
            across_x = _halving(taps, (left + block)[:, None], columns[None, :])
            halved = tl.dot(canvas, across_x, halved, input_precision="ieee")
        down_y = _halving(taps, (top + block)[None, :], rows[:, None])
        out = tl.dot(down_y, halved, out, input_precision="ieee")
    at = (rows[:, None] * WIDTH + columns[None, :]) * CHANNELS + c
    at += n * (HEIGHT * WIDTH * CHANNELS)
    inside = (rows < HEIGHT)[:, None] & (columns < WIDTH)[None, :]
    tl.store(transformed + at, out.to(transformed.dtype.element_ty), mask=inside)


def configurations() -> Iterator[tuple]:
    """Yield (label, kernel, signature, constants, warps, stages); see kernels.compile."""
    floats = (
        "scale",
        "rotate",
        "aniso",
        "aniso_rotate",
        "translate",
        "transformed",
        "labels",
        "taps",
    )
    strides = ("stride_n", "stride_c", "stride_h", "stride_w", "samples")
    signature = {"images": "*fp32", "xflip": "*i64", "yflip": "*i64"}
    signature |= dict.fromkeys(floats, "*fp32") | dict.fromkeys(strides, "i32")
    for size in (32, 64):
        constants = dict(
            CHANNELS=3, HEIGHT=size, WIDTH=size, ROWS=size, COLUMNS=size, BLOCK=BLOCK
        )  # fmt: skip
        yield f"augment {size}x{size}", _augment_kernel, signature, constants, 8, 1
