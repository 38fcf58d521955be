"""Reference statistics of real images: read from a file, or measured on a data set and cached."""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import torch

from sid_fast.data.datasets import ImageDataset, content_digest
from sid_fast.data.readers import read
from sid_fast.errors import UserError
from sid_fast.evaluation.features import Detector, Pixels
from sid_fast.evaluation.sample import (
    MAX_FEATURES,
    FeatureStats,
    StageTimer,
    compute_stats,
    shard_by_rank,
)
from sid_fast.io.atomic import atomic_path
from sid_fast.io.download import cache_folder, fetch
from sid_fast.io.safetensors import read_snapshot, write_snapshot
from sid_fast.performance import process_group


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
    """Read statistics from an .npz file or URL with `mu` [D] and `sigma` [D, D]; executes nothing.

    Raises:
        UserError: the file is missing or damaged, holds NaN, or another detector made it.
    """
    path = fetch(source)
    try:
        with np.load(path, allow_pickle=False) as file:
            values = dict(file)
        mean, covariance = (torch.from_numpy(values[k].astype(np.float64)) for k in ("mu", "sigma"))
        made_by = str(values.get("detector", detector.key))
        count = int(values["images"]) if "images" in values else None
    except Exception as error:  # damaged bytes can fail in any way
        raise UserError(
            f"{path} is not a reference, an .npz with mu [D] and sigma [D, D] ({error}): make one "
            "with python -m sid_fast.evaluate reference"
        ) from None
    if mean.dim() != 1 or covariance.shape != (len(mean), len(mean)):
        shapes = f"{tuple(mean.shape)} and {tuple(covariance.shape)}"
        raise UserError(
            f"{path} has mu and sigma of shapes {shapes}, not [D] and [D, D]: give another file"
        )
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        raise UserError(f"{path} has NaN or infinite statistics: make it again")
    if made_by != detector.key:
        raise UserError(
            f"{path} was made with another detector ({made_by}) than {detector.name} "
            f"({detector.key}): give that one as --detector, or another reference"
        )
    return FeatureStats(mean, covariance, count)


def measure(
    data: ImageDataset, detector: Detector | Pixels, timer: StageTimer, reader: str = "plain"
) -> FeatureStats:
    """Measure a data set: moments of all images, features of up to MAX_FEATURES spread over it."""
    total, with_features = len(data), min(len(data), MAX_FEATURES)
    first = [i * total // with_features for i in range(with_features)]
    order = first + sorted(set(range(total)) - set(first))
    batches = read(data, shard_by_rank(order), timer.device, reader)
    return compute_stats(batches, total, detector, timer, f"reading {data.path.name}")


def reference_of(
    data: ImageDataset, detector: Detector | Pixels, timer: StageTimer, reader: str = "plain"
) -> FeatureStats:
    """Call `measure`, or read its result for the same images and detector from the cache."""
    with process_group.main_process_first():  # one rank per node reads the files
        content = content_digest(data)
    key = hashlib.sha256(f"{content} {detector.key} {MAX_FEATURES}".encode()).hexdigest()
    cached = cache_folder() / f"reference-{key[:32]}.safetensors"
    if process_group.all_reduce_any(not cached.exists()):
        stats = measure(data, detector, timer, reader)
        if process_group.rank() == 0:
            assert stats.features is not None
            values = {"mean": stats.mean, "covariance": stats.covariance}
            write_snapshot(cached, values | {"features": stats.features}, {"count": stats.count})
        return stats
    values, header = read_snapshot(cached)
    return FeatureStats(**values, count=header["count"])


def real_stats(
    ref: str | None,
    data: ImageDataset | None,
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
