import os

import pytest
import torch

from sid_fast.tools import host_load

CPU = torch.device("cpu")


@pytest.fixture
def others(monkeypatch, tmp_path):
    """others(n, …): a machine of 4 cores on which other programs run n threads at each reading."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(host_load, "LOADAVG", tmp_path / "loadavg")
    left = []

    def read(seconds):
        if left:
            host_load.LOADAVG.write_text(f"9.00 9.00 9.00 {left.pop(0) + 1}/80 657\n")

    def start(*counts):
        left[:] = counts
        read(0)

    monkeypatch.setattr(host_load.time, "sleep", read)
    return start


def test_a_busy_cpu_gets_advice(others):
    others(3)
    advice = host_load.advice(CPU)
    assert "other programs keep 3 of 4 cores busy" in advice
    assert "OMP_NUM_THREADS=1" in advice


@pytest.mark.parametrize("counts", [(0,), (2,), (8, 5, 0, 7), (-1,)])
def test_an_idle_core_for_each_thread_suffices(others, counts):
    """Threads that run for a moment and a load average of the past do not count."""
    others(*counts)
    assert not host_load.advice(CPU)


def test_a_gpu_and_a_machine_that_does_not_tell_get_none(others):
    assert not host_load.advice(CPU), "there is no such file"
    others(6)
    assert not host_load.advice(torch.device("cuda"))


def test_a_number_of_threads_that_was_chosen_stays(others, monkeypatch):
    others(6)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert not host_load.advice(CPU)
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert not host_load.advice(CPU)
