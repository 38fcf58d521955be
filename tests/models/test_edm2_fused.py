"""EDM2's U-Net on the fused kernels: no unfused passes, the same outputs and gradients."""

import copy
import dataclasses
from collections import Counter

import pytest
import torch

from benchmarks.analysis import passes
from sid_fast.kernels import dispatch
from sid_fast.models import EDM2Network
from tests.helpers.golden import relative
from tests.helpers.networks import SMALL_EDM2, small_edm2

WIDE = dataclasses.replace(
    SMALL_EDM2, resolution=32, channel_mult=(1, 2), attention_resolutions=(16,), channels=4
)
RESAMPLING = {
    "aten::avg_pool2d", "aten::avg_pool2d_backward",
    "aten::upsample_nearest2d", "aten::upsample_nearest2d_backward",
}  # fmt: skip
SEEDS = torch.tensor([1, 5, 0])


def test_only_resampling_is_unfused():
    """Besides the image's channel of ones, and the two gradients of the first convolution."""
    fused = passes.of_network(WIDE, "triton", torch.bfloat16)
    idle = Counter(p.name for p in fused if p.idle)
    assert idle.pop("aten::add", 0) + idle.pop("aten::add_", 0) == 1
    assert idle.keys() == RESAMPLING | {"aten::cat", "aten::clone"}
    assert (idle["aten::cat"], idle["aten::clone"]) == (1, 1)
    eager = passes.of_network(WIDE, "eager", torch.bfloat16)
    assert sum(p.bytes for p in fused) < 0.55 * sum(p.bytes for p in eager)


def outcome(net: EDM2Network, backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return F of fixed images, and its gradients for the images and all trained leaves."""
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 8, 8, generator=rng).to(dtype).requires_grad_()
    leaves = [leaf.tensor for leaf in net.leaves()]
    for leaf in leaves:
        leaf.grad = None
    with dispatch.forced({"mp": backend}):
        out = net.raw(x, torch.tensor([-0.5, 0.5]), torch.eye(3)[:2])
        (out * torch.randn(out.shape, generator=rng)).sum().backward()
    return [out.detach(), x.grad, *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("frozen", [False, True])
def test_both_backends_agree(frozen):
    """With dropout, whose masks are the same."""
    net = small_edm2(dropout=0.3, logvar_channels=0).requires_grad_(not frozen).train()
    net.set_dropout(0.3, torch.arange(len(net.backbone.blocks()))[:, None] * SEEDS)
    pairs = zip(*(outcome(net, name, torch.float32) for name in ("triton", "eager")), strict=True)
    for found, expected in pairs:
        assert relative(found, expected) < 2e-5


def test_16_bit_is_as_exact_as_eager():
    net = small_edm2(logvar_channels=0).requires_grad_(True).train()
    wide = copy.deepcopy(net)
    wide.compute_in(torch.float32)
    exact = outcome(wide, "eager", torch.float32)
    net.compute_in(torch.bfloat16)
    rounded = {name: outcome(net, name, torch.bfloat16) for name in ("triton", "eager")}
    error = {
        name: [relative(a, b) for a, b in zip(tensors, exact, strict=True) if b.numel() > 1]
        for name, tensors in rounded.items()
    }
    assert sum(error["triton"]) < 1.1 * sum(error["eager"])
    assert max(error["triton"]) < 0.05


def test_a_frozen_network_keeps_less():
    """Of each convolution of 3x3 pixels, autograd keeps the input only to train its weight."""
    kept = []
    for frozen in (False, True):
        net = small_edm2().requires_grad_(not frozen)
        tensors: dict[int, int] = {}

        def note(t, tensors=tensors):
            if t.dim() == 4 and t.shape[0] == 2:
                tensors[t.data_ptr()] = t.numel()
            return t

        x = torch.randn(2, 3, 8, 8, requires_grad=True)
        hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda t: t)
        with dispatch.forced({"mp": "triton", "attention": "triton"}), hooks:
            out = net.raw(x, torch.zeros(2), torch.eye(3)[:2])
        assert out.requires_grad
        kept.append(sum(tensors.values()))
    assert kept[1] < 0.8 * kept[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["enc.8x8_block0", "dec.8x8_in0", "dec.8x8_block0"])
def test_blocks_compile_without_a_graph_break(name):
    net = small_edm2(logvar_channels=0).requires_grad_(True)
    with dispatch.forced({"mp": "triton", "attention": "triton"}):
        expected = outcome(net, "triton", torch.float32)
        net.backbone.get_submodule(name).compile(fullgraph=True, backend="aot_eager")
        found = outcome(net, "triton", torch.float32)
    for a, b in zip(found, expected, strict=True):
        assert relative(a, b) < 1e-6
