"""The metrics against the published code's numbers, independent libraries and exact arithmetic."""

import mpmath
import numpy as np
import pytest
import scipy.linalg
import sklearn.neighbors
import torch

from sid_fast.errors import UserError
from sid_fast.evaluation import (
    frechet_distance,
    inception_score,
    kernel_distance,
    moments,
    precision_recall,
)
from sid_fast.evaluation.frechet import Moments
from sid_fast.evaluation.sample import FeatureStats
from tests.helpers.golden import read


@pytest.fixture(scope="module")
def features():
    """Real [300, 16] and generated [250, 16], a little apart."""
    rng = np.random.default_rng(0)
    real, generated = rng.normal(0, 1, (300, 16)), rng.normal(0.3, 0.8, (250, 16))
    return torch.from_numpy(real), torch.from_numpy(generated)


# --- the numbers of the published code


@pytest.mark.parametrize(("name", "correction"), [("fid_edm", 1), ("fid_sid", 0)])
def test_frechet_distance_matches_golden(golden, name, correction):
    data = read(golden / "metrics.npz")
    a, b = moments(data["generated"], correction), moments(data["real"], correction)
    assert frechet_distance(*a, *b) == pytest.approx(float(data[name]), rel=1e-9)


def test_the_other_metrics_match_golden(golden):
    data = read(golden / "metrics.npz")
    real, generated, n = data["real"], data["generated"], int(data["n"])
    found = kernel_distance(real[:n], generated[:n], 1, n)
    assert found == pytest.approx(float(data["kid_all_of_first_n"]), rel=1e-5)
    mean, std = inception_score(data["probabilities"], 10)
    assert mean == pytest.approx(float(data["is_mean"]), rel=1e-6)
    assert std == pytest.approx(float(data["is_std"]), rel=1e-6)
    # The published code rounds to float16, which moves an image at the edge of a ball.
    precision, recall = precision_recall(real, generated, int(data["k"]))
    assert precision == pytest.approx(float(data["precision"]), abs=1.01 / len(generated))
    assert recall == pytest.approx(float(data["recall"]), abs=1.01 / len(real))


# --- the Fréchet distance, whatever the covariances


def covariances(samples: list[int], smallest: float) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Two sets' moments in 12 dimensions whose spread falls from 1 to `smallest`."""
    rng = np.random.default_rng(1)
    spread = np.geomspace(1, smallest, 12)
    sets = []
    for mean, n in zip((0, 0.1), samples, strict=True):
        turn = np.linalg.qr(rng.normal(size=(12, 12)))[0]
        sets.append(moments(torch.from_numpy((rng.normal(mean, 1, (n, 12)) * spread) @ turn)))
    return sets


def exact(mu1, sigma1, mu2, sigma2) -> float:
    """The Fréchet distance with 50 digits."""
    with mpmath.workdps(50):
        values, vectors = mpmath.eigsy(mpmath.matrix(sigma1.tolist()))
        # What rounding has made of the eigenvalue 0 is no part of the exact answer.
        least = 1e-14 * max(values)
        roots = mpmath.diag([mpmath.sqrt(v) if v > least else 0 for v in values])
        root = vectors * roots * vectors.T
        product = root * mpmath.matrix(sigma2.tolist()) * root
        cross = mpmath.fsum(
            mpmath.sqrt(max(v, 0)) for v in mpmath.eigsy(product, eigvals_only=True)
        )
        rest = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace()
        return float(float(rest) - 2 * cross)


# 6 samples in 12 dimensions: rank-deficient.
@pytest.mark.parametrize("samples", [(200, 200), (6, 6), (6, 200)])
@pytest.mark.parametrize("smallest", [1, 1e-3, 1e-10])
def test_frechet_distance_is_exact_on_any_covariances(samples, smallest):
    a, b = covariances(samples, smallest)
    expected = exact(*a, *b)
    assert frechet_distance(*a, *b) == pytest.approx(expected, rel=1e-11)
    assert frechet_distance(*a, *a) == pytest.approx(0, abs=1e-11)
    root = scipy.linalg.sqrtm(a[1].numpy() @ b[1].numpy())
    rest = (a[0] - b[0]).square().sum() + (a[1] + b[1]).trace()
    assert float(rest) - 2 * np.trace(root).real == pytest.approx(expected, rel=1e-6)


def test_moments_of_batches_are_those_of_the_whole(features):
    real, _ = features
    some = Moments()
    for part in (real[:1].float(), real[1:200], real[200:]):
        some.add(part)
    for correction in (0, 1):
        mean, covariance = some.moments(correction)
        assert torch.allclose(mean, real.mean(0), rtol=1e-6, atol=1e-8)
        expected = np.cov(real.numpy().T, ddof=correction)
        assert np.allclose(covariance.numpy(), expected, rtol=1e-6, atol=1e-8)


def test_feature_stats_give_the_covariance_over_n(features):
    real, _ = features
    some = FeatureStats(*moments(real), count=len(real))
    for correction in (0, 1):
        expected = np.cov(real.numpy().T, ddof=correction)
        assert np.allclose(some.moments(correction)[1].numpy(), expected, rtol=1e-12)
    some.count = None  # as of a published file: what it holds is all there is
    assert torch.equal(some.moments(0)[1], some.covariance)


# --- independent libraries


@pytest.mark.filterwarnings("ignore")
def test_metrics_match_torchmetrics(features):
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.inception import InceptionScore
    from torchmetrics.image.kid import KernelInceptionDistance

    class Identity(torch.nn.Module):
        num_features = 16

        def forward(self, x):
            return x

    real, generated = features
    theirs = FrechetInceptionDistance(Identity(), input_img_size=(16,))
    theirs.set_dtype(torch.float64)
    for metric in (theirs, KernelInceptionDistance(Identity(), subsets=1, subset_size=250)):
        metric.update(real[:250], real=True)
        metric.update(generated, real=False)
        result = metric.compute()
        if metric is theirs:
            ours = frechet_distance(*moments(real[:250]), *moments(generated))
        else:
            result, ours = result[0], kernel_distance(real[:250], generated, 1, 250)
        assert ours == pytest.approx(float(result), rel=1e-8)
    score = InceptionScore(Identity(), splits=1)
    logits = generated * 2
    score.update(logits)
    expected = float(score.compute()[0])
    assert inception_score(logits.softmax(1), 1)[0] == pytest.approx(expected, rel=1e-6)


def test_precision_and_recall_match_a_nearest_neighbour_search(features, monkeypatch):
    real, generated = (f.numpy() for f in features)

    def covered(points, balls):
        search = sklearn.neighbors.NearestNeighbors(n_neighbors=3).fit(balls)
        radius = search.kneighbors()[0][:, -1]  # without the point itself
        return (sklearn.metrics.pairwise_distances(points, balls) <= radius).any(1).mean()

    expected = covered(generated, real), covered(real, generated)
    assert precision_recall(real, generated, 3) == pytest.approx(expected)
    assert expected[0] != pytest.approx(expected[1], abs=0.05), "the test cannot tell them apart"
    monkeypatch.setattr("sid_fast.evaluation.metrics._TILE", 1000)
    assert precision_recall(real, generated, 3) == pytest.approx(expected)


def test_random_subsets_estimate_the_kernel_distance_of_all(features):
    real, generated = features
    whole = kernel_distance(real[:250], generated, 1, 250)
    assert kernel_distance(real, generated, 400, 100) == pytest.approx(whole, rel=0.1)
    assert abs(kernel_distance(real[:150], real[150:], 1, 150)) < 0.1 * whole
    # Fewer images than a subset has: all of them, and a permutation changes nothing.
    assert kernel_distance(real, generated, 3, 1000) == kernel_distance(real, generated, 3, 250)


def test_inception_score_of_certain_and_of_useless_classes():
    assert inception_score(torch.eye(10).repeat(20, 1), 10) == pytest.approx((10, 0))
    assert inception_score(torch.full((50, 10), 0.1), 5) == pytest.approx((1, 0))


def test_too_few_images_are_refused():
    few = torch.zeros(3, 4)
    with pytest.raises(UserError, match="2 images"):
        kernel_distance(few[:1], few)
    with pytest.raises(UserError, match="more than 3 images"):
        precision_recall(few, few, 3)
    with pytest.raises(UserError, match="10 splits"):
        inception_score(few.softmax(1), 10)
