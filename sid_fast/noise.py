"""Noise levels σ of distillation and of the teacher's sampler."""

import torch

SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7


def _ramp(u: torch.Tensor) -> torch.Tensor:
    """Map u in [0, 1] to [σ_max, σ_min], linearly in σ^(1/ρ) (arXiv 2206.00364, equation 5)."""
    high, low = SIGMA_MAX ** (1 / RHO), SIGMA_MIN ** (1 / RHO)
    return (high + u * (low - high)) ** RHO


def generator_sigma(t: torch.Tensor) -> torch.Tensor:
    """Return the generator step's noise level for t in [0, 1]: σ_min at 0, σ_max at 1."""
    return _ramp(1 - t)


def fake_score_sigma(
    normal: torch.Tensor, p_mean: float = -1.2, p_std: float = 1.2
) -> torch.Tensor:
    """Return a denoiser's training noise, ln σ ~ N(p_mean, p_std²), for normal ~ N(0, 1)."""
    return (p_mean + p_std * normal).exp()


def sampler_sigmas(num_steps: int) -> torch.Tensor:
    """Return the sampler's noise levels followed by a final 0, float64 [num_steps + 1]."""
    u = torch.arange(num_steps, dtype=torch.float64) / max(num_steps - 1, 1)
    return torch.cat([_ramp(u), torch.zeros(1, dtype=torch.float64)])
