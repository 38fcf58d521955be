"""--deterministic: what it selects, what it refuses, and that a resumed run keeps it."""

import json
import os

import pytest
import torch

from sid_fast.errors import UserError
from sid_fast.kernels import dispatch
from sid_fast.models.registry import save_network
from sid_fast.performance import determinism
from tests.helpers.networks import small_teacher

GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    monkeypatch.delenv(determinism.WORKSPACE, raising=False)
    yield
    determinism.configure(False)
    dispatch.force(None)


@pytest.mark.parametrize("deterministic", [True, False])
def test_it_selects_algorithms_before_cuda_starts(deterministic):
    determinism.configure(deterministic)
    assert torch.are_deterministic_algorithms_enabled() is deterministic
    assert torch.backends.cudnn.deterministic is deterministic
    assert not torch.backends.cudnn.allow_tf32
    if deterministic:
        assert not torch.utils.deterministic.fill_uninitialized_memory
    assert os.environ.get(determinism.WORKSPACE) == (":4096:8" if deterministic else None)


def test_it_is_refused_after_cuda_has_started(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(UserError, match=determinism.WORKSPACE):
        determinism.configure(True)
    monkeypatch.setenv(determinism.WORKSPACE, ":16:8")
    determinism.configure(True)


def test_an_operation_without_a_deterministic_form_is_named():
    refused = pytest.raises(UserError, match=r"cumsum_cuda_kernel .*--no-deterministic")
    with refused, determinism.refusals():
        raise RuntimeError(
            "cumsum_cuda_kernel does not have a deterministic implementation, but you set "
            "'torch.use_deterministic_algorithms(True)'"
        )
    with pytest.raises(RuntimeError, match="shape"), determinism.refusals():
        raise RuntimeError("shape mismatch")


def test_apex_is_refused(monkeypatch):
    monkeypatch.setattr(dispatch._apex, "installed", lambda: True)
    with pytest.raises(UserError, match="deterministic"):
        dispatch.configure("group_norm=apex", GPU, deterministic=True)
    dispatch.configure("group_norm=apex", GPU)


def test_a_resumed_run_keeps_the_choice(tmp_path, run_command):
    save_network(tmp_path / "teacher.safetensors", small_teacher())
    out = tmp_path / "run"
    arguments = ["--teacher", tmp_path / "teacher.safetensors", "--batch-size", 4, "--out", out]
    assert run_command("train", *arguments, "--deterministic", "--kimg", 0.004)[0] == 0
    assert run_command("train", "--resume", out, "--kimg", 0.008)[0] == 0
    assert json.loads((out / "config.json").read_text())["deterministic"] is True
