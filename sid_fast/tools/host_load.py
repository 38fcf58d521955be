"""A CPU that other programs use, on which the threads of a step wait for each other."""

import os
import time
from pathlib import Path

import torch

LOADAVG = Path("/proc/loadavg")  # of Linux: its fourth field is "running/all" threads
SAMPLES, SECONDS = 10, 0.02


def running_threads() -> int:
    """Count the threads of other programs that kept running for 0.2 s; 0 where it is unknown.

    A load average would count what has just ended, such as an installation.
    """
    found = []
    for _ in range(SAMPLES):
        try:
            found.append(int(LOADAVG.read_text().split()[3].partition("/")[0]) - 1)  # this thread
        except (OSError, ValueError, IndexError):
            return 0
        time.sleep(SECONDS)
    return max(min(found), 0)


def advice(device: torch.device) -> str:
    """Return a note for a step on a busy CPU; empty if nothing suggests that one thread is faster.

    The threads of an operation end together. If one of them has to wait for a core, all wait, many
    hundred times a step.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or "OMP_NUM_THREADS" in os.environ:
        return ""
    others, cores = running_threads(), os.cpu_count() or 1
    if others + threads <= cores:
        return ""
    return (
        f"other programs keep {others} of {cores} cores busy, and {threads} threads wait for each "
        "other: with OMP_NUM_THREADS=1 a step may be many times faster"
    )
