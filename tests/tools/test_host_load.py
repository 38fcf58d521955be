import os

import pytest
import torch

from sid_fast.tools import host_load

CPU = torch.device("cpu")


@pytest.fixture
def load(monkeypatch):
    """load(x): a machine of 4 cores and two threads an operation that has this load."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    return lambda x: monkeypatch.setattr(os, "getloadavg", lambda: (x, 0.0, 0.0))


def test_a_busy_cpu_gets_advice(load):
    load(6.25)
    advice = host_load.advice(CPU)
    assert "load 6.2 on 4 cores" in advice
    assert "OMP_NUM_THREADS=1" in advice


def test_an_idle_cpu_and_a_gpu_get_none(load):
    load(2.0)
    assert not host_load.advice(CPU)
    load(6.0)
    assert not host_load.advice(torch.device("cuda"))


def test_a_number_of_threads_that_was_chosen_stays(load, monkeypatch):
    load(6.0)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert not host_load.advice(CPU)
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert not host_load.advice(CPU)
