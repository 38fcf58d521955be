"""CUDA graphs: what a step launches is recorded once, and then launched as one."""

import contextlib
import gc
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from sid_fast.errors import Fallback, OutOfMemory, RunFailed, UserError
from sid_fast.performance import failure, process_group

MAX_SINGLE_GRAPH_MICRO_BATCHES = 4  # micro-batches up to which a step is one graph


def resolve_cuda_graph(
    choice: str, device: torch.device, sharded: bool = False
) -> tuple[bool, str]:
    """What --cuda-graph comes to, and a line on why not, if it was auto.

    UserError for `on` where there can be none.
    """
    reason = "" if device.type == "cuda" else f"there are none on {device}"
    if choice == "on" and reason:
        raise UserError(f"cuda-graph=on cannot be: {reason}; use auto")
    if choice == "auto" and sharded:
        reason = reason or (
            "with sharded networks they have not run on a GPU yet; --cuda-graph on takes them"
        )
    noted = choice == "auto" and device.type == "cuda" and reason
    return choice != "off" and not reason, f"CUDA graphs are off: {reason}" if noted else ""


class CapturedGraph:
    """A function without arguments, captured; calling it replays what it launched.

    The function reads and writes tensors that keep their addresses, waits for nothing, and has
    run before, so that nothing is tuned or allocated for good during the capture. What it
    returns is overwritten by the next replay. pool: another graph, not replayed at the same time,
    whose memory this one may share. Processes that part reset it first.
    """

    def __init__(
        self,
        function: Callable[[], Any],
        pool: "CapturedGraph | None" = None,
    ):
        self.graph = torch.cuda.CUDAGraph()
        # Named here: a graph whose capture failed does not tell its own.
        self.pool: Any = pool.pool if pool else torch.cuda.graph_pool_handle()
        failure.captured_graphs.add(self)
        stream = torch.cuda.current_stream()
        try:
            # Threads that load data or talk to other processes would break a capture of all.
            with torch.cuda.graph(self.graph, pool=self.pool, capture_error_mode="thread_local"):
                self.result = function()
        except BaseException:
            torch.cuda.set_stream(stream)  # a capture that cannot be ended stays on its own
            self._clean_up()
            raise

    def _clean_up(self) -> None:
        """Undo what torch leaves behind when CUDA refuses to end a capture (2.11 to 2.13).

        The allocator still believes that it fills the graph's pool and never frees it, and in 2.11
        the generator refuses every later draw: only a new state makes it usable.
        """
        failure.captured_graphs.discard(self)
        device = torch.cuda.current_device()
        with contextlib.suppress(RuntimeError):  # raised where the capture was ended after all
            torch._C._cuda_endAllocateToPool(device, self.pool)
            torch._C._cuda_releasePool(device, self.pool)
        self.graph.reset()
        generator = torch.cuda.default_generators[device]
        generator.graphsafe_set_state(generator.clone_state())

    def __call__(self) -> Any:
        self.graph.replay()
        return self.result

    def reset(self) -> None:
        """Let go of it; it cannot be replayed any more."""
        self.graph.reset()


def warm_up(function: Callable[[], Any], times: int = 2) -> None:
    """Run on a side stream, as capture demands, so that libraries and kernels settle."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(times):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    # Autograd's nodes from the warm-up would bring its stream into the capture.
    gc.collect()


def first_error(error: BaseException) -> BaseException:
    """Of a failed capture: the error that ending the capture may have hidden."""
    while error.__context__ and not error.__suppress_context__:
        error = error.__context__
    return error


def reason_of(error: BaseException) -> str:
    """Why a capture failed, in a line."""
    error = first_error(error)
    return str(error).partition("\n")[0] or type(error).__name__


def still_works(device: torch.device) -> bool:
    """Whether a device computes and draws random numbers, after a capture failed on it."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
        torch.empty(1, device=device).uniform_()
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


# Why a capture failed in this process. No other one is tried after it.
_failed = ""


class GraphedFunction:
    """A function of tensors, captured at its first call and replayed from then on.

    Calls give tensors of the same shapes, or None in the same places; what they return is
    overwritten by the next. If the capture fails, or an earlier one has failed in this process,
    the function runs eagerly, with a warning. Raises RunFailed if the device does not recover.
    """

    def __init__(self, function: Callable[..., torch.Tensor]):
        self.function = function
        self.replay: Callable[[], torch.Tensor] | None = None

    def __call__(self, *inputs: torch.Tensor | None) -> torch.Tensor:
        if self.replay is None:
            self.inputs = [v if v is None else v.clone() for v in inputs]
            self.replay = eager = partial(self.function, *self.inputs)
            if not _failed:
                self._capture(eager)
        for mine, given in zip(self.inputs, inputs, strict=True):
            if mine is not None and given is not None:
                mine.copy_(given)
        return self.replay()

    def _capture(self, eager: Callable[[], torch.Tensor]) -> None:
        global _failed
        warm_up(eager)
        try:
            self.replay = CapturedGraph(eager)
        except Exception as error:
            _failed = reason_of(error)
            device = next(v.device for v in self.inputs if v is not None)
            if not still_works(device):
                raise RunFailed(
                    f"CUDA graph capture failed ({_failed}), and {device} does not compute any more"
                ) from error
            warnings.warn(Fallback(fallback_message(_failed)), stacklevel=3)


def fallback_message(reason: str) -> str:
    """The line that says that a run goes on without graphs."""
    return f"CUDA graphs are off: the capture failed ({reason}); steps are launched one by one"


class GraphedStep:
    """Callables without arguments, each captured in a graph and replayed from then on.

    parts: the callables of a step, in order, and how often each is called. dry_run() runs what
    they run, in small, so that libraries and kernels settle. updates_disabled(): a context in
    which no update has an effect. clear() resets what parts add to. The collectives of several
    ranks are in the graphs too.

    If the capture fails on any rank, all of them call the parts eagerly from then on, as if there
    had been no capture; if graphs are required, they raise UserError, or OutOfMemory.
    """

    def __init__(
        self,
        parts: Sequence[tuple[Callable[[], Any], int]],
        dry_run: Callable[[], Any],
        updates_disabled: Callable[[], contextlib.AbstractContextManager],
        clear: Callable[[], None],
        device: torch.device,
        required: bool,
    ):
        self.segments, self.dry_run, self.clear = parts, dry_run, clear
        self.updates_disabled, self.device, self.required = updates_disabled, device, required
        self.graphs: list[CapturedGraph] = []
        self.failed = ""  # why

    def __call__(self) -> dict[str, torch.Tensor]:
        """What the parts return, as one dictionary."""
        if not (self.graphs or self.failed):
            self._prepare()
        calls: Sequence[Callable[[], Any]] = self.graphs or [part for part, _ in self.segments]
        metrics: dict[str, torch.Tensor] = {}
        for call, (_, times) in zip(calls, self.segments, strict=True):
            for _ in range(times):
                found = call()
            metrics |= found or {}
        return metrics

    def _prepare(self) -> None:
        """Rehearse and capture; weights, moments and random states are then what they were."""
        global _failed
        reason, works, full = "", True, False
        rng_state = torch.cuda.get_rng_state(self.device)
        with self.updates_disabled():
            warm_up(self.dry_run, times=1)
            try:
                self._capture()
            except Exception as error:
                reason = reason_of(error)
                full = isinstance(first_error(error), torch.OutOfMemoryError)
                works = still_works(self.device)
            # Graphs on some ranks alone would meet the others' collectives in another order.
            if not process_group.all_reduce_any(bool(reason)):
                torch.cuda.set_rng_state(rng_state, self.device)
                return
            self.failed = _failed = process_group.first_text(reason)
            if process_group.all_reduce_any(not works):
                raise UserError(
                    f"CUDA graph capture failed ({self.failed}), and the device does not compute "
                    "any more; use --cuda-graph off"
                )
            torch.cuda.set_rng_state(rng_state, self.device)
            self._discard_captures()
            if self.required and full:
                raise OutOfMemory(f"CUDA graph capture: {reason}")
            if self.required:
                raise UserError(f"CUDA graph capture failed ({self.failed}); use --cuda-graph off")
        if process_group.rank() == 0:
            warnings.warn(Fallback(fallback_message(self.failed)), stacklevel=2)

    def _capture(self) -> None:
        """One graph a part; a part that follows another may share its memory."""
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
        """Let go of what the captures made: graphs, messages on their way, sums."""
        for graph in self.graphs:
            graph.reset()
        self.graphs = []
        failure.drop_pending_works()
        self.clear()
        gc.collect()  # frames of the error, and the memory of the graphs
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
