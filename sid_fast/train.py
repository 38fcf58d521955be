"""Distil a teacher into a one-step generator by Score identity Distillation.

python -m sid_fast.train --preset digits
"""

import dataclasses
import sys
from typing import Any

import torch

from sid_fast import kernels, plan
from sid_fast.config import cli
from sid_fast.config.settings import RunOptions, Settings, check, option, part, rounds_of
from sid_fast.distiller import Distiller
from sid_fast.engine import parallel, precision, trial
from sid_fast.engine.checkpoint import read_header
from sid_fast.engine.fit import largest_micro_batch
from sid_fast.engine.graphs import usable
from sid_fast.engine.loop import Loop
from sid_fast.engine.recompute import checkpoint_activations
from sid_fast.engine.snapshot import Evaluations, Snapshots
from sid_fast.errors import UserError
from sid_fast.files.dataset import ImageDataset
from sid_fast.files.digits import open_dataset
from sid_fast.files.network import load_network
from sid_fast.networks import EDMNetwork, NetworkConfig


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
    cuda_graph: str = option(
        "auto",
        "replay the launches of steps and evaluations from CUDA graphs: auto, on or off; auto "
        "tries them on a small network first and goes on without them, with a note, where they "
        "fail or networks lie in parts (fsdp, hsdp)",
    )
    compile: bool = option(
        False, "run every block through torch.compile; the first steps take minutes"
    )
    teacher_steps: int = option(
        18, "sampler steps of the teacher, evaluated once for comparison; 0: it is not", 0, 1000
    )
    checkpoint_activations: bool = option(
        False, "blocks keep their input alone and run again in backward: less memory, more time"
    )


@dataclasses.dataclass
class Command(TrainConfig, plan.PlanOptions):
    """A run's configuration, and what the command line alone knows of."""

    micro_batch: str | None = option(
        None, "images a round on one process: a number, or auto for the most that fit on the GPU"
    )


def start(command: Command, given: set[str]) -> None:
    """Train, or print the plan."""
    auto = command.micro_batch == "auto"
    command.micro_batch = None if auto else _number("micro_batch", command.micro_batch)
    if command.plan:
        return show_plan(command)
    if stray := sorted(given & plan.PLAN_ONLY):
        raise UserError(
            f"{stray[0]}={getattr(command, stray[0])} is for --plan alone; torchrun says how many "
            "GPUs a run has"
        )
    run(part(command, TrainConfig), given, auto)


def _number(name: str, value: Any) -> int | None:
    try:
        return value if value is None else int(value)
    except ValueError:
        raise UserError(f"{name}={value!r} is neither a whole number nor auto") from None


def show_plan(command: Command) -> None:
    check(command)
    check(part(command, Settings))
    require_teacher(command)
    settings, options = part(command, Settings), part(command, plan.PlanOptions)
    plan.check_request(settings, options)
    network = plan.network_of(command.teacher)
    kernels.dispatch.configure(command.kernels, torch.device("cuda"))  # wherever this runs
    form = kernels.dispatch.choose("block")
    print("counting a step: takes about a minute …", file=sys.stderr, flush=True)
    found = plan.counts(network, settings, command.checkpoint_activations, form)
    name = command.preset or command.teacher
    print(plan.text(name, network, found, settings, command.kimg, options))


def require_teacher(config: TrainConfig) -> None:
    if not config.teacher:
        raise UserError(
            "teacher is missing: --teacher FILE, or --preset NAME with a teacher of its own"
        )


def run(config: TrainConfig, given: set[str], auto_micro_batch: bool = False) -> None:
    if auto_micro_batch:  # what a state had is tried first
        given = given - {"micro_batch"}
    resume = cli.resume(config, given)
    check(config)
    require_teacher(config)
    device = parallel.pick_device(config.device)
    kernels.dispatch.configure(config.kernels, device)
    data = open_dataset(config.data) if config.data else None
    with parallel.joined(device, config.parallel, config.timeout):
        with parallel.first_alone():  # it may download
            teacher = load_network(config.teacher).to(device)
        if data:
            check_data(data, teacher.config)
        layout = parallel.plan(config.parallel, teacher, device, config.shard_group)
        sharded = layout.mesh is not None
        if auto_micro_batch:
            if resume and read_header(resume)["processes"] != parallel.world():
                config.micro_batch = None
            if device.type == "cuda":
                config.micro_batch = micro_batch_that_fits(teacher, config, device, sharded)
        settings = part(config, Settings)
        mode = config.cuda_graph
        graphs, note = usable(mode, device, config.checkpoint_activations, sharded)
        auto = mode == "auto"
        if graphs and auto and (reason := trial.refused(teacher.config, settings, device)):
            mode, graphs, note = "off", False, f"CUDA graphs are off: {reason}"
        trainer = Distiller(
            teacher,
            settings,
            config.seed,
            label_weights(data, teacher.config),
            layout,
            cuda_graph="auto" if graphs and auto else graphs,
            compile=config.compile,
        )
        prepare(trainer, config)
        teacher = trainer.teacher

        def one_step(net: EDMNetwork, z: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
            sigma = torch.full((len(z),), settings.init_sigma, device=z.device)
            return net(z * settings.init_sigma, sigma, labels)

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
                cuda_graph=mode,
            )
        where = (
            f"on {device} in {trainer.settings.precision}, kernels: {kernels.dispatch.report()}"
            f"{', CUDA graphs' * graphs}{', torch.compile' * config.compile}, {layout.text}"
        )
        headline = f"distilling {config.teacher} ({teacher.config}), {where}"
        headline += note and f"\nnote: {note}"
        if data and data.labels is None and teacher.config.label_dim:
            headline += f"\nnote: {data.path} has no labels: every class is drawn alike"
        name = config.preset or "distil"
        Loop(trainer, config, snapshots, name, headline, evaluations).run(resume)


def prepare(trainer: Distiller, config: TrainConfig) -> None:
    if config.checkpoint_activations:
        checkpoint_activations(trainer.teacher, trainer.generator, trainer.fake_score)


def micro_batch_that_fits(
    teacher: EDMNetwork, config: TrainConfig, device: torch.device, sharded: bool
) -> int:
    """The largest micro-batch for this process's GPU: estimated, or as it was, then tried.

    In parts it is not tried: processes that run out of memory would leave the others waiting.
    """
    settings, world = part(config, Settings), parallel.world()
    rounds_of(dataclasses.replace(settings, micro_batch=None), world)
    batch = settings.batch_size // world
    first = parallel.rank() == 0

    def estimate() -> int:
        recompute = config.checkpoint_activations
        form = kernels.dispatch.choose("block")
        found = plan.counts(teacher.config, precision.settle(settings, device), recompute, form)
        room = torch.cuda.mem_get_info()[0]
        return plan.estimated_micro_batch(found, batch, room, world, sharded)

    def try_step(n: int) -> None:
        if sharded:
            return
        trainer = Distiller(
            teacher, dataclasses.replace(settings, batch_size=n * world, micro_batch=n)
        )
        prepare(trainer, config)
        draws = trainer.draw()
        trainer.fake_score_round(draws["fake"][0]).loss.sum().backward()
        trainer.generator_round(draws["generator"][0]).loss.sum().backward()
        if world == 1:  # else it sends messages
            trainer.live.fill_(False)
            trainer.update("generator")

    def say(line: str) -> None:
        if first:
            print(line, flush=True)

    most = config.micro_batch or parallel.from_first(estimate)
    return largest_micro_batch(batch, most, try_step, say)


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


main = cli.command(Command, start, "train", __doc__)

if __name__ == "__main__":
    cli.main(main, "sid_fast.train")
