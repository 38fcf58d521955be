"""The plan: its arithmetic on counts made up, and the command on a small teacher."""

import sys
from collections import Counter

import pytest

from sid_fast import Settings, cli, plan
from sid_fast.models.registry import save_network
from sid_fast.tools.estimator import ALLOWANCE, GIB, Counts
from sid_fast.tools.planner import Cluster, text
from sid_fast.tools.planner import plan as planned
from tests.helpers.networks import small_teacher

# 1 GiB of weights a network, 1 GiB of activations and 11 TFLOP an image.
COUNTS = Counts(
    resident=Counter(teacher=1, weights=2, gradients=2, optimiser=2, average=1, copies=1),
    image=Counter(activations=1, workspace=0),
    flop=11e12,
    forward=1e12,
    parameters=0,
    backends="triton",
)
COUNTS = Counts(
    *(Counter({k: v * GIB for k, v in c.items()}) for c in (COUNTS.resident, COUNTS.image)),
    COUNTS.flop,
    COUNTS.forward,
    parameters=GIB // 4,
    backends="triton",
)
SETTINGS = Settings(batch_size=64)


def test_the_largest_micro_batch_that_fits_is_a_divisor():
    fits = 9 + 2 + 16  # what stays, the allowance, and 16 images
    for memory, micro in ((fits, 16), (fits - 0.01, 8), (fits + 15, 16), (80, 64), (11.5, 0)):
        found = planned(COUNTS, SETTINGS, 1000, Cluster(memory=memory))
        assert (found.micro_batch, found.grad_accum_steps) == (micro, 64 // micro if micro else 0)
    assert found.memory["one GPU"].total() == 12 * GIB
    assert ALLOWANCE == 2 * GIB


def test_time_and_length_of_a_run():
    found = planned(COUNTS, SETTINGS, 6400, Cluster(tflops=200, mfu=0.5))
    assert found.flop == 64 * 11e12
    assert found.compute == pytest.approx(7.04)
    assert found.exposed == 0
    assert found.traffic == 0
    assert found.images_per_second == pytest.approx(64 / 7.04)
    assert found.days == pytest.approx(100_000 * 7.04 / 86400)


def test_shards_and_traffic():
    found = planned(COUNTS, SETTINGS, 1000, Cluster(gpus=4, memory=80, tflops=100, mfu=1, link=1))
    plain, sharded = found.memory["ddp"], found.memory["fsdp"]
    assert found.micro_batch == 16
    assert found.grad_accum_steps == 1
    assert plain["reduction"] == sharded["reduction"] == GIB
    for kind in ("weights", "gradients", "optimiser", "average"):
        assert sharded[kind] * 4 == plain[kind], kind
    for kind in ("teacher", "copies", "activations"):
        assert sharded[kind] == plain[kind], kind
    assert found.traffic == 2 * 0.75 * 2 * GIB
    assert found.communication == pytest.approx(3 * GIB / 1e9)
    # Two networks' backwards of 2 forwards each of 16 images, at 100 TFLOP/s.
    assert found.exposed == pytest.approx(3 * GIB / 1e9 - 4 * 16 / 100)
    options = {"gpus": 4, "memory": 25, "tflops": 100, "mfu": 1}
    sharded = planned(COUNTS, SETTINGS, 1000, Cluster(link=1, **options))
    assert sharded.memory["ddp"].total() > 25 * GIB
    assert sharded.micro_batch == 16
    assert sharded.exposed == found.exposed
    assert planned(COUNTS, SETTINGS, 1000, Cluster(link=6, **options)).exposed == 0


def test_a_plan_says_what_to_change_where_nothing_fits():
    shown = text("x", small_teacher().config, COUNTS, SETTINGS, 1, Cluster(memory=8))
    assert "does not fit: one image takes 12.0 GiB, a GPU has 8." in shown
    assert "--card" in shown
    assert "--checkpoint-activations" in shown
    assert "--gpus 8, sharded: 6.9 GiB each" in shown
    assert "bf16" not in shown.partition("Instead")[2]  # it is in bf16
    shown = text("x", small_teacher().config, COUNTS, SETTINGS, 1, Cluster(memory=9, gpus=8))
    assert "fits only when sharded" in shown


def test_plan_of_a_teacher_without_a_gpu(tmp_path, monkeypatch, capsys):
    save_network(tmp_path / "teacher.safetensors", small_teacher())
    arguments = ["--teacher", tmp_path / "teacher.safetensors", "--batch-size", 64, "--gpus", 2]
    arguments += ["--memory", 24, "--mfu", 0.4, "--kimg", 2000]
    monkeypatch.setattr(sys, "argv", ["plan", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main(plan.main, "sid_fast.plan")
    shown, said = capsys.readouterr()
    assert said.startswith("counting the operations")
    assert not stopped.value.code
    assert "2 x h200, 24 GiB each; all numbers are estimates" in shown
    for part in ("EMA", "activations", "CUDA and allocator", "ddp      fsdp"):
        assert part in shown
    assert "32 of 32 images per GPU: 1 micro-batch per step" in shown
    assert "11 forward passes" in shown
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
