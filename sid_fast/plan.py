"""Estimate memory, time and cost of a run on a given cluster, without a GPU.

python -m sid_fast.plan --preset imagenet64-cond --gpus 8 --card h100
"""

import dataclasses

import torch

from sid_fast import cli, kernels
from sid_fast.config.types import MethodOptions, check, check_method, option, part
from sid_fast.errors import UserError
from sid_fast.io import invocation, progress
from sid_fast.io.streams import say
from sid_fast.models.registry import network_config
from sid_fast.tools import estimator, planner


@dataclasses.dataclass
class PlanConfig(MethodOptions, planner.Cluster):
    """Options of `python -m sid_fast.plan`."""

    preset: str | None = None
    teacher: str | None = option(
        None,
        "network to distil, as in python -m sid_fast.train; a published teacher is not downloaded",
        heading="Run",
    )
    kimg: float = option(
        1000.0, "length of the run in thousands of images (kimg)", 0.001, heading="Run"
    )
    kernels: str = option("auto", "kernel backend, as in python -m sid_fast.train", heading="Run")
    checkpoint_activations: bool = option(
        False,
        "store only each block's input and recompute the block in backward",
        heading="Run",
    )


def run(config: PlanConfig, given: set[str]) -> None:
    """Count one step and print the plan."""
    check(config)
    check_method(config, given)
    if not config.teacher:
        raise UserError("teacher is missing: give --teacher FILE or --preset NAME")
    if "micro_batch" in given:
        raise UserError(
            f"--micro-batch={config.micro_batch} has no effect on a plan, which finds the largest "
            "that fits: leave it out"
        )
    cli.refuse_idle(config, given, config.gpus > 1, "several GPUs (--gpus)", "link")
    settings, cluster = config.settings(), part(config, planner.Cluster)
    planner.check_batch(settings, cluster.gpus)
    network = network_config(config.teacher)
    gpu = torch.device("cuda")  # the run's device, not this machine's
    kernels.dispatch.configure(config.kernels, gpu)
    backends = kernels.dispatch.runs(gpu)
    with progress.phase("counting the operations of a training step, about a minute"):
        counts = estimator.counts(network, settings, config.checkpoint_activations, backends)
    name = config.preset or config.teacher
    say(planner.text(name, network, counts, settings, config.kimg, cluster))
    start = ("--preset", config.preset) if config.preset else ("--teacher", config.teacher)
    invocation.suggest(invocation.command_line("train", *start))


main = cli.command(PlanConfig, run, "train", __doc__)

if __name__ == "__main__":
    cli.main(main, "sid_fast.plan")
