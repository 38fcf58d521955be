"""Resuming is bit-exact, whenever a run was stopped."""

import contextlib
import dataclasses
import errno
import json
import math
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
from sid_fast.io import download, safetensors
from sid_fast.io.lock import RunLock
from sid_fast.models.registry import save_network
from sid_fast.training import callbacks, checkpoint, loop
from sid_fast.training.checkpoint import (
    HEADER,
    States,
    changed_rates,
    find_restarted_run,
    find_state,
    hold_state,
    load_state,
    prune,
    read_header,
    remove_partial_files,
    thin_out,
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
def test_a_killed_and_resumed_run_is_bit_exact(command, tmp_path):
    arguments, whole = command
    out = tmp_path / "run"

    def ready() -> bool:
        return bool(states(out)) and int(states(out)[-1].name[6:]) >= 15

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
def test_a_killed_and_resumed_run_of_sida_is_bit_exact(tmp_path):
    """From the part of the schedule without the adversarial term, in the middle of an epoch."""
    steps = 5
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


@pytest.mark.slow
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
    for steps, left in ((8, [8]), (9, [9]), (10, [10]), (9, [9, 10]), (10, [10]), (11, [11])):
        distiller.steps = steps
        newest = save_state(tmp_path, distiller, settings, keep=1)
        assert [int(p.name[6:]) for p in states(tmp_path)] == left  # the furthest is never removed
        assert find_state(str(tmp_path), None) == newest


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


def test_a_state_from_before_a_setting_was_written_with_its_default(tmp_path):
    settings = Settings(batch_size=4)
    state = save_state(tmp_path, Distiller(small_teacher(), settings), settings, keep=1)
    header = json.loads((state / HEADER).read_text())
    del header["identity"]["tmax"]
    (state / HEADER).write_text(json.dumps(header))
    load_state(state, Distiller(small_teacher(), settings))
    with pytest.raises(UserError, match=r"with tmax=800.*, this run has tmax=700"):
        load_state(state, Distiller(small_teacher(), Settings(batch_size=4, tmax=700)))


def test_a_resumed_run_may_change_its_learning_rates(tmp_path):
    settings = Settings(batch_size=4, fake_lr=1e-2, generator_lr=1e-2, eps=1.0)
    distiller = Distiller(small_teacher(), settings)
    distiller.step()
    state = save_state(tmp_path, distiller, settings, keep=1)
    slower = dataclasses.replace(settings, generator_lr=1e-3, ema_halflife_kimg=1.0)
    resumed = Distiller(small_teacher(), slower)
    header = load_state(state, resumed)
    assert changed_rates(header, distiller) == []
    assert changed_rates(header, resumed) == [
        "generator_lr was 0.01 and is 0.001 from here on",
        "ema_halflife_kimg was 500.0 and is 1.0 from here on",
    ]
    before = {name: p.clone() for name, p in resumed.generator.named_parameters()}
    distiller.step()
    resumed.step()
    pairs = zip(distiller.generator.named_parameters(), resumed.generator.parameters(), strict=True)
    for (name, at_old_rate), at_new_rate in pairs:
        moved = at_old_rate - before[name]
        torch.testing.assert_close(at_new_rate - before[name], moved / 10, rtol=1e-2, atol=1e-7)


def test_what_is_no_state_is_refused(tmp_path):
    with pytest.raises(UserError, match="no training state"):
        find_state("latest", str(tmp_path))
    with pytest.raises(UserError, match=r"none\.safetensors does not exist: give a run"):
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


@pytest.mark.slow
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
    assert "could not be written: No space left on device" in warnings[0]
    assert not list((tmp_path / "run").glob("*.tmp"))
    names = [p.name for p in states(tmp_path / "run")]
    assert names == ["state-000000002", "state-000000008"]


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


def small_run(folder, *more) -> list:
    """A run of 6 steps, its arguments."""
    save_network(folder / "teacher.safetensors", small_teacher())
    return [
        "train", "--teacher", folder / "teacher.safetensors", "--batch-size", 4, "--kimg", 0.024,
        "--out", folder / "run", "--snapshot-every", 0.024, *more,
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kimg", [(), ("--kimg", 0.012)])
def test_a_finished_run_says_so_in_one_line(tmp_path, run_command, monkeypatch, kimg):
    assert run_command(*small_run(tmp_path))[0] == 0
    out = tmp_path / "run"
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    seen = []
    monkeypatch.setattr(loop.streams, "say", lambda line, *_: seen.append(line))
    monkeypatch.setattr(Loop, "_print", lambda self, line: seen.append(line))
    assert run_command("train", "--resume", out, *kimg)[0] == 0
    assert seen == [f"{out} is finished at 0.024 kimg: give a larger --kimg to continue it"]
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    assert run_command("train", "--resume", out, "--kimg", 0.028)[0] == 0
    assert states(out)[-1].name == "state-000000007"


def test_what_a_kill_at_the_end_prevented_is_made_up_for(tmp_path, run_command, monkeypatch):
    evaluated = "--data", "digits", "--eval-every", 0.024, "--eval-images", 20
    arguments = small_run(tmp_path, *evaluated, "--detector", "pixels", "--teacher-steps", 0)
    real = callbacks.Evaluations.__call__

    def killed(self, folder):
        if self.trainer.images == 24:
            raise SystemExit(9)
        return real(self, folder)

    monkeypatch.setattr(callbacks.Evaluations, "__call__", killed)
    assert run_command(*arguments)[0] == 9
    monkeypatch.setattr(callbacks.Evaluations, "__call__", real)
    out = tmp_path / "run"
    (out / "snapshot-0000000024.safetensors").unlink()
    seen = []
    monkeypatch.setattr(Loop, "_print", lambda self, line: seen.append(line))
    for _ in range(2):  # the second time there is nothing left to do
        assert run_command("train", "--resume", out)[0] == 0
    assert [r["images"] for r in log(out) if "evaluation_s" in r] == [0, 24]
    assert (out / "snapshot-0000000024.safetensors").exists()
    assert "is finished at 0.024 kimg" in seen[-1]


def written(folder, *steps, keep=9):
    """States of these steps, in this order of writing."""
    settings = Settings(batch_size=4)
    distiller = Distiller(small_teacher(), settings)
    for distiller.steps in steps:
        save_state(folder, distiller, settings, keep)
    return distiller, settings


def test_states_are_ordered_by_what_they_say_and_not_by_file_times(tmp_path):
    distiller, settings = written(tmp_path, 2, 4, 6)
    for age, state in enumerate(states(tmp_path)):  # copied, the newest first
        for path in (*state.iterdir(), state):
            os.utime(path, (1e9 - age, 1e9 - age))
    assert find_state(str(tmp_path), None).name == "state-000000006"
    distiller.steps = 8
    save_state(tmp_path, distiller, settings, keep=2)
    assert [int(p.name[6:]) for p in states(tmp_path)] == [6, 8]


def test_the_last_written_state_is_the_newest_even_if_the_clock_was_set_back(tmp_path, monkeypatch):
    distiller, settings = written(tmp_path, 2)
    monkeypatch.setattr(checkpoint.time, "time", lambda: 1e9)
    for distiller.steps in (4, 3):
        newest = save_state(tmp_path, distiller, settings, keep=9)
        assert find_state(str(tmp_path), None) == newest


def without(state, *names):
    header = json.loads((state / HEADER).read_text())
    (state / HEADER).write_text(json.dumps({k: v for k, v in header.items() if k not in names}))


def test_states_of_older_versions_resume_and_come_before_newer_ones(tmp_path):
    distiller, settings = written(tmp_path, 2, 10, 4)
    for state in states(tmp_path):
        without(state, "digests", "written_at")
    assert find_state(str(tmp_path), None).name == "state-000000010"
    assert load_state(states(tmp_path)[-1], distiller)["steps"] == 10
    distiller.steps = 3
    newest = save_state(tmp_path, distiller, settings, keep=1)
    assert find_state(str(tmp_path), None) == newest
    assert [int(p.name[6:]) for p in states(tmp_path)] == [3, 10]


def test_latest_is_the_run_that_wrote_last(tmp_path):
    for name, steps in (("000-a", 9), ("001-b", 4)):
        (tmp_path / name).mkdir()
        written(tmp_path / name, steps)
    assert find_state("latest", str(tmp_path)).parent.name == "001-b"


def test_an_unreadable_state_is_passed_over_with_a_note(tmp_path, capsys):
    written(tmp_path, 2, 4)
    (tmp_path / "state-000000004" / HEADER).write_text("[" * 100_000)
    assert find_state(str(tmp_path), None).name == "state-000000002"
    assert "note: " in (error := capsys.readouterr().err)
    assert "state-000000004" in error
    (tmp_path / "state-000000002" / HEADER).write_bytes(b"\xff")
    with pytest.raises(UserError, match="not a complete training state"):
        read_header(find_state(str(tmp_path), None))


def test_a_flipped_bit_is_found(tmp_path):
    distiller, _ = written(tmp_path, 2)
    (state,) = states(tmp_path)
    file = sorted(state.glob("*.safetensors"))[1]
    content = bytearray(file.read_bytes())
    content[-7] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=rf"{file.name} is damaged.*resume from another state"):
        load_state(state, distiller)


def test_a_shard_that_is_not_of_the_state_is_refused(tmp_path):
    """The reader would take tensors from it."""
    distiller, _ = written(tmp_path, 2)
    (state,) = states(tmp_path)
    save_network(state / "zzz.safetensors", small_teacher())
    with pytest.raises(UserError, match=r"zzz\.safetensors does not belong to the state"):
        load_state(state, distiller)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", -1), ("steps", True), ("steps", 2**63), ("written_at", math.nan),
        ("written_at", "x"), ("files", {"../x": 1}), ("files", [1]), ("digests", {"x": "y"}),
        ("options", []), ("tuning", [1]), ("files", {"\0": 1}),
    ],
)  # fmt: skip
def test_headers_with_wrong_values_are_refused_in_one_line(tmp_path, name, value):
    written(tmp_path, 2)
    (state,) = states(tmp_path)
    header = json.loads((state / HEADER).read_text()) | {name: value}
    (state / HEADER).write_text(json.dumps(header))
    with pytest.raises(UserError, match="not a complete training state"):
        read_header(state)


def test_leftovers_of_a_kill_never_block_a_start_and_a_users_files_stay(tmp_path):
    distiller, settings = written(tmp_path, 2)
    partial = ["state-000000002.tmp", "state-000000002.old.tmp", "state-000000001.0123abcd.tmp"]
    for name in partial:
        (tmp_path / name).mkdir()
        (tmp_path / name / "shard.safetensors").touch()
    ours = ["config.json.0123abcd.tmp", "snapshot-0000000004.safetensors.0123abcd.tmp"]
    theirs = ["notes.tmp", "my.0123abcd.tmp", "state-backup.tmp", "config.json.tmp"]
    for name in (*ours, *theirs):
        (tmp_path / name).touch()
    save_state(tmp_path, distiller, settings)  # of the same step
    remove_partial_files(tmp_path)
    assert {p.name for p in tmp_path.glob("*.tmp")} == {*theirs}
    assert load_state(states(tmp_path)[0], distiller)["steps"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("renames", [0, 1, 2, 3])
def test_a_state_of_the_same_step_is_there_whenever_its_replacement_is_cut(
    tmp_path, monkeypatch, renames
):
    distiller, settings = written(tmp_path, 2)
    real, done = os.replace, []

    def replace(source, target):
        if "state.json" not in str(target):
            if len(done) == renames:
                raise SystemExit
            done.append(target)
        real(source, target)

    writer = States(tmp_path, distiller, settings, 1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "replace", replace)
        assert writer.begin() is None
        with pytest.raises(SystemExit) if renames < 3 else contextlib.nullcontext():
            writer.finish()
    assert load_state(find_state(str(tmp_path), None), distiller)["steps"] == 2
    remove_partial_files(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["state-000000002"]
    assert load_state(find_state(str(tmp_path), None), distiller)["steps"] == 2


def test_a_state_that_is_being_read_is_not_removed(tmp_path):
    distiller, settings = written(tmp_path, 2)
    path, header = hold_state(lambda: find_state(str(tmp_path), None))
    distiller.steps = 4
    save_state(tmp_path, distiller, settings, keep=1)
    assert [int(p.name[6:]) for p in states(tmp_path)] == [2, 4]
    assert load_state(path, distiller)["steps"] == header["steps"] == 2
    distiller.steps = 5
    save_state(tmp_path, distiller, settings, keep=1)  # read, it may go
    assert [int(p.name[6:]) for p in states(tmp_path)] == [5]


def test_a_state_that_is_removed_while_it_is_looked_for_is_found_anew(tmp_path):
    distiller, settings = written(tmp_path, 2)
    calls = []

    def find():
        path = find_state(str(tmp_path), None)
        if not calls:
            distiller.steps = 4
            save_state(tmp_path, distiller, settings, keep=1)
        calls.append(path)
        return path

    path, header = hold_state(find)
    assert (path.name, header["steps"], len(calls)) == ("state-000000004", 4, 2)
    assert load_state(path, distiller)["steps"] == 4


def test_a_run_in_use_has_no_second_writer(tmp_path, run_command):
    arguments = small_run(tmp_path)
    (tmp_path / "run").mkdir()
    with RunLock(tmp_path / "run"):
        status, error = run_command(*arguments)
        assert (status, f"in use by process {os.getpid()}" in error) == (2, True)
    assert run_command(*arguments)[0] == 0
    with RunLock(tmp_path / "run"):
        status, error = run_command("train", "--resume", tmp_path / "run", "--kimg", 1)
    assert (status, f"in use by process {os.getpid()}" in error) == (2, True)
    assert error.count("\n") == 1


def test_a_run_whose_folder_was_taken_over_stops(tmp_path, run_command, monkeypatch):
    real = Distiller.step

    def step(self):
        taken.lost = self.steps == 2
        return real(self)

    class Taken(RunLock):
        def __init__(self, *arguments):
            nonlocal taken
            super().__init__(*arguments)
            taken = self

    taken = None
    monkeypatch.setattr(loop, "RunLock", Taken)
    monkeypatch.setattr(Distiller, "step", step)
    status, error = run_command(*small_run(tmp_path))
    assert (status, "another process has taken over" in error) == (1, True)


def changed_options(state, **options):
    header = json.loads((state / HEADER).read_text())
    header["options"] |= options
    (state / HEADER).write_text(json.dumps(header))


def test_a_state_brings_no_leave_to_run_programs(tmp_path, run_command, monkeypatch, script):
    """Neither trust, nor a detector with it, nor an address; the command line may."""
    evaluated = "--data", "digits", "--eval-every", 0.1, "--eval-images", 20, "--teacher-steps", 0
    assert run_command(*small_run(tmp_path, *evaluated, "--detector", "pixels"))[0] == 0
    out = tmp_path / "run"
    loaded = []
    real = torch.jit.load
    monkeypatch.setattr(torch.jit, "load", lambda *a, **k: (loaded.append(a), real(*a, **k))[1])
    changed_options(states(out)[-1], trust=True, detector=str(script))
    status, error = run_command("train", "--resume", out, "--kimg", 0.028)
    assert (status, "give --trust" in error, loaded) == (2, True, [])
    status, error = run_command("train", "--resume", out, "--kimg", 0.028, "--trust")
    assert (status, len(loaded)) == (0, 1), error


@pytest.mark.slow
@pytest.mark.parametrize("name", ["teacher", "data", "ref", "detector"])
def test_a_state_has_no_address_fetched(tmp_path, run_command, monkeypatch, cache, name):
    assert run_command(*small_run(tmp_path))[0] == 0
    out, url = tmp_path / "run", "https://example.com/x.safetensors"
    monkeypatch.setattr(download, "_download", lambda *a: pytest.fail("it was fetched"))
    changed_options(states(out)[-1], **{name: url})
    status, error = run_command("train", "--resume", out, "--kimg", 0.028)
    assert (status, f"{name}={url}" in error, f"give --{name}" in error) == (2, True, True)


def test_a_cached_address_of_a_state_is_used_again(tmp_path, run_command, cache):
    arguments = small_run(tmp_path)
    assert run_command(*arguments)[0] == 0
    url = "https://example.com/x.safetensors"
    target = download._cache_path(url)
    target.write_bytes((tmp_path / "teacher.safetensors").read_bytes())
    changed_options(states(tmp_path / "run")[-1], teacher=url)
    status, error = run_command("train", "--resume", tmp_path / "run", "--kimg", 0.028)
    assert status == 0, error


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value"),
    [("batch_size", "4"), ("alpha", [1]), ("kimg", None), ("seed", 1.5), ("precision", 7),
     ("log_every", True), ("teacher", {})],
)  # fmt: skip
def test_options_of_a_state_have_their_types(tmp_path, run_command, name, value):
    assert run_command(*small_run(tmp_path))[0] == 0
    changed_options(states(tmp_path / "run")[-1], **{name: value})
    status, error = run_command("train", "--resume", tmp_path / "run")
    assert (status, f"invalid value of {name}" in error, error.count("\n")) == (2, True, 1)


def test_a_damaged_config_of_another_run_does_not_stop_a_restart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    contents = [b"{", b"[]", b"\xff", b"7", b'{"launch": 7}', b'{"launch": "ours"}', b"[" * 100_000,
                b'{"launch": "ours", "started_at": "x"}']  # fmt: skip
    for i, content in enumerate(contents):
        (tmp_path / "runs" / f"{i:03d}-x").mkdir(parents=True)
        (tmp_path / "runs" / f"{i:03d}-x" / "config.json").write_bytes(content)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "ours")
    for count, run in (("1", Path("runs/005-x")), ("0", None), ("", None), ("x", None)):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        assert find_restarted_run(None) == run
    (tmp_path / "runs" / "000-x" / "config.json").write_text('{"launch": "ours", "started_at": 5}')
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert find_restarted_run(None) == Path("runs/000-x")


def test_snapshots_are_pruned_by_their_numbers(tmp_path):
    paths = [tmp_path / f"snapshot-{n:010d}.safetensors" for n in (4, 8, 12)]
    for path in reversed(paths):
        path.touch()
    os.utime(paths[2], (1, 1))
    prune(tmp_path, "snapshot-*.safetensors", 2, paths[2])
    assert sorted(tmp_path.iterdir()) == paths[1:]
    paths[0].touch()  # a run that was resumed from an older state
    prune(tmp_path, "snapshot-*.safetensors", 2, paths[0])
    assert sorted(tmp_path.iterdir()) == [paths[0], paths[2]]


def test_sample_grids_are_bounded_and_spread_over_the_run(tmp_path):
    for n in range(100):
        (tmp_path / f"samples-{n:010d}.png").touch()
        thin_out(tmp_path, "samples-*.png", 10)
        assert len(list(tmp_path.iterdir())) <= 10
    left = sorted(int(p.stem[8:]) for p in tmp_path.iterdir())
    assert left[0] == 0
    assert left[-1] == 99
    assert len(left) >= 6


def test_files_of_a_state_are_regular_and_bounded(tmp_path, monkeypatch):
    """A header larger than any, a pipe that would never end, a shard that is a device."""
    distiller, _ = written(tmp_path, 2, 4)
    newest, header = states(tmp_path)[1], states(tmp_path)[1] / HEADER
    content = header.read_bytes()
    most = max((state / HEADER).stat().st_size for state in states(tmp_path))
    monkeypatch.setattr(checkpoint, "MAX_HEADER_BYTES", most)
    assert find_state(str(tmp_path), None) == newest
    header.write_bytes(content.ljust(most + 1))
    assert find_state(str(tmp_path), None) == states(tmp_path)[0]
    with pytest.raises(UserError, match=r"has [\d,]+ bytes, more than"):
        load_state(newest, distiller)
    header.unlink()
    os.mkfifo(header)
    with pytest.raises(UserError, match="is a device or a pipe"):
        hold_state(lambda: newest)
    header.unlink()
    shard = sorted(newest.glob("*.safetensors"))[0]
    shard.unlink()
    shard.symlink_to(os.devnull)
    values = json.loads(content)
    values["files"][shard.name] = 0
    header.write_text(json.dumps(values))
    with pytest.raises(UserError, match="is a device or a pipe"):
        load_state(newest, distiller)


def test_a_shard_that_declares_too_much_is_refused_before_it_is_read(tmp_path):
    distiller, _ = written(tmp_path, 2)
    (state,) = states(tmp_path)
    without(state, "digests")
    shard = sorted(state.glob("*.safetensors"))[0]
    content = shard.read_bytes()
    shard.write_bytes((1 << 40).to_bytes(8, "little") + content[8:])
    with pytest.raises(UserError, match="length of its header is 1099511627776, not an integer"):
        load_state(state, distiller)


def test_other_settings_of_a_state_are_shown_in_few_characters(tmp_path):
    distiller, _ = written(tmp_path, 2)
    (state,) = states(tmp_path)
    header = json.loads((state / HEADER).read_text())
    header["identity"]["seed"] = [[1]] * 10_000
    (state / HEADER).write_text(json.dumps(header))
    with pytest.raises(UserError, match="with seed=a list, this run has seed=0"):
        load_state(state, distiller)


def test_a_state_that_a_running_run_has_pruned_names_the_run(tmp_path):
    written(tmp_path, 2)
    (state,) = states(tmp_path)
    shutil.rmtree(state)
    with RunLock(tmp_path), pytest.raises(UserError, match=f"is in use by process {os.getpid()}"):
        read_header(state)
    with pytest.raises(UserError, match="is not a training state"):
        read_header(state)


@pytest.mark.parametrize("backwards", [False, True])
def test_states_without_a_time_are_ordered_by_steps_however_they_are_listed(
    tmp_path, monkeypatch, backwards
):
    written(tmp_path, 2, 10, 4)
    for state in states(tmp_path):
        without(state, "written_at")
    real = Path.glob
    monkeypatch.setattr(Path, "glob", lambda *a: iter(sorted(real(*a), reverse=backwards)))
    assert find_state(str(tmp_path), None).name == "state-000000010"


def test_a_cut_shard_is_found_when_the_header_is_read(tmp_path):
    """Before a teacher is loaded or a digest is computed."""
    written(tmp_path, 2)
    (state,) = states(tmp_path)
    shard = sorted(state.glob("*.safetensors"))[0]
    size = shard.stat().st_size
    os.truncate(shard, size - 1)
    with pytest.raises(UserError, match=rf"{shard.name} has {size - 1} bytes instead of {size}"):
        read_header(state)
