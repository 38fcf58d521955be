"""The trial of CUDA graphs: what passes it, and that no end of its process harms the run."""

import sys
import time

import pytest
import torch

from sid_fast import Settings
from sid_fast.tools import graph_trial
from sid_fast.training import step
from sid_fast.training.random_streams import counter_of
from tests.helpers import recorder
from tests.helpers.networks import FAST, small_teacher

CPU = torch.device("cpu")


def job(**settings):
    return graph_trial.probe_spec(small_teacher().config, Settings(**FAST | settings), CPU)


@pytest.fixture
def stand_in(monkeypatch):
    recorder.stand_in(monkeypatch.setattr)


@pytest.mark.parametrize("micro_batch", [None, 1])
def test_graphs_that_make_the_eager_steps_pass(stand_in, micro_batch):
    made = job(batch_size=8, micro_batch=micro_batch, dropout=0.2, precision="bf16")
    assert made["settings"]["batch_size"] == graph_trial.MICRO_BATCH * (
        1 if micro_batch is None else 5
    )
    graph_trial.run(made)


def test_graphs_that_repeat_their_random_numbers_do_not(stand_in, monkeypatch):
    replay, counters = recorder.Recorded.__call__, []

    def watched(seed, device):
        counters.append(counter_of(seed, device))
        return counters[-1]

    def repeats(self):
        for counter in counters:
            counter[1] = 0  # the step
        return replay(self)

    monkeypatch.setattr(step, "counter_of", watched)
    monkeypatch.setattr(recorder.Recorded, "__call__", repeats)
    with pytest.raises(RuntimeError, match="replayed and eager steps differ"):
        graph_trial.run(job(dropout=0.2))


def test_a_trial_says_why_it_failed():
    """In a process of its own, which here lacks a GPU."""
    reason = graph_trial.run_probe(job(), graph_trial.LIMIT)
    assert reason.startswith("the test on a small network failed: ")
    assert "\n" not in reason


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        ("os.abort()", "the test on a small network was killed by SIGABRT"),
        ("time.sleep(60)", "the test on a small network took longer than 1 s"),
        ("sys.exit('no\\nsuch thing')", "the test on a small network failed: such thing"),
        ("os._exit(3)", "the test on a small network failed: exit status 3"),
        ("assert 'RANK' not in os.environ and sys.stdin.read()", ""),
    ],
)
def test_a_trial_may_end_as_it_likes(tmp_path, monkeypatch, end, reason):
    python = tmp_path / "python"  # in the place of the interpreter: whatever it is told to run
    python.write_text(f"#!{sys.executable}\nimport os, sys, time\n{end}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setenv("RANK", "1")
    began = time.monotonic()
    assert graph_trial.run_probe({}, 1 if "sleep" in end else 60) == reason
    assert time.monotonic() - began < 30


def test_the_first_process_of_a_node_makes_the_trial_for_all(monkeypatch):
    monkeypatch.setattr(graph_trial, "run_probe", lambda *_: "it broke")
    arguments = small_teacher().config, Settings(**FAST), CPU
    assert graph_trial.failure_reason(*arguments) == "it broke"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert graph_trial.failure_reason(*arguments) == ""
    monkeypatch.setattr(graph_trial.process_group, "all_reduce_any", lambda flag: True)
    monkeypatch.setattr(graph_trial.process_group, "first_text", lambda text: "process 0: it broke")
    assert graph_trial.failure_reason(*arguments) == "process 0: it broke"
