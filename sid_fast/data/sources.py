"""Find the images and labels in a folder, a zip or a downloaded data set; nothing is executed."""

import csv
import io
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from sid_fast.data import layouts, tables
from sid_fast.data.convert import LeftOut
from sid_fast.data.datasets import (
    LABELS,
    MAX_CLASSES,
    OTHER_FORMATS,
    is_hidden,
    parse_labels,
    suffix_of,
    walk,
)
from sid_fast.errors import UserError
from sid_fast.io.archives import MAX_BYTES, open_zip, read_member
from sid_fast.io.untrusted import (
    FIRST_BYTES,
    Refused,
    brief,
    checked_int,
    describe,
    naming,
    open_limited,
    parse_json,
    read_limited,
    sniff,
)

_WHAT = "a folder or zip of images, or a data set as torchvision or Hugging Face stores it"
_IMAGES = {".png", *OTHER_FORMATS} - {".npy"}
_MAX_FILE_BYTES = 2**28  # of an image file, or of labels
_MAX_METADATA_LINES = 10_000_000
_METADATA = ("metadata.jsonl", "metadata.csv")
_LABEL_KEYS = ("label", "labels", "class")  # of such metadata
_SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing", "extra"}
_EDM_NAME = re.compile(r"\d{5}/img\d{8}\.\w+")
_SHOWN = 5  # names in a message


@dataclass
class Source:
    """Images in the order of the data set to make, and their labels.

    Attributes:
        what: the kind of source, for people.
        count: number of images.
        name: names an image for people.
        read: returns an image file, or pixels as uint8 [H, W] or [H, W, 3]; LeftOut if it cannot
            be read. Threads may call it.
        labels: class numbers, int64 [count], -1 for an image without one; None without labels.
        class_names: by class number; None if unknown.
        notes: what else people should know.
        in_order: reading images in order is much faster.
    """

    what: str
    count: int
    name: Callable[[int], str]
    read: Callable[[int], bytes | np.ndarray]
    labels: np.ndarray | None = None
    class_names: list[str] | None = None
    notes: list[str] = field(default_factory=list)
    in_order: bool = False


def open_source(path: Path, split: str | None, with_labels: bool) -> Source:
    """Open whatever is at a path.

    Args:
        path: of a folder or file.
        split: name of the split to read, or "all"; None: the only one, or train.
        with_labels: read the labels, too.

    Raises:
        UserError: it holds no images, several data sets, or labels that cannot be used.
    """
    if path.is_dir():
        names, links = walk(path)
        source = _open_folder(path, names, split, with_labels)
        if links:
            source.notes.append(f"{links:,} link{'s' * (links > 1)} to folders not followed")
    else:
        with open_limited(path, MAX_BYTES) as file:
            first = file.read(FIRST_BYTES)
        if first.startswith(b"PAR1"):
            source = _tables(path.parent, [path.name], split, with_labels)
        elif (kind := sniff(first)) in ("zip", "npz", "torch"):
            source = _open_zip(path, split, with_labels)
        else:
            raise UserError(f"{path} is {describe(kind)}: give {_WHAT}")
    if not with_labels:
        source.labels = source.class_names = None
    return source


def select_classes(source: Source, wanted: Sequence[str]) -> np.ndarray:
    """Renumber the classes of a source, keeping only some.

    Args:
        source: with labels; changed.
        wanted: names of the classes, or their numbers where there are no names. The first becomes
            class 0.

    Returns:
        Indices of the images that are kept, int64.

    Raises:
        UserError: there is no such class, or one is named twice.
    """
    if source.labels is None:
        raise UserError("classes: the source has no classes to choose from: leave out --classes")
    known = source.class_names or [str(c) for c in range(int(source.labels.max()) + 1)]
    for name in wanted:
        if name not in known:
            shown = ", ".join(known[:20]) + ", …" * (len(known) > 20)
            raise UserError(f"classes: {name!r} is not a class: choose from {shown}")
    if len(set(wanted)) < len(wanted):
        raise UserError(f"classes={','.join(wanted)} names a class twice: name each once")
    number = np.full(len(known) + 1, -1)  # the last entry is for the label -1
    number[[known.index(name) for name in wanted]] = range(len(wanted))
    source.labels = number[np.minimum(source.labels, len(known))]
    source.class_names = list(wanted) if source.class_names else None
    return np.flatnonzero(source.labels >= 0)


def _choose_split(available: Iterable[str], wanted: str | None, path: Path) -> list[str]:
    """Return the names of the splits to read."""
    known = sorted(available)
    if wanted == "all":
        return known
    if wanted is not None:
        if wanted not in known:
            raise UserError(f"split={wanted} is not in {path}: choose from all, {', '.join(known)}")
        return [wanted]
    for name in (*known[: len(known) == 1], "train", "training"):
        if name in known:
            return [name]
    raise UserError(f"{path} has the splits {', '.join(known)}: choose one with --split, or all")


def _named(what: str, chosen: Sequence[str], available: Iterable[str]) -> str:
    """Append the splits to the name of a source that has several."""
    known = set(available)
    if len(known) == 1:
        return what
    rest = ", ".join(sorted(known - set(chosen)))
    return f"{what}, split {' + '.join(chosen)}{f' (not read: {rest})' * bool(rest)}"


def _open_folder(path: Path, names: list[str], split: str | None, with_labels: bool) -> Source:
    names = [n for n in names if not is_hidden(n)]
    folders: dict[str, set[str]] = {}
    for name in names:
        folder, _, file = name.rpartition("/")
        folders.setdefault(folder, set()).add(file)
    found = [(f, layouts.find_layout(path / f, folders[f])) for f in sorted(folders)]
    known = [(f, layout) for f, layout in found if layout]
    table_files = [n for n in names if tables.is_table(n)]
    if len(known) + bool(table_files) > 1:
        places = [str(path / f) for f, _ in known] + [str(path / n) for n in table_files[:1]]
        raise UserError(f"{path} holds several data sets: give one of {', '.join(places)}")
    if known:
        (folder, layout), *_ = known
        return _arrays(path / folder, layout, split)
    if table_files:
        return _tables(path, table_files, split, with_labels)

    def read(name: str) -> bytes:
        try:
            return read_limited(path / name, _MAX_FILE_BYTES)
        except UserError as error:
            raise LeftOut("unreadable") from error

    return _Images(path, "folder", names, read).open(split, with_labels)


def _open_zip(path: Path, split: str | None, with_labels: bool) -> Source:
    archive = open_zip(path, _WHAT)
    names = sorted(n for n in archive.NameToInfo if not n.endswith("/") and not is_hidden(n))

    def read(name: str) -> bytes:
        try:
            return read_member(archive, archive.getinfo(name), _MAX_FILE_BYTES)
        except Refused as error:
            raise LeftOut("encrypted, too large or compressed in an unknown way") from error
        except Exception as error:  # damaged bytes can fail in any way
            raise LeftOut("damaged") from error

    return _Images(path, "zip", names, read).open(split, with_labels)


def _arrays(path: Path, layout: layouts.Layout, split: str | None) -> Source:
    chosen = _choose_split(layout.splits, split, path)
    files = [name for each in chosen for name in layout.splits[each]]
    parts = [layout.load(path / name) for name in files]
    ends = np.cumsum([len(images) for images, _ in parts])

    def locate(index: int) -> tuple[int, int]:
        k = int(np.searchsorted(ends, index, side="right"))
        return k, index - (int(ends[k - 1]) if k else 0)

    def name(index: int) -> str:
        k, row = locate(index)
        return f"{files[k]} image {row}"

    def read(index: int) -> np.ndarray:
        k, row = locate(index)
        return parts[k][0][row]

    return Source(
        _named(layout.what, chosen, layout.splits),
        int(ends[-1]),
        name,
        read,
        np.concatenate([labels for _, labels in parts]),
        layout.class_names() if layout.class_names else None,
    )


def _tables(path: Path, names: Sequence[str], split: str | None, with_labels: bool) -> Source:
    splits = tables.splits_of(names)
    chosen = _choose_split(splits, split, path)
    files = [path / name for each in chosen for name in splits[each]]
    for each in chosen:
        if len(folders := {(path / name).parent for name in splits[each]}) > 1:
            places = ", ".join(map(str, sorted(folders)))
            raise UserError(f"{path} holds several data sets: give one of {places}")
    if len({file.suffix for file in files}) > 1:
        raise UserError(f"{path} holds both Parquet and Arrow files: give a folder of one kind")
    rows = tables.Rows(files, with_labels)
    what = f"{'Parquet' if files[0].suffix == '.parquet' else 'Arrow'} files, {rows.note}"
    return Source(
        _named(what, chosen, splits),
        len(rows),
        rows.name,
        rows.read,
        rows.labels,
        rows.class_names,
        in_order=True,
    )


class _Images:
    """Image files in a folder or zip, and where their labels are."""

    def __init__(
        self, path: Path, kind: str, names: Iterable[str], read: Callable[[str], bytes]
    ) -> None:
        self._path, self._kind, self._read = path, kind, read
        self._all = set(names)
        self._images = sorted(n for n in self._all if suffix_of(n) in _IMAGES)

    def open(self, split: str | None, with_labels: bool) -> Source:
        """Find the split and the labels."""
        if not self._images:
            advice = (
                "its images may be hidden or have another suffix" if self._all else "it is empty"
            )
            raise UserError(f"{self._path} holds no images ({advice}): give {_WHAT}")
        others = sum(n.rpartition("/")[2] not in (LABELS, *_METADATA) for n in self._all)
        others -= len(self._images)
        images, root, what = self._images, self._common(""), f"{self._kind} of images"
        tops = {n[len(root) :].partition("/")[0] for n in images}
        splits = len(tops) > 1 and tops <= _SPLITS and not self._has_labels(root)
        if splits:
            chosen = _choose_split(tops, split, self._path)
            what = _named(what, chosen, tops)
            images = [n for n in images if n[len(root) :].partition("/")[0] in chosen]
            if len(chosen) == 1:
                self._images = images
                root, splits = self._common(f"{root}{chosen[0]}/"), False
        elif split is not None:
            raise UserError(f"split={split}: {self._path} has no splits: leave out --split")
        source = Source(what, len(images), lambda i: images[i], lambda i: self._read(images[i]))
        if others:
            source.notes.append(f"{others:,} other file{'s' * (others > 1)} ignored")
        if with_labels:
            self._label(source, images, root, splits)
        return source

    def _common(self, root: str) -> str:
        """Extend a folder as long as it holds nothing but one folder with all the images."""
        while not self._has_labels(root):
            tops = {n[len(root) :].partition("/")[0] for n in self._images}
            top = f"{root}{min(tops)}/"
            if len(tops) > 1 or not self._images[0].startswith(top):
                break
            root = top
        return root

    def _has_labels(self, root: str) -> bool:
        return any(root + name in self._all for name in (LABELS, *_METADATA))

    def _label(self, source: Source, images: list[str], root: str, splits: bool) -> None:
        """Set the labels of a source: from a file, else by the folders' names."""
        relative = [n[len(root) :] for n in images]
        if root + LABELS in self._all:
            content = self._read_text(root + LABELS)
            source.labels, _ = parse_labels(content, relative, self._path)
            source.class_names = _class_names(content)
            return
        folders = sorted({n.partition("/")[0] + "/" for n in relative}) if splits else [""]
        by_name: dict[str, str | int | None] = {}
        for folder in folders:
            for name in _METADATA:
                if (file := root + folder + name) in self._all:
                    by_name |= self._metadata(file, root + folder)
        if any(v is not None for v in by_name.values()):
            _set_labels(source, [by_name.get(n) for n in images])
            return
        if splits:
            relative = [n.partition("/")[2] for n in relative]
        if all(map(_EDM_NAME.fullmatch, relative)):
            return  # folders of an EDM data set are no classes
        tops = [n.partition("/")[0] if "/" in n else None for n in relative]
        if len(set(tops)) == 1:
            return
        if None in tops:
            raise UserError(
                f"{self._path}: {images[tops.index(None)]} lies outside the folders, whose names "
                "are the classes: move it into one, or give --classes none"
            )
        _set_labels(source, tops)

    def _read_text(self, name: str) -> bytes:
        try:
            return self._read(name)
        except LeftOut as error:
            raise UserError(f"{self._path}: {name} is {error}: replace it") from error

    def _metadata(self, name: str, folder: str) -> dict[str, str | int | None]:
        """Read Hugging Face's metadata: the label of each image, by its name in the source."""
        with naming(f"{self._path}: {name}", "metadata of an image folder"):
            content = self._read_text(name)
            if content.count(b"\n") > _MAX_METADATA_LINES:
                raise Refused(f"it has more than {_MAX_METADATA_LINES:,} lines")
            rows: Iterable
            if name.endswith(".csv"):
                rows = csv.DictReader(io.StringIO(content.decode("utf-8-sig")))
            else:
                rows = (parse_json(line) for line in content.splitlines() if line.strip())
            labels: dict[str, str | int | None] = {}
            for row in rows:
                file = row.get("file_name") if isinstance(row, dict) else None
                if not isinstance(file, str):
                    raise Refused("a line of it has no file_name")
                label = next((row[k] for k in _LABEL_KEYS if row.get(k) is not None), None)
                if type(label) is int:
                    checked_int(label, 0, MAX_CLASSES - 1, "a label")
                elif label is not None and type(label) is not str:
                    raise Refused(f"it gives {brief(file)} the label {brief(label)}")
                labels[folder + str(PurePosixPath(file))] = label
            return labels


def _class_names(content: bytes) -> list[str] | None:
    """The class names that `prepare` wrote beside the labels of a data set, if any."""
    names = parse_json(content, 4, 10_000_000).get("class_names")
    if isinstance(names, list) and all(isinstance(n, str) for n in names):
        return names
    return None


def _set_labels(source: Source, values: Sequence[str | int | None]) -> None:
    """Number the classes by their sorted names; by their numbers if all names are numbers.

    Class numbers in a file stay as they are.
    """
    present = {v for v in values if v is not None}
    if all(type(v) is int for v in present):
        source.labels = np.array([-1 if v is None else v for v in values], np.int64)
        return
    names = sorted({str(v) for v in present})
    if all(re.fullmatch(r"[0-9]{1,9}", n) for n in names):
        names.sort(key=lambda n: (int(n), n))
    number = {name: i for i, name in enumerate(names)}
    source.labels = np.array([-1 if v is None else number[str(v)] for v in values], np.int64)
    source.class_names = names
