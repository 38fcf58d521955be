"""--profile: a bounded trace with named steps and phases."""

import gzip
import json
import os
import types
from pathlib import Path

import pytest
import torch

from sid_fast.errors import WriteFailed
from sid_fast.models.registry import save_network
from sid_fast.performance import ranges
from sid_fast.training import loop, profile
from sid_fast.training.profile import WARM_UP, StepTrace
from tests.helpers.networks import small_teacher

CPU = torch.device("cpu")


def run_steps(trace, count):
    """Take steps; what the trace says after each that it says something after."""
    said = {}
    for number in range(1, count + 1):
        with ranges.named(f"step {number}"):
            torch.ones(3).mul(2)
        if text := trace.step(number):
            said[number] = text
    return said


def names(path):
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return {event["name"] for event in events}


def test_some_steps_after_the_warm_up_are_traced_by_name(tmp_path):
    with StepTrace(tmp_path, CPU, 1) as trace:
        said = run_steps(trace, 12)
    (last,) = said
    first = WARM_UP + 2
    assert last == first + profile.MAX_STEPS - 1
    (path,) = (tmp_path / "profile").glob("*.json.gz")
    table = next((tmp_path / "profile").glob("*.txt"))
    assert {p.name for p in (tmp_path / "profile").iterdir()} == {path.name, table.name}
    assert str(path) in said[last]
    assert "ui.perfetto.dev" in said[last]
    assert str(table) in said[last]
    assert "aten::mul" in table.read_text()
    assert {n for n in names(path) if n.startswith("step ")} == {"step 7", "step 8", "step 9"}
    assert not ranges.enabled


def test_the_profiler_stops_with_the_run(tmp_path):
    with StepTrace(tmp_path, CPU, 1) as trace:
        run_steps(trace, WARM_UP + 1)
        assert torch.autograd._profiler_enabled()
        assert trace.pending
    assert not torch.autograd._profiler_enabled()
    assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_is_traced_on_a_device(tmp_path, monkeypatch, device):
    """With a stand-in for the profiler: a GPU has finished when it stops."""
    did = []

    class StandIn:
        def __init__(self, activities, schedule):
            did.append({activity.name for activity in activities})

        start = step = lambda self: None

        def stop(self):
            did.append("stop")

        def key_averages(self):
            return self

        def table(self, sort_by, row_limit):
            did.append((sort_by, row_limit))
            return ""

        def export_chrome_trace(self, path):
            Path(path).write_bytes(b"")

    monkeypatch.setattr(torch.profiler, "profile", StandIn)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: did.append("synchronize"))
    monkeypatch.delenv("KINETO_LOG_LEVEL", raising=False)
    trace = StepTrace(tmp_path, torch.device(device), 1)
    assert [number for number in range(1, 20) if trace.step(number)] == [9]
    assert os.environ["KINETO_LOG_LEVEL"] == "99", "kineto is silent"
    if device == "cpu":
        assert did == [{"CPU"}, "stop", ("self_cpu_time_total", profile.ROWS)]
    else:
        table = "self_cuda_time_total", profile.ROWS
        assert did == [{"CPU", "CUDA"}, "synchronize", "stop", table]


def test_a_trace_counts_neither_as_a_step_nor_as_training(monkeypatch):
    now, warned = [1000.0], []
    for clock in ("monotonic", "perf_counter"):
        monkeypatch.setattr(loop.time, clock, lambda: now[0])

    def writes(number):
        now[0] += 9
        raise WriteFailed("the disk is full")

    run = types.SimpleNamespace(
        trace=types.SimpleNamespace(pending=True, step=writes),
        trainer=types.SimpleNamespace(steps=7), throughput=loop.Throughput(),
        limit=loop.TimeLimit(1), shown=loop.Throughput(), _warn=warned.append,
    )  # fmt: skip
    run.limit.stepped()
    loop.Loop._trace_step(run)
    now[0] += 1
    run.limit.stepped()
    run.throughput.steps = run.shown.steps = 1
    assert run.throughput.read() == run.shown.read() == 1
    assert run.limit.step_seconds == 1
    assert list(map(str, warned)) == ["the disk is full"]


def test_steps_of_many_micro_batches_are_fewer(tmp_path):
    assert StepTrace(tmp_path, CPU, 8).count == 2
    assert StepTrace(tmp_path, CPU, 512).count == 1


def test_a_trace_that_is_too_large_is_dropped_and_the_table_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(profile, "MAX_MB", 0)
    with StepTrace(tmp_path, CPU, 16) as trace:
        (said,) = run_steps(trace, 9).values()
    assert "too large and was dropped" in said
    assert [p.suffix for p in (tmp_path / "profile").iterdir()] == [".txt"]


def test_a_trace_that_cannot_be_written_says_where(tmp_path):
    (tmp_path / "profile").write_text("a file")
    with (
        StepTrace(tmp_path, CPU, 16) as trace,
        pytest.raises(WriteFailed, match="profile cannot be written"),
    ):
        run_steps(trace, 9)


def test_ranges_are_nvtx_where_cuda_is(monkeypatch):
    opened = []

    class Range:
        def __init__(self, name):
            opened.append(name)

        __enter__ = __exit__ = lambda *_: None

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "nvtx", types.SimpleNamespace(range=Range))
    with ranges.named("fake forward"):
        pass
    monkeypatch.setattr(ranges, "enabled", True)
    with ranges.named("generator forward"):
        pass
    assert opened == ["generator forward"]


@pytest.mark.slow
@pytest.mark.parametrize(("kimg", "traced"), [(0.028, True), (0.016, False)])
def test_a_run_traces_its_phases(tmp_path, run_command, capsys, monkeypatch, kimg, traced):
    said = []
    monkeypatch.setattr(profile, "MAX_STEPS", 1)
    monkeypatch.setattr("sid_fast.training.loop.Loop._print", lambda self, line: said.append(line))
    save_network(tmp_path / "teacher.safetensors", small_teacher())
    out = tmp_path / "run"
    status, error = run_command(
        "train", "--teacher", tmp_path / "teacher.safetensors", "--out", out, "--batch-size", 4,
        "--micro-batch", 2, "--kimg", kimg, "--profile",
    )  # fmt: skip
    assert status == 0, error
    if not traced:
        assert said[-1].startswith("note: no profile")
        assert not (out / "profile").exists()
        return
    assert any(line.startswith("profile of step 7:") for line in said)
    (path,) = (out / "profile").glob("*.json.gz")
    assert names(path) >= {
        "step 7", "fake forward", "fake backward", "fake update", "generator forward",
        "generator step, micro-batch 2 of 2",
    }  # fmt: skip
    assert "profile" not in json.loads((out / "config.json").read_text())
