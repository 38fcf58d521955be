"""Power-function EMAs of the weights, and EMAs of any width made from them after training.

At t images, the profile of an EMA with exponent γ weights the parameters of τ images by
p(τ) = (γ+1)·τ^γ / t^(γ+1) for 0 ≤ τ ≤ t: its width grows with the run. The relative standard
deviation σ = std(τ)/t names a profile. Source: Karras et al., arXiv 2312.02696, section 3.
"""

from collections.abc import Sequence

import numpy as np

from sid_fast.errors import UserError

MIN_STD, MAX_STD = 0.005, 0.28  # γ from 195 down to 0.07; 0.2887 is the plain mean, γ = 0
Profile = tuple[float, float]  # t > 0, in images, and γ


def exponent(std: float) -> float:
    """Return γ of a relative standard deviation: the positive root of (γ+2)²·(γ+3)·σ² = γ+1.

    Raises:
        UserError: std is out of range.
    """
    if not MIN_STD <= std <= MAX_STD:  # NaN too
        raise UserError(f"ema_std={std:g} is out of range: choose from {MIN_STD} to {MAX_STD}")
    s = std**-2
    return float(np.roots([1, 7, 16 - s, 12 - s]).real.max())


def exponents(stds: Sequence[float]) -> list[float]:
    """Return γ of each profile that a run tracks.

    Raises:
        UserError: A std is out of range, or two have the same name in files (three decimals).
    """
    names = [f"{std:.3f}" for std in stds]
    if len(set(names)) < len(names):
        raise UserError(f"ema_std={','.join(f'{s:g}' for s in stds)}: each width must be another")
    return [exponent(std) for std in stds]


def decay(images: int, batch: int, gamma: float) -> float:
    """Return β of a step of `batch` images that starts at `images`: (1 − Δ/t)^(γ+1), t at its end.

    β of the first step is 0: the EMA begins with the weights that this step made.
    """
    return (1 - batch / (images + batch)) ** (gamma + 1)


def inner_products(a: Sequence[Profile], b: Sequence[Profile]) -> np.ndarray:
    """Return ∫ p_a(τ)·p_b(τ) dτ of every pair, float64 [len(a), len(b)]."""
    t_a, gamma_a = np.array(a, dtype=np.float64).T[:, :, None]
    t_b, gamma_b = np.array(b, dtype=np.float64).T[:, None, :]
    # With m = min(t_a, t_b) and M the larger: m^(γa+γb+1)/(t_a^(γa+1)·t_b^(γb+1)) = (m/M)^γM / M,
    # where γM belongs to the profile that ends at M.
    later = np.maximum(t_a, t_b)
    ratio = np.minimum(t_a, t_b) / later
    power = np.where(t_a < t_b, gamma_b, gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * ratio**power / later


def combination(stored: Sequence[Profile], wanted: Profile) -> np.ndarray:
    """Return the weights x of stored EMAs whose sum comes closest to the wanted one.

    Minimises ∫ (Σ x_i·p_i − p)² dτ, subject to Σ x_i = 1 so that a constant parameter stays itself.

    Args:
        stored: Profiles of the stored EMAs, all different.
        wanted: Profile of the EMA to reconstruct.

    Returns:
        float64 [len(stored)], summing to 1.
    """
    n = len(stored)
    # Scaled to t = 1, so that the constraint's row is of the order of the others.
    stored = [(t / wanted[0], gamma) for t, gamma in stored]
    system = np.ones((n + 1, n + 1))
    system[:n, :n] = inner_products(stored, stored)
    system[n, n] = 0
    right = np.append(inner_products(stored, [(1.0, wanted[1])]), 1.0)
    return np.linalg.lstsq(system, right, rcond=None)[0][:n]


def distance(stored: Sequence[Profile], weights: np.ndarray, wanted: Profile) -> float:
    """Return ‖Σ x_i·p_i − p‖ / ‖p‖ of a combination, in the L² norm of profiles."""
    stored = [(t / wanted[0], gamma) for t, gamma in stored]
    target = [(1.0, wanted[1])]
    norm = inner_products(target, target)[0, 0]
    cross = weights @ inner_products(stored, target)[:, 0]
    square = weights @ inner_products(stored, stored) @ weights - 2 * cross + norm
    return float(np.sqrt(max(square, 0.0) / norm))
