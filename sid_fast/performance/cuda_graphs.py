"""CUDA graphs: capture a step's kernel launches once, then replay them as one launch."""

import contextlib
import gc
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from sid_fast.errors import Fallback, OutOfMemory, RunFailed, UserError, is_out_of_memory
from sid_fast.io import progress
from sid_fast.performance import failure, process_group, ranges

MAX_SINGLE_GRAPH_MICRO_BATCHES = 4  # steps of more are captured in segments


def resolve_cuda_graph(
    choice: str, device: torch.device, sharded: bool = False
) -> tuple[bool, str]:
    """Decide whether to use CUDA graphs.

    Args:
        choice: --cuda-graph: auto, on or off.
        device: The device of the networks.
        sharded: Whether networks are sharded; auto then chooses off.

    Returns:
        Whether to use them, and a note for the user if auto chooses off on a GPU.

    Raises:
        UserError: `on` without a GPU.
    """
    on_gpu = device.type == "cuda"
    if choice == "on" and not on_gpu:
        raise UserError(f"cuda-graph=on needs a GPU, but the device is {device}; use auto")
    if choice == "auto" and on_gpu and sharded:
        return False, (
            "CUDA graphs are off: untested on a GPU with sharded networks; "
            "--cuda-graph on enables them"
        )
    return choice != "off" and on_gpu, ""


class CapturedGraph:
    """A captured function without arguments; calling it replays its kernels.

    The function must read and write tensors at fixed addresses, never sync with the host, and have
    run before, so that autotuning and persistent allocations are done. Each replay overwrites the
    result of the previous one. Reset the graph before destroying a process group that it uses.

    Args:
        function: What to capture.
        pool: Another graph whose memory this one may share, as they never run at the same time.
    """

    def __init__(
        self,
        function: Callable[[], Any],
        pool: "CapturedGraph | None" = None,
    ):
        self.graph = torch.cuda.CUDAGraph()
        # Created here because a graph whose capture failed does not return its own pool.
        self.pool: Any = pool.pool if pool else torch.cuda.graph_pool_handle()
        failure.captured_graphs.add(self)
        stream = torch.cuda.current_stream()
        try:
            # thread_local: other threads (data, checkpoints) may call CUDA during the capture.
            with torch.cuda.graph(self.graph, pool=self.pool, capture_error_mode="thread_local"):
                self.result = function()
        except BaseException:
            torch.cuda.set_stream(stream)  # a failed capture can leave its own stream current
            self._clean_up()
            raise

    def _clean_up(self) -> None:
        """Reset PyTorch's state after CUDA could not end a capture (PyTorch 2.11 to 2.13).

        The allocator would keep allocating from the graph's pool and never free it. In 2.11 the
        generator would also reject every later draw until it gets a new state.
        """
        failure.captured_graphs.discard(self)
        device = torch.cuda.current_device()
        with contextlib.suppress(RuntimeError):  # raised if the capture did end
            torch._C._cuda_endAllocateToPool(device, self.pool)
            torch._C._cuda_releasePool(device, self.pool)
        self.graph.reset()
        generator = torch.cuda.default_generators[device]
        generator.graphsafe_set_state(generator.clone_state())

    def __call__(self) -> Any:
        """Replay the graph and return the function's result."""
        self.graph.replay()
        return self.result

    def reset(self) -> None:
        """Free the graph; it cannot be replayed afterwards."""
        self.graph.reset()


def current(device: torch.device) -> contextlib.AbstractContextManager:
    """Make a GPU the current one, on which streams and graphs are made; nothing on a CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def warm_up(function: Callable[[], Any], times: int = 2) -> None:
    """Run on a side stream, as capture requires, so that autotuning and lazy init are done."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(times):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    # Autograd nodes left from the warm-up would pull its stream into the capture.
    gc.collect()


def first_error(error: BaseException) -> BaseException:
    """Return the error that started a chain; ending a failed capture raises another over it."""
    while error.__context__ and not error.__suppress_context__:
        error = error.__context__
    return error


def reason_of(error: BaseException) -> str:
    """Describe in one line why a capture failed."""
    error = first_error(error)
    return str(error).partition("\n")[0] or type(error).__name__


def still_works(device: torch.device) -> bool:
    """Check that the device still computes and draws random numbers after a failed capture."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
        torch.empty(1, device=device).uniform_()
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


# Why a capture failed in this process; after that, no other is attempted.
_failed = ""


class GraphedFunction:
    """A function of tensors, captured at its first call and replayed afterwards.

    Every call must pass tensors of the same shapes, and None in the same places, and overwrites the
    previous result. If the capture fails, or one has failed before in this process, the function
    runs eagerly; the first failure warns.

    Raises:
        RunFailed: The device does not recover from a failed capture.
    """

    def __init__(self, function: Callable[..., torch.Tensor]):
        self.function = function
        self.replay: Callable[[], torch.Tensor] | None = None

    def __call__(self, *inputs: torch.Tensor | None) -> torch.Tensor:
        """Copy the inputs to the captured ones and replay; the first call captures."""
        if self.replay is None:
            self.inputs = [v if v is None else v.clone() for v in inputs]
            self.replay = eager = partial(self.function, *self.inputs)
            device = next(v.device for v in self.inputs if v is not None)
            if not _failed:
                with current(device):
                    self._capture(eager, device)
        for static, new in zip(self.inputs, inputs, strict=True):
            if static is not None and new is not None:
                static.copy_(new)
        return self.replay()

    def _capture(self, eager: Callable[[], torch.Tensor], device: torch.device) -> None:
        global _failed
        warm_up(eager)
        try:
            self.replay = CapturedGraph(eager)
        except Exception as error:
            _failed = reason_of(error)
            if not still_works(device):
                raise RunFailed(
                    f"CUDA graph capture failed ({_failed}), and {device} no longer works"
                ) from error
            warnings.warn(Fallback(fallback_message(_failed)), stacklevel=3)


def fallback_message(reason: str) -> str:
    """Tell the user that the run continues without CUDA graphs."""
    return f"CUDA graphs are off: capture failed ({reason}); running eagerly"


class GraphedStep:
    """A step whose segments are captured as CUDA graphs, collectives included, and replayed.

    If the capture fails on any rank, all ranks run the segments eagerly from then on, with the same
    results.

    Args:
        segments: Callables of the step in order, with the number of calls of each.
        dry_run: Runs every segment's kernels once, to finish autotuning and lazy init.
        updates_disabled: Context manager inside which updates have no effect.
        clear: Resets what the segments accumulate.
        device: The device of the networks.
        required: Raise UserError or OutOfMemory instead of falling back to eager steps.
    """

    def __init__(
        self,
        segments: Sequence[tuple[Callable[[], Any], int]],
        dry_run: Callable[[], Any],
        updates_disabled: Callable[[], contextlib.AbstractContextManager],
        clear: Callable[[], None],
        device: torch.device,
        required: bool,
    ):
        self.segments, self.dry_run, self.clear = segments, dry_run, clear
        self.updates_disabled, self.device, self.required = updates_disabled, device, required
        self.graphs: list[CapturedGraph] = []
        self.failed = ""  # the reason, once a capture has failed

    def restart(self, segments: Sequence[tuple[Callable[[], Any], int]]) -> None:
        """Replace the segments; the next call captures them."""
        self.segments = segments
        self._reset()
        self._free_memory()

    def __call__(self) -> dict[str, torch.Tensor]:
        """Run the step, after capturing it at the first call; return the segments' metrics."""
        if not (self.graphs or self.failed):
            with current(self.device):
                self._prepare()
        calls: Sequence[Callable[[], Any]] = self.graphs or [
            segment for segment, _ in self.segments
        ]
        metrics: dict[str, torch.Tensor] = {}
        for i, (call, (_, times)) in enumerate(zip(calls, self.segments, strict=True)):
            for _ in range(times):
                with ranges.named(f"segment {i + 1} of {len(calls)}"):
                    result = call()
            metrics |= result or {}
        return metrics

    def _prepare(self) -> None:
        """Warm up and capture; weights, moments and RNG states are unchanged afterwards."""
        global _failed
        reason, works, out_of_memory = "", True, False
        rng_state = torch.cuda.get_rng_state(self.device)
        with self.updates_disabled(), progress.phase("capturing CUDA graphs"):
            warm_up(self.dry_run, times=1)
            try:
                self._capture()
            except Exception as error:
                reason = reason_of(error)
                out_of_memory = is_out_of_memory(first_error(error))
                works = still_works(self.device)
            # All ranks or none: replays and eager steps order their collectives differently.
            if not process_group.all_reduce_any(bool(reason)):
                torch.cuda.set_rng_state(rng_state, self.device)
                return
            self.failed = _failed = process_group.first_text(reason)
            if process_group.all_reduce_any(not works):
                raise UserError(
                    f"CUDA graph capture failed ({self.failed}), and the device no longer works; "
                    "use --cuda-graph off"
                )
            torch.cuda.set_rng_state(rng_state, self.device)
            self._discard_captures()
            if self.required and out_of_memory:
                raise OutOfMemory(f"CUDA graph capture: {reason}")
            if self.required:
                raise UserError(f"CUDA graph capture failed ({self.failed}); use --cuda-graph off")
        if process_group.rank() == 0:
            warnings.warn(Fallback(fallback_message(self.failed)), stacklevel=2)

    def _capture(self) -> None:
        """Capture one graph per segment; all share one memory pool."""
        try:
            for function, _ in self.segments:
                pool = self.graphs[-1] if self.graphs else None
                self.graphs.append(CapturedGraph(function, pool))
        except BaseException:
            for graph in self.graphs:
                graph.reset()
            self.graphs = []
            raise

    def _discard_captures(self) -> None:
        """Discard what the captures left: graphs, pending collectives, accumulated gradients."""
        self._reset()
        failure.drop_pending_works()
        self.clear()
        self._free_memory()

    def _reset(self) -> None:
        for graph in self.graphs:
            graph.reset()
        self.graphs = []

    def _free_memory(self) -> None:
        gc.collect()  # frees the error's frames, and with them the graphs' memory
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
