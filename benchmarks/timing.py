"""Timing: CUDA events on a GPU, interleaved calls, warm-up, peak rates of the device."""

import time
from collections.abc import Callable, Mapping

import torch

from sid_fast.tools.timing import synchronize as synchronize
from sid_fast.tools.timing import time_call as time_call

FLUSH_BYTES = 2**28  # written between two launches: several times any L2 cache


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    device: torch.device,
    seconds: float,
    max_rounds: int = 30,
    min_rounds: int = 3,
) -> dict[str, list[tuple[float, float]]]:
    """Time every function once per round with `time_call`, for about `seconds` in total.

    Clock changes and other load on the machine then affect all functions alike.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    end = time.perf_counter() + seconds
    for done in range(max_rounds):
        if done >= min_rounds and time.perf_counter() > end:
            break
        for name, function in functions.items():
            times[name].append(time_call(function, device))
    return times


class ColdCacheTimer:
    """Times a function as a CUDA graph, with the L2 cache flushed before every call.

    The times exclude the host's launches. On a CPU the function is called as it is.

    Args:
        make: returns the function; called on the capture's stream, because autograd runs a
            backward pass on the stream of its forward pass.
        device: where the function runs.
    """

    def __init__(self, make: Callable[[], Callable[[], object]], device: torch.device):
        self.device = device
        if device.type != "cuda":
            self.function = make()
            self.function()
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function = make()
            for _ in range(3):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            function()
        self.function = self.graph.replay

    def times(self, repeats: int) -> list[float]:
        """Times of `repeats` calls, ms."""
        if self.device.type != "cuda":
            return [time_call(self.function, self.device)[0] for _ in range(repeats)]
        cache = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=self.device)
        events = []
        for _ in range(repeats):
            cache.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            self.function()
            end.record()
            events.append((begin, end))
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) for begin, end in events]


def peak_rates(device: torch.device) -> dict[str, float]:
    """Measure the device's peak rates.

    Returns "bf16" and "fp32", matrix products in TFLOP/s, and "copy", bytes read and written in
    TB/s. Each is the fastest of up to 20 rounds; a CPU's products take milliseconds, since a
    shorter one on all cores mostly waits for a core that another process uses.
    """
    cuda = device.type == "cuda"
    n = 8192 if cuda else 512
    a, b = (torch.randn(n, n, device=device) for _ in range(2))
    half_a, half_b = a.bfloat16(), b.bfloat16()
    source = torch.randint(256, (2**32 if cuda else 2**26,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    functions = {
        "bf16": lambda: half_a @ half_b,
        "fp32": lambda: a @ b,
        "copy": lambda: target.copy_(source),
    }
    for function in functions.values():
        function()
    times = interleaved(functions, device, seconds=2, max_rounds=20)
    work = {"bf16": 2 * n**3, "fp32": 2 * n**3, "copy": 2 * source.numel()}
    return {name: work[name] / min(ms for ms, _ in times[name]) / 1e9 for name in functions}


def rate_columns(rates: Mapping[str, float]) -> dict[str, float]:
    """Name peak rates as columns of a result file."""
    units = {"bf16": "tflop_s", "fp32": "tflop_s", "copy": "tb_s"}
    return {f"rate_{name}_{units[name]}": rate for name, rate in rates.items()}


def median(values: list[float]) -> float:
    """Return the median, the mean of the middle two of an even number."""
    return float(torch.tensor(values, dtype=torch.float64).quantile(0.5))


def failure_reason(error: Exception) -> str:
    """Describe an error in one line of at most 160 characters."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:160]
