"""EDM data sets: a zip or folder of square PNGs, with class numbers in `dataset.json`.

Latents of a VAE come in the same layout, as .npy files; see data.latents.
"""

import hashlib
import itertools
import json
import mmap
import os
import re
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import length_hint
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from sid_fast.data.images import MAX_RESOLUTION, decode_png, encode_png
from sid_fast.errors import UserError
from sid_fast.io import progress
from sid_fast.io.archives import MAX_BYTES, open_zip, read_member, require_member
from sid_fast.io.atomic import atomic_path
from sid_fast.io.download import cache_folder, file_sha256, write_cache
from sid_fast.io.untrusted import (
    Refused,
    brief,
    describe,
    open_limited,
    parse_json,
    read_limited,
    read_values,
    require_file,
    sniff,
)

MAX_CLASSES = 100_000  # that a network can have
LABELS = "dataset.json"
_LABEL_ALIASES = {"dataset.json", "labels.json"}  # in any case, at the top
OTHER_FORMATS = {
    ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".apng", ".avif", ".heic",
    ".jp2", ".jxl", ".ppm", ".pgm", ".tga", ".npy",
}  # fmt: skip
_GREY, _RGB, _PALETTE = 0, 2, 3  # PNG colour types
_MAX_SAMPLE_BYTES = 2**27  # a PNG of noise of MAX_RESOLUTION takes 50 MB
_LABELS_FORM = 'must be of the form {"labels": [[name, class], ...] or null}'
_MAX_LABEL_BYTES = 2**27  # the labels of ImageNet take 60 MB
_MAX_LABEL_VALUES = 8_000_000  # commas and brackets: three an image


@dataclass(frozen=True)
class Listing:
    """The files of a data set.

    Attributes:
        path: of the zip or folder.
        zip: the open zip, or None.
        names: of all files, relative to the folder or in the zip, where one may be repeated.
        linked_folders: links to folders, which are not followed.
    """

    path: Path
    zip: zipfile.ZipFile | None
    names: list[str]
    linked_folders: int

    @property
    def visible(self) -> set[str]:
        """Names that are not hidden; others are not read."""
        return {name for name in self.names if not is_hidden(name)}


def list_files(path: str | os.PathLike[str]) -> Listing:
    """List the files of a data set zip or folder; UserError if it cannot be read."""
    path = Path(path)
    if path.is_dir():
        return Listing(path, None, *walk(path))
    archive = open_zip(path, "a data set zip or folder")
    # Not is_dir(), which fails for a name that is empty.
    names = [i.filename for i in archive.infolist() if not i.filename.endswith("/")]
    return Listing(path, archive, names, 0)


class Dataset:
    """Samples of a data set, a file each, sorted by name, and their labels.

    Indexing and `images()` return CHW arrays. Opening reads only the file names, the labels and the
    first sample; every other one is checked when it is read. Every method raises UserError, naming
    the file, for missing or damaged data.

    Hidden files, and what is in hidden folders, are not read.

    Args:
        source: the path of a zip or folder, or its files.

    Attributes:
        path: of the zip or folder.
        resolution: height and width.
        channels: of a network's input.
        dtype: of the samples.
        labels: class numbers, int64 [N], or None.
        label_dim: number of classes, 0 without labels.
        note: what of the data set is left out, for people; "" if nothing is.
    """

    suffix: ClassVar[str]  # of the files, in lower case
    is_latent: ClassVar[bool]
    resolution: int
    channels: int
    dtype: np.dtype

    def __init__(self, source: str | os.PathLike[str] | Listing) -> None:
        files = source if isinstance(source, Listing) else list_files(source)
        self.path, self._zip = files.path, files.zip
        self._map: mmap.mmap | None = None
        listed, names = files.names, files.visible
        formats = {".png", *OTHER_FORMATS}
        self._names = sorted(name for name in names if name.lower().endswith(self.suffix))
        others = Counter(suffix_of(n) for n in names if suffix_of(n) in formats - {self.suffix})
        hidden = sum(suffix_of(n) in formats for n in set(listed) - names)
        if not self._names:
            raise self._nothing(others, hidden)
        self._inspect(self._names[0], self._member(self._names[0]))
        self._refuse_misplaced_labels(names)
        omitted = [
            f"{count:,} {suffix} file{'s' * (count > 1)} {self._way(suffix)}".rstrip()
            for suffix, count in sorted(others.items())
        ]
        omitted += [f"{hidden:,} hidden image{'s' * (hidden > 1)}"] * bool(hidden)
        if links := files.linked_folders:
            omitted.append("1 link to a folder" if links == 1 else f"{links:,} links to folders")
        notes = [f"not read: {', '.join(omitted)}"] * bool(omitted)
        if self._zip and (twice := len(listed) - len(set(listed))):
            repeated = min(name for name, count in Counter(listed).items() if count > 1)
            notes.append(
                f"{twice:,} name{'s' * (twice > 1)} twice in the zip, such as {repeated}: the last "
                "is read"
            )
        self.labels = None
        if LABELS in names:
            self.labels, unused = self._read_labels()
            if unused:
                notes.append(f"{unused:,} label{'s' * (unused > 1)} of files that are not read")
        self.label_dim = 0 if self.labels is None else int(self.labels.max()) + 1
        notes += self._absent_classes()
        self.note = "; ".join(notes)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """The shape of a sample as it is stored."""
        return self.channels, self.resolution, self.resolution

    def __getitem__(self, index: int) -> np.ndarray:
        raise NotImplementedError

    def images(self) -> np.ndarray:
        """Read all samples, [N, C, R, R]."""
        images = np.empty([len(self), *self.sample_shape], self.dtype)
        for i in progress.track(range(len(self)), f"reading {self.path.name}", "images"):
            images[i] = self[i]
        return images

    def _inspect(self, name: str, data: np.ndarray) -> None:
        """Set resolution, channels and dtype to those of the first sample."""
        raise NotImplementedError

    def _nothing(self, others: Mapping[str, int], hidden: int) -> UserError:
        """The error for a data set without samples."""
        raise NotImplementedError

    def _way(self, suffix: str) -> str:
        """What to do with files of another format, in brackets; or ""."""
        return ""

    @property
    def classes(self) -> list[int]:
        """The classes that have images, ascending; empty without labels."""
        return [] if self.labels is None else np.unique(self.labels).tolist()

    @property
    def files(self) -> list[Path]:
        """The files that hold the samples: one zip, or every one of a folder."""
        return [self.path] if self._zip else [self.path / name for name in self._names]

    def __len__(self) -> int:
        return len(self._names)

    def _error(self, name: str, what: object) -> UserError:
        return UserError(f"{self.path}: {name} {what}")

    def _read(self, name: str, max_bytes: int) -> bytes:
        if not self._zip:
            return read_limited(self.path / name, max_bytes)
        try:
            return read_member(self._zip, self._zip.getinfo(name), max_bytes)
        except Refused as error:
            raise self._error(name, error) from error
        except Exception as error:  # damaged bytes can fail in any way
            raise self._error(name, f"cannot be read ({error}): copy the data set again") from error

    def _read_values(self, name: str) -> bytes:
        """Read JSON text, and refuse too many values before all of it is in memory."""
        limits = _MAX_LABEL_BYTES, _MAX_LABEL_VALUES
        if not self._zip:
            with open_limited(self.path / name, _MAX_LABEL_BYTES) as file:
                return read_values(file, *limits)
        info = self._zip.getinfo(name)
        try:
            require_member(info, _MAX_LABEL_BYTES)
        except Refused as error:
            raise self._error(name, error) from error
        try:
            with self._zip.open(info) as member:
                data = read_values(member, *limits)
            if len(data) != info.file_size:
                raise Refused("it is cut short")
            return data
        except Refused:
            raise
        except Exception as error:  # damaged bytes can fail in any way
            raise self._error(name, f"cannot be read ({error}): copy the data set again") from error

    def _member(self, name: str) -> np.ndarray:
        """Bytes of a sample; for an uncompressed zip a view of the memory-mapped archive."""
        info = self._zip.getinfo(name) if self._zip else None
        if info is None or info.compress_type != zipfile.ZIP_STORED:
            return np.frombuffer(self._read(name, _MAX_SAMPLE_BYTES), np.uint8)
        try:
            require_member(info, _MAX_SAMPLE_BYTES)
        except Refused as error:
            raise self._error(name, error) from error
        if self._map is None:
            with open(self.path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        lengths = self._map[info.header_offset + 26 : info.header_offset + 30]
        start = info.header_offset + 30 + sum(struct.unpack("<HH", lengths.ljust(4, b"\0")))
        data = np.frombuffer(self._map, np.uint8)[start : start + info.file_size]
        if zlib.crc32(data) != info.CRC:
            raise self._error(name, "cannot be read (bad CRC-32): copy the data set again")
        return data

    def _refuse_misplaced_labels(self, names: set[str]) -> None:
        """Refuse labels in a file that would not be read, as training would ignore them."""
        if LABELS in names:
            return
        for name in sorted(names):
            folder, _, file = name.rpartition("/")
            if not folder and file.lower() in _LABEL_ALIASES:
                raise self._error(
                    name,
                    f"may hold labels, which only {LABELS} gives: rename it to that, or remove it "
                    "to go on without labels",
                )
            if folder and file.lower() == LABELS:
                way = f"zip what is in {folder} without the folder itself"
                if not self._zip:
                    way = f"give {self.path / folder} as the data set"
                raise self._error(
                    name,
                    f"is not at the top, where labels are read: {way}, or remove it to go on "
                    "without labels",
                )

    def _read_labels(self) -> tuple[np.ndarray | None, int]:
        """Return the labels of the images, and how many labels are of other files."""
        try:
            content = self._read_values(LABELS)
        except Refused as error:
            raise self._error(LABELS, f"cannot be used ({error}): it {_LABELS_FORM}") from error
        return parse_labels(content, self._names, self.path)

    def _absent_classes(self) -> list[str]:
        """A note about class numbers below the largest that no image has."""
        present = [-1, *self.classes]
        gaps = [(a + 1, b - 1) for a, b in itertools.pairwise(present) if b > a + 1]
        if not gaps:
            return []
        shown = ", ".join(f"{a}" if a == b else f"{a} to {b}" for a, b in gaps[:3])
        return [
            f"no images of class {shown}{', …' * (len(gaps) > 3)}: such classes are never drawn; "
            "numbers from 0 without gaps make a smaller network"
        ]


class ImageDataset(Dataset):
    """Images of an EDM data set; see Dataset.

    Samples are uint8; `encoded()` returns the PNG itself. resolution is in pixels, channels is 1 or
    3.
    """

    suffix, is_latent, dtype = ".png", False, np.dtype(np.uint8)

    def __getitem__(self, index: int) -> np.ndarray:
        try:
            image = decode_png(self.encoded(index), self.resolution)
            pixels = np.array(image.convert("L" if self.channels == 1 else "RGB"))
        except UserError:
            raise
        except Exception as error:  # damaged bytes can fail in any way
            raise self.damaged(index, str(error)) from error
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

    def _inspect(self, name: str, data: np.ndarray) -> None:
        self.channels, self.resolution = self._header(name, data)

    def _nothing(self, others: Mapping[str, int], hidden: int) -> UserError:
        advice = "give a data set zip or folder"
        if [*others] == [".npy"]:
            advice = f"its {others['.npy']:,} .npy files are latents, but images are needed"
        elif others:
            advice = f"convert its {min(others)} files, for example with {_convert(min(others))}"
        elif hidden:
            advice = f"rename its {hidden:,} hidden images, whose names or folders begin with a dot"
        return UserError(f"{self.path} holds no PNG images: {advice}")

    def _way(self, suffix: str) -> str:
        return f"(convert them, for example with {_convert(suffix)})"

    def _header(self, name: str, data: np.ndarray) -> tuple[int, int]:
        """Check a PNG header; return channels and resolution. Decoders would hide the bit depth."""
        png = data.tobytes()
        if (kind := sniff(png)) != "png" and kind != "unknown":
            raise self._error(name, f"is damaged or not a PNG ({describe(kind)}): replace it")
        if len(png) < 33 or kind == "unknown":
            raise self._error(name, "is damaged or not a PNG: replace it")
        width, height, depth, colour = struct.unpack(">IIBB", png[16:26])
        if width != height:
            raise self._error(
                name,
                f"is {width}x{height} pixels: crop it to a square, for "
                "example with python -m sid_fast.prepare",
            )
        if not 0 < width <= MAX_RESOLUTION:
            raise self._error(
                name, f"is {width}x{height} pixels: scale it to {MAX_RESOLUTION} at most"
            )
        if colour not in (_GREY, _RGB, _PALETTE) or (depth != 8 and colour != _PALETTE):
            raise self._error(name, "has alpha or is not 8-bit: save it as 8-bit RGB or grey")
        if b"tRNS" in png[: png.find(b"IDAT")]:
            raise self._error(name, "has transparency: save it as RGB or grey")
        return 1 if colour == _GREY else 3, width


def walk(path: Path) -> tuple[list[str], int]:
    """List the files below a folder, and count the links to folders, which are not followed.

    Returns:
        Names relative to the folder, with forward slashes, and the number of links.

    Raises:
        UserError: a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise UserError(
            f"{error.filename} cannot be read ({error.strerror}): check its permissions"
        ) from error

    names, links = [], 0
    for folder, inner, files in os.walk(path, onerror=refuse):
        at = Path(folder).relative_to(path)
        prefix = "" if at == Path() else f"{at.as_posix()}/"
        names += [prefix + file for file in files]
        links += sum(os.path.islink(os.path.join(folder, n)) for n in inner)
    return names, links


def suffix_of(name: str) -> str:
    """The suffix of a file name in lower case, such as ".png"."""
    return os.path.splitext(name)[1].lower()


def is_hidden(name: str) -> bool:
    """Whether a file or a folder above it is hidden, or is what macOS adds to a zip."""
    return any(
        part == "__MACOSX" or (part.startswith(".") and part not in (".", ".."))
        for part in name.split("/")
    )


def parse_labels(content: bytes, names: Sequence[str], path: Path) -> tuple[np.ndarray | None, int]:
    """Read the labels of images from a `dataset.json`.

    Args:
        content: of the file.
        names: of the images, as the file should have them.
        path: of the data set, for errors.

    Returns:
        Class numbers, int64 [N], or None if the file says null; and how many labels are of other
        files.

    Raises:
        UserError: the file has another form, or no class number for one of the images.
    """

    def wrong(what: str) -> UserError:
        return UserError(f"{path}: {LABELS} {what}")

    form = _LABELS_FORM
    try:
        values = parse_json(content, 4, _MAX_LABEL_VALUES)
    except Refused as error:
        raise wrong(f"cannot be used ({error}): it {form}") from error
    if not isinstance(values, dict) or "labels" not in values:
        raise wrong(form)
    pairs = values["labels"]
    if pairs is None:
        return None, 0
    if not isinstance(pairs, list):
        raise wrong(form)
    by_name: dict[str, Any] = {}
    for pair in pairs:
        if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)):
            raise wrong(form)
        by_name[pair[0]] = pair[1]
    if len(pairs) != len(by_name):
        raise wrong("labels an image twice: every image needs one label")
    labels = np.empty(len(names), np.int64)
    for i, name in enumerate(names):
        if name not in by_name:
            raise wrong(f"has no label for {name}: every image needs one")
        label = by_name[name]
        whole = type(label) is int or (type(label) is float and label.is_integer())
        if not whole or not 0 <= label < MAX_CLASSES:
            raise wrong(
                f"gives {name} the label {brief(label)}: only class numbers (0, 1, …, below "
                f"{MAX_CLASSES:,}) are supported, not vectors"
            )
        labels[i] = label
    return labels, len(by_name) - len(names)


def _convert(suffix: str) -> str:
    """A command that converts files with this suffix."""
    foreign = (
        ".apng",
        ".heic",
        ".jxl",
        ".npy",
        ".tga",
    )  # that PIL cannot read, or not as one image
    return (
        f"magick mogrify -format png *{suffix}"
        if suffix in foreign
        else "python -m sid_fast.prepare"
    )


def content_digest(data: Dataset) -> str:
    """The sha256 of a data set's files.

    Hashing takes about a second per GB, so the result is cached under the files' paths, sizes,
    inodes and times; a change in any of them hashes the files again.
    """
    identity = hashlib.sha256()
    for path in data.files:
        require_file(path, MAX_BYTES)
        s = path.stat()
        times = s.st_mtime_ns, s.st_ctime_ns  # ctime cannot be set back
        identity.update(repr((os.path.abspath(path), s.st_size, s.st_ino, *times)).encode())
    record = cache_folder() / f"content-{identity.hexdigest()[:32]}.txt"
    if record.exists():
        cached = read_limited(record, 1000)
        if re.fullmatch(rb"[0-9a-f]{64}", cached):
            return cached.decode()
    content = hashlib.sha256()
    for path in progress.track(data.files, f"hashing {data.path.name}", "files"):
        content.update(bytes.fromhex(file_sha256(path)))

    def write() -> None:
        with atomic_path(record) as temporary:
            temporary.write_text(content.hexdigest())

    write_cache(write)
    return content.hexdigest()


class DatasetWriter:
    """Write an EDM data set zip image by image; the same calls give the same bytes."""

    def __init__(self, path: Path) -> None:
        self._zip = zipfile.ZipFile(path, "w")
        self._labels: list[int | None] = []

    def __enter__(self) -> "DatasetWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self._zip.close()

    @property
    def count(self) -> int:
        """Images written so far."""
        return len(self._labels)

    def add(self, png: bytes, label: int | None) -> None:
        """Write an image; either all images have a label or none has."""
        self._zip.writestr(zipfile.ZipInfo(_image_name(self.count)), png)
        self._labels.append(label)

    def finish(self, **extra: Any) -> None:
        """Write the labels and further entries of `dataset.json`; nothing can be added then."""
        pairs = None
        if self._labels and None not in self._labels:
            pairs = [[_image_name(i), label] for i, label in enumerate(self._labels)]
        content = json.dumps({"labels": pairs, **extra})
        self._zip.writestr(zipfile.ZipInfo(LABELS), content)


def _image_name(index: int) -> str:
    return f"{index // 1000:05d}/img{index:08d}.png"


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
    shown = progress.track(images, f"writing {path}", "images", length_hint(images) or None)
    with atomic_path(path) as temporary, DatasetWriter(temporary) as writer:
        for i, image in enumerate(shown):
            label = int(labels[i]) if labels is not None and i < len(labels) else None
            writer.add(encode_png(image), label)
        if labels is not None and len(labels) != writer.count:
            raise UserError(f"{path}: {writer.count} images but {len(labels)} labels")
        writer.finish()
