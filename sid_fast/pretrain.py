"""Train an EDM teacher on your own images.

python -m sid_fast.pretrain --data images.zip --out runs/teacher
"""

import contextlib
import dataclasses
from functools import partial
from pathlib import Path

import torch

from sid_fast import augment, cli, kernels
from sid_fast.config.types import (
    Architecture,
    PretrainSettings,
    RunOptions,
    check,
    grad_accum_steps,
    option,
    part,
)
from sid_fast.data.digits import open_dataset
from sid_fast.data.feed import ImageFeed
from sid_fast.errors import UserError
from sid_fast.io import invocation, progress
from sid_fast.methods.edm import EDM
from sid_fast.models import EDMNetwork, NetworkConfig
from sid_fast.performance import fsdp, mixed_precision, process_group
from sid_fast.sampling import heun
from sid_fast.tools import estimator
from sid_fast.training import sinks
from sid_fast.training.callbacks import Evaluations, Snapshots
from sid_fast.training.loop import Loop
from sid_fast.training.random_streams import seed_of
from sid_fast.training.step import Trainer

_network = partial(option, heading="Network")


@dataclasses.dataclass
class PretrainConfig(RunOptions, PretrainSettings):
    """Options of `python -m sid_fast.pretrain`."""

    preset: str | None = None
    data: str | None = option(
        None, "training images: an EDM data set (zip or folder), or `digits`", heading="Data"
    )
    architecture: Architecture = _network("ddpmpp", "network architecture")
    model_channels: int = _network(128, "base number of channels", 1)
    channel_mult: tuple[int, ...] = _network(
        (2, 2, 2), "channels of each resolution level, as multiples of --model-channels"
    )
    num_blocks: int = _network(4, "residual blocks per resolution level", 1)
    attention_resolutions: tuple[int, ...] = _network(
        (16,), "resolutions (pixels) with self-attention"
    )
    sampler_steps: int = option(
        18,
        "sampler steps for sample grids and evaluations",
        1,
        1000,
        heading="Run and output",
    )
    # run() replaces None by a number before it builds PretrainSettings.
    lr_rampup_kimg: float | None = option(  # type: ignore[assignment]
        None,
        "kimg of linear learning-rate warm-up; default: 1/20 of --kimg",
        0,
        heading="Optimizer and EMA",
    )


def run(config: PretrainConfig, given: set[str]) -> None:
    """Train a teacher; `given` names the fields that the command line set."""
    resume = cli.resume(config, given)
    check(config)
    sinks.require(config.log_to)
    cli.refuse_idle_run_options(config, given)
    if not config.data:
        raise UserError("data is missing: give the training images as --data IMAGES.zip")
    if config.lr_rampup_kimg is None:  # the ratio of EDM: 10 of 200 million images
        config.lr_rampup_kimg = config.kimg / 20
    device = process_group.pick_device(config.device, config.deterministic)
    kernels.dispatch.configure(config.kernels, device, config.deterministic)
    data = open_dataset(config.data)
    network = NetworkConfig(
        architecture=config.architecture,
        resolution=data.resolution,
        channels=data.channels,
        label_dim=data.label_dim,
        augment_dim=augment.LABEL_DIM if config.augment_p else 0,
        model_channels=config.model_channels,
        channel_mult=config.channel_mult,
        num_blocks=config.num_blocks,
        attention_resolutions=config.attention_resolutions,
        dropout=config.dropout,
    )
    with process_group.joined(device, config.parallel, config.timeout):
        settings = part(config, PretrainSettings)
        grad_accum_steps(settings, process_group.world_size())
        estimator.require_host_memory(network, settings, device)
        state = estimator.StateMemory(
            lambda s: EDM(EDMNetwork(network), s),
            mixed_precision.resolve_precision(settings, device),
            kernels.dispatch.runs(device),
        )
        sharding = fsdp.plan(config.parallel, device, state.nbytes, config.shard_group)
        feed = ImageFeed(
            data, settings.batch_size, config.seed, device, sharding.rank, sharding.ranks
        )
        torch.manual_seed(seed_of(config.seed, "weights"))
        fingerprint = {f"network {k}": v for k, v in network.to_dict().items()}
        with progress.phase("building the network"):
            method = EDM(EDMNetwork(network).to(device), settings, feed)
            trainer = Trainer(method, settings, config.seed, sharding, fingerprint)
        sampler = partial(heun, num_steps=config.sampler_steps)
        snapshots = Snapshots(config, trainer, trainer.ema, sampler)
        evaluations = None
        if config.eval_every:
            evaluations = Evaluations(config, trainer, trainer.ema, data, config.sampler_steps)
        name = f"teacher-{config.preset or Path(config.data).stem}"
        backends = kernels.dispatch.report(device)
        where = f"on {device} in {trainer.settings.precision}, kernels: {backends}, {sharding.text}"
        headline = f"training a teacher ({network}) on {len(data):,} images {feed.text}, {where}"
        with contextlib.closing(feed):
            changed = {"changed": cli.changed_options(config, "pretrain")}
            loop = Loop(trainer, config, snapshots, name, headline, evaluations, changed)
            if loop.run(resume) and process_group.rank() == 0:
                invocation.suggest(*next_commands(config, loop.folder))


def next_commands(config: PretrainConfig, folder: Path) -> list[str]:
    """What to type after a run in a folder: look at images, distil the teacher, train on."""
    steps = "--steps", config.sampler_steps
    grid = "--seeds", "0-63", "--grid", "images.png"
    return [
        invocation.command_line("generate", "--network", folder, *steps, *grid),
        invocation.command_line("train", "--teacher", folder),
        invocation.command_line("pretrain", "--resume", folder, "--kimg", f"{2 * config.kimg:g}"),
    ]


main = cli.command(PretrainConfig, run, "pretrain", __doc__)

if __name__ == "__main__":
    cli.main(main, "sid_fast.pretrain")
