"""Result files in JSON Lines: one row per line, which pandas reads as it is.

    pandas.read_json("benchmarks/results/kernels.jsonl", lines=True)

Each row holds its figures and its provenance: device, driver, versions, commit, date and load.
Rows are appended as they are measured, so an interrupted run keeps its rows. A later row replaces
an earlier one with the same KEYS.
"""

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from sid_fast.errors import UserError, WriteFailed

RESULTS = Path(__file__).parent / "results"
# Columns that identify a row of a benchmark.
KEYS = {
    "kernels": ("name", "shape", "dtype", "provider", "mode"),
    "train": ("preset", "variant", "micro_batch"),
    "evaluation": ("stage", "variant"),
    "check": ("name",),
    "breakdown": ("preset", "precision", "micro_batch", "kind", "name"),
    "roofline": ("preset", "precision", "images", "kernels", "scope", "layer", "kind"),
}
PROVENANCE = ("device", "driver", "python", "cuda", "torch", "triton", "commit", "date", "load")

Row = dict[str, Any]


class Results:
    """Appends rows to a result file.

    Args:
        path: the .jsonl file; its folder is created.
        benchmark: one of KEYS.
        columns: further columns of every row; `device` replaces the name of this machine's GPU
            or CPU.
    """

    def __init__(self, path: str | Path, benchmark: str, **columns: Any):
        self.path, self.benchmark = Path(path), benchmark
        self.columns = provenance() | columns

    def add(self, row: Row) -> None:
        """Append one row. Raises ValueError if it lacks a key or holds NaN or infinity."""
        row = {"benchmark": self.benchmark, **row, **self.columns}
        if missing := [name for name in KEYS[self.benchmark] if name not in row]:
            raise ValueError(f"{self.path}: the row lacks {', '.join(missing)}")
        line = json.dumps(row, ensure_ascii=False, allow_nan=False)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(f"{line}\n")
        except OSError as error:
            raise WriteFailed(f"{self.path} cannot be written: {error.strerror or error}") from None


def read(path: Path) -> list[Row]:
    """Read the rows of a result file, the latest of each key. Raises UserError for other files."""
    try:
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        keys = [tuple(row[name] for name in KEYS[row["benchmark"]]) for row in rows]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a result file: {error}") from None
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is not a result file: a row lacks {error}") from None
    return list(dict(zip(keys, rows, strict=True)).values())


def times(milliseconds: Sequence[float]) -> Row:
    """Summarise times in ms as the columns ms_p20, ms_p50 and ms_p80."""
    values = torch.tensor(milliseconds, dtype=torch.float64)
    quantiles = values.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    return dict(zip(("ms_p20", "ms_p50", "ms_p80"), quantiles.tolist(), strict=True))


def provenance() -> Row:
    """Describe the machine, the software and the time of a run: the columns PROVENANCE."""
    values = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        platform.python_version(),
        torch.version.cuda,
        torch.__version__,
        _version("triton"),
        # A copy of the tree without its history gets the commit from the environment.
        os.environ.get("SID_FAST_COMMIT")
        or _first_line("git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty"),
        datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        round(os.getloadavg()[0], 1),  # running processes, averaged over the last minute
    )
    return dict(zip(PROVENANCE, values, strict=True))


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' * (threads > 1)}"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _first_line(*command: str) -> str | None:
    """Return the first line that a command prints, or None if it cannot run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.partition("\n")[0].strip() or None
