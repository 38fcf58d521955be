"""The Fréchet distance between two sets of features (arXiv 1706.08500)."""

import torch


def moments(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [D] and covariance [D, D] (over N−1) of features [N, D], in float64."""
    features = features.double()
    return features.mean(0), torch.cov(features.T)


def _root(matrix: torch.Tensor) -> torch.Tensor:
    """The square root of a symmetric positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet_distance(
    mu1: torch.Tensor, sigma1: torch.Tensor, mu2: torch.Tensor, sigma2: torch.Tensor
) -> float:
    """|μ−μ'|² + tr(Σ + Σ' − 2(ΣΣ')^½), from means [D] and covariances [D, D].

    ΣΣ' has the eigenvalues of Σ^½Σ'Σ^½, which is symmetric: so no imaginary part arises, and
    rank-deficient covariances are no special case.
    """
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(v).double() for v in (mu1, sigma1, mu2, sigma2))
    root = _root(sigma1)
    cross = torch.linalg.eigvalsh(root @ sigma2 @ root).clamp(min=0).sqrt().sum()
    return float((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross)
