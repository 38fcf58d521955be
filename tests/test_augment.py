"""The augmentation against numbers of the published one."""

import numpy as np
import pytest
import torch
from golden import TOLERANCE, read, relative

from sid_fast import augment


def test_augmentation_matches_golden(golden):
    data = read(golden / "augment.npz")
    parameters = {k.removeprefix("param."): v for k, v in data.items() if k.startswith("param.")}
    found, labels = augment.apply(data["images"], parameters)
    assert torch.equal(labels, data["labels"])
    assert relative(found, data["augmented"]) <= TOLERANCE


def test_an_image_drawn_with_nothing_applied_stays_as_it_was():
    rng = torch.Generator().manual_seed(0)
    parameters = augment.draw(4, 0.0, rng) | {"xflip": torch.zeros(4, dtype=torch.long)}
    images = torch.randn(4, 3, 8, 8)
    found, labels = augment.apply(images, parameters)
    assert not labels.any()
    # The wavelet filters reconstruct all but perfectly.
    assert relative(found, images) < 1e-3


def test_draws_follow_their_probabilities():
    n = 20_000
    q = augment.draw(n, 0.3, torch.Generator().manual_seed(0))
    rate = {name: float((v != 0).float().mean()) for name, v in q.items()}
    assert rate["xflip"] == pytest.approx(0.5, abs=0.02)
    assert rate["yflip"] == pytest.approx(0.15, abs=0.02)
    for name in ("scale", "rotate", "aniso", "translate"):
        assert rate[name] == pytest.approx(0.3, abs=0.02), name
    assert rate["aniso_rotate"] == pytest.approx(0.5, abs=0.02)
    turned = q["rotate"][q["rotate"] != 0]
    assert float(turned.abs().max()) <= np.pi
    assert float(turned.std()) == pytest.approx(np.pi / 3**0.5, rel=0.05)
