"""Reads the folder of a run, whoever made it: configuration, log and the list of sample grids."""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sid_fast.errors import UserError
from sid_fast.io import progress
from sid_fast.io.untrusted import naming, parse_json, read_limited, unreadable
from sid_fast.training.logging import MAX_BYTES

MAX_RUNS = 12
MAX_CONFIG_BYTES = 1 << 20
MAX_IMAGES = 2**53  # images seen that a record may state: JavaScript counts no further
MAX_METRICS = 100  # different metrics of a log
_RECORD_ITEMS = 1000  # values of one record
_GRID = re.compile(r"samples-(\d{10,16})\.png")
RATE = "img_per_s"
_ABOUT_EVALUATION = ("images", "teacher", "evaluation_s")
NOT_OPTIONS = ("tuning", "changed", "environment", "headline", "started_at", "launch")


@dataclasses.dataclass
class Run:
    """What a run folder holds.

    Attributes:
        folder: The folder.
        name: Unique among the runs of a page.
        config: config.json.
        log: The log's records by images seen: {"images": int, metric: finite float or None}.
        grids: Images seen and path of each sample grid, in this order.
        notes: What is missing or damaged, in words.
    """

    folder: Path
    name: str
    config: dict[str, Any]
    log: list[dict[str, Any]]
    grids: list[tuple[int, Path]]
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def options(self) -> dict[str, Any]:
        """The options of config.json, without what the run adds to them."""
        return {k: v for k, v in self.config.items() if k not in NOT_OPTIONS}

    @property
    def changed(self) -> dict[str, Any] | None:
        """The preset's value of each option that differs from it; None: not recorded."""
        return self.section("changed") if "changed" in self.config else None

    def section(self, name: str) -> dict[str, Any]:
        """An object in config.json; empty if it is missing or something else."""
        value = self.config.get(name)
        return value if isinstance(value, dict) else {}

    @property
    def seen(self) -> int:
        """Images seen, as far as the log or the grids tell."""
        last = [r["images"] for r in self.log[-1:]] + [images for images, _ in self.grids[-1:]]
        return max(last, default=0)

    @property
    def total(self) -> int | None:
        """Images that the run should see; None: unknown."""
        kimg = number(self.config.get("kimg"))
        return round(kimg * 1000) if kimg and 0 < kimg < MAX_IMAGES / 1000 else None

    def metrics(self) -> list[str]:
        """Names of all metrics in the log, in order of appearance."""
        names = dict.fromkeys(name for record in self.log for name in record)
        return [n for n in names if n not in _ABOUT_EVALUATION]

    def evaluation_metrics(self) -> list[str]:
        """Names of the metrics of evaluations; distances come first."""
        records = (r for r in self.log if "evaluation_s" in r)
        found = dict.fromkeys(name for record in records for name in record)
        names = [n for n in found if n not in _ABOUT_EVALUATION]
        return sorted(names, key=lambda n: n != "FID" and not n.startswith("Fréchet"))

    def curve(self, metric: str) -> list[tuple[int, float | None]]:
        """Images seen and value of each record that has a metric; None: it was not finite."""
        return [(r["images"], r[metric]) for r in self.log if metric in r]

    def teacher(self) -> float | None:
        """The teacher's own distance, if the log has it."""
        values = (r["teacher"] for r in self.log if r.get("teacher") is not None)
        return next(values, None)

    def training_seconds(self) -> list[tuple[float, float]]:
        """Seconds of training, and the rate in img/s, at each record of the throughput.

        Pauses for snapshots and evaluations are left out, as in the rates themselves.
        """
        points: list[tuple[float, float]] = []
        seconds, before = 0.0, 0
        for images, rate in self.curve(RATE):
            if rate and rate > 0:
                seconds += max(images - before, 0) / rate
                points.append((seconds, rate))
            before = images
        return points


def read_runs(folders: Sequence[str]) -> list[Run]:
    """Read run folders; executes nothing, and bounds what it reads.

    Raises:
        UserError: A folder is given twice, is missing, holds no run, or its configuration is
            damaged; or there are more than MAX_RUNS.
    """
    if len(folders) > MAX_RUNS:
        raise UserError(f"{len(folders)} runs are more than the {MAX_RUNS} that one page may show")
    paths = [Path(folder) for folder in folders]
    for path in paths:
        _require_run(path)
    resolved = [path.resolve() for path in paths]
    for path, real in zip(paths, resolved, strict=True):
        if resolved.count(real) > 1:
            raise UserError(f"{path} is given twice: give each run once")
    return [_read(path, name) for path, name in zip(paths, unique_names(resolved), strict=True)]


def unique_names(paths: Sequence[Path]) -> list[str]:
    """Name each folder by as many of its last parts as tell all of them apart."""
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def number(value: Any) -> float | None:
    """A number of a file as a float in float32's range; None: not finite, or something else."""
    if type(value) not in (int, float) or not math.isfinite(value) or abs(value) > 1e38:
        return None
    return float(value) if abs(value) > 1e-38 else 0.0


def _require_run(path: Path) -> None:
    advice = "give a run folder, such as runs/000-digits"
    try:
        if not path.is_dir():
            problem = "is a file" if path.exists() else "does not exist"
            raise UserError(f"{path} {problem}: {advice}")
        if not (path / "config.json").exists():
            raise UserError(f"{path} holds no run (it has no config.json): {advice}")
    except (OSError, ValueError) as error:  # ValueError: a null byte
        raise unreadable(path, error) from error


def _read(folder: Path, name: str) -> Run:
    path = folder / "config.json"
    with naming(path, "the configuration of a run"):
        config = parse_json(read_limited(path, MAX_CONFIG_BYTES), max_items=20_000)
    if not isinstance(config, dict):
        raise UserError(f"{path} is not the configuration of a run: give another folder")
    notes: list[str] = []
    log = _read_log(folder / "log.jsonl", notes)
    return Run(folder, name, config, log, _grids(folder), notes)


def _read_log(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    if not path.exists():
        notes.append("there is no log.jsonl yet")
        return []
    data = read_limited(path, 2 * MAX_BYTES)
    records: list[dict[str, Any]] = []
    damaged, names = 0, set[str]()
    with progress.phase(f"reading {path}", len(data), "bytes") as shown:
        for line in _lines(data):
            shown.update(len(line) + 1)
            record = _record(line)
            if record is None:
                damaged += 1
                continue
            names |= record.keys()
            if len(names) > MAX_METRICS:
                raise UserError(f"{path} has more than {MAX_METRICS} metrics: is it a run's log?")
            records.append(record)
    if damaged:
        lines = "1 damaged line" if damaged == 1 else f"{damaged:,} damaged lines"
        notes.append(f"{lines} of log.jsonl left out")
    return sorted(records, key=lambda record: record["images"])


def _lines(data: bytes) -> Iterator[bytes]:
    """Yield the complete lines; a run may be writing the last one."""
    start = 0
    while (end := data.find(b"\n", start)) >= 0:
        if end > start:
            yield data[start:end]
        start = end + 1


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        values = parse_json(line, max_depth=1, max_items=_RECORD_ITEMS)
    except UserError:
        return None
    images = values.get("images") if isinstance(values, dict) else None
    if type(images) is not int or not 0 <= images < MAX_IMAGES:
        return None
    kept = {k: number(v) for k, v in values.items() if v is None or type(v) in (int, float)}
    return kept | {"images": images}


def _grids(folder: Path) -> list[tuple[int, Path]]:
    matches = ((_GRID.fullmatch(path.name), path) for path in folder.glob("samples-*.png"))
    return sorted((int(match[1]), path) for match, path in matches if match)
