"""Data sets as Hugging Face stores them: Parquet files, and Arrow files of `save_to_disk`."""

import functools
import re
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from sid_fast.data.convert import LeftOut
from sid_fast.data.datasets import MAX_CLASSES
from sid_fast.errors import UserError
from sid_fast.io.archives import MAX_BYTES
from sid_fast.io.untrusted import Refused, brief, naming, parse_json, require_file

_WHAT = "a Parquet or Arrow file of images"
_PART = re.compile(r"(.+?)-\d{5}-of-\d{5}.*")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "class")


def is_table(name: str) -> bool:
    """Whether a file is a table of a data set; Hugging Face also leaves caches beside them."""
    path = PurePosixPath(name)
    return path.suffix in (".parquet", ".arrow") and not path.name.startswith("cache-")


def splits_of(names: Iterable[str]) -> dict[str, list[str]]:
    """Group table files by split: train-00000-of-00002.parquet or train/data-00000-of-00002.arrow.

    Args:
        names: of the files, relative to the data set.
    """
    splits: dict[str, list[str]] = {}
    for name in sorted(names):
        path = PurePosixPath(name)
        match = _PART.fullmatch(path.stem)
        split = match[1] if match else path.stem
        if split == "data" or (not match and path.parent.name):
            split = path.parent.name or "train"
        splits.setdefault(split, []).append(name)
    return splits


class Rows:
    """Rows of Parquet or Arrow files: an image each, and a label if there is such a column.

    Attributes:
        labels: int64 [N], -1 for a row without one; None without such a column.
        class_names: by label; None if the files have no names.
        note: which columns are read.
    """

    def __init__(self, paths: Sequence[Path], with_labels: bool) -> None:
        self._files = [_open(path) for path in paths]
        self._ends = np.cumsum([len(file) for file in self._files])
        first = self._files[0]
        self._image = _image_column(first)
        for file in self._files[1:]:
            if self._image not in file.columns:
                raise UserError(f"{file.path} has no column {self._image}, which {first.path} has")
        self.labels: np.ndarray | None = None
        self.class_names: list[str] | None = None
        label = ""
        if with_labels:
            self.labels, self.class_names, label = self._read_labels()
        self.note = f"column {self._image}" + (f", labels from column {label}" if label else "")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def name(self, index: int) -> str:
        """Name a row for people."""
        file, row = self._locate(index)
        return f"{file.path.name} row {row}"

    def read(self, index: int) -> bytes:
        """Return the file of an image."""
        file, row = self._locate(index)
        value = file.value(self._image, row)
        if value is None:
            raise LeftOut("without an image in the file")  # such as a path elsewhere
        return value

    def _locate(self, index: int) -> tuple["_Table", int]:
        k = int(np.searchsorted(self._ends, index, side="right"))
        return self._files[k], index - (int(self._ends[k - 1]) if k else 0)

    def _read_labels(self) -> tuple[np.ndarray | None, list[str] | None, str]:
        first = self._files[0]
        features = first.features
        classes = [n for n, f in features.items() if f.get("_type") == "ClassLabel"]
        label = next((n for n in (*_LABEL_COLUMNS, *classes) if n in first.columns), "")
        if not label:
            return None, None, ""
        values: list[Any] = []
        for file in self._files:
            with naming(file.path, _WHAT):
                if label not in file.columns:
                    raise Refused(f"it has no column {label}")
                values += file.column(label)
        names = features.get(label, {}).get("names")
        texts = {v for v in values if isinstance(v, str)}
        if texts and all(v is None or isinstance(v, str) for v in values):
            names = sorted(texts)
            values = [-1 if v is None else v for v in values]
            number = {name: i for i, name in enumerate(names)}
            values = [v if v == -1 else number[v] for v in values]
        labels = np.empty(len(values), np.int64)
        for i, value in enumerate(values):
            value = -1 if value is None else value
            if type(value) is not int or not -1 <= value < MAX_CLASSES:
                raise UserError(
                    f"{first.path}: column {label} holds {brief(value)}, not a class number or "
                    "name: leave the labels out with --classes none"
                )
            labels[i] = value
        if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            names = None
        return (None if (labels < 0).all() else labels), names, label


class _Table:
    """One file: its columns by name, and single values of them."""

    def __init__(self, path: Path, schema: Any) -> None:
        self.path = path
        self.columns = {field.name: field.type for field in schema}
        self.features: dict[str, dict[str, Any]] = {}
        metadata = (schema.metadata or {}).get(b"huggingface")
        if metadata:  # written by `datasets`
            info = parse_json(metadata, 12)
            features = info.get("info", {}).get("features", {}) if isinstance(info, dict) else {}
            if isinstance(features, dict):
                self.features = {k: v for k, v in features.items() if isinstance(v, dict)}

    def __len__(self) -> int:
        raise NotImplementedError

    def column(self, name: str) -> list[Any]:
        """All values of a column."""
        raise NotImplementedError

    def value(self, name: str, row: int) -> bytes | None:
        """One value of a column of images; None if it is missing."""
        raise NotImplementedError


class _Parquet(_Table):
    def __init__(self, path: Path) -> None:
        from pyarrow import parquet

        self._file = parquet.ParquetFile(path, memory_map=True)
        groups = range(self._file.metadata.num_row_groups)
        self._ends = np.cumsum([self._file.metadata.row_group(g).num_rows for g in groups])
        self._lock = threading.Lock()
        self._group = functools.lru_cache(2)(self._read_group)
        super().__init__(path, self._file.schema_arrow)

    def __len__(self) -> int:
        return self._file.metadata.num_rows

    def column(self, name: str) -> list[Any]:
        return self._file.read(columns=[name]).column(name).to_pylist()

    def value(self, name: str, row: int) -> bytes | None:
        group = int(np.searchsorted(self._ends, row, side="right"))
        with self._lock:
            values = self._group(name, group)
        return _bytes(values[row - (int(self._ends[group - 1]) if group else 0)])

    def _read_group(self, name: str, group: int) -> Any:
        with naming(self.path, _WHAT):
            return self._file.read_row_group(group, columns=[name]).column(name)


class _Arrow(_Table):
    def __init__(self, path: Path) -> None:
        import pyarrow

        self._table = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))).read_all()
        self._table.validate(full=True)  # offsets that point outside the file would crash
        super().__init__(path, self._table.schema)

    def __len__(self) -> int:
        return self._table.num_rows

    def column(self, name: str) -> list[Any]:
        return self._table.column(name).to_pylist()

    def value(self, name: str, row: int) -> bytes | None:
        return _bytes(self._table.column(name)[row])


def _bytes(scalar: Any) -> bytes | None:
    """The file in a value of an image column: a struct with `bytes`, or the bytes."""
    if scalar.is_valid and hasattr(scalar, "keys"):
        scalar = scalar["bytes"]
    return scalar.as_py()


def _open(path: Path) -> _Table:
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise UserError(
            f"{path} needs pyarrow: pip install pyarrow, or give a folder of images"
        ) from None
    require_file(path, MAX_BYTES)
    with naming(path, _WHAT):
        return _Parquet(path) if path.suffix == ".parquet" else _Arrow(path)


def _image_column(table: _Table) -> str:
    """The first column of images: of a struct with `bytes`, else of binary values."""
    for name, kind in table.columns.items():
        text = str(kind)
        if text.startswith("struct<") and re.search(r"\bbytes: (large_)?binary", text):
            return name
    for name, kind in table.columns.items():
        if str(kind) in ("binary", "large_binary"):
            return name
    known = ", ".join(map(brief, list(table.columns)[:8]))
    raise UserError(f"{table.path} has no column of encoded images (its columns: {known})")
