"""The loop: the files of a run, its evaluations, and how it ends."""

import json
import os
import re
import shlex
import signal
import time
import types

import numpy as np
import pytest
import torch
from tqdm import tqdm

from sid_fast import pretrain, train
from sid_fast.data.datasets import write_dataset
from sid_fast.distiller import Distiller
from sid_fast.errors import UserError
from sid_fast.io import progress, streams
from sid_fast.models.registry import load_network, save_network
from sid_fast.training import callbacks, loop
from sid_fast.training.checkpoint import States
from tests.helpers.networks import small_teacher
from tests.helpers.processes import TORCHRUN, python, python_without_stdout, tensors_of

DISTANCE = "Fréchet distance (pixels)"


def test_a_run_that_keeps_failing_stops_with_its_last_good_state(tmp_path, run_command):
    teacher = small_teacher()
    teacher.model.map_layer1.bias.data.fill_(3e38)  # finite, but what it makes is not
    save_network(tmp_path / "teacher.safetensors", teacher)
    out = tmp_path / "run"
    status, error = run_command(
        "train", "--teacher", tmp_path / "teacher.safetensors", "--out", out,
        "--batch-size", 4, "--kimg", 1, "--log-every", 10,
    )  # fmt: skip
    assert status == 1
    assert error.strip().count("\n") == 0
    assert "no finite sample" in error
    assert "state-000000020" in error
    assert (out / "state-000000020").exists()


def test_a_run_leaves_pictures_metrics_and_a_network_that_knows_itself(
    tmp_path, run_command, monkeypatch
):
    grids, close = [], progress._Display.close

    def closed(display, phase, completed):
        if phase.title == "sample grid":
            grids.append((phase.done, phase.total))
        close(display, phase, completed)

    monkeypatch.setattr(progress._Display, "close", closed)
    save_network(tmp_path / "teacher.safetensors", small_teacher())
    out = tmp_path / "run"
    status, _ = run_command(
        "train", "--teacher", tmp_path / "teacher.safetensors", "--out", out, "--data", "digits",
        "--batch-size", 4, "--kimg", 0.012, "--snapshot-every", 0.008, "--log-every", 1,
        "--eval-every", 0.004, "--eval-images", 40, "--detector", "pixels", "--teacher-steps", 2,
    )  # fmt: skip
    assert status == 0
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    figures = [r for r in records if DISTANCE in r]
    assert [r["images"] for r in figures] == [0, 4, 8, 12]
    assert ["teacher" in r for r in figures] == [True, False, False, False]
    assert all("kernel distance (pixels)" in r and r["evaluation_s"] > 0 for r in figures)
    steps = [r for r in records if "fake/loss" in r]
    assert [r["images"] for r in steps] == [4, 8, 12]
    assert steps[0].keys() >= {"generator/loss", "generator/distance", "img_per_s", "it_per_s"}
    assert 0.01 < steps[0]["peak_gib"] <= steps[-1]["peak_gib"] < 1000
    for kind in ("samples-*.png", "snapshot-*.safetensors"):
        assert [int(p.stem.split("-")[1]) for p in sorted(out.glob(kind))] == [0, 8, 12]
    assert grids == [(100, 100)] * 3
    least = min(figures, key=lambda r: r[DISTANCE])["images"]
    assert [p.name for p in out.glob("best-*")] == [f"best-{least:010d}.safetensors"]
    assert (out / "distance.png").stat().st_size > 10_000
    assert any((out / "tensorboard").iterdir())
    config = json.loads((out / "config.json").read_text())
    assert config["batch_size"] == 4
    assert config["alpha"] == 1.2
    assert config["changed"]["batch_size"] == 256  # the default
    assert "alpha" not in config["changed"]
    assert config["environment"]["torch"] == torch.__version__
    assert config["environment"]["processes"] == 1
    assert config["headline"].startswith("distilling ")
    # The newest snapshot of a run folder is found, and it says how to use it.
    net = load_network(out)
    assert net.config.init_sigma == 2.5
    assert net.config.label_dim == 10


def records(out) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_evaluations_equal_those_of_the_evaluate_command(tmp_path, run_command):
    save_network(tmp_path / "teacher.safetensors", small_teacher())
    arguments = ["--teacher", tmp_path / "teacher.safetensors", "--data", "digits"]
    arguments += ["--batch-size", 4, "--kimg", 0.008, "--eval-every", 0.004, "--eval-images", 20]
    arguments += ["--detector", "pixels", "--teacher-steps", 3, "--generator-lr", 0.01]
    assert run_command("train", *arguments, "--out", tmp_path / "one")[0] == 0
    one = [r for r in records(tmp_path / "one") if DISTANCE in r]

    def evaluate(network, *more):
        base = ["--network", network, "--data", "digits", "--detector", "pixels", "-n", 20]
        status, error = run_command("evaluate", *base, *more, "--out", tmp_path / "r.json")
        assert status == 0, error
        return json.loads((tmp_path / "r.json").read_text())["reported"]

    found = evaluate(tmp_path / "one")
    assert found["frechet_distance"] == pytest.approx(one[-1][DISTANCE], rel=1e-9)
    assert found["kernel_distance"] == pytest.approx(one[-1]["kernel distance (pixels)"])
    found = evaluate(tmp_path / "teacher.safetensors", "--steps", 3)
    assert found["frechet_distance"] == pytest.approx(one[0]["teacher"], rel=1e-9)
    # Two processes find the same of the same network.
    command = ["-m", "sid_fast.train", *arguments, "--out", tmp_path / "two"]
    done = python(*TORCHRUN, 2, *command)
    assert done.returncode == 0, done.stderr
    two = [r for r in records(tmp_path / "two") if DISTANCE in r]
    assert [r["images"] for r in two] == [0, 4, 8]
    for name in (DISTANCE, "teacher", "kernel distance (pixels)"):
        assert two[0][name] == pytest.approx(one[0][name], rel=1e-9)


@pytest.mark.slow
def test_a_resumed_run_remembers_teacher_and_best(tmp_path, run_command, monkeypatch):
    save_network(tmp_path / "teacher.safetensors", small_teacher())
    out = tmp_path / "run"
    arguments = ["--teacher", tmp_path / "teacher.safetensors", "--data", "digits", "--out", out]
    arguments += ["--batch-size", 4, "--eval-every", 0.004, "--eval-images", 20]
    arguments += ["--detector", "pixels", "--teacher-steps", 2, "--generator-lr", 0.02]
    assert run_command("train", *arguments, "--kimg", 0.004)[0] == 0
    printed = []
    monkeypatch.setattr(loop.Loop, "_print", lambda self, text: printed.append(text))
    assert run_command("train", "--resume", out, "--kimg", 0.008)[0] == 0
    assert "from here on" not in "".join(printed)
    slower = ("--fake-lr", 1e-6)
    assert run_command("train", "--resume", out, "--kimg", 0.012, *slower)[0] == 0
    assert "note: fake_lr was 1e-05 and is 1e-06 from here on" in printed
    figures = [r for r in records(out) if DISTANCE in r]
    assert [r["images"] for r in figures] == [0, 4, 8, 12]
    assert sum("teacher" in r for r in figures) == 1
    least = min(figures, key=lambda r: r[DISTANCE])["images"]
    assert [p.name for p in out.glob("best-*")] == [f"best-{least:010d}.safetensors"]


@pytest.mark.slow
def test_evaluations_generate_the_classes_that_have_images(tmp_path, run_command, monkeypatch):
    drawn, generate = [], callbacks.generate_batches
    monkeypatch.setattr(
        callbacks, "generate_batches", lambda *a: drawn.append(a[-2]) or generate(*a)
    )
    write_dataset(
        tmp_path / "a.zip", np.arange(384, dtype=np.uint8).reshape(6, 1, 8, 8), [1, 4] * 3
    )
    save_network(tmp_path / "teacher.safetensors", small_teacher())
    status, error = run_command(
        "train", "--teacher", tmp_path / "teacher.safetensors", "--data", tmp_path / "a.zip",
        "--batch-size", 4, "--kimg", 0.004, "--eval-every", 0.004, "--eval-images", 8,
        "--detector", "pixels", "--teacher-steps", 2, "--out", tmp_path / "run",
    )  # fmt: skip
    assert status == 0, error
    assert drawn == [[1, 4]] * 3
    assert f"note: {tmp_path}/a.zip: no images of class 0, 2 to 3:" in error


@pytest.mark.slow
def test_an_evaluation_that_fails_is_a_warning(tmp_path, run_command, monkeypatch, capsys):
    """And the run goes on, at the start, later, and when it is resumed."""
    compute, calls = callbacks.compute_stats, []

    def failing(images, *arguments):
        calls.append(images)
        if len(calls) not in (3, 7):  # the generator at 0.004 kimg and at the end
            raise UserError("the features are not finite")
        return compute(images, *arguments)

    monkeypatch.setattr(callbacks, "compute_stats", failing)
    save_network(tmp_path / "teacher.safetensors", small_teacher())
    out = tmp_path / "run"
    status, error = run_command(
        "train", "--teacher", tmp_path / "teacher.safetensors", "--data", "digits", "--out", out,
        "--batch-size", 4, "--kimg", 0.012, "--eval-every", 0.004, "--eval-images", 20,
        "--detector", "pixels", "--teacher-steps", 2,
    )  # fmt: skip
    assert status == 0, error
    failed = [line for line in error.splitlines() if line.startswith("warning: the evaluation of")]
    assert failed == [
        f"warning: the evaluation of the {what} at {at} kimg failed: the features are not finite; "
        "training continues"
        for what, at in (("teacher", 0), ("network", 0), ("network", 0.008), ("network", 0.012))
    ]
    evaluated = [r for r in records(out) if "evaluation_s" in r]
    assert [DISTANCE in r for r in evaluated] == [False, True, False, False]
    # The log of an older release has null for a distance that was NaN.
    lines = (out / "log.jsonl").read_text().splitlines()
    lines.append(json.dumps({"images": 12, DISTANCE: None, "teacher": None, "evaluation_s": 1}))
    (out / "log.jsonl").write_text("\n".join(lines) + "\n")
    calls[:] = [None] * 5  # the teacher fails again, the network does not
    status, error = run_command("train", "--resume", out, "--kimg", 0.016)
    assert status == 0, error
    assert error.count("warning: the evaluation of the teacher at 0.016 kimg failed") == 1
    assert [r["images"] for r in records(out) if isinstance(r.get(DISTANCE), float)] == [4, 16]


@pytest.mark.slow
@pytest.mark.parametrize("loses", [True, False])
def test_a_run_stopped_during_an_evaluation_has_a_state(tmp_path, run_command, monkeypatch, loses):
    """After SIGKILL the resumed run repeats the evaluation; after SIGTERM it is finished first."""
    real = callbacks.Evaluations.__call__

    def preempted(self, folder):
        if self.trainer.images == 8:
            if loses:
                raise SystemExit(9)
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, folder)

    save_network(tmp_path / "teacher.safetensors", small_teacher())
    out = tmp_path / "run"
    monkeypatch.setattr(callbacks.Evaluations, "__call__", preempted)
    status, _ = run_command(
        "train", "--teacher", tmp_path / "teacher.safetensors", "--data", "digits", "--out", out,
        "--batch-size", 4, "--kimg", 0.016, "--eval-every", 0.008, "--eval-images", 20,
        "--detector", "pixels", "--teacher-steps", 0,
    )  # fmt: skip
    assert status == (9 if loses else 128 + signal.SIGTERM)
    monkeypatch.setattr(callbacks.Evaluations, "__call__", real)
    assert run_command("train", "--resume", out)[0] == 0
    assert [r["images"] for r in records(out) if DISTANCE in r] == [0, 8, 16]
    assert (out / "state-000000004").exists()


@pytest.mark.slow
def test_the_time_of_an_evaluation_is_not_in_the_throughput(tmp_path, run_command, monkeypatch):
    now = [0.0]  # a step takes a second, an evaluation a thousand
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])

    def taking(seconds, act):
        def call(*arguments):
            now[0] += seconds
            return act(*arguments)

        return call

    monkeypatch.setattr(Distiller, "step", taking(1, Distiller.step))
    evaluate = callbacks.Evaluations._metrics
    monkeypatch.setattr(callbacks.Evaluations, "_metrics", taking(1000, evaluate))
    save_network(tmp_path / "teacher.safetensors", small_teacher())
    status, _ = run_command(
        "train", "--teacher", tmp_path / "teacher.safetensors", "--data", "digits", "--out",
        tmp_path / "run", "--batch-size", 4, "--kimg", 0.016, "--eval-every", 0.004,
        "--eval-images", 20, "--detector", "pixels", "--teacher-steps", 0, "--log-every", 4,
    )  # fmt: skip
    assert status == 0
    (line,) = (r for r in records(tmp_path / "run") if "it_per_s" in r)
    assert line["it_per_s"] == 1
    assert [r["evaluation_s"] for r in records(tmp_path / "run") if DISTANCE in r] == [1000] * 5


def test_the_time_left_knows_that_the_warmup_is_cheaper(tmp_path, run_command, monkeypatch, capsys):
    """A step takes 41 s while the generator rests, and 100 s afterwards; a snapshot is no step."""
    now = [0.0]
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])
    step = Distiller.step

    def timed(self):
        now[0] += 100 if self.images > 16 else 41
        return step(self)

    monkeypatch.setattr(Distiller, "step", timed)
    save_network(tmp_path / "teacher.safetensors", small_teacher())
    lines, began = [], []

    def snapshot(self, what, callback):
        if self.trainer.steps:
            began.append(self.shown.began)
            time.sleep(0.1)
        return []

    monkeypatch.setattr(loop.Loop, "_run_callback", snapshot)
    monkeypatch.setattr(loop.Loop, "_print", lambda self, line: lines.append(line))
    status, _ = run_command(
        "train", "--teacher", tmp_path / "teacher.safetensors", "--data", "digits", "--out",
        tmp_path / "run", "--snapshot-every", 0.012, "--method", "sida", "--adversarial-group", 4,
        "--batch-size", 4,
        "--kimg", 0.04, "--generator-start-kimg", 0.016, "--log-every", 3,
    )  # fmt: skip
    assert status == 0
    left = [re.search(r"ETA (\S+)", line)[1] for line in lines if "ETA" in line]
    # After 2 and 3 steps; 6, in an interval of both kinds; 9 and 10 of 10 steps.
    assert left[1] == tqdm.format_interval(2 * 41 + 5 * 100)
    assert left[-2:] == ["01:40", "00:00"]
    assert len(began) == 4
    assert began[3] - began[0] >= 0.3


def test_a_signal_within_the_first_step_ends_it_at_once(tmp_path, run_command, monkeypatch):
    """A compilation may take minutes more, and there is no state to lose."""

    def compiling(self):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("it went on")

    monkeypatch.setattr(Distiller, "step", compiling)
    seen = []
    monkeypatch.setattr(loop.Loop, "_print", lambda self, line: seen.append(line))
    save_network(tmp_path / "teacher.safetensors", small_teacher())
    out = tmp_path / "run"
    status, _ = run_command("train", "--teacher", tmp_path / "teacher.safetensors", "--out", out)
    assert status == 128 + signal.SIGTERM
    assert "no new state to save" in seen[-1]
    assert not list(out.glob("state-*"))
    assert list(out.glob("snapshot-*"))


@pytest.mark.slow
@pytest.mark.parametrize("stdout", ["closed", "reader gone", "full"])
def test_a_lost_stdout_does_not_stop_the_run(teacher, tmp_path, stdout):
    out = tmp_path / "run"
    done = python_without_stdout(
        stdout, "-m", "sid_fast.train", "--teacher", teacher, "--out", out, "--batch-size", 4,
        "--kimg", 0.016, "--log-every", 1, "--device", "cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [p.name for p in out.glob("state-*")] == ["state-000000004"]
    lost = "warning: some output was lost: No space left on device" in done.stderr
    assert lost == (stdout == "full")
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


@pytest.mark.parametrize("torchrun", [False, True])
def test_a_signal_says_what_happens_next(monkeypatch, torchrun):
    told = []
    monkeypatch.setattr(loop.progress, "announce", told.append)
    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with loop.signals(lambda: False) as caught:
        signal.raise_signal(signal.SIGTERM)
        later = signal.getsignal(signal.SIGTERM)
    assert caught == [signal.SIGTERM]
    assert told[0].startswith("SIGTERM: the run stops after this step or evaluation")
    assert ("a second signal" in told[0]) == (later == signal.SIG_DFL) == (not torchrun)


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with loop.signals(lambda: False) as caught:
            signal.raise_signal(signal.SIGHUP)
        assert not caught
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.fixture
def started_long_ago(monkeypatch):
    """The process is so old that --max-hours 1 is over after a step."""
    began = time.monotonic() - 3600
    monkeypatch.setattr(loop.invocation, "started", lambda: began)


@pytest.fixture
def told(monkeypatch):
    """The texts that are printed."""
    texts = []
    monkeypatch.setattr(streams, "say", lambda text, file=None: texts.append(text))
    return texts


def arguments_of(folder, *more):
    save_network(folder / "teacher.safetensors", small_teacher())
    return [
        "train", "--teacher", folder / "teacher.safetensors", "--batch-size", 4, "--kimg", 0.012,
        "--log-every", 1, "--state-every", 1, *more,
    ]  # fmt: skip


@pytest.mark.slow
def test_max_hours_saves_and_leaves_with_the_status_of_a_requeue(
    tmp_path, run_command, started_long_ago, told
):
    """Each start takes one step; the last state is that of a run in one piece, to the bit."""
    arguments = arguments_of(tmp_path)
    assert run_command(*arguments, "--out", tmp_path / "whole")[0] == 0
    out = tmp_path / "run"
    assert run_command(*arguments, "--out", out, "--max-hours", 1)[0] == loop.TIME_IS_UP == 75
    assert [p.name for p in out.glob("state-*")] == ["state-000000001"]
    assert run_command("train", "--resume", out, "--max-hours", 1)[0] == 75
    assert told[-2].startswith(
        "--max-hours 1: stopped at 0.008 kimg with exit status 75; the state"
    )
    assert told[-1].endswith(f"sid_fast.train --resume {out} --max-hours 1")
    assert run_command("train", "--resume", out, "--max-hours", 1)[0] == 0, "it is at its end"
    last = "state-000000003"
    for name, tensor in tensors_of(tmp_path / "whole" / last).items():
        assert tensor.equal(tensors_of(out / last)[name]), name
    assert "max_hours" not in json.loads((out / "config.json").read_text())


def test_an_evaluation_that_does_not_fit_into_max_hours_is_made_after_the_resume(
    tmp_path, run_command, monkeypatch
):
    evaluated = "--data", "digits", "--eval-every", 0.004, "--eval-images", 20, "--detector"
    arguments = arguments_of(tmp_path, *evaluated, "pixels", "--teacher-steps", 0)
    out = tmp_path / "run"
    real = loop.Loop._run_callback

    def slow(self, what, callback):
        unwritten = real(self, what, callback)
        self.took |= {"evaluation": 4000.0} if what == "evaluation" else {}
        return unwritten

    monkeypatch.setattr(loop.Loop, "_run_callback", slow)
    assert run_command(*arguments, "--out", out, "--max-hours", 1)[0] == 75
    assert [r["images"] for r in records(out) if DISTANCE in r] == [0]
    assert [p.name for p in out.glob("state-*")] == ["state-000000001"]
    for images in ([0, 4], [0, 4, 8]):
        assert run_command("train", "--resume", out, "--max-hours", 1)[0] == 75
        assert [r["images"] for r in records(out) if DISTANCE in r] == images
    assert run_command("train", "--resume", out, "--max-hours", 1)[0] == 0
    assert [r["images"] for r in records(out) if DISTANCE in r] == [0, 4, 8, 12]


@pytest.mark.slow
def test_the_last_evaluation_is_left_to_the_resume_when_the_time_is_up(
    tmp_path, run_command, started_long_ago
):
    evaluated = "--data", "digits", "--eval-every", 1, "--eval-images", 20, "--detector", "pixels"
    arguments = arguments_of(tmp_path, *evaluated, "--teacher-steps", 0)
    arguments[arguments.index("--kimg") + 1] = 0.004
    out = tmp_path / "run"
    assert run_command(*arguments, "--out", out, "--max-hours", 1)[0] == 75
    assert [r["images"] for r in records(out) if DISTANCE in r] == [0]
    assert run_command("train", "--resume", out)[0] == 0
    assert [r["images"] for r in records(out) if DISTANCE in r] == [0, 4]


def test_a_restart_by_torchrun_after_max_hours_leaves_at_once(
    tmp_path, run_command, monkeypatch, started_long_ago
):
    monkeypatch.setattr(loop, "restart_count", lambda: 1)
    out = tmp_path / "run"
    assert run_command(*arguments_of(tmp_path), "--out", out, "--max-hours", 1)[0] == 75
    assert not out.exists()
    monkeypatch.setattr(loop, "restart_count", lambda: 0)
    assert run_command(*arguments_of(tmp_path), "--out", out, "--max-hours", 1)[0] == 75
    assert [p.name for p in out.glob("state-*")] == ["state-000000001"], "every start gets on"


def test_the_time_of_a_save_and_of_a_step_is_kept_free(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(loop.invocation, "started", lambda: 900.0)
    limit = loop.TimeLimit(1, state_bytes=2 * 10**9)  # over at 4500, less 30
    now[0] = 4470 - 21
    assert not limit.is_up()
    assert limit.is_up(more=2)
    now[0] += 2
    assert limit.is_up(), "2 GB at 100 MB/s are 20 s"
    limit.save_begun()
    now[0] += 3
    limit.save_ended()
    assert not limit.is_up(), "the save took 3 s"
    limit.stepped()
    now[0] += 9
    limit.stepped()
    assert limit.is_up(), "steps of 9 s"
    limit.save_begun()
    now[0] += 2
    limit.save_ended()
    now[0] += 50
    limit.save_ended()
    assert limit.save_seconds == 3, "the longest; without one that began, nothing is measured"
    limit.paused()
    now[0] += 1
    limit.stepped()
    assert limit.step_seconds == 9, "the longest; what is between two steps does not count"
    assert loop.TimeLimit(None).is_up() is False
    now[0] = 1000
    short = loop.TimeLimit(0.1)  # over at 900 + 360, less a twentieth
    assert short.end == 1242


@pytest.fixture
def slowed(monkeypatch):
    """A clock that slow work advances, without waiting: slowed(object, method, seconds)."""
    real, extra = time.monotonic, [0.0]
    monkeypatch.setattr(loop.time, "monotonic", lambda: real() + extra[0])

    def slow(owner, name, seconds):
        method = getattr(owner, name)

        def slower(*arguments):
            result = method(*arguments)
            extra[0] += seconds(*arguments)
            return result

        monkeypatch.setattr(owner, name, slower)

    return slow


def test_steps_and_saves_are_timed_without_what_is_between_them(
    tmp_path, run_command, monkeypatch, slowed
):
    """The first step compiles; snapshots and evaluations are no steps, nor part of a save."""
    runs = []
    real = loop.Loop.run
    monkeypatch.setattr(loop.Loop, "run", lambda self, *a: runs.append(self) or real(self, *a))
    slowed(Distiller, "step", lambda trainer, *_: 1000 if trainer.steps == 1 else 5)
    slowed(callbacks.Snapshots, "__call__", lambda *_: 2000)
    slowed(callbacks.Evaluations, "__call__", lambda *_: 2000)
    evaluated = "--data", "digits", "--eval-every", 0.008, "--eval-images", 20, "--detector"
    arguments = arguments_of(tmp_path, *evaluated, "pixels", "--snapshot-every", 0.004)
    arguments[arguments.index("--state-every") + 1] = 0.004
    assert run_command(*arguments, "--teacher-steps", 0, "--out", tmp_path / "run")[0] == 0
    (run,) = runs
    assert 5 <= run.limit.step_seconds < 500
    assert 0 < run.limit.save_seconds < 500
    assert all(2000 <= seconds < 2500 for seconds in run.took.values())
    assert run.took.keys() == {"snapshot", "evaluation"}


def test_a_state_that_is_written_while_training_goes_on_is_timed(
    tmp_path, run_command, monkeypatch
):
    seen = []
    begin, report = States.begin, loop.Loop._report

    def reports(run, *arguments):
        seen.append(run.limit.save_seconds > 0)
        report(run, *arguments)

    monkeypatch.setattr(States, "begin", lambda states: begin(states) or states.finish())
    monkeypatch.setattr(loop.Loop, "_report", reports)
    arguments = arguments_of(tmp_path)
    arguments[arguments.index("--state-every") + 1] = 0.004
    assert run_command(*arguments, "--out", tmp_path / "run")[0] == 0
    assert seen == [False, False, True], "by the end of the step after"


def test_the_snapshot_of_the_next_step_has_to_fit_into_max_hours(tmp_path, run_command, slowed):
    slowed(callbacks.Snapshots, "__call__", lambda *_: 2000)
    out = tmp_path / "run"
    assert run_command(*arguments_of(tmp_path), "--out", out, "--max-hours", 1)[0] == 75
    assert [p.name for p in out.glob("state-*")] == ["state-000000001"]


@pytest.mark.slow
def test_all_processes_leave_together_when_one_finds_that_the_time_is_up(tmp_path):
    save_network(tmp_path / "teacher.safetensors", small_teacher())
    program = tmp_path / "late.py"
    program.write_text(
        "import os, runpy, sys, time\n"
        "from sid_fast.io import invocation\n"
        "began = time.monotonic() - 3600 * int(os.environ['RANK'])\n"
        "invocation.started = lambda: began\n"
        "sys.argv[0] = 'train'\n"
        "runpy.run_module('sid_fast.train', run_name='__main__')\n"
    )
    arguments = ["--teacher", tmp_path / "teacher.safetensors", "--out", tmp_path / "run"]
    arguments += ["--batch-size", 4, "--kimg", 0.4, "--max-hours", 0.9, "--device", "cpu"]
    done = python(*TORCHRUN, 2, program, *arguments)
    assert done.returncode == 1, "torchrun has no other status for a failed process"
    assert done.stdout.count("with exit status 75") == 1, done.stdout + done.stderr
    assert done.stderr.count("exitcode  : 75") >= 2, done.stderr
    assert len(list((tmp_path / "run").glob("state-*"))) == 1


def test_quiet_leaves_errors_warnings_and_the_result(tmp_path, run_command, monkeypatch, told):
    arguments = arguments_of(tmp_path, "--quiet", "--out", tmp_path / "run")

    def failing(*_):
        raise UserError("the features are not finite")

    monkeypatch.setattr(callbacks, "compute_stats", failing)
    monkeypatch.setattr(callbacks, "real_stats", lambda *_: None)
    evaluated = "--data", "digits", "--eval-every", 0.012, "--detector", "pixels"
    assert run_command(*arguments, *evaluated, "--teacher-steps", 0)[0] == 0
    assert [line.partition(" ")[0] for line in told] == ["warning:", "warning:", "done:"]
    made = told[-1].splitlines()[1:]
    assert made == [f"  {tmp_path}/run/{n}" for n in (
        "snapshot-0000000012.safetensors", "samples-0000000012.png", "log.jsonl", "tensorboard"
    )]  # fmt: skip


def test_the_start_is_told_in_short_lines(tmp_path, run_command, told, monkeypatch):
    """The run folder stands beside what is trained, and notes come last."""
    monkeypatch.setattr(train.graph_trial, "choose", lambda *_: ("off", False, "a note"))
    assert run_command(*arguments_of(tmp_path), "--out", tmp_path / "run", "--profile") == (0, "")
    first, where, note = told[0].splitlines()
    assert re.fullmatch(rf"distilling .*\(ddpmpp, .*\); run folder {tmp_path}/run", first)
    assert where.startswith("  on cpu in fp32, kernels: ")
    assert note == "note: a note"
    assert "note: no profile: the run ended before the steps that it traces" in told


def test_the_next_command_repeats_what_a_state_does_not_hold():
    options = train.TrainConfig()
    options.log_to, options.max_hours, options.detector = "wandb", 3.9, "pixels"
    assert train.next_commands(options, "run", latent=False)[1].endswith(
        f"pixels -n {options.eval_images}"
    )
    run = types.SimpleNamespace(options=options, folder="runs/a b")
    told = loop.Loop._resume_command(run)
    assert shlex.split(told)[2:] == [
        "sid_fast.train", "--resume", "runs/a b", "--log-to", "wandb", "--max-hours", "3.9",
    ]  # fmt: skip
    more = pretrain.next_commands(pretrain.PretrainConfig(log_to="wandb"), "run")
    for commands in train.next_commands(options, "run", latent=False), more:
        assert commands[-1].endswith(" --log-to wandb")


def test_the_end_names_the_next_commands(tmp_path, run_command, told):
    out = tmp_path / "a run"
    assert run_command(*arguments_of(tmp_path), "--out", out) == (0, "")
    assert not any("profile" in line for line in told), "nobody asked for one"
    first, *commands = told[-1].splitlines()
    assert first == "next:"
    assert [shlex.split(c)[2:5] for c in commands] == [
        ["sid_fast.generate", "--network", str(out)],
        ["sid_fast.evaluate", "--network", str(out)],
        ["sid_fast.train", "--resume", str(out)],
    ]
    words = shlex.split(commands[2])[3:]
    assert run_command("train", *words)[0] == 0  # as it is printed
    assert (out / "snapshot-0000000024.safetensors").exists()
