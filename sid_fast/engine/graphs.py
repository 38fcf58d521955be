"""CUDA graphs: what a step launches is recorded once, and then launched as one."""

import contextlib
import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from sid_fast.draws import PHASES
from sid_fast.engine import parallel
from sid_fast.errors import Fallback, OutOfMemory, RunFailed, UserError

if TYPE_CHECKING:
    from sid_fast.distiller import Distiller

FEW = 4  # rounds up to which a step is one graph


def usable(
    choice: str, device: torch.device, recompute: bool = False, sharded: bool = False
) -> tuple[bool, str]:
    """What --cuda-graph (auto, on or off) comes to, and a line on why not, if it was auto.

    Raises UserError for an unknown choice, and for `on` where there can be none.
    """
    if choice not in ("auto", "on", "off"):
        raise UserError(f"cuda-graph={choice!r} is unknown: choose auto, on or off")
    reason = ""
    if device.type != "cuda":
        reason = f"there are none on {device}"
    elif recompute:
        reason = "blocks that run again set back the state of random numbers from the host"
    if choice == "on" and reason:
        raise UserError(f"cuda-graph=on cannot be: {reason}; use auto")
    if choice == "auto" and sharded:
        reason = reason or (
            "with networks in parts they have not run on a GPU yet; --cuda-graph on takes them"
        )
    note = (
        f"CUDA graphs are off: {reason}"
        if choice == "auto" and device.type == "cuda" and reason
        else ""
    )
    return choice != "off" and not reason, note


class Graph:
    """A function without arguments, captured; calling it replays what it launched.

    The function reads and writes tensors that keep their addresses, waits for nothing, and has
    run before, so that nothing is tuned or allocated for good during the capture. What it
    returns is overwritten by the next replay. generators are those it draws from, besides the
    device's own; each replay goes on where their state stands. pool: another graph, not replayed
    at the same time, whose memory this one may share. Processes that part reset it first.
    """

    def __init__(
        self,
        function: Callable[[], Any],
        generators: Sequence[torch.Generator] = (),
        pool: "Graph | None" = None,
    ):
        self.graph = torch.cuda.CUDAGraph()
        # Named here: a graph whose capture failed does not tell its own.
        self.pool = pool.pool if pool else torch.cuda.graph_pool_handle()
        parallel.captured.add(self)
        for generator in generators:
            self.graph.register_generator_state(generator)
        stream = torch.cuda.current_stream()
        try:
            # Threads that load data or talk to other processes would break a capture of all.
            with torch.cuda.graph(self.graph, pool=self.pool, capture_error_mode="thread_local"):
                self.result = function()
        except BaseException:
            torch.cuda.set_stream(stream)  # a capture that cannot be ended stays on its own
            self._clean_up(generators)
            raise

    def _clean_up(self, generators: Sequence[torch.Generator]) -> None:
        """Undo what torch leaves behind when CUDA refuses to end a capture (2.11 to 2.13).

        The allocator still believes that it fills the graph's pool and never frees it, and in 2.11
        generators that took part refuse every later draw: only a new state makes them usable.
        """
        parallel.captured.discard(self)
        device = torch.cuda.current_device()
        with contextlib.suppress(RuntimeError):  # raised where the capture was ended after all
            torch._C._cuda_endAllocateToPool(device, self.pool)
            torch._C._cuda_releasePool(device, self.pool)
        self.graph.reset()
        for generator in (torch.cuda.default_generators[device], *generators):
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


def still_works(device: torch.device, *generators: torch.Generator) -> bool:
    """Whether a device computes and draws random numbers, after a capture failed on it."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
        torch.empty(1, device=device).uniform_()
        for generator in generators:
            torch.rand(1, device=device, generator=generator)
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


# Why a capture failed in this process. No other one is tried after it.
_failed = ""


class Replayed:
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
            self.replay = partial(self.function, *self.inputs)
            if not _failed:
                self._capture()
        for mine, given in zip(self.inputs, inputs, strict=True):
            if mine is not None:
                mine.copy_(given)
        return self.replay()

    def _capture(self) -> None:
        global _failed
        warm_up(self.replay)
        try:
            self.replay = Graph(self.replay)
        except Exception as error:
            _failed = reason_of(error)
            device = next(v.device for v in self.inputs if v is not None)
            if not still_works(device):
                raise RunFailed(
                    f"CUDA graph capture failed ({_failed}), and {device} does not compute any more"
                ) from error
            warnings.warn(Fallback(off(_failed)), stacklevel=3)


def off(reason: str) -> str:
    """The line that says that a run goes on without graphs."""
    return f"CUDA graphs are off: the capture failed ({reason}); steps are launched one by one"


class StepGraphs:
    """A Distiller's step, drawing its own random numbers, as one graph if its rounds are few.

    Otherwise, for either phase, a graph of its first round, one of those that follow, and one of
    the last with the update. What processes send one another is in the graphs, too: weights that
    lie in parts are gathered in a first round, and all in parts again when the step ends.

    If the capture fails on any process, all of them run steps eagerly from then on, as if there
    had been no capture; if graphs are required, they raise UserError, or OutOfMemory.
    """

    def __init__(self, distiller: "Distiller", required: bool):
        self.distiller, self.required = distiller, required
        self.parts: list[tuple[Graph, int]] = []  # in order; how often
        self.failed = ""  # why

    def __call__(self) -> dict[str, torch.Tensor]:
        """What Distiller.run does."""
        if not (self.parts or self.failed):
            self._prepare()
        if self.failed:
            return self.distiller.run()
        metrics = {}
        for part, times in self.parts:
            for _ in range(times):
                found = part()
            metrics |= found or {}
        return metrics

    def _prepare(self) -> None:
        """Rehearse and capture. Weights, moments and random states are then what they were."""
        global _failed
        d = self.distiller
        reason, works, full = "", True, False
        with self._changing_nothing():
            # Two rounds of a phase settle everything: its first and its last.
            rounds = min(d.rounds, 2)
            warm_up(partial(d.run, rounds=rounds), times=2 // rounds)
            try:
                self.parts = self._captured()
            except Exception as error:
                reason = reason_of(error)
                full = isinstance(first_error(error), torch.OutOfMemoryError)
                works = still_works(d.device, d.rng)
            # Graphs on some processes alone would meet the others' messages in another order.
            if not parallel.any_(bool(reason)):
                return
            self.failed = _failed = parallel.first_text(reason)
            if parallel.any_(not works):
                raise UserError(
                    f"CUDA graph capture failed ({self.failed}), and the device does not compute "
                    "any more; use --cuda-graph off"
                )
            self._forget()
            if self.required and full:
                raise OutOfMemory(f"CUDA graph capture: {reason}")
            if self.required:
                raise UserError(f"CUDA graph capture failed ({self.failed}); use --cuda-graph off")
        if parallel.rank() == 0:
            warnings.warn(Fallback(off(self.failed)), stacklevel=2)

    @contextlib.contextmanager
    def _changing_nothing(self) -> Iterator[None]:
        """Updates inside the block leave no trace; the draws begin anew behind it."""
        d = self.distiller
        states = d.rng.get_state(), torch.cuda.get_rng_state(d.device)
        d.live.fill_(False)
        try:
            yield
        finally:
            # A device that was lost in a failed capture takes nothing: that is an error already.
            with contextlib.suppress(RuntimeError) if self.failed else contextlib.nullcontext():
                d.live.fill_(True)
                d.rng.set_state(states[0])
                torch.cuda.set_rng_state(states[1], d.device)

    def _forget(self) -> None:
        """Let go of what the captures made: graphs, messages on their way, sums."""
        for graph, _ in self.parts:
            graph.reset()
        self.parts = []
        parallel.forget_messages()
        d = self.distiller
        for optimizer in (d.fake_optimizer, d.generator_optimizer):
            optimizer.totals.zero_()
            optimizer.gradients.zero()
        gc.collect()  # frames of the error, and the memory of the graphs
        if d.device.type == "cuda":
            torch.cuda.empty_cache()

    def _captured(self) -> list[tuple[Graph, int]]:
        d = self.distiller
        if d.rounds <= FEW:
            return [(Graph(d.run, [d.rng]), 1)]
        parts, graph = [], None
        try:
            for phase in PHASES:
                each, last = partial(d.accumulate, phase), partial(self._last, phase)
                for function, times in ((each, 1), (each, d.rounds - 2), (last, 1)):
                    graph = Graph(function, [d.rng], graph)
                    parts.append((graph, times))
        except BaseException:
            for graph, _ in parts:
                graph.reset()
            raise
        return parts

    def _last(self, phase: str) -> dict[str, torch.Tensor]:
        self.distiller.accumulate(phase, last=True)
        return self.distiller.update(phase)
