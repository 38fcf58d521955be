"""Train an EDM teacher on your own images.

python -m sid_fast.pretrain --data images.zip --out runs/teacher
"""

import dataclasses
import functools
from pathlib import Path

import torch

from sid_fast import augment, kernels
from sid_fast.config import cli
from sid_fast.config.settings import PretrainSettings, RunOptions, check, option, part
from sid_fast.draws import seed_of
from sid_fast.engine import parallel
from sid_fast.engine.loop import Loop
from sid_fast.engine.snapshot import Evaluations, Snapshots
from sid_fast.errors import UserError
from sid_fast.files.digits import open_dataset
from sid_fast.networks import EDMNetwork, NetworkConfig
from sid_fast.pretrainer import Pretrainer
from sid_fast.sampling import heun


@dataclasses.dataclass
class PretrainConfig(RunOptions, PretrainSettings):
    preset: str | None = None
    data: str | None = option(None, "images to learn: an EDM data set zip or folder, or `digits`")
    architecture: str = option("ddpmpp", "ddpmpp, ncsnpp or adm")
    model_channels: int = option(128, "width of the network", 1)
    channel_mult: tuple[int, ...] = option((2, 2, 2), "width of each level, in model_channels")
    num_blocks: int = option(4, "residual blocks a level", 1)
    attention_resolutions: tuple[int, ...] = option((16,), "resolutions with attention")
    sampler_steps: int = option(18, "steps of the sampler that shows the teacher's images", 1, 1000)
    lr_rampup_kimg: float | None = option(
        None, "the learning rate rises linearly over so many; default: a 20th of the run", 0
    )


def run(config: PretrainConfig, given: set[str]) -> None:
    resume = cli.resume(config, given)
    check(config)
    if not config.data:
        raise UserError("data is missing: --data images.zip names the images to learn")
    if config.lr_rampup_kimg is None:  # as published: 10 of 200 million images
        config.lr_rampup_kimg = config.kimg / 20
    device = parallel.pick_device(config.device)
    kernels.dispatch.configure(config.kernels, device)
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
    with parallel.joined(device, config.parallel, config.timeout):
        torch.manual_seed(seed_of(config.seed, "weights"))
        net = EDMNetwork(network).to(device)
        settings = part(config, PretrainSettings)
        layout = parallel.plan(config.parallel, net, device, config.shard_group)
        trainer = Pretrainer(net, settings, data.images(), data.labels, config.seed, layout)
        many_steps = functools.partial(heun, num_steps=config.sampler_steps)
        snapshots = Snapshots(config, trainer, trainer.ema, many_steps)
        evaluations = None
        if config.eval_every:
            evaluations = Evaluations(config, trainer, trainer.ema, data, config.sampler_steps)
        name = f"teacher-{config.preset or Path(config.data).stem}"
        where = (
            f"on {device} in {trainer.settings.precision}, kernels: {kernels.dispatch.report()}, "
            f"{layout.text}"
        )
        headline = f"training a teacher ({network}) on {len(data):,} images, {where}"
        Loop(trainer, config, snapshots, name, headline, evaluations).run(resume)


main = cli.command(PretrainConfig, run, "pretrain", __doc__)

if __name__ == "__main__":
    cli.main(main, "sid_fast.pretrain")
