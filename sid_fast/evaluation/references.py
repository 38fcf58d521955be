"""What generated images are compared with: statistics of real ones, from a file or measured."""

import dataclasses
import hashlib
import os
from pathlib import Path

import numpy as np
import torch

from sid_fast.data.datasets import ImageDataset
from sid_fast.data.readers import read
from sid_fast.errors import UserError
from sid_fast.evaluation.features import Detector, Pixels
from sid_fast.evaluation.sample import KEPT, FeatureStats, StageTimer, look, shard_by_rank
from sid_fast.io.atomic import atomic_path
from sid_fast.io.download import cache_folder, fetch, file_sha256
from sid_fast.io.safetensors import read_snapshot, write_snapshot
from sid_fast.performance import process_group


def write_reference(path: str | Path, sample: FeatureStats, detector: Detector | Pixels) -> None:
    """Write statistics in the published layout, `mu` and `sigma` (over N − 1) in float64.

    Beside them: `images`, their number, and `detector`, the sha256 of its file.
    """
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            mu=sample.mean.cpu().numpy(),
            sigma=sample.covariance.cpu().numpy(),
            images=np.array(sample.count),
            detector=np.array(detector.key),
        )


def read_reference(source: str, detector: Detector | Pixels) -> FeatureStats:
    """Statistics from an npz file or URL with `mu` [D] and `sigma` [D, D]; nothing in it is run."""
    path = fetch(source)
    try:
        with np.load(path, allow_pickle=False) as file:
            values = dict(file)
        mean, covariance = (torch.from_numpy(values[k].astype(np.float64)) for k in ("mu", "sigma"))
        made_by = str(values.get("detector", detector.key))
        count = int(values["images"]) if "images" in values else None
    except Exception as error:  # damaged bytes can fail in any way
        raise UserError(
            f"{path} is not a reference: an .npz with mu [D] and sigma [D, D] is ({error})"
        ) from None
    if mean.dim() != 1 or covariance.shape != (len(mean), len(mean)):
        shapes = f"{tuple(mean.shape)} and {tuple(covariance.shape)}"
        raise UserError(f"{path} has mu and sigma of shapes {shapes}, not [D] and [D, D]")
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        raise UserError(f"{path} has NaN or infinite statistics: make it again")
    if made_by != detector.key:
        raise UserError(
            f"{path} was made by another detector ({made_by}) than {detector.name} "
            f"({detector.key}): give --detector, or another reference"
        )
    return FeatureStats(mean, covariance, count)


def measure(
    data: ImageDataset, detector: Detector | Pixels, clock: StageTimer, reader: str = "plain"
) -> FeatureStats:
    """The statistics of all images of a data set, and features of up to KEPT spread over it."""
    total, kept = len(data), min(len(data), KEPT)
    first = [i * total // kept for i in range(kept)]
    order = first + sorted(set(range(total)) - set(first))
    batches = read(data, shard_by_rank(order), clock.device, reader)
    return look(batches, total, detector, clock, f"reading {data.path.name}")


def reference_of(
    data: ImageDataset, detector: Detector | Pixels, clock: StageTimer, reader: str = "plain"
) -> FeatureStats:
    """`measure`, or what it gave for the same images and detector before, from the cache."""
    with process_group.main_process_first():  # one process of a node reads the files
        content = content_digest(data)
    key = hashlib.sha256(f"{content} {detector.key} {KEPT}".encode()).hexdigest()
    cached = cache_folder() / f"reference-{key[:32]}.safetensors"
    if process_group.all_reduce_any(not cached.exists()):
        sample = measure(data, detector, clock, reader)
        if process_group.rank() == 0:
            assert sample.features is not None
            values = {"mean": sample.mean, "covariance": sample.covariance}
            write_snapshot(cached, values | {"features": sample.features}, {"count": sample.count})
        return sample
    values, header = read_snapshot(cached)
    return FeatureStats(**values, count=header["count"])


def real_sample(
    ref: str | None,
    data: ImageDataset | None,
    detector: Detector | Pixels,
    clock: StageTimer,
    reader: str = "plain",
) -> FeatureStats:
    """Real images to compare with: statistics from a file if there is one, features from data."""
    measured = reference_of(data, detector, clock, reader) if data else None
    if ref is None:
        assert measured is not None
        return measured
    features = measured.features if measured else None
    return dataclasses.replace(read_reference(ref, detector), features=features)


def content_digest(data: ImageDataset) -> str:
    """The sha256 of the files of a data set.

    They are read once, about a second for a gigabyte. The digest is then remembered under their
    names, sizes and times of change, and read again as soon as one of those is another.
    """
    marks = hashlib.sha256()
    for path in data.files:
        s = path.stat()
        times = s.st_mtime_ns, s.st_ctime_ns  # the second cannot be set back
        marks.update(repr((os.path.abspath(path), s.st_size, s.st_ino, *times)).encode())
    record = cache_folder() / f"content-{marks.hexdigest()[:32]}.txt"
    if record.exists():
        return record.read_text()
    content = hashlib.sha256()
    for path in data.files:
        content.update(bytes.fromhex(file_sha256(path)))
    with atomic_path(record) as temporary:
        temporary.write_text(content.hexdigest())
    return content.hexdigest()
