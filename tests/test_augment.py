"""The augmentation against upstream's golden data, and the distribution of its draws."""

import numpy as np
import pytest
import torch

from sid_fast import augment
from sid_fast.kernels import dispatch
from tests.helpers.augmentation import stream, to_device
from tests.helpers.golden import TOLERANCE, read, relative


@pytest.fixture(params=["triton", "eager"])
def backend(request):
    with dispatch.forced(request.param):
        yield request.param


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
