"""KID, precision and recall of two sets of features; the Inception score of class probabilities.

Every function takes tensors or arrays and computes in float64 on the device of the first.
"""

import torch

from sid_fast.errors import UserError
from sid_fast.io import progress

_TILE = 2**25  # pairwise distances in memory at a time


def _double(*values: torch.Tensor) -> list[torch.Tensor]:
    device = torch.as_tensor(values[0]).device
    return [torch.as_tensor(v).to(device, torch.float64) for v in values]


def kernel_distance(
    real: torch.Tensor, generated: torch.Tensor, subsets: int = 100, subset_size: int = 1000
) -> float:
    """The kernel distance (KID; arXiv 1801.01401) of features [N, D] and [M, D].

    The unbiased squared maximum mean discrepancy under the kernel (x·y/D + 1)³, averaged over
    random subsets of both sets. The subsets are sampled without replacement from a fixed seed.
    Unlike the Fréchet distance, it is unbiased for few images.

    Args:
        real: features [N, D].
        generated: features [M, D].
        subsets: number of subsets to average over.
        subset_size: images per subset, at most min(N, M).

    Raises:
        UserError: a set has fewer than 2 images.
    """
    real, generated = _double(real, generated)
    size = min(subset_size, len(real), len(generated))
    if size < 2:
        raise UserError(f"the kernel distance needs at least 2 images of each set, not {size}")
    if size == len(real) == len(generated):
        subsets = 1  # every subset would be the whole set
    rng = torch.Generator().manual_seed(0)

    def subset(features: torch.Tensor) -> torch.Tensor:
        return features[torch.randperm(len(features), generator=rng)[:size].to(features.device)]

    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    total: torch.Tensor | float = 0.0
    for _ in progress.track(range(subsets), "computing the kernel distance", "subsets"):
        x, y = subset(real), subset(generated)
        within = sum(k.sum() - k.trace() for k in (kernel(x, x), kernel(y, y))) / (size - 1)
        total += (within - 2 * kernel(x, y).sum() / size) / size
    return float(total / subsets)


def precision_recall(
    real: torch.Tensor, generated: torch.Tensor, k: int = 3
) -> tuple[float, float]:
    """Improved precision and recall (arXiv 1904.06991) of features [N, D] and [M, D].

    Precision: the fraction of generated images that are no farther from some real image than that
    image's k-th nearest real neighbour. Recall: the same with real and generated exchanged.
    """
    real, generated = _double(real, generated)
    if min(len(real), len(generated)) <= k:
        raise UserError(f"precision and recall need more than {k} images of each set")
    count = len(real) + len(generated)
    with progress.phase("computing precision and recall", 2 * count, "images") as shown:
        return _covered(generated, real, k, shown), _covered(real, generated, k, shown)


def _covered(points: torch.Tensor, balls: torch.Tensor, k: int, shown: progress.Phase) -> float:
    """Fraction of points inside a ball of `balls`; each radius is its k-th neighbour distance."""
    rows = max(_TILE // len(balls), 1)
    # k + 1: each point is its own nearest neighbour.
    radii = []
    for part in balls.split(rows):
        radii.append(torch.cdist(part, balls).kthvalue(k + 1).values)
        shown.update(len(part))
    radius, inside = torch.cat(radii), torch.zeros((), dtype=torch.int64, device=balls.device)
    for part in points.split(rows):
        inside += (torch.cdist(part, balls) <= radius).any(1).sum()
        shown.update(len(part))
    return float(inside) / len(points)


def inception_score(probabilities: torch.Tensor, splits: int = 10) -> tuple[float, float]:
    """The Inception score (arXiv 1606.03498) of class probabilities [N, C]: mean and std.

    The images are cut into `splits` consecutive parts. A part's score is exp of the mean
    Kullback-Leibler divergence of its probabilities from their average; mean and std are over the
    parts.
    """
    (probabilities,) = _double(probabilities)
    if len(probabilities) < splits:
        raise UserError(f"an Inception score over {splits} splits needs at least {splits} images")
    scores = []
    for part in probabilities.tensor_split(splits):
        entropy = torch.special.entr(part).sum(1).mean()
        scores.append((torch.special.entr(part.mean(0)).sum() - entropy).exp())
    values = torch.stack(scores)
    return float(values.mean()), float(values.std(correction=0))
