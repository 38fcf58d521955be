"""Data sets as torchvision stores them on disk: CIFAR, MNIST and others in its format.

Nothing in the files is executed; CIFAR's are pickles.
"""

import gzip
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sid_fast.data.datasets import MAX_CLASSES
from sid_fast.errors import UserError
from sid_fast.io.pickles import read_arrays_pickle
from sid_fast.io.untrusted import Refused, checked_int, naming, open_limited

_MAX_BYTES = 2**31  # of the pixels in a file
_IDX = re.compile(r"(train|t10k|test)-images[-.]idx3-ubyte(\.gz)?")
_SVHN = re.compile(r"(train|test|extra)_32x32\.mat")


@dataclass(frozen=True)
class Layout:
    """A data set in a folder of files with known names.

    Attributes:
        what: its name.
        splits: names of the files of each split.
        load: reads a file of the folder: images, uint8 [N, H, W] or [N, H, W, 3], and class
            numbers, int64 [N].
        class_names: reads the names of the classes; None if the folder has none.
    """

    what: str
    splits: dict[str, list[str]]
    load: Callable[[Path], tuple[np.ndarray, np.ndarray]]
    class_names: Callable[[], list[str]] | None = None


def find_layout(folder: Path, names: set[str]) -> Layout | None:
    """Recognize a data set by the names of the files in a folder.

    Raises:
        UserError: it is SVHN, whose format is not supported.
    """
    batches = sorted(n for n in names if re.fullmatch(r"data_batch_\d", n))
    if batches:
        splits = {"train": batches} | ({"test": ["test_batch"]} if "test_batch" in names else {})
        read = None
        if "batches.meta" in names:
            read = _names_reader(folder / "batches.meta", "label_names")
        return Layout("CIFAR-10", splits, lambda path: _cifar(path, "labels"), read)
    if {"train", "test", "meta"} <= names:
        splits = {split: [split] for split in ("train", "test")}
        read = _names_reader(folder / "meta", "fine_label_names")
        return Layout("CIFAR-100", splits, lambda path: _cifar(path, "fine_labels"), read)
    idx = {m[1]: m[0] for m in map(_IDX.fullmatch, sorted(names, reverse=True)) if m}
    if idx:  # where a file is there twice, the one that is not compressed
        return Layout("MNIST or alike", {_split(k): [idx[k]] for k in sorted(idx)}, _mnist)
    if svhn := sorted(n for n in names if _SVHN.fullmatch(n)):
        raise UserError(
            f"{folder / svhn[0]}: SVHN's .mat files are not supported: give its Parquet files from "
            "Hugging Face, or a folder of images"
        )
    return None


def _split(name: str) -> str:
    return "test" if name == "t10k" else name


def _names_reader(path: Path, key: str) -> Callable[[], list[str]]:
    def read() -> list[str]:
        with naming(path, "the class names of CIFAR"):
            names = read_arrays_pickle(path, "the class names of CIFAR").get(key)
            if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
                raise Refused(f"it has no list of names {key}")
            return names

    return read


def _labels(values: Any, count: int) -> np.ndarray:
    """Check class numbers; int64 [count]."""
    if len(values) != count:
        raise Refused(f"it has {count} images and {len(values)} labels")
    return np.array([checked_int(v, 0, MAX_CLASSES - 1, "a label") for v in values], np.int64)


def _cifar(path: Path, key: str) -> tuple[np.ndarray, np.ndarray]:
    what = "a batch of CIFAR (python version)"
    with naming(path, what):
        batch = read_arrays_pickle(path, what)
        data, labels = batch.get("data"), batch.get(key)
        if not isinstance(data, np.ndarray) or data.ndim != 2 or data.shape[1] != 3072:
            raise Refused("it has no array `data` of 3072 columns")
        if not isinstance(labels, list):
            raise Refused(f"it has no list `{key}`")
        return data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), _labels(labels, len(data))


def _mnist(path: Path) -> tuple[np.ndarray, np.ndarray]:
    images = _idx(path, 3)
    # torchvision's names; some copies have a dot in place of the first hyphen.
    name = path.name.replace("images", "labels").replace("idx3", "idx1")
    other = name.removesuffix(".gz") if name.endswith(".gz") else f"{name}.gz"
    labels = path.with_name(name)
    if not labels.exists() and path.with_name(other).exists():
        labels = path.with_name(other)
    with naming(labels, "an idx file of labels"):
        return images, _labels(_idx(labels, 1).tolist(), len(images))


def _idx(path: Path, dimensions: int) -> np.ndarray:
    """Read an idx file of uint8, compressed with gzip or not."""
    with naming(path, "an idx file"), open_limited(path, _MAX_BYTES) as raw:
        file = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
        header = file.read(4 + 4 * dimensions)
        if header[:4] != bytes([0, 0, 8, dimensions]) or len(header) != 4 + 4 * dimensions:
            raise Refused(f"it is not of uint8 in {dimensions} dimensions")
        shape = [int.from_bytes(header[i : i + 4], "big") for i in range(4, len(header), 4)]
        count = int(np.prod(shape, dtype=object))
        if not 0 < count <= _MAX_BYTES:
            raise Refused(f"its shape {shape} has no or too many elements")
        data = file.read(count)
        if len(data) != count:
            raise Refused("it is cut short: copy it again")
        return np.frombuffer(data, np.uint8).reshape(shape)
