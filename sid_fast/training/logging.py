"""Logs of a run: JSON lines for programs, TensorBoard for people."""

import contextlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from torch.utils.tensorboard import SummaryWriter

from sid_fast.errors import WriteFailed
from sid_fast.io.atomic import atomic_path
from sid_fast.training.sinks import Sink

MAX_BYTES = 64 << 20  # of log.jsonl


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read the records of a log; lines that are not records, such as a cut one, are left out."""
    return _read(path)[0]


def _read(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """Return the records, and whether a line before the last is not one."""
    if not path.exists():
        return [], False
    lines = path.read_text("utf-8", "replace").splitlines()
    records = [_record(line) for line in lines]
    return [r for r in records if r is not None], None in records[:-1]


def _record(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    valid = isinstance(record, dict) and type(record.get("images")) is int
    return record if valid else None


def thin(records: list[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    """Drop every second record until the log takes at most `limit` bytes.

    Records of evaluations are dropped only where the others do not suffice; the first and the last
    record of each sort stay.
    """

    def size(records: list[dict[str, Any]]) -> int:
        return sum(len(json.dumps(r)) + 1 for r in records)

    for is_kept in (lambda r: "evaluation_s" in r, lambda r: False):
        while size(records) > limit:
            droppable = [i for i, r in enumerate(records) if not is_kept(r)]
            dropped = set(droppable[1:-1:2])
            if not dropped:
                break
            records = [r for i, r in enumerate(records) if i not in dropped]
    return records


class Log:
    """Appends records to log.jsonl and tensorboard/ in a run folder, and to other sinks.

    Opening it drops all records later than `images`: a resumed run logs them again. A log that
    would grow beyond MAX_BYTES is thinned out to half of that; see `thin`. A log with damaged lines
    is first renamed to log-damaged.jsonl.
    """

    def __init__(self, folder: Path, images: int, sinks: Sequence[Sink] = ()):
        self.path, self.sinks = folder / "log.jsonl", sinks
        records, damaged = _read(self.path)
        if damaged:
            os.replace(self.path, folder / "log-damaged.jsonl")
        self.file = self._rewrite([r for r in records if r["images"] <= images])
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=images + 1)

    def _rewrite(self, records: list[dict[str, Any]]) -> TextIO:
        with atomic_path(self.path) as temporary:
            temporary.write_text("".join(json.dumps(r) + "\n" for r in records), "utf-8")
        return self.path.open("a", encoding="utf-8")

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, kind: type | None, *exception: object) -> None:
        # After an error, such as a full disk, a failing close must not hide the first exception.
        with contextlib.suppress(*[OSError] if kind else []):
            self.file.close()
        with contextlib.suppress(*[OSError] if kind else []):
            self.board.close()
        for sink in self.sinks:
            sink.close()

    def write(self, images: int, values: dict[str, float]) -> None:
        """Append a record.

        Raises:
            WriteFailed: The file cannot be written.
        """
        for sink in self.sinks:
            sink.write(images, values)
        record: dict[str, float | None] = {"images": images}
        record |= {k: v if math.isfinite(v) else None for k, v in values.items()}
        try:
            line = json.dumps(record) + "\n"
            if self.file.tell() + len(line) > MAX_BYTES:
                file = self._rewrite(thin(read_log(self.path), MAX_BYTES // 2))
                self.file.close()
                self.file = file
            self.file.write(line)
            self.file.flush()
            for name, value in values.items():
                self.board.add_scalar(name, value, images)
            self.board.flush()
        except OSError as error:
            raise WriteFailed(f"{self.path} cannot be written: {error.strerror or error}") from None
