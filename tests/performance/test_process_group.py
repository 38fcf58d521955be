"""torchrun's environment variables: read as a whole, or refused in one line."""

import socket

import pytest
import torch

from sid_fast.errors import UserError
from sid_fast.performance.process_group import Launch, launch, named_device

TORCHRUN = {
    "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2",
    "TORCHELASTIC_RESTART_COUNT": "1", "MASTER_ADDR": "host", "MASTER_PORT": "29500",
}  # fmt: skip


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    return lambda values: [monkeypatch.setenv(name, value) for name, value in values.items()]


def test_what_torchrun_sets_is_read(environment):
    assert launch() == Launch(0, 0, 1, 1, 0)
    environment({"WORLD_SIZE": "1"})  # as some clusters set it for one process
    assert launch() == Launch(0, 0, 1, 1, 0)
    environment(TORCHRUN)
    assert launch() == Launch(3, 1, 4, 2, 1)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"WORLD_SIZE": ""}, ["WORLD_SIZE=''"]),
        ({"WORLD_SIZE": "two"}, ["WORLD_SIZE='two'"]),
        ({"WORLD_SIZE": "0"}, ["WORLD_SIZE='0'", "from 1"]),
        ({"WORLD_SIZE": "9" * 5000}, ["WORLD_SIZE='999"]),
        ({"LOCAL_RANK": " 1"}, ["LOCAL_RANK=' 1'"]),
        ({"LOCAL_RANK": "-1"}, ["LOCAL_RANK='-1'"]),
        ({"TORCHELASTIC_RESTART_COUNT": ""}, ["TORCHELASTIC_RESTART_COUNT=''"]),
        ({"LOCAL_WORLD_SIZE": "2.0"}, ["LOCAL_WORLD_SIZE='2.0'"]),
        ({"RANK": "1"}, ["RANK is set without WORLD_SIZE"]),
        ({"LOCAL_RANK": "1"}, ["LOCAL_RANK is set without WORLD_SIZE"]),
        ({"WORLD_SIZE": "2"}, ["WORLD_SIZE=2 is set without RANK"]),
        (TORCHRUN | {"MASTER_ADDR": ""}, ["without MASTER_ADDR"]),
        (TORCHRUN | {"MASTER_PORT": "http"}, ["MASTER_PORT='http'"]),
        (TORCHRUN | {"RANK": "4"}, ["RANK=4 is not below WORLD_SIZE=4"]),
    ],
)
def test_a_broken_environment_is_one_line(environment, run_command, tmp_path, values, words):
    environment(values)
    status, error = run_command("generate", "--network", "digits", "--out", tmp_path / "out")
    assert status == 2
    assert error.count("\n") == 1
    assert error.startswith("error")
    for word in [*words, "torchrun" if "MASTER_PORT" not in words[0] else "1 to 65535"]:
        assert word in error
    assert not list(tmp_path.iterdir())


def test_processes_that_cannot_meet_are_one_line(environment, run_command, tmp_path):
    with socket.create_server(("localhost", 0)) as other:
        port = str(other.getsockname()[1])
        environment(TORCHRUN | {"RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": port})
        status, error = run_command("generate", "--network", "digits", "--out", tmp_path / "out")
    assert status == 2
    assert f"cannot meet at MASTER_ADDR:MASTER_PORT, localhost:{port}" in error


@pytest.mark.parametrize(
    ("cuda", "count", "told"),
    [
        (None, 0, "device=cuda cannot be used: this PyTorch is built for CPUs alone; give --devi"),
        ("13.0", 0, "device=cuda cannot be used: no GPU is visible; give --device cpu, or auto"),
        ("13.0", 1, "device=cuda:3 does not exist: 1 GPU is visible; use fewer processes"),
        ("13.0", 2, "device=cuda:3 does not exist: 2 GPUs are visible; use fewer processes"),
    ],
)
def test_a_missing_gpu_is_named(monkeypatch, cuda, count, told):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(UserError) as refused:
        named_device("cuda:3" if count else "cuda")
    assert str(refused.value).startswith(told)
