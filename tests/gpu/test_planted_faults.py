"""The acceptance checks fail when a fault is planted in what they check."""

import dataclasses

import pytest
import torch

from sid_fast import Distiller
from sid_fast.kernels.dispatch import choose
from sid_fast.models import EDM2Network
from sid_fast.models.edm_unet import layers
from tests.gpu import checks

CPU = torch.device("cpu")


def test_resume_sees_a_moment_that_was_not_restored(monkeypatch):
    state_dict = Distiller.state_dict

    def forgetful(self):
        state = state_dict(self).items()
        return {k: v for k, v in state if not k.startswith("fake_score.exp_avg_sq")}

    monkeypatch.setattr(Distiller, "state_dict", forgetful)
    error, bound, _ = checks.resumes(checks.Context(CPU, 1))
    assert error > bound


def test_nan_fails():
    assert checks.worst([0.1, 0.2]) == 0.2
    assert checks.worst([0.1, float("nan")]) == checks.worst([float("nan"), 0.1]) == float("inf")


@pytest.mark.parametrize("off", ["fake", "generator"])
def test_gradients_sees_either_network(off, monkeypatch):
    backward = Distiller.backward

    def wrong(self, phase, inputs, **which):
        losses = backward(self, phase, inputs, **which)
        if phase.name == off and self.settings.precision == "fp16":
            net = self.method.networks[phase.network]
            for p in net.parameters():
                p.grad *= 1.5
        return losses

    monkeypatch.setattr(Distiller, "backward", wrong)
    error, bound, note = checks.gradients_agree(checks.Context(CPU, 1), "fp16")
    assert error == pytest.approx(0.5, abs=0.05)
    assert error > bound
    assert "nan" not in note


@pytest.fixture
def smaller(monkeypatch):
    """A network that takes the interpreter seconds."""
    config = dataclasses.replace(checks.TINY, resolution=4, channel_mult=(1,), dropout=0.13)
    monkeypatch.setattr(checks, "TINY", config)
    return config


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fp32", "bf16"])
@pytest.mark.parametrize("factors", [(1.0, 1.0), (1.1, 1.1), (1.05, 0.95)], ids=str)
def test_network_sees_scaled_norms(smaller, monkeypatch, kind, factors):
    """In all channels or in every other one; dropout is off, since backends draw other masks."""

    def off(*args, **more):
        out = original(*args, **more)
        by = torch.tensor(factors).repeat(out.y.shape[1] // 2)[:, None, None].to(out.y.dtype)
        return out._replace(y=out.y * by) if choose("group_norm", CPU) == "triton" else out

    original = layers.kernels.group_norm
    monkeypatch.setattr(layers.kernels, "group_norm", off)
    error, bound, note = checks.network_agrees(checks.Context(CPU, 1), smaller, kind)
    assert (error <= bound) == (factors == (1, 1)), note


def test_within_sees_error_and_scale_separately():
    """16-bit noise may hide a scale error, and an error may leave the scale alone."""
    rng = torch.Generator().manual_seed(0)
    expected, noise, other = torch.randn(3, 10**5, generator=rng, dtype=torch.float64)
    eager = expected + 0.03 * noise
    usual, scaled, worse = (
        checks.within(actual, eager, expected, "bf16")[:2]
        for actual in (expected + 0.03 * other, 1.015 * eager, expected + 0.06 * other)
    )
    assert max(usual) < 1
    assert scaled[0] < 1 < scaled[1]
    assert worse[1] < 1 < worse[0]
    # The scale of eager's own may be off by more.
    assert max(checks.within(eager, 1.015 * eager, expected, "bf16")[:2]) < 1
    # In float32 eager's own error does not raise the limit.
    assert checks.within(eager, eager, expected, "fp32")[0] > 1


def test_every_backend_is_checked_once_the_default_first(monkeypatch):
    everything = ["default", "triton", "eager"]
    assert list(checks.backends()) == everything
    with checks.dispatch.forced("triton"):
        assert list(checks.backends()) == everything, "whatever is forced at the moment"
    monkeypatch.setattr(checks.dispatch, "runs", lambda device: {"block": "triton"})
    assert list(checks.backends()) == ["default", "eager"]


def test_a_check_that_would_interpret_whole_steps_is_skipped():
    with checks.Context(CPU, 1).use_backend():
        pass
    with (
        pytest.raises(pytest.skip.Exception, match="interpreter"),
        checks.Context(CPU, 1, "triton").use_backend(),
    ):
        pass


def test_bits_are_compared_with_deterministic_algorithms():
    """PyTorch's attention asks this switch alone, and not cuDNN's."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    with checks.deterministic():
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory is before


def test_edm2_is_checked_with_both_of_its_networks_normalised():
    context = dataclasses.replace(checks.Context(CPU, 1), network=checks.EDM2)
    distiller = context.distiller()
    assert isinstance(distiller.teacher, EDM2Network)
    assert distiller.generator.force_normalization
    assert distiller.fake_score.force_normalization
