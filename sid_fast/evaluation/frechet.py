"""The Fréchet distance between two sets of features (arXiv 1706.08500)."""

import torch

from sid_fast.performance import process_group


class Moments:
    """Mean and covariance of features that come batch by batch, summed in float64.

    The sums stay on the features' device until they are asked for.
    """

    def __init__(self) -> None:
        self.count = 0
        self.total = self.products = torch.zeros((), dtype=torch.float64)

    def add(self, features: torch.Tensor) -> None:
        """Take in a batch [N, D] of any float type."""
        features = features.double()
        self.count += len(features)
        self.total = self.total + features.sum(0)
        self.products = self.products + features.T @ features

    def reduce(self) -> None:
        """Take in what the other processes have; every process needs to have had an image."""
        self.count = int(
            process_group.all_reduce_sum(torch.full((1,), self.count, device=self.total.device))
        )
        for values in (self.total, self.products):
            process_group.all_reduce_sum(values)

    def moments(self, correction: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean [D] and covariance [D, D] over N − correction, in float64."""
        mean = self.total / self.count
        scatter = self.products - self.count * torch.outer(mean, mean)
        return mean, scatter / (self.count - correction)


def moments(features: torch.Tensor, correction: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [D] and covariance [D, D] over N − correction of features [N, D], in float64."""
    features = features.double()
    return features.mean(0), torch.cov(features.T, correction=correction)


def _factor(matrix: torch.Tensor) -> torch.Tensor:
    """F [D, rank] with F Fᵀ = matrix, symmetric positive semidefinite.

    Eigenvalues that rounding cannot tell from 0 are left out: the square root of such noise,
    once for every dimension that the samples do not reach, would be an error of 1e-8 each.
    """
    values, vectors = torch.linalg.eigh(matrix)
    kept = values > len(values) * torch.finfo(values.dtype).eps * values[-1]
    return vectors[:, kept] * values[kept].sqrt()


def frechet_distance(
    mu1: torch.Tensor, sigma1: torch.Tensor, mu2: torch.Tensor, sigma2: torch.Tensor
) -> float:
    """|μ−μ'|² + tr(Σ + Σ' − 2(ΣΣ')^½), from means [D] and covariances [D, D].

    Takes tensors or arrays and computes in float64 on the device of the first. With Σ = FFᵀ and
    Σ' = GGᵀ, both from symmetric eigenvalue problems, the eigenvalues of (ΣΣ')^½ are the singular
    values of FᵀG: real, and right to rounding also where covariances are ill-conditioned.
    """
    device = torch.as_tensor(mu1).device
    mu1, sigma1, mu2, sigma2 = (
        torch.as_tensor(v).to(device, torch.float64) for v in (mu1, sigma1, mu2, sigma2)
    )
    cross = torch.linalg.svdvals(_factor(sigma1).T @ _factor(sigma2)).sum()
    found = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross
    return max(float(found), 0.0)  # which rounding can make of 0 what is less
