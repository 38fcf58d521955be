"""Resuming is bit-exact, whenever a run was stopped."""

import errno
import json
import os
import pickle
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint import HuggingFaceStorageWriter

from sid_fast.config.types import Settings
from sid_fast.data.datasets import write_dataset
from sid_fast.distiller import Distiller
from sid_fast.errors import UserError
from sid_fast.io import safetensors
from sid_fast.models.registry import save_network
from sid_fast.training.checkpoint import (
    HEADER,
    States,
    find_restarted_run,
    find_state,
    load_state,
    read_header,
)
from sid_fast.training.loop import Loop
from tests.helpers.images import pictures
from tests.helpers.networks import small_teacher
from tests.helpers.processes import python, python_until, tensors_of

LAST = "state-000000040"


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """A run of 40 steps with dropout, warps and a first moment, and its unbroken result."""
    folder = tmp_path_factory.mktemp("resume")
    save_network(folder / "teacher.safetensors", small_teacher())
    command = [
        "-m", "sid_fast.train", "--teacher", folder / "teacher.safetensors", "--batch-size", 4,
        "--micro-batch", 2, "--dropout", 0.1, "--augment-p", 0.3, "--generator-beta1", 0.9,
        "--kimg", 0.16, "--log-every", 1, "--state-every", 0.02, "--snapshot-every", 0.04,
        "--fake-lr", 1e-3, "--generator-lr", 1e-3,
    ]  # fmt: skip
    done = python(*command, "--out", folder / "whole")
    assert done.returncode == 0, done.stderr
    return command, folder / "whole"


def states(folder):
    return sorted(folder.glob("state-*[0-9]"))


def save_state(folder, distiller, settings, keep=1):
    """The state of a distiller, written and waited for."""
    states = States(folder, distiller, settings, keep)
    assert states.begin() is None
    assert states.finish() is None
    return states.path


def same_end(found, expected) -> bool:
    a, b = tensors_of(found / LAST), tensors_of(expected / LAST)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.slow
@pytest.mark.parametrize("moment", [1, 3, 6])
def test_a_killed_and_resumed_run_is_bit_exact(command, tmp_path, moment):
    arguments, whole = command
    out = tmp_path / "run"

    def ready() -> bool:
        return bool(states(out)) and int(states(out)[-1].name[6:]) >= 5 * moment

    status = python_until(ready, signal.SIGKILL, *arguments, "--out", out)
    assert status == -signal.SIGKILL
    assert not (out / LAST).exists()
    done = python(*arguments, "--out", out, "--resume", "latest")
    assert done.returncode == 0, done.stderr
    assert same_end(out, whole)
    # The log of the resumed run reads like that of an unbroken one, times aside.
    steps = [[r["images"], r.get("fake/loss")] for r in log(out)]
    assert steps == [[r["images"], r.get("fake/loss")] for r in log(whole)]


@pytest.mark.slow
@pytest.mark.parametrize("steps", [2, 5, 8])  # in each part of the schedule, and into an epoch
def test_a_killed_and_resumed_run_of_sida_is_bit_exact(tmp_path, steps):
    save_network(tmp_path / "teacher.safetensors", small_teacher())
    write_dataset(tmp_path / "data.zip", pictures(14), np.arange(14) % 10)
    arguments = [
        "-m", "sid_fast.train", "--teacher", tmp_path / "teacher.safetensors", "--data",
        tmp_path / "data.zip", "--method", "sida", "--batch-size", 4, "--micro-batch", 2,
        "--adversarial-group", 2, "--dropout", 0.1, "--augment-p", 0.3, "--kimg", 0.16,
        "--generator-start-kimg", 0.012, "--adversarial-start-kimg", 0.028, "--log-every", 1,
        "--state-every", 0.004, "--keep-states", 100, "--fake-lr", 1e-3, "--generator-lr", 1e-3,
    ]  # fmt: skip
    whole, out = tmp_path / "whole", tmp_path / "run"
    done = python(*arguments, "--out", whole)
    assert done.returncode == 0, done.stderr

    def ready() -> bool:
        return bool(states(out)) and int(states(out)[-1].name[6:]) >= steps

    status = python_until(ready, signal.SIGKILL, *arguments, "--out", out)
    assert status == -signal.SIGKILL
    for late in states(out)[steps:]:
        shutil.rmtree(late)
    done = python(*arguments, "--out", out, "--resume", "latest")
    assert done.returncode == 0, done.stderr
    assert same_end(out, whole)
    metrics = "fake/loss", "fake/discriminator", "generator/adversarial"
    found, expected = ([[r.get(m) for m in metrics] for r in log(f)] for f in (out, whole))
    assert found == expected


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("send", [signal.SIGTERM, signal.SIGINT])
def test_sigterm_saves_a_state_of_the_last_step(command, tmp_path, send):
    arguments, whole = command
    out = tmp_path / "run"

    def ready() -> bool:
        return (out / "log.jsonl").exists() and len(log(out)) > 7

    status = python_until(ready, send, *arguments, "--out", out)
    assert status == 128 + send
    stopped = int(re.search(r"\d+", states(out)[-1].name)[0])
    assert 5 < stopped < 40
    # The settings come from the state: nothing but the folder need be said.
    done = python("-m", "sid_fast.train", "--resume", out)
    assert done.returncode == 0, done.stderr
    assert same_end(out, whole)


def test_only_the_newest_states_are_kept_and_nothing_half_written(command):
    _, whole = command
    assert [p.name for p in states(whole)] == ["state-000000035", LAST]
    assert not list(whole.glob("*.tmp"))
    assert (whole / "config.json").exists()
    for kind in ("samples-*.png", "snapshot-*.safetensors"):
        found = [int(p.stem.split("-")[1]) for p in sorted(whole.glob(kind))]
        assert found == [0, 40, 80, 120, 160]


def test_a_run_resumed_from_an_older_state_keeps_its_new_states(tmp_path):
    settings = Settings(batch_size=4)
    distiller = Distiller(small_teacher(), settings)
    for steps in (8, 9, 10, 9):
        distiller.steps = steps
        newest = save_state(tmp_path, distiller, settings, keep=1)
        assert states(tmp_path) == [newest]


def test_a_state_written_with_keep_all_removes_no_older_state(tmp_path):
    settings = Settings(batch_size=4)
    distiller = Distiller(small_teacher(), settings)
    writer = States(tmp_path, distiller, settings, keep=1)
    for steps, keep_all, left in ((1, False, [1]), (2, True, [1, 2]), (3, True, [1, 2, 3])):
        distiller.steps = steps
        assert writer.begin(keep_all=keep_all) is None
        assert writer.finish() is None
        assert [int(p.name[6:]) for p in states(tmp_path)] == left


def test_a_state_of_other_settings_names_the_first_that_differs(tmp_path):
    settings = Settings(batch_size=4)
    state = save_state(tmp_path, Distiller(small_teacher(), settings), settings, keep=1)
    other = Distiller(small_teacher(), Settings(batch_size=4, tmax=700, alpha=1.0))
    with pytest.raises(UserError, match=r"alpha=1\.2.*alpha=1\.0"):
        load_state(state, other)
    with pytest.raises(UserError, match="seed"):
        load_state(state, Distiller(small_teacher(), settings, seed=1))
    teacher = small_teacher()
    teacher.model.map_layer0.bias.data += 1
    with pytest.raises(UserError, match="teacher"):
        load_state(state, Distiller(teacher, settings))
    header = json.loads((state / HEADER).read_text())
    del header["identity"]["random numbers"]  # as a state was before they were counted by sample
    (state / HEADER).write_text(json.dumps(header))
    with pytest.raises(UserError, match="random numbers=None, this run has random numbers=Philox"):
        load_state(state, Distiller(small_teacher(), settings))


def test_what_is_no_state_is_refused(tmp_path):
    with pytest.raises(UserError, match="no training state"):
        find_state("latest", str(tmp_path))
    with pytest.raises(UserError, match=r"there is no .*none\.safetensors"):
        find_state(str(tmp_path / "none.safetensors"), None)
    save_network(tmp_path / "net.safetensors", small_teacher())
    with pytest.raises(UserError, match="not a training state"):
        load_state(tmp_path / "net.safetensors", Distiller(small_teacher(), Settings()))


def test_a_damaged_state_is_refused_before_it_is_used(tmp_path):
    settings = Settings(batch_size=4)
    distiller = Distiller(small_teacher(), settings)
    state = save_state(tmp_path, distiller, settings)
    file = next(state.glob("*.safetensors"))
    content = file.read_bytes()
    for broken in (content[:-4], None):
        if broken is None:
            file.unlink()
        else:
            file.write_bytes(broken)
        with pytest.raises(UserError, match=file.name):
            load_state(state, distiller)
    file.write_bytes(b"\xff" * 16 + content[16:])
    with pytest.raises(UserError, match="damaged"):
        load_state(state, distiller)
    for header in ("{", '{"files": {}}', '{"files": {}, "kind": 7}'):
        (state / HEADER).write_text(header)
        with pytest.raises(UserError, match="is not a complete training state"):
            load_state(state, distiller)


def test_reading_a_state_executes_nothing(tmp_path):
    """torch.distributed.checkpoint's metadata file is a pickle; it is never opened."""

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    settings = Settings(batch_size=4)
    distiller = Distiller(small_teacher(), settings)
    state = save_state(tmp_path, distiller, settings)
    assert {p.suffix for p in state.iterdir()} == {".safetensors", ".json"}
    (state / ".metadata").write_bytes(pickle.dumps(Evil()))
    load_state(state, distiller)
    assert not (tmp_path / "executed").exists()


def test_a_state_holds_the_step_at_which_its_writing_began(tmp_path):
    settings = Settings(batch_size=4, fake_lr=1e-2, generator_lr=1e-2)
    distiller = Distiller(small_teacher(), settings)
    expected = {k: v.detach().clone() for k, v in distiller.state_dict().items()}
    states = States(tmp_path, distiller, settings, 1)
    states.begin()
    distiller.step()
    assert states.finish() is None
    found = tensors_of(tmp_path / "state-000000000")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], expected[k]) for k in expected)


def full_disk_at(monkeypatch, *steps):
    """No state of these steps can be written: half of it is, and then the disk is full."""
    real = HuggingFaceStorageWriter.write_data

    def write_data(self, plan, planner):
        done = real(self, plan, planner)
        if int(re.search(r"state-(\d+)", str(self.path))[1]) in steps:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return done

    monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", write_data)


def test_a_full_disk_does_not_stop_a_run_that_can_write_its_last_state(
    tmp_path, monkeypatch, run_command
):
    save_network(tmp_path / "teacher.safetensors", small_teacher())
    arguments = [
        "train", "--teacher", tmp_path / "teacher.safetensors", "--batch-size", 4,
        "--kimg", 0.032, "--state-every", 0.008, "--out", tmp_path / "run",
    ]  # fmt: skip
    seen = []
    real = Loop._print
    monkeypatch.setattr(Loop, "_print", lambda self, line: (seen.append(line), real(self, line)))
    full_disk_at(monkeypatch, 4, 6)
    status, error = run_command(*arguments)
    assert status == 0, error
    warnings = [line for line in seen if line.startswith("warning")]
    assert len(warnings) == 2
    assert "state-000000004" in warnings[0]
    assert "No space left" in warnings[0]
    assert not list((tmp_path / "run").glob("*.tmp"))
    names = [p.name for p in states(tmp_path / "run")]
    assert names == ["state-000000002", "state-000000008"]


def test_a_full_disk_at_the_end_is_a_failure_with_the_last_good_state_intact(
    tmp_path, monkeypatch, run_command
):
    save_network(tmp_path / "teacher.safetensors", small_teacher())
    full_disk_at(monkeypatch, 4, 6, 8)
    out = tmp_path / "run"
    status, error = run_command(
        "train", "--teacher", tmp_path / "teacher.safetensors", "--batch-size", 4,
        "--kimg", 0.032, "--state-every", 0.008, "--out", out,
    )  # fmt: skip
    assert status == 1
    assert "state-000000008" in error
    assert "No space left" in error
    assert "last good state is state-000000002" in error
    assert error.strip().count("\n") == 0
    assert not list(out.glob("*.tmp"))
    assert [p.name for p in states(out)] == ["state-000000002"]
    assert read_header(states(out)[0])["steps"] == 2


@pytest.mark.parametrize(("at", "status"), [(0, 2), (16, 0), (32, 1)])
def test_a_snapshot_that_cannot_be_written(tmp_path, monkeypatch, run_command, at, status):
    """At the start it is an error, later a warning, at the end a failure after the state."""
    save_network(tmp_path / "teacher.safetensors", small_teacher())
    real = safetensors.save_file

    def full(tensors, path, metadata):
        if f"snapshot-{at:010d}" in str(path):
            raise SafetensorError("I/O error: No space left on device")
        real(tensors, path, metadata)

    monkeypatch.setattr(safetensors, "save_file", full)
    out = tmp_path / "run"
    found, error = run_command(
        "train", "--teacher", tmp_path / "teacher.safetensors", "--batch-size", 4,
        "--kimg", 0.032, "--snapshot-every", 0.008, "--out", out,
    )  # fmt: skip
    assert found == status, error
    assert (f"snapshot-{at:010d}" in error and "No space left" in error) == (status > 0)
    assert [p.name for p in states(out)] == (["state-000000008"] if at else [])
    made = [int(p.stem.split("-")[1]) for p in sorted(out.glob("snapshot-*"))]
    assert made == ([n for n in (0, 8, 16, 24, 32) if n != at] if at else [])


def test_a_torchrun_restart_resumes_the_last_state_of_its_run(tmp_path, monkeypatch, run_command):
    monkeypatch.chdir(tmp_path)
    save_network("teacher.safetensors", small_teacher())
    arguments = ["train", "--teacher", "teacher.safetensors", "--batch-size", 4, "--kimg", 0.008]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "ours")
    assert run_command(*arguments)[0] == 0
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another")
    assert run_command(*arguments)[0] == 0
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "ours")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert run_command(*arguments[:-1], 0.016)[0] == 0
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["000-distil", "001-distil"]
    names = [p.name for p in states(tmp_path / "runs" / "000-distil")]
    assert names == ["state-000000002", "state-000000004"]


def test_a_restart_without_a_run_id_resumes_no_other_run(tmp_path, monkeypatch):
    """torchrun gives every run the id "none" unless --standalone or --rdzv-id is set."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "003-other").mkdir(parents=True)
    (tmp_path / "runs" / "003-other" / "config.json").write_text('{"launch": "none"}')
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert find_restarted_run(None) is None
    assert find_restarted_run("runs/003-other") == Path("runs/003-other")
