"""Training states: everything a run needs to go on to the same bits."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch

from sid_fast.engine import parallel
from sid_fast.errors import UserError
from sid_fast.files.snapshots import read_snapshot, write_snapshot

PATTERN = "state-*.safetensors"


class Trainer(Protocol):
    """What the loop trains: a Distiller or a Pretrainer."""

    settings: Any
    identity: dict[str, Any]  # what must be the same for a state to fit
    shown: dict[str, str]  # metrics of the progress line, with their labels
    steps: int
    images: int

    def step(self) -> dict[str, torch.Tensor]: ...

    def tensors(self) -> dict[str, torch.Tensor]: ...

    def refresh(self) -> None: ...


def digest(tensors: Iterable[torch.Tensor]) -> str:
    """A short fingerprint of values."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return sha.hexdigest()[:16]


def save_state(folder: Path, trainer: Trainer, options: Any, keep: int) -> Path:
    """Write the state of a trainer, from the first process, and prune all but the newest.

    options: the dataclass the run was started with.
    """
    path = folder / f"state-{trainer.steps:09d}.safetensors"
    if parallel.rank() == 0:
        header = {
            "kind": type(options).__name__,
            "identity": trainer.identity,
            "steps": trainer.steps,
            "images": trainer.images,
            "processes": parallel.world(),
            "options": dataclasses.asdict(options),
        }
        write_snapshot(path, trainer.tensors(), header)
        prune(folder, PATTERN, keep)
    return path


def prune(folder: Path, pattern: str, keep: int) -> None:
    """Remove all but the newest files."""
    for old in sorted(folder.glob(pattern), key=_age)[:-keep]:
        old.unlink()


def find_state(resume: str, out: str | None) -> Path:
    """The state that --resume means: a file, the newest of a folder, or `latest`."""
    place = Path(out or "runs") if resume == "latest" else Path(resume)
    if place.is_file():
        return place
    states = [*place.glob(PATTERN), *(place.glob(f"*/{PATTERN}") if resume == "latest" else ())]
    if not states:
        raise UserError(f"resume={resume}: there is no training state ({PATTERN}) at {place}")
    return max(states, key=_age)


def _age(path: Path) -> float:
    return path.stat().st_mtime


def read_state(
    path: Path, header_only: bool = False
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors (none with header_only) and header of a state; UserError for any other file."""
    tensors, header = read_snapshot(path, header_only)
    if "identity" not in header:
        raise UserError(f"{path} is a network, not a training state ({PATTERN})")
    return tensors, header


def load_state(path: Path, trainer: Trainer) -> dict[str, Any]:
    """Bring a trainer to a state and return its header.

    UserError names the first setting in which the two differ.
    """
    tensors, header = read_state(path)
    for name, value in json.loads(json.dumps(trainer.identity)).items():  # as a state has it
        if (saved := header["identity"].get(name)) != value:
            raise UserError(
                f"{path} was written with {name}={saved}, this run has {name}={value}: resume "
                "with the same settings, or start a new run"
            )
    with torch.no_grad():
        for name, target in trainer.tensors().items():
            target.copy_(tensors[name])
    trainer.refresh()
    trainer.steps, trainer.images = header["steps"], header["images"]
    return header
