"""Check and time implementations of the training step on this machine, and keep the fastest.

python -m sid_fast.tune --preset cifar10-uncond

Each candidate (single Triton operations, the fused block, CUDA graphs, the memory format, cuDNN's
search, larger micro-batches, compiled blocks; on a CPU the C++ Adam, the memory format, threads)
runs in a child process, so one that crashes, hangs or runs out of memory is reported and harms
nothing else. It must first reproduce the eager float32 step, up to rounding. It is then timed
interleaved with the best candidate so far, and wins if it is faster beyond the spread of both.
`train` uses the result while GPU, driver, libraries, network and the options below are the same.
"""

import dataclasses
import json
import os
import sys

from sid_fast import cli, kernels
from sid_fast.config.types import (
    Parallel,
    Settings,
    StepOptions,
    check,
    grad_accum_steps,
    option,
    part,
)
from sid_fast.errors import UserError
from sid_fast.io import invocation, progress
from sid_fast.io.atomic import atomic_path, open_target
from sid_fast.io.streams import note, say
from sid_fast.models.registry import network_config
from sid_fast.performance import process_group
from sid_fast.tools import autotune


@dataclasses.dataclass
class TuneConfig(StepOptions, Settings):  # type: ignore[misc]  # micro_batch
    """Options of `python -m sid_fast.tune`."""

    preset: str | None = None
    teacher: str | None = option(
        None, "as for training; a published teacher is known without its file", heading="Run"
    )
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


def run(config: TuneConfig, given: set[str]) -> None:
    """Tune and print the table; `given` names the fields that the command line set."""
    micro_batch = config.micro_batch
    config.micro_batch = None if micro_batch == "auto" else micro_batch
    check(config)
    if config.preset and cli.presets("train")[config.preset].get("method", "sid") != "sid":
        raise UserError(f"preset={config.preset}: steps of SiDA are not tuned yet; use one of SiD")
    if not config.teacher:
        raise UserError("teacher is missing: --teacher FILE, or --preset NAME with one of its own")
    if config.json:
        open_target(config.json)
    device = process_group.named_device(config.device)
    kernels.dispatch.configure(config.kernels, device, config.deterministic)
    settings = part(config, Settings)
    grad_accum_steps(settings, int(os.environ.get("WORLD_SIZE", 1)))
    with process_group.joined(process_group.named_device("cpu"), "ddp", config.timeout):
        with process_group.main_process_first():  # it may download
            network = network_config(config.teacher)
        job = autotune.job_of(config, given, network, settings, device, micro_batch == "auto")
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
    start = ("--preset", config.preset) if config.preset else ("--teacher", config.teacher)
    invocation.suggest(invocation.command_line("train", *start))


main = cli.command(TuneConfig, run, "train", __doc__)

if __name__ == "__main__":
    cli.main(main, "sid_fast.tune")
