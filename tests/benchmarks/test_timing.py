"""Interleaved timing within its limits, and the columns made of it."""

import pytest
import torch

from benchmarks import timing

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """A clock that a call of clock(seconds) moves on, and nothing else."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def move(seconds):
        now[0] += seconds

    return move


def test_calls_are_interleaved(clock):
    order = []

    def call(name, seconds):
        order.append(name)
        clock(seconds)

    calls = {"a": lambda: call("a", 0.25), "b": lambda: call("b", 0.5)}
    times = timing.interleaved(calls, CPU, seconds=1e6, max_rounds=3)
    assert "".join(order) == "ababab"
    assert times == {"a": [(250.0, 250.0)] * 3, "b": [(500.0, 500.0)] * 3}


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 2), (4.5, 5), (100.0, 7)])
def test_rounds_end_after_the_seconds(clock, seconds, rounds):
    """But not before min_rounds, nor later than max_rounds."""
    times = timing.interleaved({"a": lambda: clock(1.0)}, CPU, seconds, max_rounds=7, min_rounds=2)
    assert len(times["a"]) == rounds


def test_the_first_call_is_not_among_the_times(clock):
    calls = []

    def call():
        clock(0.5 if calls else 9.0)
        calls.append(call)

    timer = timing.ColdCacheTimer(lambda: call, CPU)
    assert timer.times(3) == [500.0] * 3
    assert len(calls) == 4


def test_rates_divide_the_work_by_the_shortest_time(monkeypatch):
    """The products and the copy take 1, 2 and 4 ms when nothing disturbs them."""
    times = {"bf16": [9.0, 1.0, 9.0], "fp32": [9.0, 9.0, 2.0], "copy": [4.0, 9.0, 9.0]}
    timed = {name: [(ms, 0.0) for ms in many] for name, many in times.items()}
    monkeypatch.setattr(timing, "interleaved", lambda *_, **__: timed)
    rates = timing.peak_rates(CPU)
    assert rates["bf16"] == pytest.approx(2 * 512**3 / 1e-3 / 1e12)
    assert rates["fp32"] == pytest.approx(2 * 512**3 / 2e-3 / 1e12)
    assert rates["copy"] == pytest.approx(2 * 2**26 / 4e-3 / 1e12)


def test_a_failure_is_one_line():
    assert (
        timing.failure_reason(torch.OutOfMemoryError("CUDA out of memory.\nTried"))
        == "out of memory"
    )
    long = timing.failure_reason(ValueError("no kernel\n  for this " + "shape" * 100))
    assert long.startswith("ValueError: no kernel for this shape")
    assert len(long) == 160
