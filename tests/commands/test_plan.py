"""The plan command on a small teacher, and what it refuses."""

import re
import sys

import pytest

from sid_fast import cli, plan
from sid_fast.models.registry import save_network
from tests.helpers.networks import small_teacher


@pytest.mark.slow
def test_plan_of_a_teacher_without_a_gpu(tmp_path, monkeypatch, capsys):
    save_network(tmp_path / "teacher.safetensors", small_teacher())
    arguments = ["--teacher", tmp_path / "teacher.safetensors", "--batch-size", 64, "--gpus", 2]
    arguments += ["--memory", 24, "--mfu", 0.4, "--kimg", 2000]
    monkeypatch.setattr(sys, "argv", ["plan", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main(plan.main, "sid_fast.plan")
    shown, said = capsys.readouterr()
    assert "sid_fast.train --teacher" in shown
    assert "counting the operations" in said or not said  # if it took seconds
    assert not stopped.value.code
    assert "2 x h200, 24 GiB each; all numbers are estimates" in shown
    for part in ("EMA", "activations", "CUDA and allocator", "ddp      fsdp"):
        assert part in shown
    assert "32 of 32 images per GPU: 1 micro-batch per step" in shown
    assert re.search(r"image, (10\.9|11)\d* forward passes", shown)
    assert "40% of 790 TFLOP/s" in shown
    assert "GB/s (assumed)" in shown
    assert "2 M images at" in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan", "--card", "tpu"], ["tpu", "h200"]),
        (["plan", "--precision", "int8"], ["int8", "bf16"]),
        (["plan", "--gpus", 3], ["batch_size=256", "3 processes", "255"]),
        (["plan", "--mfu", 2], ["mfu=2"]),
        (["plan", "--micro-batch", "-5"], ["micro_batch=-5", "choose from 1"]),
        (["train", "--gpus", 8], ["--gpus", "python -m sid_fast.plan"]),
        (["train", "--plan"], ["--plan", "python -m sid_fast.plan"]),
        (["train", "--micro-batch", "most"], ["'most'", "auto"]),
        (["train", "--micro-batch", "0"], ["micro_batch=0"]),
    ],
)
def test_a_bad_request_is_one_line(run_command, tmp_path, arguments, words):
    save_network(tmp_path / "teacher.safetensors", small_teacher())
    command, *arguments = arguments
    base = ["--teacher", tmp_path / "teacher.safetensors"]
    status, error = run_command(command, *base, *arguments)
    assert status == 2
    assert error.strip().count("\n") == 0  # nothing is counted first
    for word in words:
        assert word in error
