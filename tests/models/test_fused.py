"""The fused U-Net: no unfused passes, the same outputs and gradients, low-precision copies."""

import copy
import dataclasses

import pytest
import torch

from benchmarks.analysis import passes
from sid_fast import Distiller, Settings
from sid_fast.kernels import dispatch
from sid_fast.models import EDMNetwork, NetworkConfig
from sid_fast.models.edm_unet.fused import DeferredResidual
from sid_fast.models.edm_unet.unet import Block
from sid_fast.performance.ddp import DDPGradSync
from tests.helpers.golden import relative

FFHQ64 = dataclasses.replace(passes.CIFAR10, resolution=64, channel_mult=(1, 2, 2, 2))
SMALL = NetworkConfig(
    "ddpmpp", resolution=8, model_channels=16, channel_mult=(1, 2), num_blocks=1,
    attention_resolutions=(4,), label_dim=10, augment_dim=9,
)  # fmt: skip
# With fewer blocks a level, of the same shapes.
NETWORKS = {
    "cifar10": dataclasses.replace(passes.CIFAR10, num_blocks=1),
    "imagenet64": dataclasses.replace(passes.IMAGENET64, num_blocks=2),
    "ffhq64": dataclasses.replace(FFHQ64, num_blocks=1),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_no_pass_is_unfused(name):
    """There is no element-wise, cat, pad, cast or layout operation on a feature map."""
    fused = passes.of_network(NETWORKS[name], "triton", torch.bfloat16)
    assert {p.name.partition("::")[0] for p in fused} == {"aten", "sid_fast"}
    # Exception: the sum of attention's partial bias gradients, which in ADM exceed an image.
    idle = [p for p in fused if p.idle and not (p.name == "aten::sum" and p.backward)]
    assert not idle
    assert max((p.bytes for p in fused if p.name == "aten::sum"), default=0) < 2**23
    eager = passes.of_network(NETWORKS[name], "eager", torch.bfloat16)
    assert sum(p.bytes for p in fused) < 0.55 * sum(p.bytes for p in eager)  # with SDPA


def test_an_unfused_pass_is_counted(monkeypatch):
    def halves(self, x, *others, **named):
        x, h_for_skip = forward(self, x, *others, **named)
        return x._replace(x=x.x * 0.5), h_for_skip

    forward = Block.forward
    monkeypatch.setattr(Block, "forward", halves)
    counted = passes.of_network(SMALL, "triton", torch.bfloat16)
    assert {p.name for p in counted if p.idle} == {"aten::mul"}


def small(architecture: str = "ddpmpp", device: torch.device | str = "cpu") -> EDMNetwork:
    torch.manual_seed(0)
    width = 64 if architecture == "adm" else 16
    net = EDMNetwork(dataclasses.replace(SMALL, architecture=architecture, model_channels=width))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return net.to(device)


def outcome(net: EDMNetwork, backends, **kwargs) -> list[torch.Tensor]:
    """Return D of fixed images and its gradients for the images and every parameter."""
    rng = torch.Generator().manual_seed(1)
    device = next(net.parameters()).device
    x = torch.randn(3, 3, 8, 8, generator=rng).to(device).requires_grad_()
    labels = torch.eye(10, device=device)[[1, 5, 7]]
    sigma = torch.tensor([0.1, 1.0, 10.0], device=device)
    augment_labels = torch.tensor([[0.1] * 9] * 3, device=device)
    net.zero_grad()
    with dispatch.forced(backends):
        out = net(x, sigma, labels, augment_labels)
        (out * torch.randn(out.shape, generator=rng).to(device)).sum().backward()
    return [out.detach(), x.grad, *(p.grad.clone() for p in net.parameters() if p.requires_grad)]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("architecture", ["ddpmpp", "adm"])
def test_fused_blocks_equal_eager_blocks(architecture, frozen):
    """Both run eager kernels inside; golden data test the Triton kernels."""
    net = small(architecture).requires_grad_(not frozen)
    pairs = zip(outcome(net, {"block": "triton"}), outcome(net, "eager"), strict=True)
    for fused, eager in pairs:
        assert relative(fused, eager) <= 1e-5 or not eager.any()


def test_sixteen_bit_stays_close_and_gradients_reach_the_float32_weights():
    net = small()
    expected = outcome(net, {"block": "triton"})
    half = copy.deepcopy(net)
    half.compute_dtype = torch.bfloat16
    results = outcome(half, {"block": "triton"})
    assert all(p.grad.dtype == torch.float32 for p in half.parameters())
    assert relative(results[0], expected[0]) <= 2e-2
    errors = [relative(a, b) for a, b in zip(results[1:], expected[1:], strict=True) if b.any()]
    assert sorted(errors)[len(errors) // 2] <= 5e-2


@pytest.mark.parametrize("backends", [{"block": "triton"}, {"block": "eager"}])
@pytest.mark.parametrize("architecture", ["ddpmpp", "ncsnpp", "adm"])
def test_gradients_through_copies_equal_those_through_casts(architecture, backends):
    """Accumulated over two micro-batches in float32, up to rounding: copies hold sums of biases."""
    net = small(architecture)
    cast, copied = copy.deepcopy(net), copy.deepcopy(net)
    cast.compute_dtype = torch.bfloat16
    copied.compute_in(torch.bfloat16)
    gradients = DDPGradSync(copied)
    addresses = [p.grad.data_ptr() for p in copied.parameters()]
    for step in range(2):  # the second step must not see gradients of the first
        for p in cast.parameters():
            p.grad = torch.zeros_like(p)
        for scale in (1.0, 0.25):
            for each in (cast, copied):
                rng = torch.Generator().manual_seed(1)
                x, weight = torch.randn(2, 3, 3, 8, 8, generator=rng)
                labels, sigma = torch.eye(10)[[1, 5, 7]], torch.tensor([0.1, 1.0, 10.0])
                augment_labels = None if step else torch.ones(3, 9) * 0.1
                with dispatch.forced(backends):
                    out = each(x, sigma, labels, augment_labels)
                loss = (out * weight).sum((1, 2, 3))
                if each is cast:
                    (loss.sum() * scale).backward()
                else:
                    gradients.backward(loss, scale, sync_grads=scale < 1)
        for (name, p), q in zip(cast.named_parameters(), copied.parameters(), strict=True):
            assert q.grad.dtype == torch.float32
            assert q.grad.stride() == q.stride()
            assert relative(q.grad, p.grad) <= 0.03 or not (p.grad.any() or q.grad.any()), name
        assert not step or not copied.model.map_augment.weight.grad.any()
        gradients.zero()
    assert [p.grad.data_ptr() for p in copied.parameters()] == addresses


@pytest.mark.slow
def test_float16_loses_no_gradient_to_an_overflow(device):
    """A convolution's output exceeds float16; the norm after it restores the range."""
    net = small(device=device)
    with torch.no_grad():
        net.model.enc["8x8_block0"].norm0.weight.fill_(1.0)
        net.model.enc["8x8_block0"].conv0.weight.fill_(6e4)
    net.compute_dtype = torch.float16
    overflowed = []
    conv = torch.nn.functional.conv2d

    def watch(*arguments, **more):
        out = conv(*arguments, **more)
        overflowed.append(bool(out.isinf().any()))
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.nn.functional.conv2d", watch)
        results = outcome(net, "triton")
    assert any(overflowed)
    assert all(t.isfinite().all() for t in results)


@pytest.mark.parametrize("architecture", ["ddpmpp", "adm"])
def test_copies_follow_their_parameters(architecture):
    net = small(architecture)
    net.compute_in(torch.bfloat16)
    written = dict(zip((n for n, _ in net.named_parameters()), net.cast_copies(), strict=True))
    assert {n for n, copy in written.items() if copy is None} == {
        f"model.{layer}" for layer in (
            "map_layer0.weight", "map_layer0.bias", "map_layer1.weight", "map_layer1.bias",
            "map_label.weight", "map_augment.weight",
            *(["map_label.bias"] if architecture == "ddpmpp" else []),
        )
    }  # fmt: skip
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(2)
    net.update_compute_copies()
    for name, p in net.named_parameters():
        copy = written[name]
        assert copy is None or torch.equal(copy, p.to(torch.bfloat16)), name
    block = net.model.dec["8x8_block0"]
    assert torch.equal(block.residual_bias, block.conv1.bias + block.skip.bias)
    rows = net.model.conditioning.conv_bias.split(net.model.conditioning.widths)
    first = net.model.enc["8x8_block0"]
    if architecture == "ddpmpp":
        assert torch.equal(rows[0], (first.affine.bias + first.conv0.bias).to(torch.bfloat16))
    else:
        assert torch.equal(rows[0], first.conv0.bias)
        assert rows[0].dtype == torch.float32


def test_copies_require_gradients_unless_their_network_is_frozen():
    net = small()
    net.compute_in(torch.bfloat16)
    assert all(leaf.tensor.requires_grad for leaf in net.compute_copies)
    net.requires_grad_(False)
    with dispatch.forced({"block": "triton"}):
        assert not net(torch.randn(2, 3, 8, 8), torch.ones(2)).requires_grad


def test_an_update_refreshes_every_copy():
    settings = Settings(batch_size=2, generator_lr=1e-2, precision="bf16")
    distiller = Distiller(small(), settings)
    before = distiller.generator.model.conditioning.conv_bias.clone()
    distiller.step()
    generator = distiller.generator
    copies = [leaf.tensor.clone() for leaf in generator.compute_copies]
    assert not torch.equal(generator.model.conditioning.conv_bias, before)
    generator.update_compute_copies()
    assert all(map(torch.equal, copies, (leaf.tensor for leaf in generator.compute_copies)))


def test_every_block_has_its_own_dropout_seed():
    """Blocks' seeds are rows of one tensor, rewritten for each micro-batch."""
    distiller, seeds = Distiller(small(), Settings(batch_size=2, dropout=0.5)), []
    for phase in distiller.method.phases:
        distiller.backward(phase, first=True, last=True)
        blocks = distiller.method.networks[phase.network].model.blocks()
        seeds += [tuple(block.dropout_seed.tolist()) for block in blocks]
    assert len(set(seeds)) == len(seeds) == 2 * len(blocks)


def test_a_frozen_network_stores_its_weights_in_16_bits_only():
    net = small().requires_grad_(False)
    expected = copy.deepcopy(net)
    expected.compute_dtype = torch.bfloat16
    net.compute_in(torch.bfloat16, frozen=True)
    kinds = {p.dtype for n, p in net.model.enc.named_parameters() if p.dim() > 1}
    assert kinds == {torch.bfloat16}
    inputs = torch.randn(2, 3, 8, 8), torch.ones(2)
    for backends in ({"block": "triton"}, {"block": "eager"}):
        with dispatch.forced(backends):
            assert relative(net(*inputs), expected(*inputs)) <= 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["ddpmpp", "adm"])
def test_a_block_compiles_without_a_graph_break(architecture, device):
    """Includes its custom operators, forward and backward."""
    net = small(architecture, device).train()
    block = net.model.dec["4x4_in0"]  # with attention
    net.set_dropout(0.0)
    channels = block.fan_in

    def random(*shape):
        return torch.randn(shape).to(device)

    x, residual = (random(2, channels, 4, 4).requires_grad_() for _ in range(2))
    bias, embedding = random(channels), random(2, net.config.model_channels * 4)

    def run(block):
        out, h_for_skip = block(DeferredResidual(x, residual, bias, block.skip_scale), embedding)
        ends = [out.x, out.residual, h_for_skip]
        grads = torch.autograd.grad(
            ends, [x, residual, block.qkv.bias], [torch.ones_like(e) for e in ends]
        )
        return *ends, *grads

    with dispatch.forced("triton"):
        expected = run(block)
        block.compile(fullgraph=True, backend="aot_eager")
        results = run(block)
    for a, b in zip(results, expected, strict=True):
        assert relative(a, b) <= 1e-6


@pytest.mark.parametrize("architecture", ["ddpmpp", "adm"])
def test_a_state_dict_has_upstreams_order_of_qkv(architecture):
    net = small(architecture)
    qkv = net.model.dec["4x4_in0"].qkv
    state = net.state_dict()
    upstream = state["model.dec.4x4_in0.qkv.weight"]
    size = len(qkv.weight) // 3 // qkv.heads
    rows = upstream.unflatten(0, (qkv.heads, size, 3))
    assert torch.equal(rows[:, :, 1].flatten(0, 1), qkv.weight.chunk(3)[1])
    again = EDMNetwork(net.config)
    again.load_state_dict(state)
    assert all(map(torch.equal, again.parameters(), net.parameters()))
