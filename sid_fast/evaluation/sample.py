"""One pass over images: their feature statistics, and the metrics computed from two of them."""

import contextlib
import dataclasses
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import torch

from sid_fast.data.datasets import Dataset
from sid_fast.errors import UserError
from sid_fast.evaluation.decoding import Decoder
from sid_fast.evaluation.features import Detector, Pixels
from sid_fast.evaluation.frechet import Moments, frechet_distance
from sid_fast.evaluation.metrics import inception_score, kernel_distance, precision_recall
from sid_fast.io import progress
from sid_fast.models import Network
from sid_fast.performance import process_group
from sid_fast.performance.cuda_graphs import GraphedFunction
from sid_fast.sampling import generate_images, seed_inputs

MAX_DIM = 16_384  # features of an image; their covariance takes 2 GB
MAX_FEATURES = 50_000  # images whose features are stored: 0.4 GB with the Inception network
GENERATION_BATCH = 512  # images
METRICS = ("fid", "is", "kid", "pr")


class StageTimer:
    """Accumulates wall-timer seconds per stage; waits for the GPU at the end of each."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add the time of the block to a stage."""
        began = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[stage] += time.perf_counter() - began


@dataclasses.dataclass
class FeatureStats:
    """Feature statistics of a set of images.

    Attributes:
        mean: [D], float64, over all images.
        covariance: [D, D], float64, over N − 1.
        count: number of images N; None where a statistics file does not tell.
        features: [≤ MAX_FEATURES, D] of the first images; None for a statistics file.
    """

    mean: torch.Tensor
    covariance: torch.Tensor
    count: int | None = None
    features: torch.Tensor | None = None

    def moments(self, correction: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and covariance over N − correction; over N − 1 if N is unknown."""
        factor = 1.0 if self.count is None else (self.count - 1) / (self.count - correction)
        return self.mean, self.covariance * factor


def shard_by_rank(items: Sequence) -> Sequence:
    """Every world_size-th item, starting at this process's rank."""
    return items[process_group.rank() :: process_group.world_size()]


def classes_to_draw(data: Dataset | None, net: Network) -> list[int]:
    """The classes to draw if the network knows others too; empty: all.

    Those that real images have; without their labels those that the network was trained on.
    """
    classes = [c for c in data.classes if c < net.config.label_dim] if data else []
    classes = classes or [*net.config.classes]
    return [] if len(classes) == net.config.label_dim else classes


def generate_batches(
    net: Network,
    seeds: Sequence[int],
    init_sigma: float | None,
    steps: int = 1,
    cuda_graph: bool = False,
    classes: Sequence[int] = (),
    decoder: Decoder | None = None,
) -> Iterator[torch.Tensor]:
    """Generate one image per seed, this rank's seeds only, in batches, uint8 [N, C, H, W].

    Args:
        net: the network, on its device.
        seeds: of all ranks.
        init_sigma: noise level of one-step generation.
        steps: 1, or the number of sampler steps of a teacher.
        cuda_graph: replay the network's forward pass from a CUDA graph.
        classes: class numbers to draw from, such as those that real images have; empty: all.
        decoder: of a network that makes latents.
    """
    mine = shard_by_rank(seeds)
    # Captured once per pass, which costs two extra calls. A graph that outlived the pass would hold
    # a batch of activations while training needs the memory, and a sharded network is gathered into
    # a new copy for each pass.
    call = GraphedFunction(net) if cuda_graph else net
    for i in range(0, len(mine), GENERATION_BATCH):
        latents, labels = seed_inputs(
            list(mine[i : i + GENERATION_BATCH]), net.config, None, classes
        )
        made = generate_images(net, latents, labels, init_sigma, steps, call)
        yield decoder(made) if decoder and net.config.is_latent else made


def compute_stats(
    batches: Iterable[torch.Tensor],
    total: int,
    detector: Detector | Pixels,
    timer: StageTimer,
    title: str,
) -> FeatureStats:
    """Compute the feature statistics of images; the same on any number of ranks, up to rounding.

    Args:
        batches: this rank's images, as shard_by_rank assigns them, in uint8 [N, C, R, R] batches.
        total: number of images over all ranks.
        detector: the feature extractor.
        timer: records the stages images, detector and moments.
        title: names the images in the progress line.

    Raises:
        UserError: there are fewer than 2 images, or fewer than ranks; the features are too many or
            not finite. Every rank raises if one does.
    """
    if total < max(process_group.world_size(), 2):
        raise UserError(
            f"{total} images are too few: statistics need at least 2, and 1 per process"
        )
    max_features = len(shard_by_rank(range(min(total, MAX_FEATURES))))
    sums, stored = Moments(), []
    failure: Exception | None = None
    try:
        with progress.phase(title, total, "images") as shown:
            images = iter(batches)
            while True:
                with timer("images"):
                    batch = next(images, None)
                if batch is None:
                    break
                with timer("detector"):
                    features = detector(batch.to(timer.device, non_blocking=True))
                    if features.shape[1] > MAX_DIM:
                        raise UserError(
                            f"{detector.name} gives {features.shape[1]:,} features of an image, "
                            f"more than {MAX_DIM:,}: give another --detector"
                        )
                with timer("moments"):
                    stored.append(features[: max(max_features - sums.count, 0)].float().cpu())
                    sums.add(features)
                shown.update(min(process_group.world_size() * len(batch), total - shown.done))
    except Exception as error:  # the other ranks would wait forever
        failure = error
    if process_group.all_reduce_any(failure is not None):
        raise failure or UserError(f"{title}: another process failed, which says why")
    with timer("moments"), progress.phase(f"{title}: combining"):
        sums.reduce()
        features = process_group.gather(torch.cat(stored), min(total, MAX_FEATURES))
    if not (sums.total.isfinite().all() and sums.products.isfinite().all()):
        raise UserError(
            f"{title}: {detector.name} gives features that are NaN, infinite or too large: give "
            "another --detector"
        )
    assert sums.count == total, f"{sums.count} images were processed, not {total}"
    return FeatureStats(*sums.moments(), total, features)


def compare(
    real: FeatureStats,
    generated: FeatureStats,
    detector: Detector | Pixels,
    timer: StageTimer,
    metrics: Iterable[str] = METRICS,
    correction: int = 1,
) -> dict[str, float]:
    """Compute metrics of generated against real images, where statistics and detector allow.

    KID, precision and recall need real.features; IS needs a detector with classes.

    Args:
        real: statistics of the real images.
        generated: statistics of the generated images.
        detector: the feature extractor of both.
        timer: records a stage per metric.
        metrics: any of METRICS.
        correction: 1 for covariances over N − 1, 0 for over N.

    Returns:
        Values by metric name: frechet_distance, inception_score and inception_score_std,
        kernel_distance, precision and recall.

    Raises:
        UserError: the numbers of features differ, or a metric is not finite.
    """
    values: dict[str, float] = {}
    assert generated.features is not None
    generated_features = generated.features.to(timer.device)
    real_features = None if real.features is None else real.features.to(timer.device)
    if "fid" in metrics:
        if real.mean.shape != generated.mean.shape:
            raise UserError(
                f"the reference has {len(real.mean)} features, the generated images have "
                f"{len(generated.mean)} with {detector.name}: use the same detector and image shape"
            )
        with timer("Fréchet distance"), progress.phase("computing the Fréchet distance"):
            moments = [m.to(timer.device) for s in (generated, real) for m in s.moments(correction)]
            try:
                values["frechet_distance"] = frechet_distance(*moments)
            except torch.linalg.LinAlgError as error:
                raise UserError(
                    f"the Fréchet distance cannot be computed ({error}): the {detector.name} "
                    "features are out of range; give another --detector"
                ) from error
    if "is" in metrics:
        with timer("class score"), progress.phase("computing the class score"):
            probabilities = detector.probabilities(generated_features)
            if probabilities is not None:
                mean, std = inception_score(probabilities)
                values |= {"inception_score": mean, "inception_score_std": std}
    if real_features is not None:
        if "kid" in metrics:
            with timer("kernel distance"):
                values["kernel_distance"] = kernel_distance(real_features, generated_features)
        if "pr" in metrics:
            with timer("precision and recall"):
                precision, recall = precision_recall(real_features, generated_features)
                values |= {"precision": precision, "recall": recall}
    if bad := [name for name, value in values.items() if not math.isfinite(value)]:
        raise UserError(
            f"{bad[0].replace('_', ' ')} is {values[bad[0]]}: the {detector.name} features are out "
            "of range; give another --detector, or leave the metric out"
        )
    return values
