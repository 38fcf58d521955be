"""Counted FLOP, bytes and launches, against published figures and small cases done by hand."""

from collections import Counter

import pytest
import torch

from benchmarks.analysis import passes
from sid_fast.models import EDMNetwork
from sid_fast.models.teachers import TEACHERS
from sid_fast.tools import op_counter
from tests.helpers.networks import SMALL


@pytest.mark.parametrize(
    ("name", "gflop", "million", "tensors", "norms", "attentions"),
    [
        ("cifar10-uncond", 42.4, 55.7, 417, 73, 6),
        ("ffhq64", 83.7, 61.8, 541, 95, 6),
        ("imagenet64-cond", 219.3, 295.9, 541, 95, 22),
    ],
)
def test_flop_and_layers_of_the_published_networks(
    name, gflop, million, tensors, norms, attentions
):
    network = TEACHERS[name].network
    with torch.device("meta"):
        params = list(EDMNetwork(network).parameters())
    assert len(params) == tensors
    assert sum(p.numel() for p in params) / 1e6 == pytest.approx(million, abs=0.05)
    ops = op_counter.forward(network)
    assert sum(op.flops for op in ops) / 1e9 == pytest.approx(gflop, abs=0.05)
    kinds = Counter(op.name for op in ops)
    assert (kinds["group_norm"], kinds["attention"]) == (norms, attentions)


def test_every_layer_is_charged_for_its_own_work_and_bytes():
    by_layer = {}
    for op in op_counter.forward(SMALL, "bf16"):
        by_layer.setdefault((op.layer, op.name), op)
    block = "EDMNetwork.model.enc.8x8_block0"  # 16 -> 16 channels at 8x8
    conv = by_layer[block, "convolution"]
    assert conv.flops == 2 * 16 * 16 * 9 * 64
    assert conv.nbytes == 2 * (2 * 16 * 64 + 16 * 16 * 9)  # x and y, weight
    norm = by_layer[f"{block}.norm0", "group_norm"]
    # x, its sum with a bias, and y in 16 bit; weight and twice bias, statistics of 4 groups in 32.
    assert norm.nbytes == 2 * 3 * 16 * 64 + 4 * (3 * 16 + 2 * 4)
    attention = by_layer["EDMNetwork.model.dec.4x4_in0", "attention"]  # 32 channels, 16 pixels
    assert attention.flops == 2 * 2 * 16 * 16 * 32


@pytest.mark.parametrize(
    ("sizes", "types", "copies", "adds"),
    [
        ([8] * 64, "fb", 1, 64),  # from one type into another; adding takes a launch each
        ([8] * 65, "ff", 2, 2),  # 64 tensors of two lists
        ([65536 * 320], "ff", 1, 1),  # 320 chunks
        ([65536 * 320 + 1], "ff", 2, 2),
        ([65536 * 319, 65537, 8], "ff", 2, 2),  # a tensor that ends in the second launch
        ([65536 * 320 + 1] + [8] * 64, "ff", 3, 3),  # and counts among the tensors of that
    ],
)
def test_a_list_operation_takes_the_launches_it_takes_on_cuda(sizes, types, copies, adds):
    with op_counter.fake(), op_counter.Count() as count:
        into, of = (
            [torch.empty(n, dtype={"f": torch.float32, "b": torch.bfloat16}[kind]) for n in sizes]
            for kind in types
        )
        torch._foreach_copy_(into, of)
        torch._foreach_add_(into, of)
    assert [op.launches for op in count.ops] == [copies, adds]


@pytest.mark.slow
def test_a_round_starts_few_small_kernels():
    step = passes.of_micro_batch("ffhq64", "triton")  # of CIFAR-10's architecture, with more levels
    found = passes.launches(step, 3 * 64**2)
    assert sum(n for kind, (n, _) in found.items() if kind.startswith("pointwise")) <= 300
    names = Counter(op.name for op in step.ops)
    assert "slice_backward" not in names
    assert "copy_" not in names
    assert sum(op.launches for op in step.ops if op.name == "group_norm_backward") > sum(
        op.name == "group_norm_backward" for op in step.ops
    )


def test_a_broadcast_operand_is_read_once():
    with op_counter.fake(), op_counter.Count() as count:
        torch.add(torch.empty(8, 16), torch.empty(16).expand(8, 16))
        torch.empty(100).zero_()
    add, zero = count.ops
    assert add.nbytes == 4 * (8 * 16 + 16 + 8 * 16)
    assert zero.nbytes == 4 * 100


def test_the_reference_moves_more_than_the_kernels():
    """Published form: norm, add, activation each pass over memory; the kernel reads and writes."""

    def passes(backend):
        ops = [
            op for op in op_counter.forward(SMALL, "bf16", backend) if op.layer.endswith("norm1")
        ]
        return sum(op.nbytes for op in ops)

    assert 2.5 < passes("eager") / passes("triton") < 5


def test_activations_are_what_autograd_saves():
    """A convolution keeps its input, silu its own; of two chained, 2 + 1 tensors live at most."""
    with op_counter.fake(), op_counter.Count() as count:
        weight = torch.empty(8, 8, 3, 3, requires_grad=True)
        x = torch.empty(4, 8, 16, 16)
        count.set_kind("weights", weight)
        y = torch.nn.functional.silu(torch.nn.functional.conv2d(x, weight, padding=1))
        assert count.live["activations"] == 2 * x.nbytes
        assert count.live["workspace"] == x.nbytes
        y.sum().backward()
        del x, y
    assert count.live["weights"] == weight.nbytes + 256  # 512-byte allocations
    assert count.live["activations"] == 0
    assert count.peak.total() > count.live.total()
