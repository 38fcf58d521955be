"""Network snapshots: safetensors files whose metadata say how to build the network."""

import json
import os
from collections.abc import Sequence
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sid_fast.errors import UserError, WriteFailed
from sid_fast.io.atomic import atomic_path
from sid_fast.io.untrusted import (
    MAX_NETWORK_BYTES,
    Refused,
    brief,
    checked_int,
    checked_shape,
    naming,
    open_limited,
    parse_json,
)

_MAX_HEADER = 1 << 24  # bytes; the largest EDM network's has 100 kB
_MAX_TENSORS = 100_000
_MAX_NAME = 200  # characters of a tensor's name
_KEY = "sid_fast"
_VERSION = 1
_WHAT = "a snapshot (.safetensors)"


def write_snapshot(
    path: str | os.PathLike[str],
    state: dict[str, torch.Tensor],
    config: dict[str, Any],
    ema: dict[str, Any] | None = None,
) -> None:
    """Write tensors and a JSON-serialisable `config` to `path`, atomically.

    Args:
        path: of the file.
        state: the tensors.
        config: how to build the network.
        ema: what the tensors are an average of; see read_average.

    Raises:
        WriteFailed: the file cannot be written.
    """
    record = {"version": _VERSION, "config": config} | ({"ema": ema} if ema else {})
    metadata = {_KEY: json.dumps(record)}
    tensors = {name: tensor.detach().contiguous() for name, tensor in state.items()}
    try:
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata)
    except SafetensorError as error:
        raise WriteFailed(f"{path} cannot be written ({error}): check the free space") from error


def read_snapshot(
    path: str | os.PathLike[str], config_only: bool = False
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read a file of `write_snapshot`: its tensors, on the CPU, and its config.

    Args:
        path: of the file.
        config_only: do not read tensors; the first result is then empty.

    Raises:
        UserError: the file is missing, damaged, of another version, or not from sid_fast.
    """
    with naming(path, _WHAT):
        names = check_header(path)
        with safe_open(path, framework="pt") as file:
            config = _record(path, file.metadata())["config"]
            wanted = [] if config_only else names
            return {name: file.get_tensor(name) for name in wanted}, config


def read_average(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read what the tensors of a snapshot are an average of, and its config.

    Returns:
        Width `std` in (0, 1), training images seen `images` > 0, and the name of the `run`; empty
        if the snapshot holds no power-function EMA, or that of an untrained network. And the
        config.

    Raises:
        UserError: as read_snapshot.
    """
    with naming(path, _WHAT):
        check_header(path)
        with safe_open(path, framework="pt") as file:
            record = _record(path, file.metadata())
        ema = record.get("ema")
        if ema is None:
            return {}, record["config"]
        if not isinstance(ema, dict) or ema.keys() != {"std", "images", "run"}:
            raise Refused(f"its average is {brief(ema)}")
        std, images, run = ema["std"], ema["images"], ema["run"]
        if type(std) is not float or not 0 < std < 1 or not isinstance(run, str):
            raise Refused(f"its average is {brief(ema)}")
        return ema if checked_int(images, 0, 2**63, "its images") else {}, record["config"]


def read_tensor(path: str | os.PathLike[str], name: str, shape: Sequence[int]) -> torch.Tensor:
    """Read one tensor of a snapshot.

    Raises:
        UserError: the file has no such tensor, or one of another shape, or it cannot be read.
    """
    with naming(path, _WHAT), safe_open(path, framework="pt") as file:
        if name not in file.keys():  # noqa: SIM118  # not iterable
            raise Refused(f"it has no {name}")
        tensor = file.get_tensor(name)
        if tensor.shape != torch.Size(shape):
            raise Refused(f"{name} is {tuple(tensor.shape)}, not {tuple(shape)}")
        return tensor


def _record(path: str | os.PathLike[str], metadata: dict[str, str] | None) -> dict[str, Any]:
    """Return our entry of a file's metadata, checked; raises in a block of naming()."""
    if _KEY not in (metadata or {}):
        raise UserError(
            f"{path} is a safetensors file but was not written by sid_fast: "
            "give a snapshot-*.safetensors of a run"
        )
    assert metadata
    record = parse_json(metadata[_KEY].encode())
    if not isinstance(record, dict) or not isinstance(record.get("config"), dict):
        raise Refused("its metadata hold no configuration")
    if record.get("version") != _VERSION:
        raise UserError(
            f"{path} has snapshot version {brief(record.get('version'))}, this program "
            f"reads {_VERSION}: install the version of sid_fast that wrote it"
        )
    return record


def read_tensors(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Read all tensors of any safetensors file, onto the CPU.

    Raises:
        UserError: As open_limited; or the file is cut short.
        Refused: As check_header.
    """
    names = check_header(path)
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in names}


def check_header(path: str | os.PathLike[str]) -> list[str]:
    """Check the counts and sizes that a safetensors file declares, and return its tensors' names.

    The library checks the rest, as that tensors do not overlap, but it reads headers of 100 MB.
    """
    with open_limited(path, MAX_NETWORK_BYTES) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(first := file.read(8), "little")
        if len(first) == 8:
            checked_int(length, 2, _MAX_HEADER, "the length of its header")
        data = file.read(length)
    if len(first) < 8 or len(data) < length:
        raise _cut_short(path)
    header = parse_json(data, max_depth=3)
    if not isinstance(header, dict) or len(header) > _MAX_TENSORS:
        raise Refused(f"its header is not an object of at most {_MAX_TENSORS:,} tensors")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise Refused("its metadata are not texts by name")
    end = 0
    for name, entry in header.items():
        if len(name) > _MAX_NAME or not isinstance(entry, dict):
            raise Refused(f"its header has {brief(name)} with {brief(entry)}, which is no tensor")
        checked_shape(entry.get("shape"), 2**63 - 1, f"the shape of {brief(name)}")
        offsets = entry.get("data_offsets")
        if not isinstance(offsets, list) or len(offsets) != 2:
            raise Refused(f"the offsets of {brief(name)} are {brief(offsets)}")
        end = max(end, *(checked_int(v, 0, 2**63 - 1, "an offset") for v in offsets))
    if 8 + length + end > size:
        raise _cut_short(path)
    return sorted(header)


def _cut_short(path: str | os.PathLike[str]) -> UserError:
    return UserError(f"{path} is cut short: delete it, then copy or download it again")
