"""The augmentation kernel and its eager form against float64."""

import numpy as np
import pytest
import torch

from sid_fast import augment, kernels
from sid_fast.kernels import dispatch
from sid_fast.kernels._triton import tl, triton
from sid_fast.kernels.augment import _cos_sin, augment_eager, bytes_moved, flop
from tests.helpers.augmentation import stream, to_device
from tests.helpers.golden import relative

# Relative error of the kernel in norm: coordinates are accurate to 1e-6 of the image's size.
KERNEL_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.fixture(params=["triton", "eager"])
def backend(request):
    with dispatch.forced(request.param):
        yield request.param


@pytest.mark.parametrize(
    ("shape", "dtype", "channels_last"),
    [
        ((1, 3, 8, 8), torch.float32, True),
        ((2, 2, 5, 9), torch.float32, False),
        ((2, 1, 8, 8), torch.bfloat16, True),
        ((2, 1, 8, 8), torch.float16, False),
    ],
)
@pytest.mark.parametrize("far", [1.0, 4.0])
def test_the_transform_matches_float64(device, backend, shape, dtype, channels_last, far):
    """At far=4, parameters exceed any likely draw, and lookups leave the reflected image."""
    rng = torch.Generator().manual_seed(int(far))
    parameters = augment.draw(stream(shape[0], int(far)), 1.0)
    for name in ("scale", "aniso", "translate"):
        parameters[name] *= far
    images = torch.randn(shape, generator=rng).to(dtype)
    exact = {k: v.double() if v.is_floating_point() else v for k, v in parameters.items()}
    wanted, _ = augment_eager(images.double(), exact)
    images = images.to(device)
    if channels_last:
        images = images.to(memory_format=torch.channels_last)
    augmented, labels = kernels.augment(images, to_device(parameters, device))
    assert augmented.dtype == dtype
    assert augmented.shape == shape
    assert relative(augmented.cpu(), wanted) <= KERNEL_TOLERANCE[dtype]
    assert relative(labels.cpu(), kernel_labels(parameters)) <= 1e-6


def kernel_labels(parameters):
    _, labels = augment_eager(torch.zeros(len(parameters["scale"]), 1, 4, 4), parameters)
    return labels


@triton.jit
def _cos_sin_of(x, cos, sin, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    c, s = _cos_sin(tl.load(x + at))
    tl.store(cos + at, c)
    tl.store(sin + at, s)


def test_cosine_and_sine_are_accurate_to_an_ulp(device):
    """Over a turn, at and near multiples of π/4, close to 0, and several turns away."""
    edges = torch.arange(-8, 9) * np.pi / 4
    x = torch.cat(
        [torch.linspace(-np.pi, np.pi, 3000), edges, edges * (1 + 1e-6), edges * (1 - 1e-6)]
    )
    tiny = torch.logspace(-30, -1, 500)
    x = torch.cat([x, tiny, -tiny, torch.tensor([0.0])]).float()
    x = torch.cat([x, torch.linspace(-100, 100, 4096 - len(x))]).to(device)
    cos, sin = torch.empty_like(x), torch.empty_like(x)
    _cos_sin_of[(1,)](x, cos, sin, len(x))
    assert float((cos - x.double().cos()).abs().max()) <= 2**-23
    assert float((sin - x.double().sin()).abs().max()) <= 2**-23
    assert float((sin / x - (x.double().sin() / x)).nan_to_num(0).abs().max()) <= 2**-23


def test_bytes_and_flop_equal_a_count_by_hand():
    """A 4×4 image has a canvas of 20×20 pixels, each 7 rows of 7 products and their sums."""
    assert bytes_moved(2 * 3 * 4 * 4) == 768
    assert flop(2, 3, 4, 4) == 6 * (400 * 112 + 20 * 4 * 24 + 4 * 4 * 24)
