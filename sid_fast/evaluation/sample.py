"""One pass over images: their moments, and the features of as many as can be kept."""

import contextlib
import dataclasses
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import torch
from tqdm import tqdm

from sid_fast.errors import UserError
from sid_fast.evaluation.features import Detector, Pixels
from sid_fast.evaluation.frechet import Moments, frechet_distance
from sid_fast.evaluation.metrics import inception_score, kernel_distance, precision_recall
from sid_fast.models import EDMNetwork
from sid_fast.performance import process_group
from sid_fast.performance.cuda_graphs import GraphedFunction
from sid_fast.sampling import generate_images, seed_inputs

KEPT = 50_000  # images whose features are kept: 0.4 GB of the Inception network's
GENERATED = 512  # images made at a time
METRICS = ("fid", "is", "kid", "pr")


class StageTimer:
    """Seconds by stage, the device's work included."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[stage] += time.perf_counter() - began


@dataclasses.dataclass
class FeatureStats:
    """What a pass over images leaves: moments of all, features [≤ KEPT, D] of the first of them.

    A sample from a file of statistics has no features, and may not know its count.
    """

    mean: torch.Tensor
    covariance: torch.Tensor  # over N − 1
    count: int | None = None
    features: torch.Tensor | None = None

    def moments(self, correction: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and covariance over N − correction; over N − 1 where N is not known."""
        factor = 1.0 if self.count is None else (self.count - 1) / (self.count - correction)
        return self.mean, self.covariance * factor


def shard_by_rank(items: Sequence) -> Sequence:
    """What is this process's work: the items in turn, to rank after rank."""
    return items[process_group.rank() :: process_group.world_size()]


def generated(
    net: EDMNetwork,
    seeds: Sequence[int],
    init_sigma: float | None,
    steps: int = 1,
    cuda_graph: bool = False,
) -> Iterator[torch.Tensor]:
    """This process's share of one image a seed, in batches, uint8 [N, C, R, R].

    cuda_graph: the network's launches are replayed from a graph.
    """
    mine = list(shard_by_rank(seeds))
    # Captured anew for every pass, which costs two calls more. A graph kept for the next one would
    # hold the activations of a group of images while the training in between needs the memory,
    # and the whole copy of a sharded network is another each time.
    call = GraphedFunction(net) if cuda_graph else net
    for i in range(0, len(mine), GENERATED):
        latents, classes = seed_inputs(mine[i : i + GENERATED], net.config, None)
        yield generate_images(net, latents, classes, init_sigma, steps, call)


def look(
    batches: Iterable[torch.Tensor],
    total: int,
    detector: Detector | Pixels,
    clock: StageTimer,
    title: str,
) -> FeatureStats:
    """Look at `total` images, of which each process has its `share` in batches, uint8 NCHW.

    The same from any number of processes, to the rounding of float64.
    """
    if total < max(process_group.world_size(), 2):
        raise UserError(f"{total} images are too few: it takes 2, and 1 on every process")
    mine, keep = len(shard_by_rank(range(total))), len(shard_by_rank(range(min(total, KEPT))))
    sums, kept = Moments(), []
    hide = True if process_group.rank() else None
    with tqdm(total=mine, desc=title, unit="img", disable=hide, leave=False) as bar:
        images = iter(batches)
        while True:
            with clock("images"):
                some = next(images, None)
            if some is None:
                break
            with clock("detector"):
                features = detector(some.to(clock.device, non_blocking=True))
            with clock("moments"):
                kept.append(features[: max(keep - sums.count, 0)].float().cpu())
                sums.add(features)
            bar.update(len(some))
    with clock("moments"):
        sums.reduce()
        features = process_group.gather(torch.cat(kept), min(total, KEPT))
    assert sums.count == total, f"{sums.count} images were looked at, not {total}"
    return FeatureStats(*sums.moments(), total, features)


def compare(
    real: FeatureStats,
    generated: FeatureStats,
    detector: Detector | Pixels,
    clock: StageTimer,
    metrics: Iterable[str] = METRICS,
    correction: int = 1,
) -> dict[str, float]:
    """Figures of `metrics` by name, those that the samples and the detector allow.

    correction: 1 for covariances over N − 1, 0 for over N.
    """
    figures: dict[str, float] = {}
    assert generated.features is not None
    seen = generated.features.to(clock.device)
    expected = None if real.features is None else real.features.to(clock.device)
    if "fid" in metrics:
        if real.mean.shape != generated.mean.shape:
            raise UserError(
                f"the reference has {len(real.mean)} features, {detector.name} makes "
                f"{len(generated.mean)} of these images: use one detector, and images of one shape"
            )
        with clock("Fréchet distance"):
            moments = [m.to(clock.device) for s in (generated, real) for m in s.moments(correction)]
            figures["frechet_distance"] = frechet_distance(*moments)
    if "is" in metrics:
        with clock("class score"):
            probabilities = detector.probabilities(seen)
            if probabilities is not None:
                mean, std = inception_score(probabilities)
                figures |= {"inception_score": mean, "inception_score_std": std}
    if expected is not None:
        if "kid" in metrics:
            with clock("kernel distance"):
                figures["kernel_distance"] = kernel_distance(expected, seen)
        if "pr" in metrics:
            with clock("precision and recall"):
                precision, recall = precision_recall(expected, seen)
                figures |= {"precision": precision, "recall": recall}
    return figures
