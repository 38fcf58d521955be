"""A candidate on trial: what runs in a child of tools.isolation."""

import ctypes
import gc
import resource
import sys
from functools import partial
from typing import NamedTuple

import torch

from sid_fast.performance import cuda_graphs, determinism
from sid_fast.tools import proof, timing
from sid_fast.tools.candidates import Candidate
from sid_fast.tools.proof import Job

TURN = 0.25  # seconds, at least a step


class Turn(NamedTuple):
    """steps taken, and ms of one; ms of the reference kernel; bytes at the peak and now in use."""

    steps: int
    ms: float
    reference_ms: float
    peak: int
    in_use: int


class Trial:
    """Proves a candidate's step and takes turns at timing it."""

    def __init__(self, job: Job, candidate: Candidate):
        self.job, self.candidate = job, candidate
        self.device = torch.device(job.device)
        if self.device.type == "cuda":
            determinism.configure(job.deterministic)
            torch.cuda.set_device(self.device)

    def wrong(self) -> str:
        """See proof.wrong."""
        return proof.wrong(self.job, self.candidate)

    def wrong_alone(self) -> str:
        """See proof.wrong_alone."""
        return proof.wrong_alone(self.job, self.candidate)

    def replays_wrong(self) -> str:
        """See proof.replays_agree."""
        return proof.replays_agree(self.job, self.candidate)

    def prepare(self) -> int:
        """Warm up for turns; the images of a timed step: at most a few micro-batches."""
        gc.collect()
        micro = self.candidate.micro_batch or self.job.settings.micro_batch or self.job.share
        rounds = min(self.job.share // micro, cuda_graphs.MAX_SINGLE_GRAPH_MICRO_BATCHES + 1)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        changes = {"batch_size": micro * rounds, "micro_batch": micro}
        self.trainer = proof.build(self.job, self.candidate, **changes)
        self.reference = reference_kernel(self.device)
        for _ in range(2):
            self.trainer.step()
        ms = timing.time_call(self.trainer.step, self.device)[0]
        self.steps = max(1, round(TURN * 1e3 / ms))
        self.reference()
        return micro * rounds

    def turn(self) -> Turn:
        """Time the reference kernel and some steps."""
        reference_ms = timing.time_call(self.reference, self.device)[0]
        ms = timing.time_call(self._steps, self.device)[0] / self.steps
        gc.collect()
        return Turn(self.steps, ms, reference_ms, *memory(self.device))

    def _steps(self) -> None:
        for _ in range(self.steps):
            self.trainer.step()


def reference_kernel(device: torch.device) -> partial:
    """Return a matrix product of a few milliseconds, timed once per turn.

    A machine that slows down slows it too, so dividing by its time makes turns comparable.
    """
    n, dtype = (8192, torch.float16) if device.type == "cuda" else (512, torch.float32)
    a = torch.randn(n, n, device=device, dtype=dtype)
    return partial(torch.mm, a, a)


def memory(device: torch.device) -> tuple[int, int]:
    """Return peak and current memory in bytes, of the GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024), allocated()


def allocated() -> int:
    """Bytes that this process has from glibc's malloc; 0 where there is another."""
    try:
        information = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError):
        return 0
    information.restype = _Mallinfo
    found = information()
    return found.uordblks + found.hblkhd


class _Mallinfo(ctypes.Structure):
    _fields_ = (
        *((f"_{i}", ctypes.c_size_t) for i in range(4)),
        ("hblkhd", ctypes.c_size_t),  # in regions of their own
        *((f"_{i}", ctypes.c_size_t) for i in range(5, 7)),
        ("uordblks", ctypes.c_size_t),
        *((f"_{i}", ctypes.c_size_t) for i in range(8, 10)),
    )
