"""Checkpoints, called training states: resuming from one continues the run bit for bit.

A state is a folder of safetensors, to which every rank writes its shards
(torch.distributed.checkpoint, without pickles), and state.json, written last, which lists them all.
The folder is renamed to state-* when it is complete, so every state-* folder is complete.
"""

import dataclasses
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, cast

import torch

from sid_fast.errors import UserError
from sid_fast.io.atomic import atomic_path, flush
from sid_fast.performance import process_group

PATTERN = "state-*[0-9]"
HEADER = "state.json"
HEADER_TYPES = {
    "kind": str, "identity": dict, "steps": int, "images": int, "processes": int, "options": dict,
}  # fmt: skip
FILES_PER_RANK = 4
NO_RUN_ID = "none"  # torchrun's id for runs that were given none

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

    def step(self) -> dict[str, torch.Tensor]:
        """Update every network once and return the metrics."""
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
        from torch.distributed.checkpoint import HuggingFaceStorageWriter, async_save

        problem, self.keep_all = self.finish(), keep_all
        self.path = self.folder / f"state-{self.trainer.steps:09d}"
        self.temporary = self.path.with_name(f"{self.path.name}.tmp")
        self.header = {
            "kind": type(self.options).__name__,
            "identity": self.trainer.resume_fingerprint,
            "steps": self.trainer.steps,
            "images": self.trainer.images,
            "processes": process_group.world_size(),
            "options": dataclasses.asdict(self.options),
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
        writer = HuggingFaceStorageWriter(
            str(self.temporary), fqn_to_index_mapping=files, save_distributed=True
        )
        written = async_save(
            {"state": state_dict},
            storage_writer=writer,
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
        self.header["files"] = {p.name: p.stat().st_size for p in self.temporary.iterdir()}
        with atomic_path(self.temporary / HEADER) as temporary:
            temporary.write_text(json.dumps(self.header), "utf-8")
        assert self.path is not None
        _remove(self.path)
        os.replace(self.temporary, self.path)
        flush(self.folder)
        if not self.keep_all:
            prune(self.folder, PATTERN, self.keep)


def _reason(error: BaseException) -> str:
    """Return the cause of a failed write or read, and the rank if not all ranks failed."""
    failures = getattr(error, "failures", {})  # of a CheckpointException: {rank: (error, trace)}
    for process, (cause, _) in failures.items():
        return (
            f"{cause} (process {process})"
            if len(failures) < process_group.world_size()
            else str(cause)
        )
    return str(error)


def _remove(path: Path) -> None:
    """Remove a file or folder; folders are renamed first, so state-* is never incomplete."""
    if path.is_dir():
        renamed = path.with_name(f"{path.name.removesuffix('.tmp')}.old.tmp")
        os.replace(path, renamed)
        shutil.rmtree(renamed)
    else:
        path.unlink(missing_ok=True)


def remove_partial_files(folder: Path) -> None:
    """Remove the temporary files of a killed run."""
    for partial in folder.glob("*.tmp"):
        _remove(partial)


def prune(folder: Path, pattern: str, keep: int) -> None:
    """Remove all but the `keep` newest files or states."""
    for old in sorted(folder.glob(pattern), key=_mtime)[:-keep]:
        _remove(old)


def _mtime(path: Path) -> float:
    header = path / HEADER
    return (header if header.exists() else path).stat().st_mtime


def find_state(resume: str, out: str | None, kind: str = "") -> Path:
    """Resolve --resume to a state.

    Args:
        resume: A state, a run folder (its newest state), or `latest`.
        out: With `latest`, the folder to search; default: runs/.
        kind: With `latest`, consider only states of runs with this options dataclass.

    Raises:
        UserError: There is no such state.
    """
    root = Path(out or "runs") if resume == "latest" else Path(resume)
    if root.is_file() or (root / HEADER).exists():
        return root.parent if root.name == HEADER else root
    states = [*root.glob(PATTERN), *(root.glob(f"*/{PATTERN}") if resume == "latest" else ())]
    if resume == "latest" and kind:
        states = [path for path in states if _may_be(kind, path)]
    if not states:
        missing = not (root.exists() or resume == "latest")
        what = "there is no" if missing else "there is no training state (state-*) in"
        raise UserError(f"resume={resume}: {what} {root}")
    return max(states, key=_mtime)


def _may_be(kind: str, path: Path) -> bool:
    try:
        return read_header(path)["kind"] == kind
    except UserError:
        return True  # reported when the state is loaded


def torchrun_run_id() -> dict[str, str]:
    """Return torchrun's run id as an entry of config.json; it survives torchrun's restarts."""
    run = os.environ.get("TORCHELASTIC_RUN_ID", NO_RUN_ID)
    return {} if run == NO_RUN_ID else {"launch": run}


def find_restarted_run(out: str | None) -> Path | None:
    """Find the folder of this run after torchrun restarted it (--max-restarts), or None.

    Without --out, the run is found by torchrun's run id, set by --standalone or --rdzv-id.
    """
    if not int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) or not (out or torchrun_run_id()):
        return None
    configs = [Path(out) / "config.json"] if out else Path("runs").glob("*/config.json")
    mine = [
        p
        for p in configs
        if p.exists() and torchrun_run_id().items() <= json.loads(p.read_text()).items()
    ]
    return max(mine, key=_mtime).parent if mine else None


def read_header(path: Path) -> dict[str, Any]:
    """Read and validate a state's header.

    Raises:
        UserError: It is not a state, or it is incomplete.
    """
    if not path.is_dir():
        raise UserError(f"{path} is not a training state: use a state-* folder or a run folder")
    try:
        header = json.loads((path / HEADER).read_text("utf-8"))
        files = header["files"]
        for name, kind in HEADER_TYPES.items():
            if not isinstance(header[name], kind):
                raise ValueError(f"{name} is {header[name]!r}")
        for name, size in files.items():
            actual = (path / name).stat().st_size
            if actual != size:
                raise UserError(f"{path / name} has {actual} bytes instead of {size}")
    except UserError as error:
        raise UserError(f"{error}: resume from another state") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a complete training state ({error}): resume from another"
        ) from error
    return header


def load_state(path: Path, trainer: Trainer) -> dict[str, Any]:
    """Load a state into a trainer, for any number of ranks, and return its header.

    Raises:
        UserError: The state is damaged, or its settings differ from the trainer's; names the first
            difference.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load
    from torch.distributed.checkpoint.api import CheckpointException

    header = read_header(path)
    fingerprint = json.loads(json.dumps(trainer.resume_fingerprint))  # as stored in a state
    for name in header["identity"] | fingerprint:
        saved, value = header["identity"].get(name), fingerprint.get(name)
        if saved != value:
            raise UserError(
                f"{path} was written with {name}={saved}, this run has {name}={value}: resume "
                "with the same settings, or start a new run"
            )
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
