"""Network snapshots: safetensors files whose metadata say how to build the network."""

import json
import os
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sid_fast.errors import UserError, WriteFailed
from sid_fast.io.atomic import atomic_path

_KEY = "sid_fast"
_VERSION = 1


def write_snapshot(
    path: str | os.PathLike[str], state: dict[str, torch.Tensor], config: dict[str, Any]
) -> None:
    """Write tensors and a JSON-serialisable `config` to `path`, atomically.

    Raises:
        WriteFailed: the file cannot be written.
    """
    metadata = {_KEY: json.dumps({"version": _VERSION, "config": config})}
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
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if _KEY not in metadata:
                raise UserError(
                    f"{path} is a safetensors file but was not written by sid_fast: "
                    "give a snapshot-*.safetensors of a run"
                )
            header = json.loads(metadata[_KEY])
            if header["version"] != _VERSION:
                raise UserError(
                    f"{path} has snapshot version {header['version']}, this program reads "
                    f"{_VERSION}: install the version of sid_fast that wrote it"
                )
            names = [] if config_only else file.keys()
            return {name: file.get_tensor(name) for name in names}, header["config"]
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}): check the path") from error
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is cut short, damaged or not a safetensors file ({error}): copy it again"
        ) from error
