"""Variants take turns, for as long as they are given and no more."""

import pytest
import torch

from benchmarks import measure

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """A clock that a call of clock(seconds) moves on, and nothing else."""
    now = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

    def move(seconds):
        now[0] += seconds

    return move


def test_what_is_timed_takes_turns(clock):
    order = []

    def call(name, seconds):
        order.append(name)
        clock(seconds)

    calls = {"a": lambda: call("a", 0.25), "b": lambda: call("b", 0.5)}
    times = measure.in_turns(calls, CPU, seconds=1e6, most=3)
    assert "".join(order) == "ababab"
    assert times == {"a": [(250.0, 250.0)] * 3, "b": [(500.0, 500.0)] * 3}


@pytest.mark.parametrize(("seconds", "turns"), [(0.0, 2), (4.5, 5), (100.0, 7)])
def test_turns_end_with_their_time(clock, seconds, turns):
    """But not before the least, nor after the most of them."""
    times = measure.in_turns({"a": lambda: clock(1.0)}, CPU, seconds, most=7, least=2)
    assert len(times["a"]) == turns


def test_the_first_call_is_not_among_the_times(clock):
    calls = []

    def call():
        clock(0.5 if calls else 9.0)
        calls.append(call)

    cold = measure.Cold(lambda: call, CPU)
    assert cold.times(3) == [500.0] * 3
    assert len(calls) == 4


def test_rates_are_the_work_over_the_least_time(monkeypatch):
    """Of products and of a copy that take 1, 2 and 4 ms where nothing disturbs them."""
    times = {"bf16": [9.0, 1.0, 9.0], "fp32": [9.0, 9.0, 2.0], "copy": [4.0, 9.0, 9.0]}
    found = {name: [(ms, 0.0) for ms in many] for name, many in times.items()}
    monkeypatch.setattr(measure, "in_turns", lambda *_, **__: found)
    rates = measure.ceilings(CPU)
    assert rates["bf16"] == pytest.approx(2 * 512**3 / 1e-3 / 1e12)
    assert rates["fp32"] == pytest.approx(2 * 512**3 / 2e-3 / 1e12)
    assert rates["copy"] == pytest.approx(2 * 2**26 / 4e-3 / 1e12)


def test_why_there_are_no_figures_is_a_line():
    assert measure.reason(torch.OutOfMemoryError("CUDA out of memory.\nTried")) == "out of memory"
    long = measure.reason(ValueError("no kernel\n  for this " + "shape" * 100))
    assert long.startswith("ValueError: no kernel for this shape")
    assert len(long) == 160
