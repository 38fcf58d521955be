"""Reference statistics of real images: read from a file, or measured on a data set and cached."""

import dataclasses
import hashlib
from functools import partial
from importlib import resources
from pathlib import Path

import numpy as np
import torch

from sid_fast.data.datasets import Dataset, content_digest
from sid_fast.data.readers import choose, read
from sid_fast.errors import UserError
from sid_fast.evaluation.features import Detector, Pixels
from sid_fast.evaluation.sample import (
    MAX_DIM,
    MAX_FEATURES,
    FeatureStats,
    StageTimer,
    compute_stats,
    shard_by_rank,
)
from sid_fast.io.archives import read_arrays
from sid_fast.io.atomic import atomic_path
from sid_fast.io.download import cache_folder, fetch, write_cache
from sid_fast.io.safetensors import read_snapshot, write_snapshot
from sid_fast.performance import process_group

_TOLERANCE = 1e-4  # of the largest entry or eigenvalue: some files were kept in half precision


def write_reference(path: str | Path, stats: FeatureStats, detector: Detector | Pixels) -> None:
    """Write an .npz in EDM's layout: float64 `mu` [D] and `sigma` [D, D], over N − 1.

    Two extra entries: `images`, the number of images, and `detector`, the sha256 of its file.
    """
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            mu=stats.mean.cpu().numpy(),
            sigma=stats.covariance.cpu().numpy(),
            images=np.array(stats.count),
            detector=np.array(detector.key),
        )


def read_reference(source: str, detector: Detector | Pixels) -> FeatureStats:
    """Read statistics with `mu` [D] and `sigma` [D, D]; executes nothing.

    Args:
        source: an .npz file, its URL, or `fashion`, the statistics of Fashion-MNIST's pixels at
            16x16 that come with this package.
        detector: what the distance is measured with.

    Raises:
        UserError: the file is missing or damaged, holds NaN, sigma is no covariance, or another
            detector made it.
    """
    if source == "fashion" and not Path(source).exists():
        path = Path(str(resources.files("sid_fast") / "teachers" / "fashion-pixels.npz"))
    else:
        path = fetch(source)
    what = (
        "a reference, an .npz with mu [D] and sigma [D, D], as python -m sid_fast.evaluate "
        "reference writes it"
    )
    limits = {"mu": MAX_DIM, "sigma": MAX_DIM**2, "images": 1, "detector": 1}
    values = read_arrays(path, what, limits)
    if missing := {"mu", "sigma"} - values.keys():
        raise UserError(f"{path} has no {min(missing)}: give {what}")
    mu, sigma = values["mu"], values["sigma"]
    if mu.ndim != 1 or not len(mu) or sigma.shape != (len(mu), len(mu)):
        raise UserError(
            f"{path} has mu and sigma of shapes {mu.shape} and {sigma.shape}, not [D] and [D, D]: "
            "give another file"
        )
    if mu.dtype.kind not in "iuf" or sigma.dtype.kind not in "iuf":
        raise UserError(f"{path} has mu or sigma that are not numbers: make it again")
    mean, covariance = (torch.from_numpy(v.astype(np.float64)) for v in (mu, sigma))
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        raise UserError(f"{path} has NaN or infinite statistics: make it again")
    _check_covariance(path, covariance)
    made_by = str(values["detector"].flat[0]) if "detector" in values else detector.key
    if made_by != detector.key:
        raise UserError(
            f"{path} was made with another detector ({made_by:.64}) than {detector.name} "
            f"({detector.key}): give that one as --detector, or another reference"
        )
    count = None
    if "images" in values:
        images = values["images"]
        if images.size != 1 or images.dtype.kind not in "iu" or images.flat[0] < 2:
            raise UserError(
                f"{path} says that it is of {images.tolist()} images, which must be an integer of "
                "at least 2: make it again"
            )
        count = int(images.flat[0])
    return FeatureStats(mean, covariance, count)


def _check_covariance(path: Path, sigma: torch.Tensor) -> None:
    """Refuse what is no covariance; its distance from anything would be a number all the same."""
    asymmetry = float((sigma - sigma.T).abs().max())
    if asymmetry > _TOLERANCE * float(sigma.abs().max()):
        raise UserError(f"{path} has a sigma that is not symmetric: make it again")
    try:
        values = torch.linalg.eigvalsh(sigma)
    except torch.linalg.LinAlgError as error:
        raise UserError(f"{path} has a sigma without eigenvalues: make it again") from error
    if values[0] < -_TOLERANCE * values[-1].abs():
        raise UserError(
            f"{path} has a sigma with the negative eigenvalue {float(values[0]):.3g}, so it is no "
            "covariance: make it again"
        )


def measure(
    data: Dataset, detector: Detector | Pixels, timer: StageTimer, reader: str = "plain"
) -> FeatureStats:
    """Measure a data set: moments of all images, features of up to MAX_FEATURES spread over it."""
    total, with_features = len(data), min(len(data), MAX_FEATURES)
    first = [i * total // with_features for i in range(with_features)]
    order = first + sorted(set(range(total)) - set(first))
    batches = read(data, shard_by_rank(order), timer.device, choose(reader, total))
    return compute_stats(batches, total, detector, timer, f"reading {data.path.name}")


def reference_of(
    data: Dataset, detector: Detector | Pixels, timer: StageTimer, reader: str = "plain"
) -> FeatureStats:
    """Call `measure`, or read its result for the same images and detector from the cache."""
    with process_group.main_process_first():  # one rank per node reads the files
        content = content_digest(data)
    key = hashlib.sha256(f"{content} {detector.key} {MAX_FEATURES}".encode()).hexdigest()
    cached = cache_folder() / f"reference-{key[:32]}.safetensors"
    stats = _read_cached(cached)
    if process_group.all_reduce_any(stats is None):
        stats = measure(data, detector, timer, reader)
        if process_group.rank() == 0:
            assert stats.features is not None
            values = {"mean": stats.mean, "covariance": stats.covariance}
            values |= {"features": stats.features}
            write_cache(partial(write_snapshot, cached, values, {"count": stats.count}))
    assert stats is not None
    return stats


def _read_cached(path: Path) -> FeatureStats | None:
    """Read statistics that reference_of wrote; None if they are missing or damaged."""
    if not path.exists():
        return None
    try:
        values, header = read_snapshot(path)
        stats = FeatureStats(**values, count=header["count"])
    except (UserError, TypeError, KeyError):
        return None
    return stats if stats.mean.isfinite().all() and stats.covariance.isfinite().all() else None


def real_stats(
    ref: str | None,
    data: Dataset | None,
    detector: Detector | Pixels,
    timer: StageTimer,
    reader: str = "plain",
) -> FeatureStats:
    """Statistics of the real images: moments from `ref` if given, else from `data`.

    Features, which KID, precision and recall need, come from `data` alone. One of the two is given.
    """
    measured = reference_of(data, detector, timer, reader) if data else None
    if ref is None:
        assert measured is not None
        return measured
    features = measured.features if measured else None
    return dataclasses.replace(read_reference(ref, detector), features=features)
