"""Whole steps: the recorded trajectory, accumulation, non-finite samples and random draws."""

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import sid_fast
from sid_fast import Distiller, Draw, Settings, noise
from sid_fast.config.types import grad_accum_steps
from sid_fast.errors import UserError
from sid_fast.methods.base import RandomStream, one_hot_labels
from sid_fast.training.optimizer import ema_beta
from tests.helpers.golden import (
    TRAJECTORY_TOLERANCE,
    golden_draws,
    golden_settings,
    read,
    trajectory_error,
)
from tests.helpers.networks import FAST, small_teacher, weights

TRAJECTORIES = ["ddpmpp_uncond", "adm_cond"]


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAJECTORIES)
def test_golden_trajectory(golden, name):
    data = read(golden / f"trajectory_{name}.npz")
    teacher = sid_fast.load_network(golden / f"{name}.pkl")
    start = {k: v.clone() for k, v in teacher.state_dict().items()}
    distiller = Distiller(teacher, golden_settings(data))
    steps = int(data["steps"])
    for step in range(steps):
        metrics = distiller.step(golden_draws(data, step))
        assert int(metrics["fake/dropped"]) == int(metrics["generator/nonfinite"]) == 0
    for net, key in (
        (distiller.fake_score, "fake_score"),
        (distiller.generator, "G"),
        (distiller.ema, "G_ema"),
    ):
        assert trajectory_error(data, start, net, key) <= TRAJECTORY_TOLERANCE, key
    assert all(torch.equal(v, start[k]) for k, v in teacher.state_dict().items())


def test_steps_are_a_function_of_seed_and_step_alone():
    """With dropout and augmentation on, whatever else draws from torch's generator."""
    settings = Settings(dropout=0.2, augment_p=0.5, micro_batch=2, **FAST)
    runs = []
    for seed in (1, 1, 2):
        distiller = Distiller(small_teacher(), settings, seed=seed)
        for _ in range(3):
            torch.rand(len(runs) + 1)
            distiller.step()
        runs.append(weights(distiller))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_a_step_leaves_the_callers_random_state_alone():
    distiller = Distiller(small_teacher(), Settings(dropout=0.2, **FAST))
    before = torch.get_rng_state()
    distiller.step()
    assert torch.equal(torch.get_rng_state(), before)


def test_only_the_network_that_learns_is_in_training_mode():
    """Dropout acts nowhere else."""
    distiller = Distiller(small_teacher(), Settings(dropout=0.2, **FAST))
    draws = distiller.draw()
    modes = {}
    for net in ("generator", "fake_score", "teacher"):

        def note(module, inputs, net=net):
            modes.setdefault((phase, net), set()).add(module.training)

        getattr(distiller, net).model.register_forward_pre_hook(note)
    phase = "fake"

    class Switching(list):
        def __getitem__(self, i):
            nonlocal phase
            phase = "generator"
            return super().__getitem__(i)

    distiller.step({"fake": draws["fake"], "generator": Switching(draws["generator"])})
    assert modes == {
        ("fake", "generator"): {False},
        ("fake", "fake_score"): {True},
        ("generator", "generator"): {True},
        ("generator", "fake_score"): {False},
        ("generator", "teacher"): {False},
    }


def test_draws_differ_by_rank_seed_and_step(monkeypatch):
    seen = []
    for seed, rank in ((0, 0), (0, 1), (1, 0)):
        monkeypatch.setattr("sid_fast.performance.process_group.rank", lambda rank=rank: rank)
        distiller = Distiller(small_teacher(), Settings(**FAST), seed=seed)
        for step in range(2):
            distiller.steps = step
            draws = distiller.draw()
            seen += [d.z for rounds in draws.values() for d in rounds]
    assert len({float(z.sum()) for z in seen}) == len(seen) == 12


def test_dropout_differs_by_rank(monkeypatch):
    found = []
    for rank in (0, 1):
        draws = Distiller(small_teacher(), Settings(**FAST)).draw()
        monkeypatch.setattr("sid_fast.performance.process_group.rank", lambda rank=rank: rank)
        distiller = Distiller(small_teacher(), Settings(dropout=0.5, **FAST))
        distiller.step(draws)
        found.append(weights(distiller))
        monkeypatch.undo()
    assert not torch.equal(*found)


def test_draws_follow_the_settings():
    settings = Settings(batch_size=4000, tmax=500, augment_p=1.0)
    draws = Distiller(small_teacher(), settings, seed=3).draw()
    sigma = draws["generator"][0].sigma
    assert float(sigma.max()) <= float(noise.generator_sigma(torch.tensor(0.5)))
    assert float(sigma.max()) > float(noise.generator_sigma(torch.tensor(0.49)))
    log_sigma = draws["fake"][0].sigma.log()
    assert float(log_sigma.mean()) == pytest.approx(-1.2, abs=0.1)
    assert float(log_sigma.std()) == pytest.approx(1.2, abs=0.1)
    assert (draws["fake"][0].augment["rotate"] != 0).all()
    assert draws["generator"][0].augment is None
    labels = draws["fake"][0].class_labels
    assert labels.sum(1).eq(1).all()
    assert labels.mean(0).sub(0.1).abs().max() < 0.03


@pytest.mark.parametrize(
    ("field", "value"), [("z", 1e30), ("noise", 1e20), ("sigma", 0.0), ("sigma", 1e25)]
)
def test_a_huge_finite_draw_is_dropped_like_an_infinite_one(field, value):
    """It would overflow inside the networks and spoil every weight's gradient."""
    distiller = Distiller(small_teacher(), Settings(**FAST))
    draws = distiller.draw()
    for rounds in draws.values():
        getattr(rounds[0], field)[1] = value
    metrics = distiller.step(draws)
    assert int(metrics["fake/dropped"]) == int(metrics["generator/dropped"]) == 1
    assert int(metrics["fake/nonfinite"]) == int(metrics["generator/nonfinite"]) == 0
    assert torch.isfinite(weights(distiller)).all()


@pytest.mark.slow
def test_a_step_never_synchronises_with_the_host():
    """It neither reads a value nor copies one to the device: a CUDA graph can do neither."""
    settings = Settings(**FAST, micro_batch=1, augment_p=0.5, dropout=0.2, generator_beta1=0.9)
    distiller = Distiller(small_teacher(), settings, label_weights=torch.ones(10))
    distiller.run()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        distiller.run()
    names = {event.key for event in found.key_averages()}
    assert {
        "aten::bitwise_xor",
        "aten::grid_sampler",
    } <= names  # the latter in the warp's operator
    for name in ("item", "_local_scalar_dense", "nonzero", "is_nonzero", "lift_fresh"):
        assert f"aten::{name}" not in names


def test_labels_are_drawn_in_proportion():
    rng = RandomStream(torch.tensor([0, 0, 0]), "fake", 40_000)
    weights = torch.tensor([0.0, 1.0, 3.0, 0.0, 4.0, 0.0])
    found = one_hot_labels(rng, 6, weights.double().cumsum(0)).mean(0)
    assert torch.allclose(found, weights / 8, atol=0.01)
    assert torch.equal(found == 0, weights == 0)


def test_labels_follow_the_weights():
    only_three = torch.zeros(10).index_fill(0, torch.tensor([3]), 1.0)
    draws = Distiller(small_teacher(), Settings(**FAST), label_weights=only_three).draw()
    assert all(d.class_labels.argmax(1).eq(3).all() for d in draws["fake"] + draws["generator"])


def test_rounds_add_up_to_the_whole_batch():
    whole = Distiller(small_teacher(), Settings(augment_p=0.5, eps=1.0, **FAST))
    halves = Distiller(small_teacher(), Settings(augment_p=0.5, eps=1.0, micro_batch=2, **FAST))
    draws = whole.draw()

    def part(draw: Draw, rows: slice) -> Draw:
        warp = draw.augment and {k: v[..., rows] for k, v in draw.augment.items()}
        return Draw(*(v[rows] for v in (draw.z, draw.sigma, draw.noise, draw.class_labels)), warp)

    start = weights(whole)
    whole.step(draws)
    halves.step({k: [part(d[0], slice(0, 2)), part(d[0], slice(2, 4))] for k, d in draws.items()})
    moved = (weights(whole) - start).norm()
    assert (weights(whole) - weights(halves)).norm() < 1e-4 * moved


@pytest.mark.parametrize("field", ["z", "noise", "sigma", "class_labels"])
def test_a_step_with_a_nan_draw_equals_the_step_without_it(field):
    """Up to the rounding of convolutions at another batch size."""
    settings = Settings(eps=1.0, **FAST)
    spoiled, without = (Distiller(small_teacher(), settings) for _ in range(2))
    draws = spoiled.draw()
    start = weights(spoiled)
    keep = torch.tensor([True, False, True, True])
    names = ("z", "sigma", "noise", "class_labels")
    without.step({k: [Draw(*(getattr(d[0], n)[keep] for n in names))] for k, d in draws.items()})
    for rounds in draws.values():
        getattr(rounds[0], field)[1] = torch.nan
    metrics = spoiled.step(draws)
    assert int(metrics["fake/dropped"]) == int(metrics["generator/dropped"]) == 1
    assert int(metrics["fake/nonfinite"]) == int(metrics["generator/nonfinite"]) == 0
    moved = (weights(without) - start).norm()
    assert (weights(spoiled) - weights(without)).norm() < 1e-4 * moved


def test_a_step_without_a_finite_sample_changes_nothing():
    distiller = Distiller(small_teacher(), Settings(generator_beta1=0.9, **FAST))
    distiller.step()
    before = {k: v.clone() for k, v in distiller.state_dict().items()}
    draws = distiller.draw()
    for rounds in draws.values():
        rounds[0].z.fill_(torch.nan)
    metrics = distiller.step(draws)
    assert bool(metrics["fake/skipped"])
    assert bool(metrics["generator/skipped"])
    assert all(torch.equal(v, before[k]) for k, v in distiller.state_dict().items())
    assert not bool(distiller.step()["generator/skipped"])


def test_ema_follows_its_ramp_up():
    assert ema_beta(0, 256, 500, 0.05) == 0
    assert ema_beta(100_000, 256, 500, 0.05) == pytest.approx(0.5 ** (256 / 5000))
    assert ema_beta(10**9, 256, 500, 0.05) == pytest.approx(0.5 ** (256 / 500_000))
    assert ema_beta(1000, 256, 500, 0) == pytest.approx(0.5 ** (256 / 500_000))


def test_no_first_moment_is_kept_when_beta1_is_zero():
    names = Distiller(small_teacher(), Settings(generator_beta1=0.9, **FAST)).state_dict()
    assert any(".exp_avg." in n for n in names)
    assert not any(n.startswith("fake_score.exp_avg.") for n in names)


@pytest.mark.parametrize(
    ("field", "value"),
    [("alpha", 7.0), ("alpha", np.nan), ("tmax", 0), ("tmax", 1001), ("dropout", 1.5)],
)
def test_settings_out_of_range_are_refused_by_name(field, value):
    with pytest.raises(UserError, match=field):
        Distiller(small_teacher(), Settings(**{field: value}))


def test_a_batch_that_does_not_divide_names_the_nearest_that_does():
    with pytest.raises(UserError, match="nearest multiple is 96"):
        grad_accum_steps(Settings(batch_size=100, micro_batch=32))
    assert grad_accum_steps(Settings(batch_size=96, micro_batch=16), ranks=2) == 3
