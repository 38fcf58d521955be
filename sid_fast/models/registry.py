"""Loading and saving networks: upstream's pickles and .safetensors snapshots."""

from importlib import resources
from pathlib import Path

import torch

from sid_fast.errors import UserError
from sid_fast.io.download import fetch
from sid_fast.io.pickles import read_pickle
from sid_fast.io.safetensors import read_snapshot, write_snapshot
from sid_fast.models import EDMNetwork, NetworkConfig
from sid_fast.models.teachers import TEACHERS


def load_network(path: str | Path) -> EDMNetwork:
    """Load a network from an EDM or SiD pickle, or a .safetensors snapshot.

    The file determines the architecture. Nothing in the file is executed.

    Args:
        path: A file, a run folder (its newest snapshot), an https URL, the name of a published
            teacher (`cifar10-uncond`, …), or `digits`, the teacher in this package.

    Returns:
        The network, frozen, in eval mode, float32, on the CPU.

    Raises:
        UserError: The file is missing or damaged, or its network is not supported.
    """
    file = _locate(str(path))
    try:
        if file.suffix == ".safetensors":
            state, values = read_snapshot(file)
            config = NetworkConfig.from_dict(values)
        else:
            pickled = read_pickle(file)
            state = pickled.state
            config = NetworkConfig.from_published(pickled.class_name, pickled.init_kwargs)
        with torch.device("meta"):
            net = EDMNetwork(config)
        _check(state, net.state_dict())
    except UserError as error:
        message = str(error)
        raise UserError(message if str(file) in message else f"{file}: {message}") from None
    net.load_state_dict({name: value.float() for name, value in state.items()}, assign=True)
    return net.requires_grad_(False).eval()


def load_generator(path: str | Path) -> EDMNetwork:
    """Load a generator like load_network, but prefer a run folder's best network (best-*)."""
    best = sorted(Path(path).glob("best-*.safetensors"))
    return load_network(best[-1] if best else path)


def _locate(path: str) -> Path:
    if Path(path).is_dir():
        snapshots = sorted(Path(path).glob("snapshot-*.safetensors"))
        if not snapshots:
            raise UserError(f"{path} is a folder without snapshot-*.safetensors; use a file")
        return snapshots[-1]
    if path == "digits" and not Path(path).exists():
        return Path(str(resources.files("sid_fast") / "teachers" / "digits.safetensors"))
    if path in TEACHERS:
        return fetch(TEACHERS[path].source)
    return fetch(path, ", a run folder or one of digits, " + ", ".join(TEACHERS))


def network_config(teacher: str) -> NetworkConfig:
    """Return a teacher's configuration, without downloading a published one."""
    known = TEACHERS.get(teacher)
    return known.network if known else load_network(teacher).config


def _check(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    if missing := sorted(set(expected) - set(state)):
        raise UserError(f"weights do not fit: {missing[0]} is missing ({len(missing)} in all)")
    if extra := sorted(set(state) - set(expected)):
        raise UserError(f"weights do not fit: {extra[0]} is unknown ({len(extra)} in all)")
    for name, value in expected.items():
        if not state[name].is_floating_point():
            raise UserError(f"weights do not fit: {name} is {state[name].dtype}, not float")
        if state[name].shape != value.shape:
            raise UserError(
                f"weights do not fit: {name} is {tuple(state[name].shape)}, "
                f"the network needs {tuple(value.shape)}"
            )


def save_network(path: str | Path, net: EDMNetwork) -> None:
    """Write weights and configuration to one .safetensors file, atomically."""
    write_snapshot(path, net.state_dict(), net.config.to_dict())
