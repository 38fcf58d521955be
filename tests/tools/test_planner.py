"""The planner: memory, time and traffic, from counts made up for the test."""

import dataclasses
from collections import Counter

import pytest

from sid_fast import Settings, SiDASettings
from sid_fast.tools.estimator import ALLOWANCE, GIB, Counts
from sid_fast.tools.planner import Cluster, text
from sid_fast.tools.planner import plan as planned
from tests.helpers.networks import small_teacher

# 1 GiB of weights per network, 1 GiB of activations and 11 TFLOP per image.
COUNTS = Counts(
    resident=Counter(
        teacher=GIB, weights=2 * GIB, gradients=2 * GIB, optimiser=2 * GIB, average=GIB, copies=GIB
    ),
    image=Counter(activations=GIB, workspace=0),
    flop=11e12,
    forward=1e12,
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


def test_the_warmup_of_sida_takes_less_time():
    """Of 400 kimg, 100 train the fake score alone, at 5 of 12 forward passes."""
    counts = dataclasses.replace(COUNTS, flop=12e12, fake_flop=5e12)
    settings = SiDASettings(batch_size=64)
    options = Cluster(tflops=200, mfu=0.5)
    found = planned(counts, settings, 400, options)
    assert found.days * 86400 == pytest.approx((300e3 * 12e12 + 100e3 * 5e12) / 100e12)
    assert found.warmup == pytest.approx(64 * 5e12 / 100e12)
    assert found.micro_batch % 32 == 0
    shown = text("x", small_teacher().config, counts, settings, 400, options)
    assert "12 forward passes" in shown
    assert "100 k images of the fake score alone: 5 forward passes, 3,200.0 ms per step" in shown
    assert "100 k images without the adversarial loss" in shown
    short = planned(counts, settings, 50, options)  # all of it warm-up
    assert short.days * 86400 == pytest.approx(50e3 * 5e12 / 100e12)
    late = SiDASettings(batch_size=64, generator_start_kimg=0.0, adversarial_start_kimg=0.0)
    assert planned(counts, late, 400, options).warmup == 0
    assert "warm-up" not in text("x", small_teacher().config, counts, late, 400, options)
    assert "warm-up" not in text("x", small_teacher().config, COUNTS, SETTINGS, 400, options)


def test_a_plan_says_what_to_change_where_nothing_fits():
    shown = text("x", small_teacher().config, COUNTS, SETTINGS, 1, Cluster(memory=8))
    assert "does not fit: one image takes 12.0 GiB, a GPU has 8." in shown
    assert "--card" in shown
    assert "--checkpoint-activations" in shown
    assert "--gpus 8, sharded: 6.9 GiB each" in shown
    assert "bf16" not in shown.partition("Instead")[2]  # it is in bf16
    shown = text("x", small_teacher().config, COUNTS, SETTINGS, 1, Cluster(memory=9, gpus=8))
    assert "fits only when sharded" in shown


@pytest.mark.parametrize(
    ("kimg", "told"),
    [
        (50_000, "0.1 days, 0.1 GPU-days"),
        (5000, "0.3 hours, "),
        (60, "0.2 minutes, 0.2 GPU-minutes"),
    ],
)
def test_a_short_run_is_told_in_hours_or_minutes(kimg, told):
    options = Cluster(tflops=100, mfu=1.0)
    counts = dataclasses.replace(COUNTS, flop=2e10)
    shown = text("x", small_teacher().config, counts, SETTINGS, kimg, options)
    assert f" images/s: {told}" in shown
