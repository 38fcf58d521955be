"""CUDA graphs: what a step launches is recorded once, and then launched as one."""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from sid_fast.draws import PHASES
from sid_fast.engine import parallel
from sid_fast.errors import UserError

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
        parallel.captured.add(self)
        for generator in generators:
            self.graph.register_generator_state(generator)
        stream = torch.cuda.current_stream()
        try:
            # Threads that load data or talk to other processes would break a capture of all.
            with torch.cuda.graph(
                self.graph,
                pool=pool and pool.graph.pool(),
                capture_error_mode="thread_local",
            ):
                self.result = function()
        finally:
            torch.cuda.set_stream(stream)  # a capture that cannot be ended stays on its own

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


def reason_of(error: BaseException) -> str:
    """Of a failed capture: the first error, which ending the capture may have hidden."""
    while error.__context__ and not error.__suppress_context__:
        error = error.__context__
    return str(error).partition("\n")[0] or type(error).__name__


class Replayed:
    """A function of tensors, captured at its first call and replayed from then on.

    Calls give tensors of the same shapes, or None in the same places; what they return is
    overwritten by the next. With a warning and from the host, if the capture fails.
    """

    def __init__(self, function: Callable[..., torch.Tensor]):
        self.function = function
        self.replay: Callable[[], torch.Tensor] | None = None

    def __call__(self, *inputs: torch.Tensor | None) -> torch.Tensor:
        if self.replay is None:
            self.inputs = [v if v is None else v.clone() for v in inputs]
            self.replay = partial(self.function, *self.inputs)
            try:
                warm_up(self.replay)
                self.replay = Graph(self.replay)
            except RuntimeError as error:
                warnings.warn(
                    f"CUDA graphs are off: the capture failed ({reason_of(error)})", stacklevel=2
                )
        for mine, given in zip(self.inputs, inputs, strict=True):
            if mine is not None:
                mine.copy_(given)
        return self.replay()


class StepGraphs:
    """A Distiller's step, drawing its own random numbers, as one graph if its rounds are few.

    Otherwise, for either phase, a graph of its first round, one of those that follow, and one of
    the last with the update. What processes send one another is in the graphs, too: weights that
    lie in parts are gathered in a first round, and all in parts again when the step ends.
    """

    def __init__(self, distiller: "Distiller"):
        self.distiller = distiller
        self.parts: list[tuple[Callable[[], Any], int]] = []  # in order; how often

    def __call__(self) -> dict[str, torch.Tensor]:
        """What Distiller.run does. Raises UserError on all processes if the capture fails on one.

        PyTorch does not promise memory and random numbers to be in order then.
        """
        if not self.parts:
            self._rehearse()
            reason = ""
            try:
                self.parts = self._captured()
            except Exception as error:
                reason = reason_of(error)
            # Graphs on some processes alone would meet the others' messages in another order.
            if parallel.any_(bool(reason)):
                raise UserError(
                    f"CUDA graphs cannot be: the capture failed ({reason or 'on another process'});"
                    " use --cuda-graph off"
                )
        metrics = {}
        for part, times in self.parts:
            for _ in range(times):
                found = part()
            metrics |= found or {}
        return metrics

    def _rehearse(self) -> None:
        """Two steps that change nothing; the draws begin anew behind them."""
        d = self.distiller
        states = d.rng.get_state(), torch.cuda.get_rng_state(d.device)
        d.live.fill_(False)
        try:
            warm_up(d.run)
        finally:
            d.live.fill_(True)
            d.rng.set_state(states[0])
            torch.cuda.set_rng_state(states[1], d.device)

    def _captured(self) -> list[tuple[Graph, int]]:
        d = self.distiller
        if d.rounds <= FEW:
            return [(Graph(d.run, [d.rng]), 1)]
        parts, graph = [], None
        for phase in PHASES:
            each, last = partial(d.accumulate, phase), partial(self._last, phase)
            for function, times in ((each, 1), (each, d.rounds - 2), (last, 1)):
                graph = Graph(function, [d.rng], graph)
                parts.append((graph, times))
        return parts

    def _last(self, phase: str) -> dict[str, torch.Tensor]:
        self.distiller.accumulate(phase, last=True)
        return self.distiller.update(phase)
