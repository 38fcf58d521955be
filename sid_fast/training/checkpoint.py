"""Checkpoints, called training states: resuming from one continues the run bit for bit.

A state is a folder of safetensors, to which every rank writes its shards
(torch.distributed.checkpoint, without pickles), and state.json, written last, which lists them all.
The folder is renamed to state-* when it is complete, so every state-* folder is complete.
state.json holds the sha256 of every file, and the time of writing, by which states are ordered: a
copied folder has lost its file times.
"""

import dataclasses
import fcntl
import json
import math
import os
import re
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, cast

import torch

from sid_fast.config.types import RATES, recorded
from sid_fast.errors import UserError
from sid_fast.io.atomic import TEMPORARY, atomic_path, flush, temporary_name
from sid_fast.io.download import file_sha256
from sid_fast.io.lock import holder
from sid_fast.io.safetensors import check_header
from sid_fast.io.streams import say
from sid_fast.io.untrusted import (
    MAX_NETWORK_BYTES,
    brief,
    naming,
    read_json,
    require_file,
)
from sid_fast.performance import process_group

PATTERN = "state-*[0-9]"
HEADER = "state.json"
HEADER_TYPES = {
    "kind": str, "identity": dict, "steps": int, "images": int, "processes": int, "options": dict,
}  # fmt: skip
FILES_PER_RANK = 4
NO_RUN_ID = "none"  # torchrun's id for runs that were given none
MAX_HEADER_BYTES = 1 << 24  # of a state.json or config.json; 1,000 ranks take 1 MB
FIND_ATTEMPTS = 100  # at a state, while the run that writes it prunes its older ones
# Files that a run writes with atomic_path, and folders of states that are written or removed.
RUN_FILES = re.compile(
    r"config\.json|log\.jsonl|distance\.png|(snapshot|best)-\d+(-0\.\d+)?\.safetensors|samples-\d+\.png"
)
STATE_FOLDERS = re.compile(r"state-\d+(-\d+)?(\.old|\.[0-9a-f]{8})?\.tmp")
_held: list[int] = []  # open state.json files of the states that are being read

# A single process needs no torch.distributed: the warning is noise.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


class Trainer(Protocol):
    """The interface of training.step.Trainer that the loop needs."""

    device: torch.device
    settings: Any
    resume_fingerprint: dict[str, Any]  # must match for a state to be resumed
    method: Any  # has `progress`: metrics of the progress line, and their labels
    steps: int
    images: int
    grad_accum_steps: int

    def step(self) -> dict[str, torch.Tensor]:
        """Update every network once and return the metrics."""
        ...

    def before_sampling(self) -> None:
        """Prepare for sampling; may change the state, so it precedes saving one."""
        ...

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the live tensors of the training state."""
        ...

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Load tensors in place."""
        ...


class States:
    """Writes a run's states asynchronously and keeps the newest; all ranks make the same calls.

    Args:
        folder: The run folder.
        trainer: What to save.
        options: The dataclass of options that the run was started with.
        keep: Number of states to keep.
    """

    def __init__(
        self,
        folder: Path,
        trainer: Trainer,
        options: Any,
        keep: int,
        extra: Mapping[str, Any] = MappingProxyType({}),
    ):
        self.folder, self.trainer, self.options, self.keep = folder, trainer, options, keep
        self.extra = dict(extra)
        self.writing: Future | None = None
        self.path: Path | None = None  # of the newest state, complete or not

    def begin(self, keep_all: bool = False) -> str | None:
        """Copy the current state to host memory and start writing it.

        Waits for the previous write first.

        Args:
            keep_all: Do not delete older states.

        Returns:
            The error message of the previous write, or None.
        """
        from torch.distributed.checkpoint import async_save

        from sid_fast.training.storage import DigestWriter

        problem, self.keep_all = self.finish(), keep_all
        self.path = self.folder / f"state-{self.trainer.steps:09d}"
        self.temporary = self.path.with_name(f"{self.path.name}.tmp")
        self.header = {
            "kind": type(self.options).__name__,
            "identity": self.trainer.resume_fingerprint,
            "steps": self.trainer.steps,
            "images": self.trainer.images,
            "processes": process_group.world_size(),
            "options": recorded(self.options),
            **self.extra,
        }
        if process_group.rank() == 0:
            _remove(self.temporary)
        state_dict = self.trainer.state_dict()
        # The writer copies one file at a time in memory: several small files bound that copy.
        files = {
            f"state.{n}": 1 + i * FILES_PER_RANK // len(state_dict)
            for i, n in enumerate(state_dict)
        }
        self.writer = DigestWriter(
            str(self.temporary), fqn_to_index_mapping=files, save_distributed=True
        )
        written = async_save(
            {"state": state_dict},
            storage_writer=self.writer,
            process_group=process_group.checkpoint_group(),
        )
        self.writing = cast(Future, written)  # AsyncSaveResponse comes with other stagers
        return problem

    def poll(self) -> str | None:
        """Complete the state if its write is done; return the error message, or None."""
        return self.finish() if self.writing and self.writing.done() else None

    def finish(self) -> str | None:
        """Wait for the write and complete the state; return the error message, or None."""
        from torch.distributed.checkpoint.api import CheckpointException

        if self.writing is None:
            return None
        writing, self.writing = self.writing, None
        try:
            writing.result()
            if process_group.rank() == 0:
                self._complete()
        except (Exception, CheckpointException) as error:  # the latter is no Exception
            if process_group.rank() == 0:
                _remove(self.temporary)
            return f"{self.path} could not be written: {_reason(error)}"
        return None

    def _complete(self) -> None:
        """Write state.json, rename the folder and prune; a complete state exists at any moment."""
        assert self.path is not None
        digests = self.writer.digests
        self.header["files"] = {name: (self.temporary / name).stat().st_size for name in digests}
        self.header["digests"] = digests
        # Later than all others, even if a clock was set back or another machine wrote those.
        last = max((_order(h)[0] for h in _headers(self.folder).values() if h), default=0.0)
        self.header["written_at"] = max(time.time(), math.nextafter(last, math.inf))
        with atomic_path(self.temporary / HEADER) as temporary:
            temporary.write_text(json.dumps(self.header), "utf-8")
        if self.path.exists():  # a state of the same step is replaced
            other = next(
                path
                for n in range(2, sys.maxsize)
                if not (path := self.path.with_name(f"{self.path.name}-{n}")).exists()
            )
            os.replace(self.temporary, other)
            flush(self.folder)
            if _remove(self.path):
                os.replace(other, self.path)
            else:  # someone reads the old one
                self.path = other
        else:
            os.replace(self.temporary, self.path)
        flush(self.folder)
        if not self.keep_all:
            prune_states(self.folder, self.keep)


def _reason(error: BaseException) -> str:
    """Return the cause of a failed write or read, and the rank if not all ranks failed."""
    failures = getattr(error, "failures", {})  # of a CheckpointException: {rank: (error, trace)}
    for process, (cause, _) in failures.items():
        others = len(failures) < process_group.world_size()
        return f"{_words(cause)} (process {process})" if others else _words(cause)
    return _words(error)


def _words(error: BaseException) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)


def _remove(path: Path) -> bool:
    """Remove a file or folder, unless it is a state that another process is reading.

    Folders are renamed first, so state-* is never incomplete.
    """
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return True
    removed = temporary_name(path.with_name(path.name.removesuffix(".tmp")))
    lock = _open_header(path, os.O_RDWR, fcntl.LOCK_EX)
    if lock is False:
        return False
    try:
        os.replace(path, removed)
    finally:
        if lock:
            os.close(lock)
    shutil.rmtree(removed, ignore_errors=True)  # the next start removes what is left
    return True


def _open_header(path: Path, mode: int, operation: int) -> int | bool | None:
    """Open and flock a state's state.json.

    Returns:
        The descriptor; None without that file; False if another process has it locked.
    """
    try:
        file = os.open(path / HEADER, mode | os.O_NONBLOCK)  # it may be a pipe
    except OSError:
        return None
    try:
        fcntl.flock(file, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return False
    except OSError:  # no flock on this file system
        pass
    return file


def remove_partial_files(folder: Path) -> None:
    """Remove what a killed run left half-written, and no other temporary files.

    Completes the replacement of a state: see States._complete.
    """
    for path in sorted(folder.glob("state-*-*[0-9]")):
        replaced = path.with_name(path.name.rpartition("-")[0])
        ours = re.fullmatch(r"state-\d+-\d+", path.name) and path.is_dir()
        if ours and (not replaced.exists() or _remove(replaced)):
            os.replace(path, replaced)
    for path in folder.glob("*.tmp"):
        temporary = TEMPORARY.fullmatch(path.name)
        if (
            STATE_FOLDERS.fullmatch(path.name)
            if path.is_dir()
            else (temporary and RUN_FILES.fullmatch(temporary[1]))
        ):
            _remove(path)


def prune(folder: Path, pattern: str, keep: int, newest: Path) -> None:
    """Remove files, except `newest` and those with the highest numbers, `keep` in all."""

    def number(path: Path) -> int:
        return int(re.sub(r"\D", "", path.stem) or 0)

    others = sorted((p for p in folder.glob(pattern) if p != newest), key=number, reverse=True)
    for old in others[keep - 1 :]:
        _remove(old)


def thin_out(folder: Path, pattern: str, limit: int) -> None:
    """Remove every second file, the first and the last excepted, if there are over `limit`."""
    files = sorted(folder.glob(pattern))
    if len(files) > limit:
        for path in files[1:-1:2]:
            _remove(path)


def prune_states(folder: Path, keep: int) -> None:
    """Remove all states except the `keep` last written and the one with the most steps."""
    headers = {path: header for path, header in _headers(folder).items() if header}
    states = sorted(headers, key=lambda path: _order(headers[path]))
    furthest = max(states, key=lambda path: (headers[path]["steps"], _order(headers[path])))
    for old in states[:-keep]:
        if old != furthest:
            _remove(old)


def _headers(*folders: Path) -> dict[Path, dict[str, Any]]:
    """Read the headers of all states in these folders; an unreadable header is empty."""
    headers = {}
    for path in (p for folder in folders for p in folder.glob(PATTERN)):
        try:
            headers[path] = _parse_header(path)
        except UserError:
            headers[path] = {}
        except FileNotFoundError:  # no state, or just removed by the run that wrote it
            continue
    return headers


def _order(header: dict[str, Any]) -> tuple[float, int]:
    """Return the sort key of states: the last written is the largest.

    States of older versions hold no time: they come first, ordered by their steps.
    """
    return header.get("written_at", 0.0), header["steps"]


def find_state(resume: str, out: str | None, kind: str = "") -> Path:
    """Resolve --resume to a state.

    Unless `resume` is itself a state, unreadable states are passed over with a note.

    Args:
        resume: A state, a run folder (its last written state), or `latest`.
        out: With `latest`, the folder to search; default: runs/.
        kind: With `latest`, consider only states of runs with this options dataclass.

    Raises:
        UserError: There is no such state.
    """
    root = Path(out or "runs") if resume == "latest" else Path(resume)
    if root.is_file() or (root / HEADER).exists():
        return root.parent if root.name == HEADER else root
    folders = [root, *(p for p in root.glob("*") if resume == "latest" and p.is_dir())]
    headers = _headers(*folders)
    unreadable = [path for path, header in headers.items() if not header]
    headers = {
        path: header
        for path, header in headers.items()
        if header and (resume != "latest" or header["kind"] == (kind or header["kind"]))
    }
    if not headers:
        if unreadable:
            return max(unreadable)  # reported when it is loaded
        if not (root.exists() or resume == "latest"):
            raise UserError(
                f"resume={resume} does not exist: give a run folder, a state, or latest"
            )
        raise UserError(
            f"resume={resume}: there is no training state (state-*) in {root}: leave out --resume "
            "to start the run"
        )
    chosen = max(headers, key=lambda path: _order(headers[path]))
    if os.environ.get("RANK", "0") == "0":
        for path in unreadable:
            say(f"note: {path} is not a complete training state, resuming {chosen}", sys.stderr)
    return chosen


def hold_state(find: Callable[[], Path]) -> tuple[Path, dict[str, Any]]:
    """Find a state and keep a run that is writing from removing it until load_state has read it.

    Args:
        find: Finds the state; called again if the state is removed meanwhile.

    Returns:
        The state and its header.

    Raises:
        UserError: There is no state, or it is not complete.
    """
    for attempt in range(FIND_ATTEMPTS):
        path = find()
        file = _open_header(path, os.O_RDONLY, fcntl.LOCK_SH)
        if file is False or (file and not _is_at(file, path / HEADER)):
            time.sleep(0.05)
            continue
        try:
            header = read_header(path)
        except UserError:
            if file:
                os.close(file)
            if path.exists() or attempt == FIND_ATTEMPTS - 1:
                raise
            continue
        if file:
            _held.append(file)
        return path, header
    raise UserError(f"{path} is being removed by the run that wrote it: resume again")


def _is_at(file: int, path: Path) -> bool:
    """Whether an open file is still at `path`; closes it if not."""
    try:
        if os.path.samestat(os.fstat(file), path.stat()):
            return True
    except OSError:
        pass
    os.close(file)
    return False


def torchrun_run_id() -> str:
    """Return torchrun's run id, which survives its restarts; empty if it was given none."""
    run = os.environ.get("TORCHELASTIC_RUN_ID", NO_RUN_ID)
    return "" if run == NO_RUN_ID else run


def restart_count() -> int:
    """Return how often torchrun has restarted this run."""
    text = os.environ.get("TORCHELASTIC_RESTART_COUNT", "")
    return int(text) if re.fullmatch("[0-9]{1,9}", text) else 0


def run_record() -> dict[str, Any]:
    """Return the entries of config.json by which find_restarted_run finds a run."""
    run = torchrun_run_id()
    return {"started_at": time.time()} | ({"launch": run} if run else {})


def find_restarted_run(out: str | None) -> Path | None:
    """Find the folder of this run after torchrun restarted it (--max-restarts), or None.

    Without --out, the run is found by torchrun's run id, set by --standalone or --rdzv-id.
    """
    launch = torchrun_run_id()
    if not restart_count() or not (out or launch):
        return None
    runs = {}
    for path in [Path(out) / "config.json"] if out else Path("runs").glob("*/config.json"):
        try:
            config = read_json(path, MAX_HEADER_BYTES)
            if config.get("launch", "") == launch or not launch:
                runs[path.parent] = float(config.get("started_at", 0))
        except (UserError, ValueError, TypeError, AttributeError):
            continue  # not a run's
    return max(runs, key=lambda folder: (runs[folder], folder.name)) if runs else None


def _parse_header(path: Path) -> dict[str, Any]:
    """Read a state's header and check the types in it, but not the state's other files.

    Raises:
        UserError: It is not a state's header.
        FileNotFoundError: There is none.
    """
    try:
        header = read_json(path / HEADER, MAX_HEADER_BYTES)
        for name, kind in HEADER_TYPES.items():
            value = header[name]
            if type(value) is not kind or (isinstance(value, int) and not 0 <= value < 2**63):
                raise ValueError(f"{name} is not a valid {kind.__name__}")
        if not math.isfinite(header.get("written_at", 0.0)):
            raise ValueError("written_at is not a time")
        if not isinstance(header.get("tuning", {}), dict):
            raise ValueError("tuning is not a valid dict")
        for name, size in header["files"].items():
            if Path(name).name != name or type(size) is not int:
                raise ValueError("files are not names and sizes")
        for name, sha256 in header.get("digests", {}).items():
            if name not in header["files"] or not isinstance(sha256, str):
                raise ValueError("digests are not those of the files")
    except KeyError as error:
        raise UserError(
            f"{path} is not a complete training state ({error} is missing): resume from another"
        ) from error
    except (UserError, ValueError, TypeError, AttributeError) as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise error.__cause__ from None
        raise UserError(
            f"{path} is not a complete training state ({error}): resume from another"
        ) from error
    return header


def read_header(path: Path) -> dict[str, Any]:
    """Read and validate a state's header, and the sizes of its files.

    Raises:
        UserError: It is not a state, or it is incomplete.
    """
    if not path.is_dir():
        raise _missing(path)
    try:
        header = _parse_header(path)
        for name, size in header["files"].items():
            try:
                actual = require_file(path / name, MAX_NETWORK_BYTES)
            except UserError as error:
                raise UserError(
                    f"{path} is not a complete training state ({error}): resume from another"
                ) from error
            if actual != size:
                raise UserError(
                    f"{path / name} has {actual} bytes instead of {size}: resume from another state"
                )
        # The reader takes all shards in the folder.
        for file in path.glob("*.safetensors"):
            if file.name not in header["files"]:
                raise UserError(f"{file} does not belong to the state: move it elsewhere")
    except (OSError, UserError) as error:
        if not path.is_dir():
            raise _missing(path) from error
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path} is not a complete training state ({error}): resume from another"
        ) from error
    return header


def _missing(path: Path) -> UserError:
    """Make the error for a state that is none, or that the run in its folder has pruned."""
    if running := holder(path.parent):
        return UserError(
            f"{path} is gone, and {path.parent} is in use by {running}: wait for it to end, or "
            "stop it"
        )
    return UserError(f"{path} is not a training state: use a state-* folder or a run folder")


def _verify(path: Path, header: dict[str, Any]) -> None:
    """Compare the files with their digests and check what they declare, shared out over the ranks.

    States of older versions hold no digests.

    Raises:
        UserError: A file has changed since it was written, or is no shard; on all ranks.
    """
    digests, problem = header.get("digests", {}), ""
    for name in sorted(header["files"])[process_group.rank() :: process_group.world_size()]:
        file = path / name
        try:
            if name in digests and file_sha256(file) != digests[name]:
                raise UserError(f"{file} is damaged: its sha256 is not that of state.json")
            with naming(file, "a shard of a training state"):
                check_header(file)
        except OSError as error:
            problem = problem or f"{file} cannot be read ({error.strerror})"
        except UserError as error:
            problem = problem or str(error)
    if problem := process_group.first_text(problem):
        raise UserError(f"{problem}; resume from another state")


def _text(value: Any) -> str:
    return value if isinstance(value, str) else brief(value)


def changed_rates(header: Mapping[str, Any], trainer: Trainer) -> list[str]:
    """Describe each of RATES that differs between a state and the trainer it is loaded into."""
    saved, now = header["identity"], trainer.resume_fingerprint
    return [
        f"{name} was {saved[name]} and is {now[name]} from here on"
        for name in RATES
        if name in saved and saved[name] != now[name]
    ]


def load_state(path: Path, trainer: Trainer) -> dict[str, Any]:
    """Load a state into a trainer, for any number of ranks, and return its header.

    Raises:
        UserError: The state is damaged, or its settings differ from the trainer's; names the first
            difference.
    """
    try:
        return _load(path, trainer)
    finally:
        while _held:
            os.close(_held.pop())


def _load(path: Path, trainer: Trainer) -> dict[str, Any]:
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load
    from torch.distributed.checkpoint.api import CheckpointException

    header = read_header(path)
    fingerprint = json.loads(json.dumps(trainer.resume_fingerprint))  # as stored in a state
    # A setting that the state does not know is newer: the state was written with its default. But a
    # state without any setting that only this method has is of another method.
    kind = type(trainer.settings)
    defaults = {f.name: f.default for f in dataclasses.fields(kind)}
    defaults = {k: list(v) if isinstance(v, tuple) else v for k, v in defaults.items()}  # JSON
    inherited = {name for base in kind.__bases__ for name in getattr(base, "__annotations__", {})}
    if not header["identity"].keys() & (defaults.keys() - inherited):
        defaults = {}
    for name in header["identity"] | fingerprint:
        saved, value = header["identity"].get(name, defaults.get(name)), fingerprint.get(name)
        if saved != value and name not in RATES:
            raise UserError(
                f"{path} was written with {name}={_text(saved)}, this run has {name}={value}: "
                "resume with the same settings, or start a new run"
            )
    _verify(path, header)
    state = trainer.state_dict()
    try:
        load(  # in place
            {"state": state},
            storage_reader=HuggingFaceStorageReader(str(path)),
            process_group=process_group.checkpoint_group(),
        )
    except CheckpointException as error:
        raise UserError(
            f"{path} is damaged ({_reason(error)}): resume from another state"
        ) from error
    trainer.load_state_dict(state)
    trainer.steps, trainer.images = header["steps"], header["images"]
    return header
