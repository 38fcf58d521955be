"""Write a network for other programs: upstream's tools, ONNX Runtime, torch.export.

python -m sid_fast.export --network runs/000-digits --out digits.pkl

NAME.pkl is a pickle of an EDM network that the tools of EDM and SiD load. NAME.onnx (ONNX) and
NAME.pt2 (torch.export) hold a function of any batch size N: of a one-step generator
latents[, class_labels] -> images, with the multiplication by init_sigma included; of a teacher
x, sigma[, class_labels] -> denoised. NAME.safetensors is a snapshot of sid_fast.
"""

import dataclasses
import json
import os
import shlex
from pathlib import Path

from sid_fast import cli
from sid_fast.config.types import check, option
from sid_fast.errors import UserError
from sid_fast.io import invocation, progress
from sid_fast.io.atomic import open_target
from sid_fast.io.streams import say
from sid_fast.models import NetworkConfig, exporters
from sid_fast.models.registry import load_network, require_edm, save_network

SUFFIXES = (".pkl", ".onnx", ".pt2", ".safetensors")


@dataclasses.dataclass
class ExportConfig:
    """Options of `python -m sid_fast.export`."""

    network: str | None = option(
        None,
        "generator or teacher: a .safetensors snapshot, an EDM or SiD pickle (.pkl), a run folder "
        "(its newest snapshot), an https URL, or the name of a published teacher",
    )
    out: str | None = option(
        None, "file to write; its ending is the format: .pkl, .onnx, .pt2 or .safetensors"
    )
    init_sigma: float | None = option(
        None,
        "σ of a one-step generator's input noise; needed for a SiD pickle, which does not say "
        "that it is a one-step generator (2.5 in SiD's presets); default: as saved in the file",
        1e-3,
        1e3,
    )
    fp16: bool | None = option(
        None,
        ".pkl: on a GPU, upstream's tools then run the network in float16; default: as the pickle "
        "that is exported says, else not",
    )


def run(config: ExportConfig, given: set[str]) -> None:
    """Load the network, write and check the file, and say what comes next."""
    check(config)
    if not config.network:
        raise UserError("network is missing: give --network FILE, a run folder or a published name")
    if not config.out:
        raise UserError(f"out is missing: give --out NAME with one of {', '.join(SUFFIXES)}")
    out, suffix = config.out, Path(config.out).suffix
    if suffix not in SUFFIXES:
        raise UserError(f"out={out}: the ending must be one of {', '.join(SUFFIXES)}")
    cli.refuse_idle(config, given, suffix == ".pkl", "--out NAME.pkl", "fp16")
    if suffix == ".onnx":
        exporters.require_onnx()
    paths = out, config.network
    if all(map(os.path.exists, paths)) and os.path.samefile(*paths):
        raise UserError(f"out={out} is the network itself: give another name")
    net = load_network(config.network)
    if config.init_sigma is not None:
        net.config = dataclasses.replace(net.config, init_sigma=config.init_sigma)
    open_target(out)
    difference = None
    if suffix == ".pkl":
        cannot = ".pkl cannot hold yet: give NAME.safetensors, .onnx or .pt2, or an EDM network"
        fp16 = net.upstream_fp16 if config.fp16 is None else config.fp16
        exporters.save_pickle(out, require_edm(net, config.network, cannot), fp16)
    elif suffix == ".safetensors":
        save_network(out, net)
    else:
        save = exporters.save_onnx if suffix == ".onnx" else exporters.save_program
        with progress.phase("tracing the network, writing the file and comparing its outputs"):
            difference = save(out, net)
    role = "denoiser" if net.config.init_sigma is None else "one-step generator"
    what = f"{role}, {net.config}" if difference is None else exporters.interface(net.config)
    say(f"wrote {out} ({os.path.getsize(out) / 1e6:.1f} MB): {what}")
    if difference is not None and net.config.is_latent:
        say(f"largest difference of a latent from PyTorch: {difference:.2g}")
    elif difference is not None:
        say(f"largest pixel difference from PyTorch: {127.5 * difference:.2g} of 255 levels")
    invocation.suggest(next_command(out, net.config))


def next_command(out: str, config: NetworkConfig) -> str:
    """Return a command that makes images with the file, or calls the function in it."""
    suffix, one_step = Path(out).suffix, config.init_sigma is not None
    if suffix in (".pkl", ".safetensors"):
        steps = () if one_step else ("--steps", 18 if config.resolution < 64 else 40)
        option, ending = ("--grid", ".png") if config.channels in (1, 3) else ("--out", ".npz")
        target = option, Path(out).with_suffix(ending)
        return invocation.command_line(
            "generate", "--network", out, *steps, "--seeds", "0-63", *target
        )
    noise = f"randn(4, {config.channels}, {config.resolution}, {config.resolution})"
    inputs = f"latents={noise}" if one_step else f"x=80 * {noise}, sigma=80 * ones(4)"
    if config.label_dim:
        inputs += f", class_labels=eye({config.label_dim})[[0] * 4]"
    name = json.dumps(out)
    if suffix == ".pt2":
        code = (
            f"from torch import eye, export, ones, randn; f = export.load({name}).module(); "
            f"print(f({inputs}).shape)"
        )
    else:
        code = (
            "import onnxruntime; from numpy import eye, ones; from numpy.random import randn; "
            f'f = onnxruntime.InferenceSession({name}); x = {{k: v.astype("f") for k, v in '
            f"dict({inputs}).items()}}; print(f.run(None, x)[0].shape)"
        )
    return f"{invocation.python()} -c {shlex.quote(code)}"


main = cli.command(ExportConfig, run, None, __doc__)

if __name__ == "__main__":
    cli.main(main, "sid_fast.export")
