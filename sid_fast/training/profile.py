"""--profile: a trace of some steps after the warm-up, as a file that browsers show."""

import contextlib
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from sid_fast.errors import WriteFailed
from sid_fast.io import progress
from sid_fast.io.atomic import atomic_path
from sid_fast.performance import ranges

WARM_UP = 5  # steps of a process that are not traced; the first ones compile and allocate
MAX_STEPS = 3
MAX_MICRO_BATCHES = 16  # of all traced steps, unless one step has more
MAX_MB = 128  # of the compressed trace; browsers fail on larger ones
ROWS = 40  # of the table


class StepTrace:
    """Traces steps with torch.profiler and writes them to the folder `profile` of a run.

    Use as a context manager: phases of a step then carry their names, for NVTX too.

    Args:
        folder: The run folder.
        device: Device of the networks.
        micro_batches: Forward and backward passes of a step, which bound the steps traced.
    """

    def __init__(self, folder: Path, device: torch.device, micro_batches: int):
        self.folder, self.device = folder / "profile", device
        self.count = max(min(MAX_STEPS, MAX_MICRO_BATCHES // micro_batches), 1)
        self.calls = 0
        self.steps: list[int] = []
        self.profiler: Any = None

    def __enter__(self) -> "StepTrace":
        ranges.enabled = True
        return self

    def __exit__(self, *exception: object) -> None:
        ranges.enabled = False
        if self.profiler:
            with contextlib.suppress(RuntimeError):
                self.profiler.stop()

    @property
    def pending(self) -> bool:
        """Whether the trace is still to be written."""
        return len(self.steps) < self.count

    def step(self, number: int) -> str:
        """Call after each step, with its number; returns what was written, once, else "".

        Raises:
            WriteFailed: The trace cannot be written.
        """
        self.calls += 1
        if not self.pending or self.calls < WARM_UP:
            return ""
        if self.profiler is None:
            self.profiler = self._start()
            return ""
        if self.calls > WARM_UP + 1:  # one step warms the profiler itself up
            self.steps.append(number)
        if self.pending:
            self.profiler.step()
            return ""
        profiler, self.profiler = self.profiler, None
        with progress.phase("writing the profile"):
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            profiler.stop()
            try:
                return self._write(profiler)
            except OSError as error:
                raise WriteFailed(f"{self.folder} cannot be written: {error.strerror}") from error

    def _start(self) -> Any:
        from torch.profiler import ProfilerActivity, profile, schedule

        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it tells stderr of each start and stop
        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        profiler = profile(
            activities=activities, schedule=schedule(wait=0, warmup=1, active=self.count + 1)
        )
        profiler.start()
        return profiler

    def _write(self, profiler: Any) -> str:
        first, last = self.steps[0], self.steps[-1]
        steps = f"step {first}" if first == last else f"steps {first} to {last}"
        stem = f"steps-{first:09d}-{last:09d}"
        trace, table = self.folder / f"{stem}.json.gz", self.folder / f"{stem}.txt"
        self.folder.mkdir(exist_ok=True)
        order = "self_cuda_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        with atomic_path(table) as temporary:
            sums = profiler.key_averages().table(sort_by=order, row_limit=ROWS)
            temporary.write_text(f"{steps}\n{sums}\n", "utf-8")
        text = f"profile of {steps}: time by operation in {table}"
        # In a folder of its own: only the suffix .gz makes PyTorch compress.
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            written = Path(scratch) / trace.name
            profiler.export_chrome_trace(str(written))
            size = written.stat().st_size / 1e6
            if size > MAX_MB:
                return f"{text}; the trace of {size:.0f} MB is too large and was dropped"
            written.replace(trace)
        return (
            f"{text}; trace in {trace} ({size:.1f} MB), which https://ui.perfetto.dev or "
            "chrome://tracing opens"
        )
