"""The Fréchet distance between two sets of features (arXiv 1706.08500)."""

import torch

from sid_fast.performance import process_group


class Moments:
    """Accumulates mean and covariance of features over batches, in float64 on their device."""

    def __init__(self) -> None:
        self.count = 0
        self.total = self.products = torch.zeros((), dtype=torch.float64)

    def add(self, features: torch.Tensor) -> None:
        """Add a batch of features [N, D] of any float dtype."""
        features = features.double()
        self.count += len(features)
        self.total = self.total + features.sum(0)
        self.products = self.products + features.T @ features

    def reduce(self) -> None:
        """Sum over all ranks; every rank must have added at least one image."""
        self.count = int(
            process_group.all_reduce_sum(torch.full((1,), self.count, device=self.total.device))
        )
        for values in (self.total, self.products):
            process_group.all_reduce_sum(values)

    def moments(self, correction: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean [D] and covariance [D, D], over N − correction, in float64."""
        mean = self.total / self.count
        scatter = self.products - self.count * torch.outer(mean, mean)
        return mean, scatter / (self.count - correction)


def moments(features: torch.Tensor, correction: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [D] and covariance [D, D], over N − correction, of features [N, D], in float64."""
    features = features.double()
    return features.mean(0), torch.cov(features.T, correction=correction)


def _factor(matrix: torch.Tensor) -> torch.Tensor:
    """Factor F [D, rank] of a symmetric positive semidefinite matrix = F Fᵀ.

    Eigenvalues within rounding of 0 are dropped: with fewer samples than dimensions, the square
    root of each such eigenvalue would add an error of about 1e-8.
    """
    values, vectors = torch.linalg.eigh(matrix)
    nonzero = values > len(values) * torch.finfo(values.dtype).eps * values[-1]
    return vectors[:, nonzero] * values[nonzero].sqrt()


def frechet_distance(
    mu1: torch.Tensor, sigma1: torch.Tensor, mu2: torch.Tensor, sigma2: torch.Tensor
) -> float:
    """Fréchet distance |μ−μ'|² + tr(Σ + Σ' − 2(ΣΣ')^½) of two Gaussians.

    With Σ = FFᵀ and Σ' = GGᵀ from symmetric eigendecompositions, the eigenvalues of (ΣΣ')^½ are
    the singular values of FᵀG: real, and accurate even for ill-conditioned covariances. Computed in
    float64 on the device of `mu1`.

    Args:
        mu1: mean [D], tensor or array.
        sigma1: covariance [D, D].
        mu2: the other mean [D].
        sigma2: the other covariance [D, D].
    """
    device = torch.as_tensor(mu1).device
    mu1, sigma1, mu2, sigma2 = (
        torch.as_tensor(v).to(device, torch.float64) for v in (mu1, sigma1, mu2, sigma2)
    )
    cross = torch.linalg.svdvals(_factor(sigma1).T @ _factor(sigma2)).sum()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross
    return max(float(distance), 0.0)  # rounding can make an exact 0 slightly negative
