"""How steps and kernels are timed: by events on a GPU, warm."""

import time
from collections.abc import Callable, Sequence

import torch


def synchronize(device: torch.device) -> None:
    """Wait for the device; returns at once on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_call(function: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Time one call; returns (device ms, ms until the call returns to the host)."""
    synchronize(device)
    if device.type != "cuda":
        start = time.perf_counter()
        function()
        elapsed = (time.perf_counter() - start) * 1e3
        return elapsed, elapsed
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    start = time.perf_counter()
    function()
    host = (time.perf_counter() - start) * 1e3
    end.record()
    synchronize(device)
    return begin.elapsed_time(end), host


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """The 20th percentile, the median and the 80th percentile."""
    parts = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    low, middle, high = torch.tensor(values, dtype=torch.float64).quantile(parts).tolist()
    return low, middle, high
