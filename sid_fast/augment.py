"""The non-leaky geometric augmentation of EDM training, with fixed shapes.

Geometry as in Karras et al., arXiv 2006.06676, appendix B: the image is warped in a band-limited
way, at twice its resolution between two passes of a wavelet filter. Nothing here reads a value
back to the host, and no size depends on the data.
"""

import functools
import math

import torch
import torch.nn.functional as F

# Decomposition low-pass of the sym6 wavelet.
SYM6 = (
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633,
    0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252,
    -0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148,
)  # fmt: skip
LABEL_DIM = 9

Parameters = dict[str, torch.Tensor]


def draw(n: int, p: float, rng: torch.Generator) -> Parameters:
    """Parameters of n warps at probability multiplier p, on the device of rng.

    Each is [n], translate [2, n] in parts of an eighth of the size; 0 where not applied.
    """

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, n, generator=rng, device=rng.device)

    def uniform() -> torch.Tensor:
        return torch.rand(n, generator=rng, device=rng.device)

    def sometimes(value: torch.Tensor, probability: float) -> torch.Tensor:
        return torch.where(uniform() < probability, value, torch.zeros_like(value))

    def angle() -> torch.Tensor:
        return (uniform() * 2 - 1) * math.pi

    def coin() -> torch.Tensor:
        return (uniform() < 0.5).long()

    return {
        "xflip": coin(),  # multiplier 1e8: always tossed
        "yflip": sometimes(coin(), p),
        "scale": sometimes(normal(), p),
        "rotate": sometimes(angle(), p),
        "aniso": sometimes(normal(), p),
        "aniso_rotate": sometimes(angle(), 0.5),
        "translate": sometimes(normal(2), p),
    }


def labels_of(parameters: Parameters) -> torch.Tensor:
    """What the network is told of the warp, float32 [N, 9]."""
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
    """[N, 3, 3] from entries that are [N] or numbers."""
    like = next(v for row in rows for v in row if isinstance(v, torch.Tensor))
    full = [v if isinstance(v, torch.Tensor) else torch.full_like(like, v) for r in rows for v in r]
    return torch.stack(full, dim=-1).unflatten(-1, (3, 3))


def _rotation(a: torch.Tensor) -> torch.Tensor:
    return _matrix((a.cos(), -a.sin(), 0), (a.sin(), a.cos(), 0), (0, 0, 1))


def _scaling(x, y) -> torch.Tensor:
    return _matrix((x, 0, 0), (0, y, 0), (0, 0, 1))


def _translation(x, y) -> torch.Tensor:
    return _matrix((1, 0, x), (0, 1, y), (0, 0, 1))


def lookup(parameters: Parameters, height: int, width: int) -> torch.Tensor:
    """Where an output pixel finds its source, in pixels about the centre, [N, 3, 3].

    M = S(1/s₀) · R(w) · R(−r) S(1/s, s) R(r) · T(−0.125·size·n): x to the right, y down.
    """
    q = {name: value.float() for name, value in parameters.items()}
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


@functools.cache
def _taps(device: torch.device) -> torch.Tensor:
    """The filter on a device; kept there, since copying it over would stall the device."""
    return torch.tensor(SYM6, device=device)


def _filter_axes(x: torch.Tensor, taps: torch.Tensor, stride: int, padding: int) -> torch.Tensor:
    channels = x.shape[1]
    taps = taps.expand(channels, 1, -1)
    for step, pad, kernel in (
        ((1, stride), (0, padding), taps[:, :, None, :]),
        ((stride, 1), (padding, 0), taps[:, :, :, None]),
    ):
        x = F.conv2d(x, kernel, stride=step, padding=pad, groups=channels)
    return x


def apply(images: torch.Tensor, parameters: Parameters) -> tuple[torch.Tensor, torch.Tensor]:
    """Warp images by the parameters of `draw`.

    images is float32 [N, C, H, W]. Returns the warped images, same shape, and their labels,
    float32 [N, 9].
    """
    n, channels, height, width = images.shape
    x = images
    for name, axis in (("xflip", 3), ("yflip", 2)):
        x = torch.where(parameters[name].bool()[:, None, None, None], x.flip(axis), x)

    # Reflect by as much as could ever be needed; sizes from the data would stall the device.
    x = F.pad(x, [width - 1, width - 1, height - 1, height - 1], mode="reflect")
    taps = _taps(x.device)
    up = x.new_zeros(n, channels, x.shape[2], 2, x.shape[3], 2)
    up[:, :, :, 0, :, 0] = x
    up = up.flatten(4).flatten(2, 3)
    up = _filter_axes(up, taps.flip(0), stride=1, padding=(len(SYM6) + 1) // 2)[..., :-1, :-1]

    margin = len(SYM6) // 4  # the filter's reach, in pixels of the output
    canvas = (height + 2 * margin) * 2, (width + 2 * margin) * 2
    one = torch.ones(n, device=x.device)
    # In doubled pixels, whose centre lies half a pixel off; then in grid_sample's [-1, 1].
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
