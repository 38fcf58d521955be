"""Result files: what every benchmark writes as it goes, and the report reads.

A result is NAME.json with NAME.csv beside it, both complete after every row, so that a run that
is cut off leaves what it has measured:

    {"benchmark": "kernels", "device": "NVIDIA H200", "driver": "580.1", "versions": {…},
     "commit": "0dda769", "date": "2026-11-23T05:34:25+00:00",
     "rows": [{"name": "group_norm", …, "ms": {"p20": 0.011, "p50": 0.012, "p80": 0.013}, …}, …]}
"""

import csv
import dataclasses
import datetime
import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from sid_fast.errors import UserError
from sid_fast.io.atomic import atomic_path

RESULTS = Path(__file__).parent / "results"
PERCENTILES = ("p20", "p50", "p80")


@dataclasses.dataclass(frozen=True)
class Form:
    """The columns of a benchmark: keys say what a row is of, figures what was found.

    timed: whether there is "ms" besides, with its percentiles: of a call, or of a step of one
    round of micro_batch images. Memory is in GiB; floor_share is the part of the time that the
    counted bytes or FLOP would take; to_ours is the time as a multiple of that of the variant
    "ours", over_plain the images a second as one of those of "plain", each measured in turns with
    it; wait_share is the part of the steps that waited for their images; status is "ok", or why
    there are no figures: they are null.
    """

    keys: tuple[str, ...]
    figures: tuple[str, ...]
    timed: bool = True

    def key(self, row: dict[str, Any]) -> tuple:
        """What a row is of."""
        return tuple(row[name] for name in self.keys)


FORMS = {
    "kernels": Form(
        ("name", "shape", "dtype", "provider", "mode"),
        ("gb_s", "tflop_s", "floor_share", "status"),
    ),
    "train": Form(
        ("preset", "variant", "micro_batch"),
        ("it_s", "img_s", "mfu", "to_ours", "peak_allocated", "peak_reserved", "host_ms", "status"),
    ),
    "breakdown": Form(
        ("preset", "precision", "micro_batch", "kind", "name"),
        ("calls", "device_ms", "share", "floor_ms"),
        timed=False,
    ),
    "check": Form(("name",), ("status", "found", "bound", "seconds", "note"), timed=False),
    "evaluation": Form(("stage", "variant"), ("images", "img_s", "over_plain", "wait_share")),
    "roofline": Form(
        ("scope", "layer", "kind"),
        ("calls", "gflop", "mb", "floor_us", "bound"),
        timed=False,
    ),
}


def percentiles(times: list[float]) -> dict[str, float]:
    """20th, 50th and 80th percentile of times, ms."""
    values = torch.tensor(times, dtype=torch.float64)
    found = values.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    return dict(zip(PERCENTILES, found.tolist(), strict=True))


class Record:
    """A result file that grows row by row.

    path: the .json, below RESULTS to be reported; benchmark: one of FORMS; device: where it ran,
    by default the GPU if there is one; append: keep the rows that the file has, but for those of
    the same keys as new ones, if it is of the same benchmark, device and commit; more goes into
    the head of the file.
    """

    def __init__(
        self,
        path: Path,
        benchmark: str,
        device: str | None = None,
        append: bool = False,
        **more: Any,
    ):
        self.path, self.form = path, FORMS[benchmark]
        self.head = {"benchmark": benchmark, **surroundings(), **more}
        self.head["device"] = device or self.head["device"]
        self.rows: list[dict[str, Any]] = []
        self.old = 0  # of the rows, how many were in the file before
        path.parent.mkdir(parents=True, exist_ok=True)
        if append and path.exists():
            there = read(path)
            for name in ("benchmark", "device", "commit"):
                if there[name] != self.head[name]:
                    raise UserError(
                        f"{path} is of {name} {there[name]}, not {self.head[name]}: give another "
                        "file, or do not append"
                    )
            self.rows, self.old = there["rows"], len(there["rows"])

    def add(self, **row: Any) -> None:
        """One row more, on the disk before this returns. ValueError for one of another form."""
        self.extend([row])

    def extend(self, rows: list[dict[str, Any]]) -> None:
        """Several rows at once."""
        expected = (*self.form.keys, *(["ms"] if self.form.timed else []), *self.form.figures)
        for row in rows:
            if set(row) != {*expected} or (self.form.timed and tuple(row["ms"]) != PERCENTILES):
                odd = sorted(set(row) ^ {*expected}) or [f"ms of {', '.join(row['ms'])}"]
                raise ValueError(f"{self.path}: a row is off by {', '.join(odd)}")
        rows = [{name: row[name] for name in expected} for row in rows]
        new = [self.form.key(row) for row in rows]
        old = [row for row in self.rows[: self.old] if self.form.key(row) not in new]
        self.rows, self.old = old + self.rows[self.old :] + rows, len(old)
        with atomic_path(self.path) as temporary:
            text = ",\n".join(json.dumps(row, ensure_ascii=False) for row in self.rows)
            head = json.dumps(self.head, indent=1, ensure_ascii=False)
            temporary.write_text(f'{head[:-2]},\n "rows": [\n{text}\n]}}\n', "utf-8")
        with (
            atomic_path(self.path.with_suffix(".csv")) as temporary,
            open(temporary, "w", newline="", encoding="utf-8") as file,
        ):
            flat = [flatten(row) for row in self.rows]
            writer = csv.DictWriter(file, list(flat[0]))
            writer.writeheader()
            writer.writerows(flat)


def flatten(row: dict[str, Any]) -> dict[str, Any]:
    """A row with its percentiles as columns of their own: ms_p20, …"""
    flat: dict[str, Any] = {}
    for name, value in row.items():
        flat |= {f"{name}_{k}": v for k, v in value.items()} if name == "ms" else {name: value}
    return flat


def read(path: Path) -> dict[str, Any]:
    """A result file; UserError, naming it, for anything else."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a result: {error}") from None
    if not isinstance(found, dict) or found.get("benchmark") not in FORMS or "rows" not in found:
        raise UserError(f"{path} is no result of a benchmark: one has a benchmark and rows")
    return found


def surroundings() -> dict[str, Any]:
    """Where and when a result is made."""
    packages = ("torch", "triton", "numpy")
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "load": round(os.getloadavg()[0], 1),  # programs that ran in the minute before
        "driver": _line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "versions": {
            "python": platform.python_version(),
            "cuda": torch.version.cuda,
            **{name: _version(name) for name in packages},
        },
        # A copy of the tree without its history is told which commit it is.
        "commit": os.environ.get("SID_FAST_COMMIT")
        or _line("git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty"),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


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


def _line(*command: str) -> str | None:
    """The first line that a command prints; None where it cannot run."""
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.partition("\n")[0].strip() or None
