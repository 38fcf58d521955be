"""Distil an EDM teacher into a one-step generator by Score identity Distillation (SiD).

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
    """Options of `python -m sid_fast.train`."""

    preset: str | None = None
    teacher: str | None = option(
        None,
        "network to distil: an EDM pickle (.pkl), a .safetensors snapshot, a run folder (its "
        "newest snapshot), an https URL, or the name of a published teacher such as cifar10-cond",
        heading="Teacher and data",
    )
    data: str | None = option(
        None,
        "EDM data set (zip or folder). Its class frequencies weight the sampled labels (default: "
        "uniform) and its images are the reference for --eval-every; it is never trained on",
        heading="Teacher and data",
    )
    # run() replaces "auto" by a number before it builds Settings.
    micro_batch: int | Literal["auto"] | None = option(  # type: ignore[assignment]
        None,
        "images per forward pass on each GPU, with gradient accumulation; auto: the largest that "
        "fits in memory; default: the whole batch at once",
        1,
        heading="Batch and precision",
    )
    cuda_graph: Switch = option(
        "auto",
        "run steps and evaluations as CUDA graphs. auto: test capture on a small network first, "
        "and run without graphs, with a note, if that fails or the networks are sharded (fsdp, "
        "hsdp). on: fail if graphs cannot be used",
        heading="Machine",
    )
    compile: bool = option(
        False,
        "compile every network block with torch.compile; the first steps take minutes",
        heading="Machine",
    )
    checkpoint_activations: bool = option(
        False,
        "store only each block's input and recompute the block in backward: less memory, about a "
        "third more work",
        heading="Machine",
    )
    teacher_steps: int = option(
        18,
        "sampler steps for the one evaluation of the teacher, as a baseline; 0: no baseline",
        0,
        1000,
        heading="Evaluation during the run",
    )


def run(config: TrainConfig, given: set[str]) -> None:
    """Distil the teacher; `given` names the fields that the command line set."""
    auto = config.micro_batch == "auto"
    if auto:  # a resumed run first tries its saved micro-batch
        config.micro_batch, given = None, given - {"micro_batch"}
    resume = cli.resume(config, given)
    check(config)
    cli.refuse_idle_run_options(config, given)
    if not config.teacher:
        raise UserError("teacher is missing: give --teacher FILE or --preset NAME")
    if config.eval_every and not (config.data or config.ref):
        raise UserError(
            f"eval_every={config.eval_every} needs a reference: give real images as --data, or "
            "their statistics as --ref"
        )
    device = process_group.pick_device(config.device, config.deterministic)
    kernels.dispatch.configure(config.kernels, device, config.deterministic)
    data = open_dataset(config.data) if config.data else None
    with process_group.joined(device, config.parallel, config.timeout):
        if auto and resume and read_header(resume)["processes"] != process_group.world_size():
            config.micro_batch = None
        grad_accum_steps(part(config, Settings), process_group.world_size())
        with process_group.main_process_first():  # may download
            teacher = load_network(config.teacher).to(device)
        if data:
            check_data(data, teacher.config)
        network, backends = teacher.config, kernels.dispatch.runs(device)
        estimator.require_host_memory(network, config, device)
        state = estimator.StateMemory(
            lambda settings: SiD(EDMNetwork(network), settings),
            mixed_precision.resolve_precision(part(config, Settings), device),
            backends,
        )
        sharding = fsdp.plan(config.parallel, device, state.nbytes, config.shard_group)
        sharded = sharding.mesh is not None
        if auto and device.type == "cuda":
            config.micro_batch = micro_batch_that_fits(teacher, config, device, sharding)
        settings = part(config, Settings)
        mode = config.cuda_graph
        graphs, note = resolve_cuda_graph(mode, device, sharded)
        test_first = mode == "auto"
        if (
            graphs
            and test_first
            and (reason := graph_trial.failure_reason(teacher.config, settings, device))
        ):
            mode, graphs, note = "off", False, f"CUDA graphs are off: {reason}"
        trainer = Distiller(
            teacher,
            settings,
            config.seed,
            label_weights(data, teacher.config),
            sharding,
            cuda_graph="auto" if graphs and test_first else graphs,
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
        described = kernels.dispatch.report(device)
        where = (
            f"on {device} in {trainer.settings.precision}, kernels: {described}"
            f"{', CUDA graphs' * graphs}{', torch.compile' * config.compile}, {sharding.text}"
        )
        headline = f"distilling {config.teacher} ({teacher.config}), {where}"
        headline += note and f"\nnote: {note}"
        if data and data.labels is None and teacher.config.label_dim:
            headline += f"\nnote: {data.path} has no labels: classes are sampled uniformly"
        name = config.preset or "distil"
        Loop(trainer, config, snapshots, name, headline, evaluations).run(resume)


def prepare(trainer: Distiller, config: TrainConfig) -> None:
    """Apply --checkpoint-activations to the three networks."""
    if config.checkpoint_activations:
        checkpoint_activations(trainer.teacher, trainer.generator, trainer.fake_score)


def micro_batch_that_fits(
    teacher: EDMNetwork, config: TrainConfig, device: torch.device, sharding: fsdp.ShardingPlan
) -> int:
    """The largest micro-batch that fits on every GPU, in images.

    Starts from the resumed run's micro-batch or the estimate, then tries a step and goes down on
    out of memory. With sharded networks nothing is tried: a rank that runs out of memory would
    leave the others waiting in a collective.

    Args:
        teacher: the network to distil, on `device`.
        config: micro_batch: the saved one to start from, or None.
        device: this rank's GPU.
        sharding: layout of the networks over the ranks.
    """
    settings, world = part(config, Settings), process_group.world_size()
    local_batch = settings.batch_size // world
    sharded = sharding.mesh is not None

    def estimate() -> int:
        recompute = config.checkpoint_activations
        backends = kernels.dispatch.runs(device)
        resolved = mixed_precision.resolve_precision(settings, device)
        counts = estimator.counts(teacher.config, resolved, recompute, backends)
        free_bytes = torch.cuda.mem_get_info()[0]
        return estimator.estimated_micro_batch(
            counts, local_batch, free_bytes, world, sharding.dp_shard,
            sharding.reshard_after_forward,
        )  # fmt: skip

    def try_step(n: int) -> None:
        if sharded:
            return
        single = dataclasses.replace(settings, batch_size=n, micro_batch=n)
        trainer = Distiller(teacher, single, sharding=fsdp.SINGLE_PROCESS)
        prepare(trainer, config)
        with trainer.updates_disabled():
            trainer.dry_run()

    def log(line: str) -> None:
        if process_group.rank() == 0:
            print(line, flush=True)

    saved = config.micro_batch
    upper = saved if isinstance(saved, int) else process_group.broadcast_from_rank0(estimate)
    return largest_micro_batch(local_batch, upper, try_step, log)


def check_data(data: ImageDataset, network: NetworkConfig) -> None:
    """Raise UserError if the data set does not match the teacher's images and classes."""
    for name in ("resolution", "channels"):
        if getattr(data, name) != getattr(network, name):
            raise UserError(
                f"{data.path} has {name} {getattr(data, name)}, the teacher has {name} "
                f"{getattr(network, name)}: give the teacher's own data set, or leave out --data"
            )
    if data.label_dim > network.label_dim:
        raise UserError(
            f"{data.path} has {data.label_dim} classes, the teacher has {network.label_dim}: "
            "give the teacher's own data set, or leave out --data"
        )


def label_weights(data: ImageDataset | None, network: NetworkConfig) -> torch.Tensor | None:
    """Count each class in the data, float32 [label_dim]; None: sample classes uniformly."""
    if data is None or data.labels is None or not network.label_dim:
        return None
    return torch.bincount(torch.from_numpy(data.labels), minlength=network.label_dim).float()


PLAN_OPTIONS = ("plan", "gpus", "card", "memory", "tflops", "mfu", "link")
MOVED = dict.fromkeys(PLAN_OPTIONS, "sid_fast.plan")
main = cli.command(TrainConfig, run, "train", __doc__, MOVED)

if __name__ == "__main__":
    cli.main(main, "sid_fast.train")
