"""How things are timed: by events on a GPU, in turns, after a warm-up, on random data."""

import time
from collections.abc import Callable, Mapping

import torch

L2_FLUSH = 2**28  # bytes written between two launches, several times any second-level cache


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def once(function: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Milliseconds that a call takes on the device, and until it returns to the host."""
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


def in_turns(
    functions: Mapping[str, Callable[[], object]],
    device: torch.device,
    seconds: float,
    most: int = 30,
    least: int = 3,
) -> dict[str, list[tuple[float, float]]]:
    """`once` of every function, one after the other, for about so many seconds altogether.

    Each is called at least `least` and at most `most` times, so that what drifts (clocks, other
    work on the machine) meets all of them alike.
    """
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    end = time.perf_counter() + seconds
    for turn in range(most):
        if turn >= least and time.perf_counter() > end:
            break
        for name, function in functions.items():
            found[name].append(once(function, device))
    return found


class Cold:
    """A function of few launches as a CUDA graph, called with nothing of its data in the cache.

    Calling it flushes and replays; on a CPU it just calls. What it times is then the device's
    work, not the host's launches. make() returns the function, on the stream of the capture:
    autograd's backward runs where its forward ran.
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
        """So many times of the function, ms."""
        if self.device.type != "cuda":
            return [once(self.function, self.device)[0] for _ in range(repeats)]
        cache = torch.empty(L2_FLUSH, dtype=torch.uint8, device=self.device)
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


def ceilings(device: torch.device) -> dict[str, float]:
    """The device at its best: "bf16" and "fp32" products, TFLOP/s, and "copy", TB/s both ways.

    The fastest of the turns, of products of some milliseconds: beside other programs a short one
    on all cores mostly waits for the core that it shares.
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
    times = in_turns(functions, device, seconds=2, most=20)
    work = {"bf16": 2 * n**3, "fp32": 2 * n**3, "copy": 2 * source.numel()}
    return {name: work[name] / min(ms for ms, _ in times[name]) / 1e9 for name in functions}


def median(values: list[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(0.5))


def reason(error: Exception) -> str:
    """Why something has no figures, in a line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:160]
