"""The trial of CUDA graphs: what passes it, and that no end of its process harms the run."""

import sys
import time

import pytest
import recorder
import torch
from test_distiller import FAST, small_teacher

from sid_fast import Settings
from sid_fast.engine import trial

CPU = torch.device("cpu")


def job(**settings):
    return trial.job(small_teacher().config, Settings(**FAST | settings), CPU)


@pytest.fixture
def stand_in(monkeypatch):
    recorder.stand_in(monkeypatch.setattr)


@pytest.mark.parametrize("micro_batch", [None, 1])
def test_graphs_that_make_the_eager_steps_pass(stand_in, micro_batch):
    made = job(batch_size=8, micro_batch=micro_batch, dropout=0.2, precision="bf16")
    assert made["settings"]["batch_size"] == trial.IMAGES * (1 if micro_batch is None else 5)
    trial.run(made)


def test_graphs_that_repeat_their_random_numbers_do_not(stand_in, monkeypatch):
    replay = recorder.Recorded.__call__

    def repeats(self):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return replay(self)

    monkeypatch.setattr(recorder.Recorded, "__call__", repeats)
    with pytest.raises(RuntimeError, match="from eager ones"):
        trial.run(job(dropout=0.2))


def test_a_trial_says_why_it_failed():
    """In a process of its own, which here lacks a GPU."""
    reason = trial.attempt(job(), trial.LIMIT)
    assert reason.startswith("a trial failed: ") and "\n" not in reason


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        ("os.abort()", "a trial was ended by SIGABRT"),
        ("time.sleep(60)", "a trial did not end in 1 s"),
        ("sys.exit('no\\nsuch thing')", "a trial failed: such thing"),
        ("os._exit(3)", "a trial failed: exit status 3"),
        ("assert 'RANK' not in os.environ and sys.stdin.read()", ""),
    ],
)
def test_a_trial_may_end_as_it_likes(tmp_path, monkeypatch, end, reason):
    (tmp_path / "sid_fast" / "engine").mkdir(parents=True)
    for folder in ("sid_fast", "sid_fast/engine"):
        (tmp_path / folder / "__init__.py").touch()
    text = f"import os, sys, time\ndef main():\n    {end}\n"
    (tmp_path / "sid_fast" / "engine" / "trial.py").write_text(text)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setenv("RANK", "1")
    began = time.monotonic()
    assert trial.attempt({}, 1 if "sleep" in end else 60) == reason
    assert time.monotonic() - began < 30


def test_the_first_process_of_a_node_makes_the_trial_for_all(monkeypatch):
    monkeypatch.setattr(trial, "attempt", lambda *_: "it broke")
    arguments = small_teacher().config, Settings(**FAST), CPU
    assert trial.refused(*arguments) == "it broke"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert trial.refused(*arguments) == ""
    monkeypatch.setattr(trial.parallel, "any_", lambda flag: True)
    monkeypatch.setattr(trial.parallel, "first_text", lambda text: "process 0: it broke")
    assert trial.refused(*arguments) == "process 0: it broke"
