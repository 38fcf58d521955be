"""A run that was stopped at any moment and resumed ends on the bits of one that was not."""

import errno
import json
import os
import re
import signal

import pytest
import torch
from processes import python, python_until
from test_distiller import small_teacher

from sid_fast.config.settings import Settings
from sid_fast.distiller import Distiller
from sid_fast.engine.checkpoint import find_state, load_state, read_state, save_state
from sid_fast.errors import UserError
from sid_fast.files.network import save_network
from sid_fast.files.snapshots import read_snapshot

LAST = "state-000000040.safetensors"


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
    return sorted(folder.glob("state-*.safetensors"))


def same_end(found, expected) -> bool:
    a, b = read_snapshot(found / LAST)[0], read_snapshot(expected / LAST)[0]
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("moment", [1, 3, 6])
def test_killed_and_resumed_ends_on_the_same_bits(command, tmp_path, moment):
    arguments, whole = command
    out = tmp_path / "run"

    def ready() -> bool:
        return bool(states(out)) and int(states(out)[-1].stem[6:]) >= 5 * moment

    status = python_until(ready, signal.SIGKILL, *arguments, "--out", out)
    assert status == -signal.SIGKILL
    assert not (out / LAST).exists()
    done = python(*arguments, "--out", out, "--resume", "latest")
    assert done.returncode == 0, done.stderr
    assert same_end(out, whole)
    # The log of the resumed run reads like that of an unbroken one, times aside.
    steps = [[r["images"], r.get("fake/loss")] for r in log(out)]
    assert steps == [[r["images"], r.get("fake/loss")] for r in log(whole)]


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("send", [signal.SIGTERM, signal.SIGINT])
def test_a_polite_signal_saves_the_step_it_stopped_at(command, tmp_path, send):
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
    assert [p.name for p in states(whole)] == ["state-000000035.safetensors", LAST]
    assert not list(whole.glob("*.tmp"))
    assert (whole / "config.json").exists()
    for kind in ("samples-*.png", "snapshot-*.safetensors"):
        found = [int(p.stem.split("-")[1]) for p in sorted(whole.glob(kind))]
        assert found == [0, 40, 80, 120, 160]


def test_going_on_from_an_older_state_keeps_what_it_writes(tmp_path):
    settings = Settings(batch_size=4)
    distiller = Distiller(small_teacher(), settings)
    for steps in (8, 9, 10, 9):
        distiller.steps = steps
        newest = save_state(tmp_path, distiller, settings, keep=1)
        assert states(tmp_path) == [newest]


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


def test_what_is_no_state_is_refused(tmp_path):
    with pytest.raises(UserError, match="no training state"):
        find_state("latest", str(tmp_path))
    with pytest.raises(UserError, match="no training state"):
        find_state(str(tmp_path / "none.safetensors"), None)
    save_network(tmp_path / "net.safetensors", small_teacher())
    with pytest.raises(UserError, match="not a training state"):
        load_state(tmp_path / "net.safetensors", Distiller(small_teacher(), Settings()))


def test_a_full_disk_stops_the_run_with_the_last_good_state_intact(
    tmp_path, monkeypatch, run_command
):
    from sid_fast.files import snapshots

    save_network(tmp_path / "teacher.safetensors", small_teacher())
    real = snapshots.save_file

    def until_the_disk_is_full(tensors, path, metadata):
        real(tensors, path, metadata)
        if "state-000000004" in str(path):
            with open(path, "r+b") as file:
                file.truncate(1000)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(snapshots, "save_file", until_the_disk_is_full)
    out = tmp_path / "run"
    status, error = run_command(
        "train", "--teacher", tmp_path / "teacher.safetensors", "--batch-size", 4,
        "--kimg", 0.032, "--state-every", 0.008, "--out", out,
    )  # fmt: skip
    assert status == 2
    assert "state-000000004" in error and "No space left" in error
    assert not list(out.glob("*.tmp"))
    assert [p.name for p in states(out)] == ["state-000000002.safetensors"]
    assert read_state(states(out)[0])[1]["steps"] == 2
