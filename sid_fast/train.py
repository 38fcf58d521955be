"""Distil a teacher into a one-step generator by Score identity Distillation.

python -m sid_fast.train --preset digits
"""

import dataclasses
from functools import partial
from typing import Literal

import torch

from sid_fast import cli, kernels
from sid_fast.config.types import (
    RunOptions,
    Settings,
    Switch,
    check,
    grad_accum_steps,
    option,
    part,
)
from sid_fast.data.datasets import ImageDataset
from sid_fast.data.digits import open_dataset
from sid_fast.distiller import Distiller
from sid_fast.errors import UserError
from sid_fast.methods.sid import SiD
from sid_fast.models import EDMNetwork, NetworkConfig
from sid_fast.models.registry import load_network
from sid_fast.performance import fsdp, mixed_precision, process_group
from sid_fast.performance.activation_checkpoint import checkpoint_activations
from sid_fast.performance.cuda_graphs import resolve_cuda_graph
from sid_fast.sampling import one_step
from sid_fast.tools import estimator, graph_trial
from sid_fast.tools.micro_batch import largest_micro_batch
from sid_fast.training.callbacks import Evaluations, Snapshots
from sid_fast.training.checkpoint import read_header
from sid_fast.training.loop import Loop


@dataclasses.dataclass
class TrainConfig(RunOptions, Settings):
    preset: str | None = None
    teacher: str | None = option(
        None,
        "a pickle, .safetensors, run folder, https address, or a published teacher's name",
        heading="Teacher and data",
    )
    data: str | None = option(
        None,
        "data set whose label distribution to use; uniform labels without. No image is trained on",
        heading="Teacher and data",
    )
    # run() puts a number in the place of "auto" before Settings are made of it.
    micro_batch: int | Literal["auto"] | None = option(  # type: ignore[assignment]
        None,
        "images a forward pass on one GPU, if the batch is to be split (gradients add up); auto: "
        "the most that fit",
        1,
        heading="Batch and precision",
    )
    cuda_graph: Switch = option(
        "auto",
        "replay the launches of steps and evaluations from CUDA graphs; auto tries them on a small "
        "network first and goes on without them, with a note, where they fail or networks are "
        "sharded (fsdp, hsdp)",
        heading="Machine",
    )
    compile: bool = option(
        False,
        "run every block through torch.compile; the first steps take minutes",
        heading="Machine",
    )
    checkpoint_activations: bool = option(
        False,
        "blocks keep their input alone and run again in backward: less memory, more time",
        heading="Machine",
    )
    teacher_steps: int = option(
        18,
        "sampler steps of the teacher, evaluated once for comparison; 0: it is not",
        0,
        1000,
        heading="Evaluation during the run",
    )


def run(config: TrainConfig, given: set[str]) -> None:
    auto = config.micro_batch == "auto"
    if auto:  # what a state had is tried first
        config.micro_batch, given = None, given - {"micro_batch"}
    resume = cli.resume(config, given)
    check(config)
    if not config.teacher:
        raise UserError(
            "teacher is missing: --teacher FILE, or --preset NAME with a teacher of its own"
        )
    if config.eval_every and not (config.data or config.ref):
        raise UserError(
            f"eval_every={config.eval_every}: compared with what? give real images as --data, or "
            "their statistics as --ref"
        )
    device = process_group.pick_device(config.device)
    kernels.dispatch.configure(config.kernels, device)
    data = open_dataset(config.data) if config.data else None
    with process_group.joined(device, config.parallel, config.timeout):
        if auto and resume and read_header(resume)["processes"] != process_group.world_size():
            config.micro_batch = None
        grad_accum_steps(part(config, Settings), process_group.world_size())
        with process_group.main_process_first():  # it may download
            teacher = load_network(config.teacher).to(device)
        if data:
            check_data(data, teacher.config)
        network, backend = teacher.config, kernels.dispatch.choose("block")
        state = estimator.State(
            lambda settings: SiD(EDMNetwork(network), settings),
            mixed_precision.resolve_precision(part(config, Settings), device),
            backend,
        )
        sharding = fsdp.plan(config.parallel, device, state.nbytes, config.shard_group)
        sharded = sharding.mesh is not None
        if auto and device.type == "cuda":
            config.micro_batch = micro_batch_that_fits(teacher, config, device, sharding)
        settings = part(config, Settings)
        mode = config.cuda_graph
        graphs, note = resolve_cuda_graph(mode, device, sharded)
        prove = mode == "auto"
        if graphs and prove and (reason := graph_trial.refused(teacher.config, settings, device)):
            mode, graphs, note = "off", False, f"CUDA graphs are off: {reason}"
        trainer = Distiller(
            teacher,
            settings,
            config.seed,
            label_weights(data, teacher.config),
            sharding,
            cuda_graph="auto" if graphs and prove else graphs,
            compile=config.compile,
        )
        prepare(trainer, config)
        teacher = trainer.teacher

        snapshots = Snapshots(
            config, trainer, trainer.ema, partial(one_step, init_sigma=settings.init_sigma)
        )
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
        backends = kernels.dispatch.report(device)
        where = (
            f"on {device} in {trainer.settings.precision}, kernels: {backends}"
            f"{', CUDA graphs' * graphs}{', torch.compile' * config.compile}, {sharding.text}"
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
    teacher: EDMNetwork, config: TrainConfig, device: torch.device, sharding: fsdp.ShardingPlan
) -> int:
    """The largest micro-batch for this process's GPU: estimated, or as it was, then tried.

    In shards it is not tried: a rank that runs out of memory would leave the others waiting.
    """
    settings, world = part(config, Settings), process_group.world_size()
    batch = settings.batch_size // world
    first, sharded = process_group.rank() == 0, sharding.mesh is not None

    def estimate() -> int:
        recompute = config.checkpoint_activations
        backend = kernels.dispatch.choose("block")
        settled = mixed_precision.resolve_precision(settings, device)
        found = estimator.counts(teacher.config, settled, recompute, backend)
        room = torch.cuda.mem_get_info()[0]
        return estimator.estimated_micro_batch(
            found, batch, room, world, sharding.dp_shard, sharding.reshard_after_forward
        )

    def try_step(n: int) -> None:
        if sharded:
            return
        alone = dataclasses.replace(settings, batch_size=n, micro_batch=n)
        trainer = Distiller(teacher, alone, sharding=fsdp.SINGLE_PROCESS)
        prepare(trainer, config)
        with trainer.updates_disabled():
            trainer.dry_run()

    def say(line: str) -> None:
        if first:
            print(line, flush=True)

    asked = config.micro_batch
    most = asked if isinstance(asked, int) else process_group.broadcast_from_rank0(estimate)
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


PLAN = "python -m sid_fast.plan"
MOVED = dict.fromkeys(("plan", "gpus", "card", "memory", "tflops", "mfu", "link"), PLAN)
main = cli.command(TrainConfig, run, "train", __doc__, MOVED)

if __name__ == "__main__":
    cli.main(main, "sid_fast.train")
