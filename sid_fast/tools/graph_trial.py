"""--cuda-graph auto: test capture and replay on a small network, in a subprocess.

A failed capture can leave a process with a broken CUDA context, so the run itself does not try.
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

LIMIT = 180  # seconds; most of it compiles Triton kernels, which the run then finds in its cache
STEPS = 3
MICRO_BATCH = 2  # images
# Largest distance of replayed from eager weights, relative to the distance that the steps moved
# them. cuBLAS may choose another algorithm in a graph; repeated random numbers give more than 0.1.
TOLERANCE = 1e-2


def failure_reason(
    config: NetworkConfig, settings: Settings, device: torch.device, limit: int = LIMIT
) -> str:
    """Test CUDA graphs; return why they fail, or "" if they work.

    A collective: every rank must call it. The first rank of each node runs the test, before the
    run's networks take the GPU's memory.

    Args:
        config: of the run's network.
        settings: of the run.
        device: this rank's GPU.
        limit: seconds after which the test counts as failed.
    """
    reason = ""
    with process_group.main_process_first():
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            reason = run_probe(probe_spec(config, settings, device), limit)
    return process_group.first_text(reason) if process_group.all_reduce_any(bool(reason)) else ""


def probe_spec(config: NetworkConfig, settings: Settings, device: torch.device) -> dict:
    """The test as JSON: the run's network with one block per level, its step with few images."""
    micro_batches = min(
        grad_accum_steps(settings, process_group.world_size()),
        cuda_graphs.MAX_SINGLE_GRAPH_MICRO_BATCHES + 1,
    )
    # eps = 1 makes updates proportional to gradients, and large: the test compares the updates.
    settings = dataclasses.replace(
        settings, batch_size=MICRO_BATCH * micro_batches, micro_batch=MICRO_BATCH, eps=1.0,
        fake_lr=1e-2, generator_lr=1e-2,
    )  # fmt: skip
    backends = dispatch.runs(device)
    return {
        "network": dataclasses.replace(config, num_blocks=1).to_dict(),
        "settings": dataclasses.asdict(settings),
        "device": str(device),
        "kernels": backends,
    }


def run_probe(spec: dict, limit: int) -> str:
    """Run the test in a subprocess; return why it failed, or ""."""
    module = "from sid_fast.tools.graph_trial import main; main()"
    command = f"import sys; sys.path[:] = {sys.path!r}; {module}"
    torchrun = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"}
    environment = {k: v for k, v in os.environ.items() if k not in torchrun}
    process = subprocess.Popen(
        [sys.executable, "-c", command], env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        errors = process.communicate(json.dumps(spec | {"limit": limit}), timeout=limit)[1]
    except subprocess.TimeoutExpired:
        return f"the test on a small network took longer than {limit} s"
    finally:
        if process.poll() is None:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # it hangs in the driver
                process.wait(5)
    if process.returncode < 0:
        return (
            f"the test on a small network was killed by {signal.Signals(-process.returncode).name}"
        )
    if process.returncode:
        last = errors.strip().rpartition("\n")[2] or f"exit status {process.returncode}"
        return f"the test on a small network failed: {last[:300]}"
    return ""


def network(config: NetworkConfig, device: torch.device) -> EDMNetwork:
    """Make a network with random weights, without the zero-initialised layers of a new one."""
    torch.manual_seed(0)
    with torch.device(device):
        net = EDMNetwork(config)
        for p in net.parameters():
            if p.dim() > 1:
                torch.nn.init.normal_(p, std=0.5 * p[0].numel() ** -0.5)
    return net


def weights(distiller: Distiller) -> torch.Tensor:
    """Concatenate all weights of fake score, generator and EMA, float64 [N]."""
    nets = distiller.fake_score, distiller.generator, distiller.ema
    return torch.cat([p.detach().double().flatten() for net in nets for p in net.parameters()])


def run(spec: dict) -> None:
    """Compare replayed with eager steps.

    Raises:
        RuntimeError: their weights differ, or a replay synchronises with the host.
    """
    device = process_group.pick_device(spec["device"])
    dispatch.force(spec["kernels"])
    config, settings = NetworkConfig.from_dict(spec["network"]), Settings(**spec["settings"])
    final = []
    for graph in (False, True):
        distiller = Distiller(network(config, device), settings, cuda_graph=graph)
        start = weights(distiller)
        for step in range(STEPS):
            no_sync = graph and step == STEPS - 1 and device.type == "cuda"
            if no_sync:
                torch.cuda.synchronize(device)
                torch.cuda.set_sync_debug_mode("error")
            distiller.step()
            if no_sync:
                torch.cuda.set_sync_debug_mode("default")
        final.append(weights(distiller))
    eager, replayed = final
    error = float((replayed - eager).norm() / (eager - start).norm())
    if not error <= TOLERANCE:  # NaN included
        raise RuntimeError(
            f"weights after replayed and eager steps differ by {error:.1e} of the distance they "
            f"moved (tolerance {TOLERANCE:.0e})"
        )


def main() -> None:
    """Run in the subprocess: read the spec from stdin, write a failure's reason last to stderr."""
    spec = json.load(sys.stdin)
    signal.alarm(spec["limit"] + 10)  # the parent may be gone
    try:
        run(spec)
    except Exception as error:
        traceback.print_exc()
        reason = cuda_graphs.reason_of(error).removesuffix("; use --cuda-graph off")
        print(reason, file=sys.stderr, flush=True)
        os._exit(1)  # a normal exit would wait for the device
    os._exit(0)
