"""What a training step computes and holds: FLOP, operations and memory."""

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from sid_fast import Settings, SiDASettings, losses
from sid_fast.cli import presets
from sid_fast.models import EDMNetwork
from sid_fast.models.teachers import TEACHERS
from sid_fast.tools import estimator, op_counter
from tests.helpers.networks import TINY

MIB = 2**20
CIFAR10 = dataclasses.replace(TEACHERS["cifar10-uncond"].network, num_blocks=1)


@pytest.fixture(scope="module")
def cifar():
    """Steps of CIFAR-10's network, one block a level, in bf16: of one image, twice of two."""
    preset = presets("train")["cifar10-uncond"]
    settings = Settings(dropout=preset["dropout"], augment_p=preset["augment_p"])
    return estimator.steps(
        CIFAR10,
        dataclasses.replace(settings, precision="bf16"),
        [1, 2, 2],
    )


@pytest.mark.slow
def test_a_step_is_eleven_forwards(cifar):
    forward = sum(op.flops for op in op_counter.forward(CIFAR10))
    for step in cifar:
        found = sum(op.flops for op in step.ops) / step.images
        assert found == pytest.approx(11 * forward, rel=0.01)


@pytest.mark.slow
def test_a_step_does_the_same_every_time(cifar):
    """As a CUDA graph needs: no operation or shape depends on the step or on values."""
    assert cifar[1].ops == cifar[2].ops
    assert cifar[1].peak == cifar[2].peak


@pytest.mark.slow
def test_memory_is_what_the_networks_and_the_images_need(cifar):
    with torch.device("meta"):
        weights = sum(p.numel() for p in EDMNetwork(CIFAR10).parameters()) * 4 / MIB
    small, large = ({k: v / MIB for k, v in step.peak.items()} for step in cifar[:2])
    for kind, networks in (
        ("teacher", 0.5),  # in 16 bit
        ("weights", 2),
        ("gradients", 2),
        ("optimiser", 2),  # β1 = 0 keeps no first moment
        ("average", 1),
        ("copies", 1),  # of two networks in 16 bit, their GroupNorms excepted
    ):
        assert small[kind] == large[kind]
        assert small[kind] == pytest.approx(networks * weights, rel=0.1), kind
    # Rounding to whole allocations aside, the rest goes with the images, or with a weight's size.
    assert large["activations"] == pytest.approx(2 * small["activations"], rel=0.02)
    assert small["workspace"] < large["workspace"] < 2 * small["workspace"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("read", "error", "backend"),
    [
        (lambda x: x.sum().item(), DataDependentOutputException, "eager"),
        (lambda x: x[x > 0], DynamicOutputShapeException, "triton"),
    ],
)
def test_a_step_that_reads_a_value_fails(monkeypatch, read, error, backend):
    finite = losses.finite

    def spoiled(*tensors):
        read(tensors[0])
        return finite(*tensors)

    monkeypatch.setattr(losses, "finite", spoiled)
    with pytest.raises(error):
        estimator.steps(TINY, Settings(), [1], backend)


@pytest.mark.slow
def test_sida_adds_the_encoder_and_its_warmup_costs_less():
    """On FLOP of an encoder and a network that are counted apart."""
    sid, sida = (
        estimator.counts(TINY, kind(precision="fp32"), backends="eager")
        for kind in (Settings, SiDASettings)
    )
    with op_counter.fake("eager"), torch.no_grad(), op_counter.Count() as count:
        EDMNetwork(TINY).logits(torch.empty(1, 1, 8, 8), torch.ones(1), torch.empty(1, 10))
    encoder = sum(op.flops for op in count.ops)
    assert sid.fake_flop == 0
    assert 0.1 < encoder / sid.forward < 0.5
    assert sida.forward == sid.forward
    # Backward leaves out the first convolution's gradient of the images.
    assert sida.flop - sid.flop == pytest.approx(3 * encoder, rel=0.02)
    assert sida.fake_flop == pytest.approx(4 * sid.forward + 3 * encoder, rel=0.07)
    assert sida.memory(8).total() >= sid.memory(8).total()
