"""Logs of a run: JSON lines for programs, TensorBoard for people."""

import contextlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from torch.utils.tensorboard import SummaryWriter

from sid_fast.errors import UserError, WriteFailed
from sid_fast.io.atomic import atomic_path
from sid_fast.io.untrusted import parse_json, read_limited
from sid_fast.training.sinks import Sink

MAX_BYTES = 64 << 20  # of log.jsonl
MAX_READ_BYTES = 4 * MAX_BYTES  # of a log that an older version wrote without a bound
MAX_BOARD_BYTES = 4 * MAX_BYTES  # of tensorboard/
MAX_BOARD_FILES = 100  # of tensorboard/: every start of a run adds one
_EVENT_BYTES = 64  # of a TensorBoard event without its name, at most


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read the records of a log; lines that are not records, such as a cut one, are left out.

    Raises:
        UserError: The log is too large, or no regular file.
    """
    return _read(path)[0]


def _read(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """Return the records, and whether a line before the last is not one."""
    if not path.exists():
        return [], False
    lines = read_limited(path, MAX_READ_BYTES).decode("utf-8", "replace").splitlines()
    records = [_record(line) for line in lines]
    return [r for r in records if r is not None], None in records[:-1]


def _record(line: str) -> dict[str, Any] | None:
    try:
        record = parse_json(line.encode())
    except UserError:
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


def _event_bytes(values: dict[str, float]) -> int:
    return sum(_EVENT_BYTES + len(name.encode()) for name in values)


class Log:
    """Appends records to log.jsonl and tensorboard/ in a run folder, and to other sinks.

    Opening it drops all records later than `images`: a resumed run logs them again. A log that
    would grow beyond MAX_BYTES is thinned out to half of that; see `thin`. A log with damaged lines
    is first renamed to log-damaged.jsonl. Where tensorboard/ would grow beyond MAX_BOARD_BYTES or
    MAX_BOARD_FILES, it is written anew from the log.
    """

    def __init__(self, folder: Path, images: int, sinks: Sequence[Sink] = ()):
        self.path, self.sinks = folder / "log.jsonl", sinks
        records, damaged = _read(self.path)
        if damaged:
            os.replace(self.path, folder / "log-damaged.jsonl")
        self.file = self._rewrite([r for r in records if r["images"] <= images])
        self.board_folder = folder / "tensorboard"
        self.board = SummaryWriter(str(self.board_folder), purge_step=images + 1)
        events = self._events()
        self.board_bytes = sum(path.stat().st_size for path in events)
        if len(events) > MAX_BOARD_FILES:
            self._rewrite_board()

    def _rewrite(self, records: list[dict[str, Any]]) -> TextIO:
        with atomic_path(self.path) as temporary:
            temporary.write_text("".join(json.dumps(r) + "\n" for r in records), "utf-8")
        return self.path.open("a", encoding="utf-8")

    def _events(self) -> list[Path]:
        return sorted(self.board_folder.glob("events.out.tfevents.*"))

    def _rewrite_board(self) -> None:
        """Replace the files in tensorboard/ by one, made from the log, which holds no times."""
        old = self._events()
        self.board.close()
        self.board, self.board_bytes = SummaryWriter(str(self.board_folder)), 0
        for record in thin(read_log(self.path), MAX_BOARD_BYTES // 8):  # events take more bytes
            images = record.pop("images")
            numbers = {k: v for k, v in record.items() if isinstance(v, int | float)}
            self._add_scalars(images, numbers)
        self.board.flush()
        for path in old:
            path.unlink(missing_ok=True)

    def _add_scalars(self, images: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.board.add_scalar(name, value, images)
        self.board_bytes += _event_bytes(values)

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
            if self.board_bytes + _event_bytes(values) > MAX_BOARD_BYTES:
                self._rewrite_board()  # with this record
            else:
                self._add_scalars(images, values)
                self.board.flush()
        except OSError as error:
            raise WriteFailed(f"{self.path} cannot be written: {error.strerror or error}") from None
