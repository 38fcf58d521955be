"""Power-function EMAs: widths and exponents, decay per step, and combinations of stored ones."""

import itertools

import numpy as np
import pytest

from sid_fast.errors import UserError
from sid_fast.training import power_ema


def std_of(gamma: float) -> float:
    """The closed form (arXiv 2312.02696, section 3)."""
    return ((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) ** 0.5


def density(tau, t, gamma):
    return np.where(tau <= t, (gamma + 1) * tau**gamma / t ** (gamma + 1), 0.0)


@pytest.mark.parametrize("gamma", [0.2, 1, 6.94, 16.97, 150])
def test_exponents_and_widths_are_inverse(gamma):
    assert power_ema.exponent(std_of(gamma)) == pytest.approx(gamma, rel=1e-9)


def test_published_exponents():
    found = [power_ema.exponent(std) for std in (0.05, 0.1)]
    assert found == pytest.approx([16.97, 6.94], abs=5e-3)


def test_the_width_is_that_of_the_profile():
    tau = np.linspace(0, 1, 100_001)
    p = density(tau, 1.0, power_ema.exponent(0.15))
    mean = np.trapezoid(p * tau, tau)
    assert np.trapezoid(p * (tau - mean) ** 2, tau) ** 0.5 == pytest.approx(0.15, rel=1e-6)


@pytest.mark.parametrize("std", [0.0, 0.004, 0.2888, float("nan"), -0.1])
def test_widths_out_of_range_are_refused(std):
    with pytest.raises(UserError, match=r"ema_std=.*0\.005 to 0\.28"):
        power_ema.exponent(std)


def test_two_widths_of_one_name_are_refused():
    with pytest.raises(UserError, match=r"ema_std=0\.1,0\.1001"):
        power_ema.exponents([0.1, 0.1001])


def test_decays_make_the_profile():
    """Weights of the steps after n of them: differences of (τ/t)^(γ+1), which sum to 1."""
    n, batch, gamma = 50, 4, power_ema.exponent(0.1)
    weights = np.zeros(n)
    for i in range(n):
        beta = power_ema.decay(i * batch, batch, gamma)
        weights = weights * beta
        weights[i] = 1 - beta
    edges = (np.arange(n + 1) / n) ** (gamma + 1)
    np.testing.assert_allclose(weights, np.diff(edges), rtol=1e-9)
    assert weights.sum() == pytest.approx(1, abs=1e-12)


def test_inner_products_are_integrals():
    a, b = (3.0, 5.2), (5.0, 2.1)
    tau = np.linspace(0, 5, 1_000_001)
    found = power_ema.inner_products([a, b], [a, b])
    expected = [[np.trapezoid(density(tau, *p) * density(tau, *q), tau) for q in (a, b)]
                for p in (a, b)]  # fmt: skip
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def stored(n: int, stds=(0.05, 0.1)) -> list[power_ema.Profile]:
    return [(1e6 * (i + 1) / n, power_ema.exponent(s)) for i in range(n) for s in stds]


@pytest.mark.parametrize("n", [1, 3, 16, 100])
@pytest.mark.parametrize("std", [0.03, 0.1, 0.2])
def test_the_weights_sum_to_1(n, std):
    weights = power_ema.combination(stored(n), (1e6, power_ema.exponent(std)))
    assert weights.sum() == pytest.approx(1, abs=1e-9)


def test_a_stored_width_is_returned_as_it_is():
    weights = power_ema.combination(stored(4), (1e6, power_ema.exponent(0.1)))
    np.testing.assert_allclose(weights, [0] * 7 + [1], atol=1e-6)


def test_the_combination_minimises_the_distance():
    profiles, wanted = stored(4), (1e6, power_ema.exponent(0.135))
    best = power_ema.combination(profiles, wanted)
    least = power_ema.distance(profiles, best, wanted)
    rng = np.random.default_rng(0)
    for _ in range(20):
        step = rng.normal(size=8)
        other = best + 0.01 * (step - step.mean())  # the sum stays 1
        assert power_ema.distance(profiles, other, wanted) > least


def test_the_distance_is_that_of_the_densities():
    profiles, wanted = stored(3), (1e6, power_ema.exponent(0.135))
    weights = power_ema.combination(profiles, wanted)
    tau = np.linspace(0, 1e6, 400_001)
    target = density(tau, *wanted)
    sum_ = sum(w * density(tau, *p) for w, p in zip(weights, profiles, strict=True))
    off = (np.trapezoid((sum_ - target) ** 2, tau) / np.trapezoid(target**2, tau)) ** 0.5
    assert power_ema.distance(profiles, weights, wanted) == pytest.approx(off, rel=1e-3)


@pytest.mark.parametrize("std", [0.03, 0.135, 0.2])
def test_more_snapshots_come_closer(std):
    wanted = 1e6, power_ema.exponent(std)
    off = [power_ema.distance(p, power_ema.combination(p, wanted), wanted)
           for p in map(stored, (4, 8, 16, 32, 64))]  # fmt: skip
    assert all(b < 0.85 * a for a, b in itertools.pairwise(off))
    assert off[-1] < 0.02
