"""Training states: everything a run needs to go on to the same bits.

A state is a folder: safetensors that every process wrote its part of (torch.distributed.checkpoint,
in the form that keeps no pickle), and state.json, which is written last and names them all. It
gets its name when it is complete, so a folder called state-* is a whole one.
"""

import dataclasses
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol, cast

import torch

from sid_fast.errors import UserError
from sid_fast.io.atomic import atomic_path, flush
from sid_fast.performance import process_group

PATTERN = "state-*[0-9]"
HEADER = "state.json"
HEADER_TYPES = {"kind": str, "identity": dict, "steps": int, "images": int, "processes": int,
         "options": dict}  # fmt: skip
FILES_PER_RANK = 4  # of a process
NO_RUN_ID = "none"  # what torchrun calls a run without an id

# One process needs no torch.distributed; there is nothing to warn of.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


class Trainer(Protocol):
    """What the loop trains: a training.step.Trainer."""

    device: torch.device
    settings: Any
    resume_fingerprint: dict[str, Any]  # what must be the same for a state to fit
    method: Any  # with progress: metrics of the progress line, and their labels
    steps: int
    images: int

    def step(self) -> dict[str, torch.Tensor]: ...

    def state_dict(self) -> dict[str, torch.Tensor]: ...

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None: ...


class States:
    """Writes the states of a run into its folder while training goes on; keeps the newest.

    options: the dataclass the run was started with. Every process makes the same calls.
    """

    def __init__(self, folder: Path, trainer: Trainer, options: Any, keep: int):
        self.folder, self.trainer, self.options, self.keep = folder, trainer, options, keep
        self.writing: Future | None = None
        self.path: Path | None = None  # of the newest one begun

    def begin(self, keep_all: bool = False) -> str | None:
        """Copy the state as it is now to the host, and start to write it.

        One that is still being written is waited for. Returns what went wrong with that one.
        keep_all: the older ones stay.
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
        }
        if process_group.rank() == 0:
            _remove(self.temporary)
        state_dict = self.trainer.state_dict()
        # A file holds a part of the tensors only: one at a time is doubled in memory to be written.
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
        self.writing = cast(Future, written)  # the other type is of another stager
        return problem

    def poll(self) -> str | None:
        """Give the state its name if it has been written. Returns what went wrong, if anything."""
        return self.finish() if self.writing and self.writing.done() else None

    def finish(self) -> str | None:
        """Wait until the state is written, as poll() does."""
        from torch.distributed.checkpoint.api import CheckpointException

        if self.writing is None:
            return None
        writing, self.writing = self.writing, None
        try:
            writing.result()
            if process_group.rank() == 0:
                self._complete()
        except (Exception, CheckpointException) as error:  # the latter is none of the former
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
    """What went wrong, from the process that it went wrong on."""
    failures = getattr(error, "failures", {})  # a CheckpointException: {process: (error, trace)}
    for process, (cause, _) in failures.items():
        return (
            f"{cause} (process {process})"
            if len(failures) < process_group.world_size()
            else str(cause)
        )
    return str(error)


def _remove(path: Path) -> None:
    """Remove a file or a folder; a folder loses its name first, so half a state never has one."""
    if path.is_dir():
        going = path.with_name(f"{path.name.removesuffix('.tmp')}.old.tmp")
        os.replace(path, going)
        shutil.rmtree(going)
    else:
        path.unlink(missing_ok=True)


def remove_partial_files(folder: Path) -> None:
    """Remove what a killed run left half-written."""
    for left in folder.glob("*.tmp"):
        _remove(left)


def prune(folder: Path, pattern: str, keep: int) -> None:
    """Remove all but the newest files, or states."""
    for old in sorted(folder.glob(pattern), key=_age)[:-keep]:
        _remove(old)


def _age(path: Path) -> float:
    header = path / HEADER
    return (header if header.exists() else path).stat().st_mtime


def find_state(resume: str, out: str | None, kind: str = "") -> Path:
    """The state that --resume means: itself, the newest of a run folder, or `latest`.

    kind: of the runs among which the latest is looked for.
    """
    place = Path(out or "runs") if resume == "latest" else Path(resume)
    if place.is_file() or (place / HEADER).exists():
        return place.parent if place.name == HEADER else place
    states = [*place.glob(PATTERN), *(place.glob(f"*/{PATTERN}") if resume == "latest" else ())]
    if resume == "latest" and kind:
        states = [path for path in states if _may_be(kind, path)]
    if not states:
        missing = not (place.exists() or resume == "latest")
        what = "there is no" if missing else "there is no training state (state-*) at"
        raise UserError(f"resume={resume}: {what} {place}")
    return max(states, key=_age)


def _may_be(kind: str, path: Path) -> bool:
    try:
        return read_header(path)["kind"] == kind
    except UserError:
        return True  # and what is wrong with it is said when it is read


def torchrun_run_id() -> dict[str, str]:
    """Which call of torchrun started us, for config.json: the same after it has restarted us."""
    run = os.environ.get("TORCHELASTIC_RUN_ID", NO_RUN_ID)
    return {} if run == NO_RUN_ID else {"launch": run}


def find_restarted_run(out: str | None) -> Path | None:
    """The folder of this run, if torchrun has restarted it (--max-restarts) and there is one.

    Without --out it is known by torchrun's id, which --standalone or --rdzv-id gives.
    """
    if not int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) or not (out or torchrun_run_id()):
        return None
    configs = [Path(out) / "config.json"] if out else Path("runs").glob("*/config.json")
    mine = [
        p
        for p in configs
        if p.exists() and torchrun_run_id().items() <= json.loads(p.read_text()).items()
    ]
    return max(mine, key=_age).parent if mine else None


def read_header(path: Path) -> dict[str, Any]:
    """What a state says of itself; UserError if it is not one, or not whole."""
    if not path.is_dir():
        raise UserError(f"{path} is not a training state: give a folder state-* or a run's folder")
    try:
        header = json.loads((path / HEADER).read_text("utf-8"))
        files = header["files"]
        for name, kind in HEADER_TYPES.items():
            if not isinstance(header[name], kind):
                raise ValueError(f"{name} is {header[name]!r}")
        for name, size in files.items():
            found = (path / name).stat().st_size
            if found != size:
                raise UserError(f"{path / name} has {found} bytes, not the {size} written")
    except UserError as error:
        raise UserError(f"{error}: resume from another state") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is no whole training state ({error}): resume from another"
        ) from error
    return header


def load_state(path: Path, trainer: Trainer) -> dict[str, Any]:
    """Bring a trainer to a state and return its header, whatever processes wrote it.

    UserError names the first setting in which the two differ.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load
    from torch.distributed.checkpoint.api import CheckpointException

    header = read_header(path)
    fingerprint = json.loads(json.dumps(trainer.resume_fingerprint))  # as a state has it
    for name, value in fingerprint.items():
        if (saved := header["identity"].get(name)) != value:
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
