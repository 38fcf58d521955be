"""Process groups: joining and leaving a distributed run, and collectives between the hosts.

All functions also work in a single process without torch.distributed.
"""

import contextlib
import datetime
import gc
import os
import re
import signal
import socket
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from sid_fast.errors import RunFailed, UserError
from sid_fast.performance import determinism, failure


class Launch(NamedTuple):
    """This process's place among the processes that torchrun started."""

    rank: int
    local_rank: int  # on this node
    world_size: int
    local_world_size: int  # processes on this node
    restarts: int  # of the whole group


_WITH_TORCHRUN = "unset it for a single process, or start with torchrun, which sets all of them"


def launch() -> Launch:
    """Read torchrun's environment variables; without them, a single process.

    Raises:
        UserError: a variable is empty or not a number, is set without the others, or contradicts
            them.
    """
    limits = {  # name: (default, smallest)
        "RANK": (0, 0),
        "LOCAL_RANK": (0, 0),
        "WORLD_SIZE": (1, 1),
        "LOCAL_WORLD_SIZE": (1, 1),
        "TORCHELASTIC_RESTART_COUNT": (0, 0),
    }
    values = {}
    for name, (default, low) in limits.items():
        text = os.environ.get(name, str(default))
        if not re.fullmatch("[0-9]{1,9}", text) or int(text) < low:
            raise UserError(
                f"{name}={text!r} in the environment is not a whole number from {low}: "
                f"{_WITH_TORCHRUN}"
            )
        values[name] = int(text)
    found = Launch(*values.values())
    if "WORLD_SIZE" not in os.environ:
        for name in ("RANK", "LOCAL_RANK"):
            if name in os.environ:
                raise UserError(f"{name} is set without WORLD_SIZE: {_WITH_TORCHRUN}")
    elif found.world_size > 1:
        for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
            if not os.environ.get(name):
                raise UserError(
                    f"WORLD_SIZE={found.world_size} is set without {name}: {_WITH_TORCHRUN}"
                )
        port = os.environ["MASTER_PORT"]
        if not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 2**16:
            raise UserError(
                f"MASTER_PORT={port!r} in the environment is not a port: use 1 to 65535"
            )
    if found.rank >= found.world_size:
        raise UserError(
            f"RANK={found.rank} is not below WORLD_SIZE={found.world_size}: {_WITH_TORCHRUN}"
        )
    return found


def _rendezvous() -> tuple[dist.Store, int, int]:
    """Meet the other processes: (store, rank, world size); UserError if that fails."""
    try:
        return next(dist.rendezvous("env://"))
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"the processes cannot meet at MASTER_ADDR:MASTER_PORT, {where} ({reason}): start them "
            "with torchrun, on a free port"
        ) from error


def pick_device(name: str = "auto", deterministic: bool = False) -> torch.device:
    """Select a device by name (see named_device); on a GPU, start CUDA.

    Args:
        name: The device.
        deterministic: On a GPU, use algorithms that give the same bits in every run.

    Raises:
        UserError: There is no such device.
    """
    device = named_device(name)
    if device.type == "cuda":
        determinism.configure(deterministic)
        torch.cuda.set_device(device)
    return device


def named_device(name: str = "auto") -> torch.device:
    """Find a device by name (auto, cpu, cuda, cuda:1); auto is the local rank's GPU, or else cpu.

    Raises:
        UserError: There is no such device.
    """
    local = launch().local_rank
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device={name!r} is not a device; use auto, cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device={name!r} is not supported; use auto, cpu or cuda")
    if device.type == "cuda":
        device = torch.device("cuda", local if device.index is None else device.index)
        count = torch.cuda.device_count()
        if not count:
            built = torch.version.cuda or torch.version.hip
            why = "no GPU is visible" if built else "this PyTorch is built for CPUs alone"
            raise UserError(f"device={name} cannot be used: {why}; give --device cpu, or auto")
        if device.index >= count:
            raise UserError(
                f"device={device} does not exist: {count} GPU{'s are' if count > 1 else ' is'} "
                "visible; use fewer processes, or cpu"
            )
    return device


DEFAULT_TIMEOUT_MINUTES = 10.0  # of a collective between the hosts; see --timeout
LONG_TIMEOUT = datetime.timedelta(days=7)  # for tasks of unknown length: downloads, snapshots
CHECKPOINT_TIMEOUT = datetime.timedelta(hours=1)  # for one checkpoint


class _Group(NamedTuple):
    """Gloo groups for communication between hosts, each with its own timeout and connections."""

    store: dist.Store
    minutes: float
    control: dist.ProcessGroup  # small messages in every step
    long_wait: dist.ProcessGroup  # barriers for work of unknown length on rank 0
    checkpoint: dist.ProcessGroup  # used by the thread that writes checkpoints


_group: _Group | None = None


@contextlib.contextmanager
def joined(
    device: torch.device,
    mode: str = "auto",
    minutes: float = DEFAULT_TIMEOUT_MINUTES,
    purpose: str = "run",
) -> Iterator[None]:
    """Join the process group of torchrun for the length of the block.

    A single process joins none, or a group of one if the mode asks for sharding.

    Args:
        device: This process's device.
        mode: --parallel.
        minutes: Timeout of a collective.
        purpose: Names the group, where a process joins several one after the other.

    Raises:
        RunFailed: A process was lost, or did not answer in time; names it.
    """
    global _group
    alone = launch().world_size == 1
    if alone and mode in ("auto", "ddp"):
        yield
        return
    store, me, count = (dist.HashStore(), 0, 1) if alone else _rendezvous()
    # After a restart torchrun may reuse the store, which still holds the old addresses.
    store = dist.PrefixStore(purpose, dist.PrefixStore(str(launch().restarts), store))
    timeout = datetime.timedelta(minutes=minutes)
    device_id = device if device.type == "cuda" else None
    # Registering a graph's buffers syncs the ranks during the capture, and fails with expandable
    # segments.
    os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
    dist.init_process_group(
        "nccl" if device_id else "gloo",
        store=dist.PrefixStore("processes", store),
        rank=me,
        world_size=count,
        # Doubled so that the hosts' groups time out first, and name the lost rank.
        timeout=2 * timeout if device_id else timeout,
        device_id=device_id,
    )
    groups = (
        dist.new_group(backend="gloo", timeout=t)
        for t in (timeout, LONG_TIMEOUT, CHECKPOINT_TIMEOUT)
    )
    _group = _Group(dist.PrefixStore("sid_fast", store), minutes, *groups)
    _group.store.set(f"host/{me}", socket.gethostname())
    orderly = False
    try:
        yield
        orderly = True
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo/" not in str(error):
            raise
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's; it sends SIGKILL later
        lost = "onnection" in str(error)
        what = "was lost" if lost else f"did not respond for {minutes:g} minutes"
        reason = str(error).partition("\n")[0]
        # Pending collectives keep connections open, and so do the frames that hold them.
        failure.drop_pending_works()
        chained: BaseException | None = error
        while chained:
            traceback.clear_frames(chained.__traceback__)
            chained = chained.__context__
        gc.collect()
        store = _group.store
        missing = failure.missing_ranks(store, me, count, lambda: _leave(device, orderly=False))
        raise RunFailed(
            f"{f'{missing} {what}' if missing else f'processes lost their connection: {reason}'}. "
            "Resume from the last state with --resume; torchrun --max-restarts N does so by itself"
        ) from error
    finally:
        if _group is not None:
            _leave(device, orderly)


def _leave(device: torch.device, orderly: bool) -> None:
    """Leave the process group; closed connections tell the other ranks at once.

    After an error, the NCCL connections stay open: closing them would wait for collectives that
    other ranks never complete.
    """
    global _group
    failure.unclean_exit = not orderly and world_size() > 1
    if not failure.unclean_exit or device.type == "cpu":
        for graph in failure.captured_graphs:
            graph.reset()  # before the connections that its collectives use are closed
        dist.destroy_process_group()
    elif _group is not None:
        for group in (_group.control, _group.long_wait, _group.checkpoint):
            dist.destroy_process_group(group)
    _group = None


def rank() -> int:
    """Return this process's rank."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def checkpoint_group() -> dist.ProcessGroup | None:
    """Return the group that reads and writes checkpoints; None in a single process."""
    return _group and _group.checkpoint


def barrier() -> None:
    """Wait for all ranks, long enough for downloads and evaluations on rank 0 alone."""
    if _group is not None:
        dist.barrier(group=_group.long_wait)


def broadcast_from_rank0(make: Callable[[], int]) -> int:
    """Call make() on rank 0 and return its result on every rank."""
    if _group is None:
        return make()
    value = torch.tensor(make() if rank() == 0 else 0)
    dist.broadcast(value, src=0, group=_group.control)
    return int(value)


@contextlib.contextmanager
def main_process_first() -> Iterator[None]:
    """Let the first process of each node run the block before the node's others."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    if local:
        barrier()
    try:
        yield
    finally:
        if not local:
            barrier()


def gather(mine: torch.Tensor, total: int) -> torch.Tensor:
    """Gather rows [total, …] on every rank; rank r of w holds rows r, r + w, … of them."""
    if _group is None:
        return mine
    padded = mine.new_zeros(-(-total // world_size()), *mine.shape[1:])
    padded[: len(mine)] = mine
    shards = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(shards, padded, group=_group.control)
    return torch.stack(shards, dim=1).flatten(0, 1)[:total]


def all_reduce_any(flag: bool) -> bool:
    """Return whether the flag is set on any rank, without involving the devices."""
    if _group is None:
        return flag
    count = torch.tensor(int(flag))
    dist.all_reduce(count, group=_group.control)
    return bool(count)


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over the ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def gather_objects(mine: Any) -> list[Any]:
    """Gather an object of every rank, in their order, on all of them; a rank may take long."""
    if _group is None:
        return [mine]
    barrier()
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, mine, group=_group.control)
    return found


def first_text(text: str) -> str:
    """Return, on all ranks, the first non-empty text by rank, prefixed with that rank."""
    if _group is None:
        return text
    texts: list[str] = [""] * world_size()
    dist.all_gather_object(texts, text, group=_group.control)
    return next((f"process {r}: {each}" for r, each in enumerate(texts) if each), "")


def host_throttle(device: torch.device) -> failure.HostThrottle:
    """Return the throttle that keeps this host within a step of its device (several GPUs only)."""
    alone = world_size() == 1 or device.type != "cuda"
    return failure.HostThrottle(
        None if alone else device, _group.minutes if _group else DEFAULT_TIMEOUT_MINUTES
    )
