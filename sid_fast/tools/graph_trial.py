"""CUDA graphs on trial: on a small network, in a process that may crash or hang.

A failed capture can leave a process with a broken device context, so a run that may do without
graphs does not try them first itself.
"""

import dataclasses
import os
from typing import Any, Literal

import torch

from sid_fast.io import progress
from sid_fast.kernels import dispatch
from sid_fast.models import NetworkConfig
from sid_fast.performance import process_group
from sid_fast.performance.cuda_graphs import resolve_cuda_graph
from sid_fast.tools.candidates import Candidate
from sid_fast.tools.isolation import Child, Failed, lacks_room
from sid_fast.tools.proof import Job
from sid_fast.tools.trial import Trial

LIMIT = 180  # seconds; in most of them Triton compiles what the run needs as well


def choose(
    mode: str,
    candidate: Candidate | None,
    config: NetworkConfig,
    settings: Any,
    device: torch.device,
    sharded: bool,
    deterministic: bool,
) -> tuple[str, bool | Literal["auto"], str]:
    """Decide whether a run uses CUDA graphs; auto tries them first, unless it was tuned.

    A collective: every rank must call it.

    Args:
        mode: --cuda-graph.
        candidate: the result of tuning; None: not tuned.
        config: of the network.
        settings: of the method.
        device: of the run.
        sharded: whether the networks are.
        deterministic: see Job.

    Returns:
        --cuda-graph for evaluations, Trainer's cuda_graph, and a note for the user or "".
    """
    graphs, note = resolve_cuda_graph(mode, device, sharded)
    if not graphs or mode != "auto":
        return mode, graphs, note
    if candidate:
        return ("auto", "auto", "") if candidate.cuda_graph else ("off", False, "")
    if reason := failure_reason(config, settings, device, deterministic):
        return "off", False, f"CUDA graphs are off: {reason}"
    return "auto", "auto", ""


def failure_reason(
    config: NetworkConfig, settings: Any, device: torch.device, deterministic: bool = False
) -> str:
    """Why graphs do not work for steps of such a network on this device; "" if they do.

    A collective: every rank must call it. The first rank of each node makes the trial, before the
    run's networks take the GPU's memory.
    """
    reason = ""
    shown = progress.phase("testing CUDA graphs on a small network")
    with process_group.main_process_first(), shown:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            reason = attempt(*job(config, settings, device, deterministic))
            if lacks_room(reason):  # beside this process: no verdict, so the run itself tries
                reason = ""
    return process_group.first_text(reason) if process_group.all_reduce_any(bool(reason)) else ""


def job(
    config: NetworkConfig, settings: Any, device: torch.device, deterministic: bool = False
) -> tuple[Job, Candidate]:
    """Build a reduced job: one block per level, this device's default backends, CUDA graphs on."""
    small, ranks = dataclasses.replace(config, num_blocks=1), process_group.world_size()
    backends = {op: dispatch.choose(op, device) for op in dispatch.OPERATIONS if op != "random"}
    candidate = Candidate(backends, cuda_graph=True, channels_last=device.type == "cuda")
    return Job(small, settings, str(device), deterministic=deterministic, ranks=ranks), candidate


def attempt(job: Job, candidate: Candidate, limit: float = LIMIT) -> str:
    """Run the job in a child process; return the reason if it failed, else ""."""
    with Child(Trial, job, candidate) as child:
        try:
            reason = child.call("replays_wrong", limit=limit)
        except Failed as failed:
            reason = str(failed)
    return reason and f"a trial failed: {reason}"
