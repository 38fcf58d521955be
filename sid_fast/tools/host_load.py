"""A CPU that other programs use, on which the threads of a step wait for each other."""

import os

import torch


def advice(device: torch.device) -> str:
    """Return a note for a step on a busy CPU; empty if nothing suggests that one thread is faster.

    The threads of an operation end together. If one of them has to wait for a core, all wait, many
    hundred times a step.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or "OMP_NUM_THREADS" in os.environ:
        return ""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load <= cores / 2:
        return ""
    return (
        f"other programs use this machine (load {load:.1f} on {cores} cores), and {threads} "
        "threads wait for each other: with OMP_NUM_THREADS=1 a step may be many times faster"
    )
