"""Distil a teacher into a one-step generator by Score identity Distillation.

python -m sid_fast.train --preset digits
"""

import dataclasses

import torch

from sid_fast import kernels
from sid_fast.config import cli
from sid_fast.config.settings import RunOptions, Settings, check, option, part
from sid_fast.distiller import Distiller
from sid_fast.engine import parallel
from sid_fast.engine.loop import Loop
from sid_fast.engine.snapshot import Evaluations, Snapshots
from sid_fast.errors import UserError
from sid_fast.files.dataset import ImageDataset
from sid_fast.files.digits import open_dataset
from sid_fast.files.network import load_network
from sid_fast.networks import NetworkConfig


@dataclasses.dataclass
class TrainConfig(RunOptions, Settings):
    preset: str | None = None
    teacher: str | None = option(
        None, "a pickle, .safetensors, run folder, https address, or a published teacher's name"
    )
    data: str | None = option(
        None,
        "data set whose label distribution to use; uniform labels without. No image is trained on",
    )
    teacher_steps: int = option(
        18, "sampler steps of the teacher, evaluated once for comparison; 0: it is not", 0, 1000
    )


def run(config: TrainConfig, given: set[str]) -> None:
    resume = cli.resume(config, given)
    check(config)
    if not config.teacher:
        raise UserError(
            "teacher is missing: --teacher FILE, or --preset NAME with a teacher of its own"
        )
    device = parallel.pick_device(config.device)
    kernels.dispatch.configure(config.kernels, device)
    data = open_dataset(config.data) if config.data else None
    with parallel.joined(device):
        with parallel.first_alone():  # it may download
            teacher = load_network(config.teacher).to(device)
        if data:
            check_data(data, teacher.config)
        settings = part(config, Settings)
        trainer = Distiller(teacher, settings, config.seed, label_weights(data, teacher.config))

        def one_step(z: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
            sigma = torch.full((len(z),), settings.init_sigma, device=z.device)
            return trainer.ema(z * settings.init_sigma, sigma, labels)

        snapshots = Snapshots(config, trainer, trainer.ema, one_step)
        evaluations = None
        if config.eval_every:
            evaluations = Evaluations(
                config,
                trainer,
                trainer.ema,
                data,
                teacher=teacher if config.teacher_steps else None,
                teacher_steps=config.teacher_steps,
            )
        where = f"on {device} with {kernels.dispatch.choose()} kernels"
        headline = f"distilling {config.teacher} ({teacher.config}), {where}"
        name = config.preset or "distil"
        Loop(trainer, config, snapshots, name, headline, evaluations).run(resume)


def check_data(data: ImageDataset, network: NetworkConfig) -> None:
    for name in ("resolution", "channels"):
        if getattr(data, name) != getattr(network, name):
            raise UserError(
                f"{data.path} has {name} {getattr(data, name)}, the teacher makes images of "
                f"{name} {getattr(network, name)}: give the teacher's own data set, or none"
            )
    if data.label_dim > network.label_dim:
        raise UserError(
            f"{data.path} has {data.label_dim} classes, the teacher knows {network.label_dim}: "
            "give the teacher's own data set, or none"
        )


def label_weights(data: ImageDataset | None, network: NetworkConfig) -> torch.Tensor | None:
    """How often each class occurs in the data, [label_dim]; None: draw uniformly."""
    if data is None or data.labels is None or not network.label_dim:
        return None
    return torch.bincount(torch.from_numpy(data.labels), minlength=network.label_dim).float()


main = cli.command(TrainConfig, run, "train", __doc__)

if __name__ == "__main__":
    cli.main(main, "sid_fast.train")
