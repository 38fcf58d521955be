"""The augmentation against upstream's golden data, its kernel also against float64."""

import numpy as np
import pytest
import torch

from sid_fast import augment, kernels
from sid_fast.kernels import dispatch
from sid_fast.kernels._triton import tl, triton
from sid_fast.kernels.augment import _cos_sin, augment_eager, bytes_moved, flop
from sid_fast.methods.base import RandomStream
from tests.helpers.golden import TOLERANCE, read, relative

# Relative error of the kernel in norm: coordinates are accurate to 1e-6 of the image's size.
KERNEL_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.fixture(params=["triton", "eager"])
def backend(request):
    with dispatch.forced(request.param):
        yield request.param


def to_device(parameters, device):
    return {name: v.to(device) for name, v in parameters.items()}


def stream(n, seed=0):
    return RandomStream(torch.tensor([seed, 0, 0]), "fake", n)


def test_augmentation_matches_golden(golden, device, backend):
    data = read(golden / "augment.npz")
    parameters = {k.removeprefix("param."): v for k, v in data.items() if k.startswith("param.")}
    n = len(data["images"]) if backend == "eager" or device.type == "cuda" else 2
    parameters = to_device({k: v[..., :n] for k, v in parameters.items()}, device)
    augmented, labels = augment.apply(data["images"][:n].to(device), parameters)
    if backend == "eager":
        assert torch.equal(labels.cpu(), data["labels"])
    assert relative(labels.cpu(), data["labels"][:n]) <= 1e-6
    assert relative(augmented.cpu(), data["augmented"][:n]) <= TOLERANCE


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


def test_traced_without_a_break(device):
    images = torch.randn(2, 3, 8, 8, device=device)
    parameters = to_device(augment.draw(stream(2), 1.0), device)
    traced = torch.compile(augment.apply, fullgraph=True, backend="eager")(images, parameters)
    for a, b in zip(traced, augment.apply(images, parameters), strict=True):
        assert torch.equal(a, b)


def test_an_image_with_no_transform_drawn_stays_unchanged():
    parameters = augment.draw(stream(4), 0.0) | {"xflip": torch.zeros(4, dtype=torch.long)}
    images = torch.randn(4, 3, 8, 8)
    augmented, labels = augment.apply(images, parameters)
    assert not labels.any()
    # The wavelet filters' reconstruction is almost exact.
    assert relative(augmented, images) < 1e-3


def test_draws_follow_their_probabilities():
    n = 20_000
    q = augment.draw(stream(n), 0.3)
    rate = {name: float((v != 0).float().mean()) for name, v in q.items()}
    assert rate["xflip"] == pytest.approx(0.5, abs=0.02)
    assert rate["yflip"] == pytest.approx(0.15, abs=0.02)
    for name in ("scale", "rotate", "aniso", "translate"):
        assert rate[name] == pytest.approx(0.3, abs=0.02), name
    assert rate["aniso_rotate"] == pytest.approx(0.5, abs=0.02)
    turned = q["rotate"][q["rotate"] != 0]
    assert float(turned.abs().max()) <= np.pi
    assert float(turned.std()) == pytest.approx(np.pi / 3**0.5, rel=0.05)


def test_bytes_and_flop_equal_a_count_by_hand():
    """A 4×4 image has a canvas of 20×20 pixels, each 7 rows of 7 products and their sums."""
    assert bytes_moved(2 * 3 * 4 * 4) == 768
    assert flop(2, 3, 4, 4) == 6 * (400 * 112 + 20 * 4 * 24 + 4 * 4 * 24)
