"""What is measured on two sets of features, or on class probabilities, besides their moments.

Every function takes tensors or arrays and computes in float64 on the device of the first.
"""

import torch

from sid_fast.errors import UserError

_TILE = 2**25  # distances held at a time


def _double(*values: torch.Tensor) -> list[torch.Tensor]:
    device = torch.as_tensor(values[0]).device
    return [torch.as_tensor(v).to(device, torch.float64) for v in values]


def kernel_distance(
    real: torch.Tensor, generated: torch.Tensor, subsets: int = 100, subset_size: int = 1000
) -> float:
    """The kernel distance (KID; arXiv 1801.01401) of features [N, D] and [M, D].

    The unbiased squared maximum mean discrepancy under the kernel (x·y/D + 1)³, averaged over
    random subsets of both, drawn without replacement and always the same; of all where there are
    fewer than subset_size. Unlike the Fréchet distance it has no bias for few images.
    """
    real, generated = _double(real, generated)
    size = min(subset_size, len(real), len(generated))
    if size < 2:
        raise UserError(f"a kernel distance needs 2 images of each kind, not {size}")
    if size == len(real) == len(generated):
        subsets = 1  # of everything there is but one
    rng = torch.Generator().manual_seed(0)

    def some(features: torch.Tensor) -> torch.Tensor:
        return features[torch.randperm(len(features), generator=rng)[:size].to(features.device)]

    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    total: torch.Tensor | float = 0.0
    for _ in range(subsets):
        x, y = some(real), some(generated)
        within = sum(k.sum() - k.trace() for k in (kernel(x, x), kernel(y, y))) / (size - 1)
        total += (within - 2 * kernel(x, y).sum() / size) / size
    return float(total / subsets)


def precision_recall(
    real: torch.Tensor, generated: torch.Tensor, k: int = 3
) -> tuple[float, float]:
    """Improved precision and recall (arXiv 1904.06991) of features [N, D] and [M, D].

    Precision: the part of the generated images that lie no farther from some real image than that
    image's k-th nearest neighbour among the real ones. Recall: the same with the roles exchanged.
    """
    real, generated = _double(real, generated)
    if min(len(real), len(generated)) <= k:
        raise UserError(f"precision and recall need more than {k} images of each kind")
    return _covered(generated, real, k), _covered(real, generated, k)


def _covered(points: torch.Tensor, balls: torch.Tensor, k: int) -> float:
    """The part of the points that lie in a ball around another set's points."""
    rows = max(_TILE // len(balls), 1)
    # An image is its own nearest neighbour: hence k + 1.
    radii = [torch.cdist(part, balls).kthvalue(k + 1).values for part in balls.split(rows)]
    radius = torch.cat(radii)
    inside = [(torch.cdist(p, balls) <= radius).any(1).sum() for p in points.split(rows)]
    return float(sum(inside)) / len(points)


def inception_score(probabilities: torch.Tensor, splits: int = 10) -> tuple[float, float]:
    """The Inception score (arXiv 1606.03498) of class probabilities [N, C]: mean and std.

    exp of the mean Kullback-Leibler divergence from the average, over `splits` consecutive parts
    of the images; std is over the parts.
    """
    (probabilities,) = _double(probabilities)
    if len(probabilities) < splits:
        raise UserError(f"an Inception score of {splits} splits needs as many images")
    scores = []
    for part in probabilities.tensor_split(splits):
        entropy = torch.special.entr(part).sum(1).mean()
        scores.append((torch.special.entr(part.mean(0)).sum() - entropy).exp())
    values = torch.stack(scores)
    return float(values.mean()), float(values.std(correction=0))
