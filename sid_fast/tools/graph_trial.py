"""CUDA graphs on trial: on a small network, in a process that may crash or hang.

A failed capture can leave a process with a broken device context, so a run that may do without
graphs does not try them first itself.
"""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import traceback

import torch

from sid_fast.config.types import Settings, grad_accum_steps
from sid_fast.distiller import Distiller
from sid_fast.kernels import dispatch
from sid_fast.models import EDMNetwork, NetworkConfig
from sid_fast.performance import cuda_graphs, process_group

LIMIT = 180  # seconds; in most of them Triton compiles what the run needs as well
STEPS = 3
IMAGES = 2  # a round
# Between replayed and eager weights, relative to how far the steps moved them. cuBLAS may choose
# another product in a graph; random numbers that repeat are off by more than 0.1.
BOUND = 1e-2


def failure_reason(
    config: NetworkConfig, settings: Settings, device: torch.device, limit: int = LIMIT
) -> str:
    """Why graphs do not work for steps of such a network on this device; "" if they do.

    Every process has to call it. The first one of each node makes the trial, at most `limit`
    seconds long, before anything large lies on its device.
    """
    reason = ""
    with process_group.main_process_first():
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            reason = attempt(job(config, settings, device), limit)
    return process_group.first_text(reason) if process_group.all_reduce_any(bool(reason)) else ""


def job(config: NetworkConfig, settings: Settings, device: torch.device) -> dict:
    """What a trial is told: the same blocks, one a level, and a step of the same parts."""
    rounds = min(
        grad_accum_steps(settings, process_group.world_size()),
        cuda_graphs.MAX_SINGLE_GRAPH_MICRO_BATCHES + 1,
    )
    # Large updates in proportion to their gradients: what is compared is how far they go.
    settings = dataclasses.replace(
        settings, batch_size=IMAGES * rounds, micro_batch=IMAGES, eps=1.0, fake_lr=1e-2,
        generator_lr=1e-2,
    )  # fmt: skip
    backends = dispatch.runs(device)
    return {
        "network": dataclasses.replace(config, num_blocks=1).to_dict(),
        "settings": dataclasses.asdict(settings),
        "device": str(device),
        "kernels": backends,
    }


def attempt(job: dict, limit: int) -> str:
    """Make a trial in a new process; why it failed, or ""."""
    module = "from sid_fast.tools.graph_trial import main; main()"
    command = f"import sys; sys.path[:] = {sys.path!r}; {module}"
    torchrun = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"}
    environment = {k: v for k, v in os.environ.items() if k not in torchrun}
    process = subprocess.Popen(
        [sys.executable, "-c", command], env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        errors = process.communicate(json.dumps(job | {"limit": limit}), timeout=limit)[1]
    except subprocess.TimeoutExpired:
        return f"a trial did not end in {limit} s"
    finally:
        if process.poll() is None:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # one that hangs in the driver
                process.wait(5)
    if process.returncode < 0:
        return f"a trial was ended by {signal.Signals(-process.returncode).name}"
    if process.returncode:
        last = errors.strip().rpartition("\n")[2] or f"exit status {process.returncode}"
        return f"a trial failed: {last[:300]}"
    return ""


def network(config: NetworkConfig, device: torch.device) -> EDMNetwork:
    """Random weights, without the zeros of a fresh network."""
    torch.manual_seed(0)
    with torch.device(device):
        net = EDMNetwork(config)
        for p in net.parameters():
            if p.dim() > 1:
                torch.nn.init.normal_(p, std=0.5 * p[0].numel() ** -0.5)
    return net


def weights(distiller: Distiller) -> torch.Tensor:
    nets = distiller.fake_score, distiller.generator, distiller.ema
    return torch.cat([p.detach().double().flatten() for net in nets for p in net.parameters()])


def run(job: dict) -> None:
    """Replayed steps against eager ones; raises an error if they differ or if a replay waits."""
    device = process_group.pick_device(job["device"])
    dispatch.force(job["kernels"])
    config, settings = NetworkConfig.from_dict(job["network"]), Settings(**job["settings"])
    found = []
    for graph in (False, True):
        distiller = Distiller(network(config, device), settings, cuda_graph=graph)
        start = weights(distiller)
        for step in range(STEPS):
            waits_not = graph and step == STEPS - 1 and device.type == "cuda"
            if waits_not:
                torch.cuda.synchronize(device)
                torch.cuda.set_sync_debug_mode("error")
            distiller.step()
            if waits_not:
                torch.cuda.set_sync_debug_mode("default")
        found.append(weights(distiller))
    eager, replayed = found
    apart = float((replayed - eager).norm() / (eager - start).norm())
    if not apart <= BOUND:  # NaN included
        raise RuntimeError(f"replayed steps are {apart:.1e} from eager ones, relative to their way")


def main() -> None:
    """The process of a trial: its job on stdin, the reason of a failure last on stderr."""
    job = json.load(sys.stdin)
    signal.alarm(job["limit"] + 10)  # whoever started it may be gone
    try:
        run(job)
    except Exception as error:
        traceback.print_exc()
        reason = cuda_graphs.reason_of(error).removesuffix("; use --cuda-graph off")
        print(reason, file=sys.stderr, flush=True)
        os._exit(1)  # the end of a process waits for its device
    os._exit(0)
