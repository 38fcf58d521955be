"""The Fréchet distance against the published code's numbers and against scipy."""

import numpy as np
import pytest
import scipy.linalg
import torch
from golden import read

from sid_fast.evaluation import frechet_distance, moments


def test_frechet_distance_matches_golden(golden):
    data = read(golden / "metrics.npz")
    found = frechet_distance(*moments(data["generated"]), *moments(data["real"]))
    assert found == pytest.approx(float(data["fid_edm"]), rel=1e-6)


@pytest.mark.parametrize("samples", [200, 20])  # 20 samples in 64 dimensions: rank-deficient
def test_frechet_distance_matches_the_matrix_square_root(samples):
    rng = np.random.default_rng(0)
    spread = np.geomspace(1, 1e-3, 64)
    a, b = (moments(torch.from_numpy(rng.normal(m, spread, (samples, 64)))) for m in (0, 0.1))
    root = scipy.linalg.sqrtm(a[1].numpy() @ b[1].numpy()).real
    expected = float((a[0] - b[0]).square().sum() + (a[1] + b[1]).trace() - 2 * np.trace(root))
    assert frechet_distance(*a, *b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(*a, *a) == pytest.approx(0, abs=1e-7)
