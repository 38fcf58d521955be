"""Compile the Triton kernels of the published networks, in parallel.

    python -m benchmarks.warm_up --processes 8

A step compiles its kernels one after the other, half a second to a second each. This runs every
kernel at those shapes once, forward and backward, spread over processes that share Triton's cache
folder (TRITON_CACHE_DIR), so that whatever comes later finds them there. Exit status 1 if one
fails. On a CPU Triton interprets and there is nothing to compile: only the smallest run.
"""

import dataclasses
import os
import subprocess
import sys
import time

import torch

from benchmarks import kernels, measure
from sid_fast import cli
from sid_fast.config.types import check, option
from sid_fast.errors import RunFailed
from sid_fast.performance import process_group


@dataclasses.dataclass
class Options:
    kernel: str = option("", "only this one, as in benchmarks.kernels")
    dtype: str = option("bf16,fp32", "fp32, bf16 or fp16, or several with commas between")
    processes: int = option(0, "default: one per core, less two, at most 12", 0)
    part: int = option(-1, "of the cases, which a process of these runs; -1: start them all", -1)
    device: str = option("auto", "auto, cpu or cuda")


def compiled(options: Options, device: torch.device) -> None:
    """Run this process's part of the cases."""
    chosen = kernels.cases(kernels.Options(kernel=options.kernel, dtype=options.dtype), device)
    failed = []
    for case in chosen[options.part :: options.processes]:
        if "triton" not in case.forms:
            continue
        try:
            for call in kernels.prepared(case, "triton", device).values():
                call()()
            measure.synchronize(device)
        except Exception as error:  # the others go on
            failed.append(f"{case.name} {case.shape} {case.dtype}: {measure.reason(error)}")
    if failed:
        raise RunFailed("; ".join(failed))


def run(options: Options, given: set[str]) -> None:
    check(options)
    device = process_group.pick_device(options.device)
    options.processes = options.processes or min(max((os.cpu_count() or 1) - 2, 1), 12)
    if options.part >= 0:
        return compiled(options, device)
    begin = time.monotonic()
    values = {f"--{k}": str(v) for k, v in dataclasses.asdict(options).items() if v and k != "part"}
    command = [
        sys.executable,
        "-m",
        "benchmarks.warm_up",
        *(x for kv in values.items() for x in kv),
    ]
    parts = [subprocess.Popen([*command, "--part", str(i)]) for i in range(options.processes)]
    try:
        failed = sum(part.wait() != 0 for part in parts)
    finally:
        for part in parts:
            part.kill()
    print(f"{len(parts)} processes, {failed} failed, {time.monotonic() - begin:.0f} s", flush=True)
    if failed:
        raise RunFailed(f"{failed} of {len(parts)} processes had kernels that failed")


main = cli.command(Options, run, None, __doc__)

if __name__ == "__main__":
    cli.main(main, "benchmarks.warm_up")
