"""Make a data set of your own images: square PNGs of one size, with class numbers.

python -m sid_fast.prepare --source photos --out photos-64.zip --resolution 64
"""

import collections
import contextlib
import dataclasses
import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np

from sid_fast import cli
from sid_fast.config.types import check, option
from sid_fast.data.convert import Conversion, Converted, Crop, Filter, LeftOut, convert, inspect
from sid_fast.data.datasets import DatasetWriter
from sid_fast.data.images import MAX_RESOLUTION
from sid_fast.data.sources import Source, open_source, select_classes
from sid_fast.errors import UserError, printable
from sid_fast.io import invocation, progress
from sid_fast.io.atomic import atomic_path, open_target
from sid_fast.io.streams import note, say
from sid_fast.performance import process_group

CHUNK = 32  # images per task of a thread
MAX_THREADS = 32
INSPECTED = 1000  # images whose headers are compared before any is converted
ENTRY_BYTES = 250  # of a zip and of dataset.json per image
SHOWN = 3  # names per reason


@dataclasses.dataclass
class PrepareConfig:
    """Options of `python -m sid_fast.prepare`."""

    source: str | None = option(
        None,
        "images to read: a folder (searched recursively) or a zip, or a data set as torchvision "
        "(CIFAR-10, CIFAR-100, MNIST and others in its format, ImageFolder) or Hugging Face "
        "(save_to_disk, Parquet files, ImageFolder with metadata) stores it. Nothing is downloaded",
    )
    out: str | None = option(None, "the data set to write, NAME.zip; it must not exist yet")
    resolution: int | None = option(
        None,
        "height and width in pixels; smaller images are left out. Default: as the images are, "
        "which must agree",
        1,
        MAX_RESOLUTION,
    )
    crop: Crop = option(
        "center",
        "how an image becomes square. center: cut out its middle; pad: add black borders, to "
        "--resolution at least; none: leave out images that are not square",
    )
    filter: Filter = option(
        "auto",
        "how an image is scaled down. auto: 2x2 means to exactly half its size, else lanczos; "
        "area: means over each pixel's area",
    )
    channels: Literal["auto", "1", "3"] = option(
        "auto", "1: grey; 3: RGB; auto: as the images are, which must agree"
    )
    classes: str = option(
        "auto",
        "auto: from the source (dataset.json, metadata, label files), else the names of the "
        "folders in it; none: without labels; or only some classes, comma-separated, such as "
        "cat,dog",
    )
    split: str | None = option(
        None, "part of a source that has several, such as train, test, or all; default: train"
    )


def run(config: PrepareConfig, given: set[str]) -> None:
    """Write the data set; `given` names the fields that the command line set."""
    check(config)
    if not config.source:
        raise UserError("source is missing: give --source FOLDER, or a zip")
    if not config.out:
        raise UserError("out is missing: give the data set to write as --out NAME.zip")
    out = Path(config.out)
    if out.suffix != ".zip":
        raise UserError(f"out={out} is not a .zip file: give --out NAME.zip")
    if os.path.lexists(out):
        raise UserError(f"out={out} exists: remove it, or give another name")
    if process_group.launch().world_size > 1:
        raise UserError("prepare runs in one process: start it without torchrun")
    source = open_source(Path(config.source), config.split, config.classes != "none")
    indices: Sequence[int] | np.ndarray = range(source.count)
    if config.classes not in ("auto", "none"):
        indices = select_classes(source, [c.strip() for c in config.classes.split(",")])
    if not len(indices):
        raise UserError(f"{config.source} has no images of that split and class: choose others")
    channels = None if config.channels == "auto" else int(config.channels)
    conversion = Conversion(config.resolution, channels, config.crop, config.filter)
    what = f"{source.what}, {len(indices):,} images, {_classes(source)}"
    note(f"reading {config.source}: {what}", sys.stdout)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL's, of damaged metadata
        require_alike(source, indices, conversion)
        open_target(config.out)
        began = time.monotonic()
        report = write(out, source, indices, conversion)
    seconds = time.monotonic() - began
    kind = "grey" if report.channels == 1 else "RGB"
    side = f"{report.resolution}x{report.resolution}"
    say(
        f"wrote {out}: {report.count:,} {kind} images of {side} pixels, "
        f"{out.stat().st_size / 1e6:.1f} MB, in {seconds:.1f} s ({len(indices) / seconds:,.0f} "
        "images/s)"
    )
    if report.left_out:
        say(f"left out: {_left_out(report.left_out)}")
    notes = list(source.notes)
    if report.transparent:
        notes.append(f"{report.transparent:,} transparent laid on white")
    if notes:
        note(f"note: {', '.join(notes)}", sys.stdout)
    pretrain = "pretrain", "--data", out, "--out", "runs/teacher"
    invocation.suggest(invocation.command_line(*pretrain))


@dataclasses.dataclass
class Report:
    """What was written.

    Attributes:
        count: images.
        resolution: height and width in pixels.
        channels: 1 or 3.
        transparent: images that were laid on white.
        left_out: names of the images that were not written, by reason.
    """

    count: int = 0
    resolution: int = 0
    channels: int = 0
    transparent: int = 0
    left_out: dict[str, list[str]] = dataclasses.field(default_factory=dict)


def require_alike(
    source: Source, indices: Sequence[int] | np.ndarray, conversion: Conversion
) -> None:
    """Compare the headers of some images, as a difference should not show after an hour.

    Raises:
        UserError: they differ in size or channels, and no option says what to make of them.
    """
    step = 1 if source.in_order else max(1, len(indices) // INSPECTED)
    first: dict[tuple[int, int], str] = {}
    for index in indices[::step][:INSPECTED]:
        with contextlib.suppress(LeftOut):
            first.setdefault(inspect(source.read(index), conversion), source.name(index))
    shapes = sorted(first)
    for shape in shapes[1:]:
        refuse_mix(shapes[0], first[shapes[0]], shape, first[shape])


def refuse_mix(a: tuple[int, int], name_a: str, b: tuple[int, int], name_b: str) -> None:
    """Raise UserError if two images, with resolution and channels a and b, differ in either."""
    if a[1] != b[1]:
        grey, colour = (name_a, name_b) if a[1] == 1 else (name_b, name_a)
        raise UserError(
            f"the source mixes grey images ({grey}) and RGB ({colour}): give --channels 3 (grey "
            "is repeated) or --channels 1"
        )
    if a[0] != b[0]:
        raise UserError(
            f"the source mixes sizes, such as {a[0]}x{a[0]} pixels ({name_a}) and {b[0]}x{b[0]} "
            f"({name_b}): give --resolution, to which larger images are scaled down"
        )


def write(
    out: Path, source: Source, indices: Sequence[int] | np.ndarray, conversion: Conversion
) -> Report:
    """Convert the images at `indices` and write them in that order, atomically.

    Raises:
        UserError: no image can be used, they differ, or the disk is too small.
        WriteFailed: writing fails.
    """
    report = Report()
    labels = source.labels
    first_name, nbytes = "", 0
    with atomic_path(out) as temporary, DatasetWriter(temporary) as writer:
        results = convert_all(source, indices, conversion)
        shown = progress.track(results, f"writing {out.name}", "images", len(indices))
        for done, (index, result) in enumerate(shown, 1):
            if isinstance(result, str):
                report.left_out.setdefault(result, []).append(source.name(index))
                continue
            shape = result.resolution, result.channels
            if not writer.count:
                report.resolution, report.channels = shape
                first_name = source.name(index)
            elif shape != (report.resolution, report.channels):
                first = report.resolution, report.channels
                refuse_mix(first, first_name, shape, source.name(index))
            report.transparent += result.was_transparent
            writer.add(result.png, None if labels is None else int(labels[index]))
            nbytes += len(result.png) + ENTRY_BYTES
            if writer.count == INSPECTED:
                require_space(out, nbytes, nbytes / done * len(indices))
        if not writer.count:
            raise UserError(
                f"none of the {len(indices):,} images can be used: {_left_out(report.left_out)}"
            )
        report.count = writer.count
        writer.finish(**({"class_names": source.class_names} if source.class_names else {}))
    return report


def require_space(out: Path, written: int, total: float) -> None:
    """Raise UserError if the disk has no room for the rest of a file.

    Args:
        out: the file.
        written: bytes of it that are on the disk.
        total: bytes that it will have, estimated.
    """
    free = shutil.disk_usage(out.parent).free
    if total - written > free:
        raise UserError(
            f"{out} will take {total / 1e9:.1f} GB, and {(free + written) / 1e9:.1f} GB are free "
            "there: free some space, or give --out on another disk"
        )


def convert_all(
    source: Source, indices: Sequence[int] | np.ndarray, conversion: Conversion
) -> Iterator[tuple[int, Converted | str]]:
    """Convert images in threads, since PIL decodes and scales outside Python's lock.

    Yields:
        In order, the index of an image and its conversion, or the reason why it is left out.
    """

    def work(chunk: Sequence[int] | np.ndarray) -> list[tuple[int, Converted | str]]:
        results: list[tuple[int, Converted | str]] = []
        for index in map(int, chunk):
            labels = source.labels
            try:
                if labels is not None and labels[index] < 0:
                    raise LeftOut("without a label")
                results.append((index, convert(source.read(index), conversion)))
            except LeftOut as reason:
                results.append((index, str(reason)))
        return results

    threads = min(MAX_THREADS, os.cpu_count() or 1)
    pending: collections.deque[Future] = collections.deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for start in range(0, len(indices), CHUNK):
            pending.append(pool.submit(work, indices[start : start + CHUNK]))
            if len(pending) > 2 * threads:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _classes(source: Source) -> str:
    """Describe the classes of a source for people."""
    if source.labels is None:
        return "no classes"
    names = source.class_names or []
    count = len(np.unique(source.labels[source.labels >= 0]))
    shown = ", ".join(names[:10]) + ", …" * (len(names) > 10)
    return f"{count:,} class{'es' * (count != 1)}" + f" ({printable(shown)})" * bool(names)


def _left_out(left_out: dict[str, list[str]]) -> str:
    """Count left-out images by reason, most frequent first, with the names of the first few."""
    reasons = sorted(left_out.items(), key=lambda item: (-len(item[1]), item[0]))
    return ", ".join(
        f"{len(names):,} {reason} ({printable(', '.join(names[:SHOWN]))}"
        f"{', …' * (len(names) > SHOWN)})"
        for reason, names in reasons
    )


main = cli.command(PrepareConfig, run, None, __doc__)

if __name__ == "__main__":
    cli.main(main, "sid_fast.prepare")
