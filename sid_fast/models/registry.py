"""Loading and saving networks of all families: pickles and .safetensors snapshots."""

import os
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from sid_fast.config.types import Settings
from sid_fast.errors import UserError
from sid_fast.io.download import fetch
from sid_fast.io.pickles import read_pickle
from sid_fast.io.safetensors import read_snapshot, write_snapshot
from sid_fast.io.untrusted import MAX_NETWORK_BYTES, describe, sniff_file
from sid_fast.models import EDMNetwork, Network, NetworkConfig
from sid_fast.models.families import build_network, config_of_pickle, read_config
from sid_fast.models.teachers import TEACHERS

EMBEDDED = ("digits", "digits-edm2", "fashion")  # teachers in this package


def load_network(path: str | Path) -> Network:
    """Load a network from an EDM, EDM2 or SiD pickle, or a .safetensors snapshot.

    The file determines the architecture. Nothing in the file is executed.

    Args:
        path: A file, a run folder (its newest snapshot), an https URL, the name of a published
            teacher (`cifar10-uncond`, …), or `digits`, `digits-edm2` or `fashion`, the teachers in
            this package.

    Returns:
        The network, frozen, in eval mode, float32, on the CPU.

    Raises:
        UserError: The file is missing or damaged, or its network is not supported.
    """
    file = _locate(str(path))
    kind = sniff_file(file, MAX_NETWORK_BYTES)
    fp16 = False
    try:
        if kind == "safetensors":
            state, values = read_snapshot(file)
            config = read_config(values)
        elif kind == "pickle":
            pickled = read_pickle(file)
            state, fp16 = pickled.state, pickled.init_kwargs.get("use_fp16") is True
            config = config_of_pickle(pickled)
        else:
            raise UserError(
                f"{file} is {describe(kind)}: give a snapshot-*.safetensors or an EDM, EDM2 "
                "or SiD network pickle (.pkl)"
            )
        if len(state) < config.num_blocks * len(config.channel_mult):  # before they are built
            raise UserError("weights do not fit: they are fewer than the network's blocks")
        with torch.device("meta"):
            net = build_network(config)
        check_weights(state, net.state_dict())
        state = {name: value.float() for name, value in state.items()}
        _check_finite(state)
    except UserError as error:
        message = str(error)
        raise UserError(message if str(file) in message else f"{file}: {message}") from None
    net.load_state_dict(state, assign=True)
    net.upstream_fp16 = fp16
    return net.requires_grad_(False).eval()


def load_generator(path: str | Path) -> Network:
    """Load a generator like load_network, but prefer a run folder's best network (best-*)."""
    best = sorted(Path(path).glob("best-*.safetensors"))
    return load_network(best[-1] if best else path)


def _locate(path: str) -> Path:
    if not path:
        raise UserError("the network's name is empty: give a file; is a shell variable unset?")
    if os.path.isdir(path):
        snapshots = sorted(Path(path).glob("snapshot-*.safetensors"))
        if not snapshots:
            raise UserError(f"{path} is a folder without snapshot-*.safetensors; use a file")
        return snapshots[-1]
    if path in EMBEDDED and not Path(path).exists():
        return Path(str(resources.files("sid_fast") / "teachers" / f"{path}.safetensors"))
    if path in TEACHERS:
        return fetch(TEACHERS[path].source)
    return fetch(path, ", a run folder or one of " + ", ".join((*EMBEDDED, *TEACHERS)))


def network_config(teacher: str) -> NetworkConfig:
    """Return a teacher's configuration, without downloading a published one.

    Raises:
        UserError: As load_network.
    """
    known = TEACHERS.get(teacher)
    return known.network if known else load_network(teacher).config


def check_weights(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Raise UserError unless tensors have the names and shapes of a network's and are floats."""
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


def _check_finite(state: dict[str, torch.Tensor]) -> None:
    for name, value in state.items():
        if not value.isfinite().all():
            raise UserError(
                f"{name} has values that are NaN or infinite: give another snapshot, as the run "
                "that wrote this one has diverged, or the file is damaged"
            )


def require_edm(net: Network, name: str, cannot: str) -> EDMNetwork:
    """Return the network; UserError, with what cannot be done with it, if it is an EDM2 network."""
    if not isinstance(net, EDMNetwork):
        raise UserError(f"{name} is an EDM2 network, which {cannot} (DDPM++, NCSN++ or ADM)")
    return net


def load_teacher(path: str | Path) -> Network:
    """Load a network as load_network does, for training on it.

    Raises:
        UserError: As load_network; or the network is a one-step generator, or its images have
            neither 1 nor 3 channels, so that sample grids cannot be written.
    """
    net = load_network(path)
    require_denoiser(net, str(path), "a teacher")
    require_png_channels(net, str(path), "give another teacher")
    return net


def require_denoiser(net: Network, name: str, role: str) -> None:
    """Raise UserError if a network is a one-step generator, trained at one noise level alone.

    Args:
        net: The network.
        name: Where it came from, for the message.
        role: What needs a denoiser, such as "a teacher".
    """
    if net.config.init_sigma is not None:
        raise UserError(
            f"{name} is a one-step generator (init_sigma={net.config.init_sigma:g}), but {role} "
            "must denoise at every noise level: give a denoiser, such as the generator's own "
            "teacher"
        )


def one_step_sigma(config: NetworkConfig, name: str, given: float | None) -> tuple[float, str]:
    """Return the σ_init at which a network is sampled in one step, and a note if it is a guess.

    Args:
        config: Of the network; σ_init is saved with one-step generators, except in SiD's pickles.
        name: Where the network came from, for the note.
        given: The value of --init-sigma, which goes before the saved one.
    """
    if sigma := given or config.init_sigma:
        return sigma, ""
    return Settings.init_sigma, (
        f"{name} does not say that it is a one-step generator: sampling it in one step from "
        f"σ = {Settings.init_sigma:g}; for a teacher give --steps"
    )


def require_png_channels(net: Network, name: str, way_out: str) -> None:
    """Raise UserError if a network's images have neither 1 nor 3 channels, as PNG files have.

    Latents are decoded to images, or previewed; see evaluation.decoding.

    Args:
        net: The network.
        name: Where it came from, for the message.
        way_out: The end of the message.
    """
    if net.config.channels not in (1, 3) and not net.config.is_latent:
        raise UserError(
            f"{name} makes images of {net.config.channels} channels, but PNG files have 1 or 3: "
            f"{way_out}"
        )


def save_network(path: str | Path, net: Network, ema: dict[str, Any] | None = None) -> None:
    """Write weights and configuration to one .safetensors file, atomically.

    Args:
        path: The file.
        net: The network.
        ema: What the weights are an average of; see io.safetensors.read_average.
    """
    write_snapshot(path, net.state_dict(), net.config.to_dict(), ema)
