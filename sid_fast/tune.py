"""Check and time implementations of the training step on this machine, and keep the fastest.

python -m sid_fast.tune --preset cifar10-uncond
python -m sid_fast.tune pretrain --data images.zip

Each candidate (single Triton operations, the fused block, CUDA graphs, the memory format, cuDNN's
search, larger micro-batches, compiled blocks; on a CPU the C++ operations, the memory format,
threads) runs in a child process, so one that crashes, hangs or runs out of memory is reported and
harms nothing else. It must first reproduce the eager float32 step, up to rounding. It is then timed
interleaved with the best candidate so far, and wins if it is faster beyond the spread of both; the
default operations win unless they are slower. SiDA's steps are tuned on random images, as they are
after its warm-up. `train` and `pretrain` use the result while GPU, driver, libraries, network and
the options below are the same.
"""

import dataclasses
import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from sid_fast import cli, kernels
from sid_fast.config.types import (
    MethodOptions,
    Parallel,
    PretrainSettings,
    StepOptions,
    TeacherOptions,
    check,
    check_method,
    grad_accum_steps,
    option,
    part,
)
from sid_fast.data.digits import open_dataset
from sid_fast.errors import UserError
from sid_fast.io import invocation, progress
from sid_fast.io.atomic import atomic_path, open_target
from sid_fast.io.streams import note, say
from sid_fast.methods.edm import teacher_config
from sid_fast.models import NetworkConfig
from sid_fast.models.registry import network_config
from sid_fast.performance import process_group
from sid_fast.tools import autotune


@dataclasses.dataclass
class TuneOptions(StepOptions):
    """Options of tuning any method."""

    kimg: float = option(
        1000.0, "length of the run, thousand images; it sets the budget", 0.001, heading="Run"
    )
    device: str = option("auto", "auto, cpu or cuda", heading="Machine")
    kernels: str = option(
        "auto", "as for training; operations named here are not tuned", heading="Machine"
    )
    deterministic: bool = option(False, "as for training", heading="Machine")
    parallel: Parallel = option("auto", "as for training", heading="Machine")
    timeout: float = option(10.0, "as for training", 0.05, 1e5, heading="Machine")
    json: str | None = option(None, "write the table and the verdict to this file as well")


@dataclasses.dataclass
class TuneConfig(TuneOptions, MethodOptions):  # type: ignore[misc]  # micro_batch
    """Options of `python -m sid_fast.tune`."""

    preset: str | None = None
    teacher: str | None = option(
        None, "as for training; a published teacher is known without its file", heading="Run"
    )


@dataclasses.dataclass
class TunePretrainConfig(TuneOptions, TeacherOptions):  # type: ignore[misc]  # micro_batch
    """Options of `python -m sid_fast.tune pretrain`."""

    preset: str | None = None
    data: str | None = option(
        None, "as for pretrain; gives the network's resolution and classes", heading="Data"
    )


def run(config: TuneConfig, given: set[str]) -> None:
    """Tune the steps of a distillation; `given` names the fields that the command line set."""
    check_method(config, given)
    if not config.teacher:
        raise UserError("teacher is missing: --teacher FILE, or --preset NAME with one of its own")
    tune(config, given, config.settings, partial(network_config, config.teacher))
    suggest("train", "teacher", config)


def run_pretrain(config: TunePretrainConfig, given: set[str]) -> None:
    """Tune the steps of a teacher's training; `given` names the fields that were set."""
    if not config.data:
        raise UserError("data is missing: give the training images as --data IMAGES.zip")

    def network() -> NetworkConfig:
        assert config.data
        return teacher_config(config, config, open_dataset(config.data))

    tune(config, given, partial(part, config, PretrainSettings), network)
    suggest("pretrain", "data", config)


def tune(
    config: Any,
    given: set[str],
    settings: Callable[[], Any],
    network: Callable[[], NetworkConfig],
) -> None:
    """Tune and print the table.

    Args:
        config: the command's options.
        given: names of the fields that the command line set.
        settings: makes those of the method from the options.
        network: returns the configuration of the network; it may download.
    """
    auto = config.micro_batch == "auto"
    if auto:
        config.micro_batch = None
    check(config)
    if config.json:
        open_target(config.json)
    device = process_group.named_device(config.device)
    kernels.dispatch.configure(config.kernels, device, config.deterministic)
    grad_accum_steps(settings(), process_group.launch().world_size)
    with process_group.joined(process_group.named_device("cpu"), "ddp", config.timeout):
        with process_group.main_process_first():
            net = network()
        job = autotune.job_of(config, given, net, settings(), device, auto)
        with progress.phase("tuning: looking at this machine"):
            tuning = autotune.decide(job, "again", config.kimg, config.tune_minutes)
        if process_group.rank():
            return
    for line in tuning.notes:
        note(f"note: {line}", sys.stdout)
    if config.json:
        with atomic_path(config.json) as temporary:
            text = json.dumps(tuning.to_json(), indent=2, ensure_ascii=False)
            temporary.write_text(text + "\n", "utf-8")
    if not tuning.rows or not any(row.ms for row in tuning.rows):
        raise UserError(tuning.text)
    say(tuning.text)


def suggest(command: str, source: str, config: Any) -> None:
    """Print the command that takes the result; `source` is the option to name without a preset."""
    if process_group.launch().rank == 0:
        source = "preset" if config.preset else source
        invocation.suggest(invocation.command_line(command, f"--{source}", getattr(config, source)))


_pretrain = cli.command(
    TunePretrainConfig,
    run_pretrain,
    "pretrain",
    """Check and time implementations of a teacher's training step, and keep the fastest.

python -m sid_fast.tune pretrain --data images.zip
""",
)
main = cli.command(TuneConfig, run, "train", __doc__, pretrain=_pretrain)

if __name__ == "__main__":
    cli.main(main, "sid_fast.tune")
