"""Logs of a run: JSON lines for programs, TensorBoard for people."""

import contextlib
import json
import math
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from sid_fast.errors import WriteFailed
from sid_fast.io.atomic import atomic_path


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read the records of a log, ignoring a last line that was cut short."""
    records = []
    if path.exists():
        for line in path.read_text("utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                break
    return records


class Log:
    """Appends records to log.jsonl and tensorboard/ in a run folder.

    Opening it drops all records later than `images`: a resumed run logs them again.
    """

    def __init__(self, folder: Path, images: int):
        self.path = folder / "log.jsonl"
        kept = [r for r in read_log(self.path) if r["images"] <= images]
        with atomic_path(self.path) as temporary:
            temporary.write_text("".join(json.dumps(r) + "\n" for r in kept), "utf-8")
        self.file = self.path.open("a", encoding="utf-8")
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=images + 1)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, kind: type | None, *exception: object) -> None:
        # After an error, such as a full disk, a failing close must not hide the first exception.
        with contextlib.suppress(*[OSError] if kind else []):
            self.file.close()
        with contextlib.suppress(*[OSError] if kind else []):
            self.board.close()

    def write(self, images: int, values: dict[str, float]) -> None:
        """Append a record.

        Raises:
            WriteFailed: The file cannot be written.
        """
        record: dict[str, float | None] = {"images": images}
        record |= {k: v if math.isfinite(v) else None for k, v in values.items()}
        try:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
            for name, value in values.items():
                self.board.add_scalar(name, value, images)
            self.board.flush()
        except OSError as error:
            raise WriteFailed(f"{self.path} cannot be written: {error.strerror or error}") from None
