"""Make an EMA of any width of a teacher's weights from the snapshots of its training.

python -m sid_fast.ema runs/000-teacher --std 0.135 --out teacher-0.135.safetensors

The run must track power-function EMAs (--ema-std of pretrain, which EDM2 has by default). The width
is the standard deviation of the averaged stretch of the run, as a fraction of the run. A narrower
or wider EMA than those that were tracked can make better images, and costs no training: try several
(post-hoc EMA, Karras et al., arXiv 2312.02696, section 3).
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from sid_fast import cli
from sid_fast.config.types import check, option
from sid_fast.errors import UserError
from sid_fast.io import invocation, progress
from sid_fast.io.atomic import open_target
from sid_fast.io.safetensors import read_average, read_tensor, write_snapshot
from sid_fast.io.streams import say
from sid_fast.models import Network
from sid_fast.models.families import build_network, read_config
from sid_fast.training import power_ema

PATTERN = "snapshot-*.safetensors"
COARSE = 0.1  # relative distance of profiles from which the result says so


@dataclasses.dataclass
class EMAConfig:
    """Options of `python -m sid_fast.ema`."""

    runs: tuple[str, ...] = option((), "run folder")
    std: float | None = option(
        None,
        "width of the EMA, as a fraction of the run, from 0.005 to 0.28",
        power_ema.MIN_STD,
        power_ema.MAX_STD,
    )
    out: str | None = option(None, "snapshot to write, .safetensors")


@dataclasses.dataclass(frozen=True)
class Stored:
    """A snapshot of a power-function EMA."""

    path: Path
    std: float
    images: int

    @property
    def profile(self) -> power_ema.Profile:
        """Its profile."""
        return self.images, power_ema.exponent(self.std)


def run(config: EMAConfig, given: set[str]) -> None:
    """Combine the snapshots of a run and write the result."""
    check(config)
    if not config.runs:
        raise UserError("no run is given: give the run folder of a teacher, such as runs/000-x")
    if len(config.runs) > 1:
        raise UserError(f"{len(config.runs)} run folders are given: give one, such as runs/000-x")
    if config.std is None:
        raise UserError("std is missing: give the width of the EMA, such as --std 0.135")
    if not config.out:
        raise UserError("out is missing: give --out NAME.safetensors")
    if Path(config.out).suffix != ".safetensors":
        raise UserError(f"out={config.out} is not a snapshot: give --out NAME.safetensors")
    stored, values = snapshots(Path(config.runs[0]))
    if any(os.path.exists(config.out) and os.path.samefile(config.out, s.path) for s in stored):
        raise UserError(f"out={config.out} is a snapshot of the run: give another name")
    images = max(s.images for s in stored)
    wanted = images, power_ema.exponent(config.std)
    profiles = [s.profile for s in stored]
    weights = power_ema.combination(profiles, wanted)
    off = power_ema.distance(profiles, weights, wanted)
    with torch.device("meta"):
        net = build_network(read_config(values))
    open_target(config.out)
    state = combined(net, [s.path for s in stored], weights.tolist())
    write_snapshot(config.out, state, values)
    say(
        f"wrote {config.out}: EMA of width {config.std:g} at {images / 1000:g} kimg, from "
        f"{len(stored)} snapshots; its profile is off by {off:.2%}"
    )
    if off > COARSE:
        say(
            "note: that is coarse: a width nearer to those of the snapshots, or more of them "
            "(pretrain --snapshot-every, --keep-snapshots), comes closer"
        )
    steps = 18 if net.config.resolution < 64 else 40
    invocation.suggest(
        invocation.command_line(
            "generate", "--network", config.out, "--steps", steps, "--seeds", "0-63", "--grid",
            Path(config.out).with_suffix(".png"),
        ),
        invocation.command_line("train", "--teacher", config.out),
    )  # fmt: skip


def snapshots(folder: Path) -> tuple[list[Stored], dict]:
    """Find the power-function EMAs of a run, without those of its untrained network.

    Returns:
        The snapshots, and the configuration of their network.

    Raises:
        UserError: There are none, or they are of different runs or networks.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a run folder: give a folder with {PATTERN}")
    stored, first = [], None
    for path in sorted(folder.glob(PATTERN)):
        ema, values = read_average(path)
        if not ema:
            continue
        first = first or (path, ema["run"], values)
        for what, here, there in zip(
            ("runs", "networks"), (ema["run"], values), first[1:], strict=True
        ):
            if here != there:
                raise UserError(
                    f"{path} and {first[0]} are of different {what}: move those of one elsewhere"
                )
        if not power_ema.MIN_STD <= ema["std"] <= power_ema.MAX_STD:
            raise UserError(f"{path}: std={ema['std']:g} is out of range: move it elsewhere")
        stored.append(Stored(path, ema["std"], ema["images"]))
    if first is None:
        raise UserError(
            f"{folder} has no snapshots of power-function EMAs after its first step: train with "
            "--ema-std, as pretrain --architecture edm2 does"
        )
    return stored, first[2]


@torch.no_grad()
def combined(
    net: Network, paths: Sequence[Path], weights: Sequence[float]
) -> dict[str, torch.Tensor]:
    """Return Σ weight·tensor over snapshots, float32, summed in float64.

    Reads one tensor of one file at a time; the result is the only network in memory.

    Args:
        net: The network, on the meta device.
        paths: The snapshots.
        weights: Their weights. They sum to 1, so that constants stay the same bits.

    Raises:
        UserError: A snapshot does not fit the network, or holds values that are not finite.
    """
    state = {}
    tensors = net.state_dict()
    with progress.phase("combining snapshots", len(tensors), "tensors") as shown:
        for name, expected in tensors.items():
            total = torch.zeros(expected.shape, dtype=torch.float64)
            for path, weight in zip(paths, weights, strict=True):
                value = read_tensor(path, name, expected.shape)
                if not value.isfinite().all():
                    raise UserError(f"{path}: {name} has values that are NaN or infinite")
                total.add_(value, alpha=weight)
            state[name] = total.float()
            shown.update()
    return state


main = cli.command(EMAConfig, run, None, __doc__, positional="runs")

if __name__ == "__main__":
    cli.main(main, "sid_fast.ema")
