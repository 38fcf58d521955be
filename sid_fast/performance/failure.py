"""Lost ranks: detect them, name them, and exit without waiting for them."""

import datetime
import time
import weakref
from collections.abc import Callable

import torch
import torch.distributed as dist

PEER_REPLY_SECONDS = 5.0  # how long the remaining ranks have to answer after one is lost

captured_graphs: weakref.WeakSet = weakref.WeakSet()  # CUDA graphs, which may hold collectives
grad_syncs: weakref.WeakSet = weakref.WeakSet()  # objects whose `works` are pending collectives
unclean_exit = False  # other ranks may hang in a collective: this process must not wait for them


def drop_pending_works() -> None:
    """Forget pending collectives: those of a failed capture never run, a lost rank's never end."""
    for grad_sync in grad_syncs:
        grad_sync.works.clear()


def missing_ranks(store: dist.Store, rank: int, count: int, leave: Callable[[], None]) -> str:
    """Name the ranks that do not answer, after a collective has failed.

    leave() closes this rank's connections, so that the others fail at once too.
    """
    missing, deadline = [], time.monotonic() + PEER_REPLY_SECONDS
    try:
        store.set(f"here/{rank}", "")
        leave()
        for other in range(count):
            left = datetime.timedelta(seconds=max(deadline - time.monotonic(), 0.1))
            try:
                store.wait([f"here/{other}"], left)
            except RuntimeError:
                missing.append(f"process {other} on {store.get(f'host/{other}').decode()}")
    except RuntimeError:  # the host of the store is lost too
        missing = missing or ["the first node"]
    return ", ".join(missing)


class HostThrottle:
    """Keeps the host at most one step ahead of its device, so that it notices a lost rank.

    NCCL waits forever for a dead peer, and a blocking read would hang the host too. Therefore the
    hosts exchange a flag every step, with a timeout, before each waits for its device.

    Args:
        device: The device to wait for, or None to never wait.
        minutes: Timeout of a step.
    """

    def __init__(self, device: torch.device | None, minutes: float):
        self.device, self.minutes = device, minutes
        self.last: torch.cuda.Event | None = None

    def step(self) -> None:
        """Call after launching a step; returns when the previous step has finished."""
        if self.device:
            before, self.last = self.last, torch.cuda.Event()
            self.last.record()
            self._wait(before)

    def catch_up(self) -> None:
        """Wait until the last step has finished."""
        self._wait(self.last)

    def _wait(self, event: "torch.cuda.Event | None") -> None:
        deadline = time.monotonic() + 60 * self.minutes
        while event and not event.query():
            if time.monotonic() > deadline:
                raise dist.DistError(f"{self.device} is still waiting for the other processes")
            time.sleep(5e-4)
