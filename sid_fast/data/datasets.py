"""EDM data sets: a zip or folder of square PNGs, with class numbers in `dataset.json`."""

import hashlib
import io
import json
import mmap
import os
import struct
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from operator import length_hint
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from sid_fast.data.images import encode_png
from sid_fast.errors import UserError
from sid_fast.io.atomic import atomic_path
from sid_fast.io.download import cache_folder, file_sha256

_LABELS = "dataset.json"
_OTHER_FORMATS = {".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
_BAR_MIN_IMAGES = 1000  # show a progress bar for more images
_GREY, _RGB, _PALETTE = 0, 2, 3  # PNG colour types


class ImageDataset:
    """Images of an EDM data set, sorted by name, and their labels.

    Indexing and `images()` return uint8 CHW arrays, `encoded()` returns the PNG itself. Opening
    reads only the file names, the labels and the first image; every other image is checked when it
    is read. Every method raises UserError, naming the file, for missing or damaged data.

    Attributes:
        path: of the zip or folder.
        resolution: height and width in pixels.
        channels: 1 or 3.
        labels: class numbers, int64 [N], or None.
        label_dim: number of classes, 0 without labels.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._zip = None if self.path.is_dir() else self._open_zip()
        self._map: mmap.mmap | None = None
        if self._zip is not None:
            names = self._zip.namelist()
        else:
            names = [file.relative_to(path).as_posix() for file in self.path.rglob("*")]
        self._names = sorted(name for name in names if name.lower().endswith(".png"))
        if not self._names:
            suffixes = {PurePosixPath(name).suffix.lower() for name in names}
            advice = "give a data set zip or folder"
            if other := sorted(suffixes & _OTHER_FORMATS):
                advice = (
                    f"convert its {other[0]} files, for example with magick mogrify -format png "
                    f"*{other[0]}"
                )
            raise UserError(f"{self.path} holds no PNG images: {advice}")
        self.channels, self.resolution = self._header(self._names[0], self._member(self._names[0]))
        self.labels = self._read_labels() if _LABELS in names else None
        self.label_dim = 0 if self.labels is None else int(self.labels.max()) + 1

    @property
    def files(self) -> list[Path]:
        """The files that hold the images: one zip, or every PNG of a folder."""
        return [self.path] if self._zip else [self.path / name for name in self._names]

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> np.ndarray:
        try:
            image = Image.open(io.BytesIO(self.encoded(index)), formats=["PNG"])
            image.load()
        except UserError:
            raise
        except Exception as error:  # damaged bytes can fail in any way
            raise self.damaged(index, str(error)) from error
        pixels = np.array(image.convert("L" if self.channels == 1 else "RGB"))
        return np.ascontiguousarray(np.atleast_3d(pixels).transpose(2, 0, 1))

    def encoded(self, index: int) -> np.ndarray:
        """Return the PNG file of an image, uint8 [bytes]; a view for an uncompressed zip.

        The header is checked against the first image, and formats that decoders treat differently
        are refused. Damaged pixel data shows only when it is decoded.
        """
        name = self._names[index]
        data = self._member(name)
        actual, expected = self._header(name, data), (self.channels, self.resolution)
        if actual != expected:
            raise self._error(
                name,
                "has {0} channels of {1}x{1} pixels, the first image has {2} of {3}x{3}: make all "
                "images alike".format(*actual, *expected),
            )
        return data

    def damaged(self, index: int, why: str) -> UserError:
        """The error for an image that does not decode."""
        return self._error(self._names[index], f"is damaged ({why}): replace it")

    def images(self) -> np.ndarray:
        """Read all images, uint8 [N, C, H, W]."""
        images = np.empty([len(self), self.channels, *[self.resolution] * 2], np.uint8)
        hide = None if len(self) > _BAR_MIN_IMAGES else True
        for i in tqdm(range(len(self)), desc=f"reading {self.path.name}", disable=hide):
            images[i] = self[i]
        return images

    def _open_zip(self) -> zipfile.ZipFile:
        try:
            return zipfile.ZipFile(self.path)
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be read ({error.strerror}): give a data set zip or folder"
            ) from error
        except Exception as error:  # damaged bytes can fail in any way
            raise UserError(f"{self.path} is damaged or not a zip file: copy it again") from error

    def _error(self, name: str, what: str) -> UserError:
        return UserError(f"{self.path}: {name} {what}")

    def _read(self, name: str) -> bytes:
        try:
            return self._zip.read(name) if self._zip else (self.path / name).read_bytes()
        except Exception as error:  # damaged bytes can fail in any way
            raise self._error(name, f"cannot be read ({error}): copy the data set again") from error

    def _member(self, name: str) -> np.ndarray:
        """Bytes of a file; for an uncompressed zip a view of the memory-mapped archive."""
        info = self._zip.getinfo(name) if self._zip else None
        if info is None or info.compress_type != zipfile.ZIP_STORED:
            return np.frombuffer(self._read(name), np.uint8)
        if self._map is None:
            with open(self.path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        lengths = self._map[info.header_offset + 26 : info.header_offset + 30]
        start = info.header_offset + 30 + sum(struct.unpack("<HH", lengths.ljust(4, b"\0")))
        data = np.frombuffer(self._map, np.uint8)[start : start + info.file_size]
        if zlib.crc32(data) != info.CRC:
            raise self._error(name, "cannot be read (bad CRC-32): copy the data set again")
        return data

    def _header(self, name: str, data: np.ndarray) -> tuple[int, int]:
        """Check a PNG header; return channels and resolution. Decoders would hide the bit depth."""
        png = data.tobytes()
        if len(png) < 33 or png[:8] != b"\x89PNG\r\n\x1a\n":
            raise self._error(name, "is damaged or not a PNG: replace it")
        width, height, depth, colour = struct.unpack(">IIBB", png[16:26])
        if width != height:
            raise self._error(name, f"is {width}x{height} pixels: crop it to a square")
        if colour not in (_GREY, _RGB, _PALETTE) or (depth != 8 and colour != _PALETTE):
            raise self._error(name, "has alpha or is not 8-bit: save it as 8-bit RGB or grey")
        if b"tRNS" in png[: png.find(b"IDAT")]:
            raise self._error(name, "has transparency: save it as RGB or grey")
        return 1 if colour == _GREY else 3, width

    def _read_labels(self) -> np.ndarray | None:
        try:
            pairs = json.loads(self._read(_LABELS))["labels"]
            if pairs is None:
                return None
            # Not dict(pairs), which would also accept a JSON object.
            by_name = {name: label for name, label in pairs}  # noqa: C416
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise self._error(
                _LABELS, 'is not JSON of the form {"labels": [[name, class], ...] or null}'
            ) from error
        if missing := set(self._names) - by_name.keys():
            raise self._error(_LABELS, f"has no label for {min(missing)}: every image needs one")
        if extra := by_name.keys() - set(self._names):
            raise self._error(
                _LABELS, f"labels {min(extra, key=str)}, which does not exist: remove it"
            )
        if len(pairs) != len(by_name):
            raise self._error(_LABELS, "labels an image twice: every image needs one label")
        for name, label in by_name.items():
            if type(label) is not int or not 0 <= label < 2**31:
                raise self._error(
                    _LABELS,
                    f"gives {name} the label {label!r:.40}: only class numbers (0, 1, …) are "
                    "supported, not vectors",
                )
        return np.array([by_name[name] for name in self._names], np.int64)


def content_digest(data: ImageDataset) -> str:
    """The sha256 of a data set's files.

    Hashing takes about a second per GB, so the result is cached under the files' paths, sizes,
    inodes and times; a change in any of them hashes the files again.
    """
    identity = hashlib.sha256()
    for path in data.files:
        s = path.stat()
        times = s.st_mtime_ns, s.st_ctime_ns  # ctime cannot be set back
        identity.update(repr((os.path.abspath(path), s.st_size, s.st_ino, *times)).encode())
    record = cache_folder() / f"content-{identity.hexdigest()[:32]}.txt"
    if record.exists():
        return record.read_text()
    content = hashlib.sha256()
    for path in data.files:
        content.update(bytes.fromhex(file_sha256(path)))
    with atomic_path(record) as temporary:
        temporary.write_text(content.hexdigest())
    return content.hexdigest()


def write_dataset(
    path: str | os.PathLike[str],
    images: Iterable[np.ndarray | torch.Tensor],
    labels: Sequence[int] | np.ndarray | None = None,
) -> None:
    """Write uint8 images [C, H, W], C = 1 or 3, as an EDM data set zip, atomically.

    The same images and labels give the same bytes.

    Args:
        path: of the zip.
        images: arrays or tensors, of one shape.
        labels: a class number per image, or None.

    Raises:
        UserError: the file cannot be written, or images and labels differ in number.
    """
    hide = None if length_hint(images, _BAR_MIN_IMAGES + 1) > _BAR_MIN_IMAGES else True
    names: list[str] = []
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for i, image in enumerate(tqdm(images, desc=f"writing {path}", disable=hide)):
            names.append(f"{i // 1000:05d}/img{i:08d}.png")
            archive.writestr(zipfile.ZipInfo(names[-1]), encode_png(image))
        pairs: Any = None
        if labels is not None:
            if len(labels) != len(names):
                raise UserError(f"{path}: {len(names)} images but {len(labels)} labels")
            pairs = [[name, int(label)] for name, label in zip(names, labels, strict=True)]
        archive.writestr(zipfile.ZipInfo(_LABELS), json.dumps({"labels": pairs}))
