"""Trials in children: what passes them, and that no end of a child harms the run."""

import os
import time
import weakref

import pytest
import torch

from sid_fast import Settings, SiDASettings
from sid_fast.config.types import PretrainSettings
from sid_fast.tools import graph_trial, proof
from sid_fast.tools.candidates import Candidate
from sid_fast.tools.isolation import Child, Failed
from sid_fast.training import step
from sid_fast.training.random_streams import counter_of
from tests.helpers import recorder
from tests.helpers.networks import FAST, TINY, small_teacher
from tests.helpers.processes import python

CPU = torch.device("cpu")


def made(**settings):
    return graph_trial.job(small_teacher().config, Settings(**FAST | settings), CPU)


@pytest.fixture
def stand_in(monkeypatch):
    recorder.stand_in(monkeypatch.setattr)


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch", [None, 1])
def test_graphs_that_make_the_eager_steps_pass(stand_in, micro_batch):
    settings = Settings(**FAST | dict(batch_size=8), micro_batch=micro_batch, dropout=0.2,
        precision="bf16")  # fmt: skip
    job = graph_trial.job(TINY, settings, CPU)
    assert proof.replays_agree(*job) == ""


def test_steps_of_sida_are_tried_past_their_warmup(stand_in, monkeypatch):
    """With both phases, random images and a group that the trial's few images hold."""
    settings = SiDASettings(**FAST | dict(batch_size=64))
    job = graph_trial.job(small_teacher().config, settings, CPU)
    trainers, build = [], proof.build
    monkeypatch.setattr(
        proof, "build", lambda *a, **k: trainers.append(build(*a, **k)) or trainers[-1]
    )
    assert proof.replays_agree(*job) == ""
    assert all(len(t.phases) == 2 and t.method.feed for t in trainers)


def test_a_trial_holds_one_trainer_at_a_time(stand_in, monkeypatch):
    """A network of hundreds of millions of weights has to fit beside the run's teacher."""
    build, trainers = proof.build, []

    def watched(*job, **changes):
        assert not any(trainer() for trainer in trainers)
        built = build(*job, **changes)
        trainers.append(weakref.ref(built))
        return built

    monkeypatch.setattr(proof, "build", watched)
    assert proof.replays_agree(*made()) == ""
    assert len(trainers) == 2


def test_steps_of_a_teachers_training_replay(stand_in):
    settings = PretrainSettings(batch_size=8, micro_batch=4, dropout=0.2, augment_p=0.3)
    job = graph_trial.job(small_teacher().config, settings, CPU)
    assert proof.replays_agree(*job) == ""


def test_auto_takes_the_tuned_choice_and_tries_graphs_otherwise(monkeypatch):
    monkeypatch.setattr(graph_trial, "resolve_cuda_graph", lambda mode, *_: (mode != "off", ""))
    monkeypatch.setattr(graph_trial, "failure_reason", lambda *_: "it broke")

    def choose(mode, candidate=None):
        return graph_trial.choose(
            mode, candidate, small_teacher().config, Settings(**FAST), CPU, False, False
        )

    assert choose("auto", Candidate({}, cuda_graph=True)) == ("auto", "auto", "")
    assert choose("auto", Candidate({})) == ("off", False, "")
    assert choose("auto") == ("off", False, "CUDA graphs are off: it broke")
    assert choose("on", Candidate({})) == ("on", True, "")
    assert choose("off", Candidate({}, cuda_graph=True)) == ("off", False, "")
    monkeypatch.setattr(graph_trial, "failure_reason", lambda *_: "")
    assert choose("auto") == ("auto", "auto", "")


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
    assert "replayed and eager weights" in proof.replays_agree(*made(dropout=0.2))


def test_a_trial_says_why_it_failed():
    """In a child, which here lacks a GPU."""
    reason = graph_trial.attempt(*made())
    assert reason.startswith("a trial failed: ")
    assert "\n" not in reason


class Ending:
    """Does as it is told, in a child."""

    def run(self, code):
        exec(code)
        return "done"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("os.abort()", "ended by SIGABRT"),
        ("import ctypes; ctypes.string_at(0)", "ended by SIGSEGV"),
        ("time.sleep(60)", "did not end in 2 s"),
        ("raise ValueError('no\\nsuch thing')", "no"),
        ("raise torch.OutOfMemoryError('tried to …')", "out of memory"),
        ("import sys; print('a word on stderr', file=sys.stderr); os._exit(3)", "a word on stderr"),
        ("import sys; sys.exit(3)", "exit status 3"),
    ],
)
def test_a_child_may_end_as_it_likes(code, reason):
    began = time.monotonic()
    child = Child(Ending)
    if "sleep" in code:  # its time does not begin before the child has started
        child.call("run", "pass", limit=120)
    with pytest.raises(Failed, match=reason):
        child.call("run", code, limit=2 if "sleep" in code else 120)
    assert time.monotonic() - began < 150
    assert not child.process.is_alive()
    with pytest.raises(Failed):  # and whoever still asks is told
        child.call("run", "pass", limit=1)


def test_children_work_side_by_side_and_alone(monkeypatch):
    """They share neither their modules' values nor torchrun's word on which rank they are."""
    monkeypatch.setenv("RANK", "1")
    with Child(Ending) as one, Child(Ending) as other:
        for child in (one, other):
            child.ask("run", "assert 'RANK' not in os.environ; os.environ['HOME'] = ''", limit=120)
        assert one.answer() == other.answer() == "done"
        assert one.call("run", "assert not os.environ['HOME']", limit=60) == "done"
    assert os.environ["HOME"]


def test_the_server_of_children_asks_for_no_gpu():
    """Forked children could not open one after that."""
    done = python(
        "-c",
        "import torch\n"
        "def refused(*_): raise SystemExit('asked')\n"
        "torch._C._cuda_getDeviceCount = torch.cuda.device_count = refused\n"
        "torch.cuda.is_available = refused\n"
        "import sid_fast.tools.trial",
    )
    assert done.returncode == 0, done.stderr


def test_the_first_process_of_a_node_makes_the_trial_for_all(monkeypatch):
    monkeypatch.setattr(graph_trial, "attempt", lambda *_: "it broke")
    arguments = small_teacher().config, Settings(**FAST), CPU
    assert graph_trial.failure_reason(*arguments) == "it broke"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert graph_trial.failure_reason(*arguments) == ""
    monkeypatch.setattr(graph_trial.process_group, "all_reduce_any", lambda flag: True)
    monkeypatch.setattr(graph_trial.process_group, "first_text", lambda text: "process 0: it broke")
    assert graph_trial.failure_reason(*arguments) == "process 0: it broke"


@pytest.mark.parametrize(
    "reason",
    [
        "out of memory",
        "CUDA error: CUDA-capable device(s) is/are busy or unavailable",  # exclusive compute mode
    ],
)
def test_a_trial_without_room_is_no_verdict(reason, monkeypatch):
    """The run holds the GPU or its memory: then it tries graphs itself."""
    monkeypatch.setattr(graph_trial, "attempt", lambda *_: f"a trial failed: {reason}")
    assert graph_trial.failure_reason(small_teacher().config, Settings(**FAST), CPU) == ""
