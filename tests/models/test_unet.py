"""The networks against recorded numbers of the original, and configurations that are refused."""

import dataclasses

import pytest
import torch

import sid_fast
from sid_fast.errors import UserError
from sid_fast.kernels import dispatch
from sid_fast.models import EDMNetwork, NetworkConfig
from tests.helpers.golden import NETWORKS, TOLERANCE, check_gradients, read, relative


@pytest.mark.parametrize("name", NETWORKS)
def test_forward_and_gradients_match_golden(golden, name):
    net = sid_fast.load_network(golden / f"{name}.pkl").requires_grad_(True)
    data = read(golden / f"{name}.forward.npz")
    x = data["x"].requires_grad_(True)
    found = net(x, data["sigma"], data.get("class_labels"), data.get("augment_labels"))
    assert found.dtype == torch.float32
    assert relative(found, data["D"]) <= TOLERANCE
    (found * data["cotangent"]).sum().backward()
    assert relative(x.grad, data["grad_x"]) <= TOLERANCE
    check_gradients(net, data, "grad")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddpmpp_uncond", "adm_cond"])
def test_the_kernels_match_golden(golden, name, device):
    """With every Triton kernel, on one sample: the interpreter's time goes by the batch.

    Gradients of weights, recorded over the batch, are compared with the eager network's.
    """
    net = sid_fast.load_network(golden / f"{name}.pkl").requires_grad_(True).to(device)
    data = {k: v.to(device) for k, v in read(golden / f"{name}.forward.npz").items()}
    labels = [data[k][:1] if k in data else None for k in ("class_labels", "augment_labels")]
    gradients = []
    for backend in ("eager", "triton"):
        x = data["x"][:1].clone().requires_grad_(True)
        net.zero_grad()
        with dispatch.forced(backend):
            found = net(x, data["sigma"][:1], *labels)
            assert relative(found, data["D"][:1]) <= TOLERANCE
            (found * data["cotangent"][:1]).sum().backward()
        assert relative(x.grad, data["grad_x"][:1]) <= TOLERANCE
        gradients.append({k: p.grad for k, p in net.named_parameters() if p.grad is not None})
    expected, found = gradients
    assert found.keys() == expected.keys()
    for key, grad in expected.items():
        assert relative(found[key], grad) <= TOLERANCE or not (grad.any() or found[key].any()), key


def test_sigma_may_be_flat_or_scalar_and_no_labels_mean_zero_labels(golden):
    net = sid_fast.load_network(golden / "adm_cond.pkl")
    x, sigma = torch.randn(3, 3, 16, 16), torch.full((3,), 0.7)
    zeros = torch.zeros(3, 10)
    expected = net(x, sigma, zeros)
    assert torch.equal(net(x, sigma.reshape(3, 1, 1, 1), None), expected)
    assert torch.equal(net(x, torch.tensor(0.7), None), expected)


SMALL = NetworkConfig(
    "ddpmpp", resolution=8, model_channels=16, channel_mult=(1, 2), num_blocks=1,
    attention_resolutions=(4,), label_dim=10, augment_dim=9,
)  # fmt: skip


def test_stock_initialisation_starts_close_to_the_skip_connection():
    """The last layers are scaled down, so that D(x) is c_skip·x plus next to nothing."""
    x, sigma = torch.randn(2, 3, 8, 8), torch.ones(2)
    for architecture in ("ddpmpp", "ncsnpp", "adm"):
        net = EDMNetwork(dataclasses.replace(SMALL, architecture=architecture, model_channels=64))
        assert relative(net(x, sigma), x * 0.25 / 1.25) < 1e-2


@pytest.mark.parametrize("architecture", ["ddpmpp", "ncsnpp", "adm"])
def test_initialisation_is_as_published(architecture):
    """Root mean squares of weights against those of the rules: uniform in ±b has b/√3."""
    torch.manual_seed(0)
    net = EDMNetwork(dataclasses.replace(SMALL, architecture=architecture, model_channels=64))
    found = {name: float(p.detach().square().mean().sqrt()) for name, p in net.named_parameters()}
    block = "model.dec.4x4_in0"
    fan = 128 * 9
    if architecture == "adm":
        expected = {
            f"{block}.conv0.weight": (1 / 3 / fan) ** 0.5,
            f"{block}.conv0.bias": (1 / 3 / fan) ** 0.5,
            f"{block}.conv1.weight": 0,
            f"{block}.qkv.weight": (1 / 3 / 128) ** 0.5,
            f"{block}.proj.weight": 0,
            "model.map_layer1.weight": (1 / 3 / 256) ** 0.5,
            "model.map_label.weight": 1.0,  # √(1/10)·√10
            "model.out_conv.weight": 0,
        }
    else:
        expected = {
            f"{block}.conv0.weight": (1 / fan) ** 0.5,
            f"{block}.conv0.bias": 0,
            f"{block}.conv1.weight": 1e-5 * (1 / fan) ** 0.5,
            f"{block}.qkv.weight": (0.2 * 2 / (128 + 384)) ** 0.5,
            f"{block}.proj.weight": 1e-5 * (1 / 128) ** 0.5,
            "model.map_layer1.weight": (1 / 256) ** 0.5,
            "model.dec.8x8_aux_conv.weight": 1e-5 * (2 / (64 * 9 + 3 * 9)) ** 0.5,
        }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=0.1), name
    if architecture == "ncsnpp":
        assert float(net.model.map_noise.freqs.std()) == pytest.approx(16, rel=0.2)


def test_dropout_acts_in_training_only():
    net = EDMNetwork(dataclasses.replace(SMALL, dropout=0.5))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x, sigma = torch.randn(2, 3, 8, 8), torch.ones(2)
    assert torch.equal(net.eval()(x, sigma), net(x, sigma))
    assert not torch.equal(net.train()(x, sigma), net(x, sigma))
    net.set_dropout(0)
    assert torch.equal(net(x, sigma), net.eval()(x, sigma))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("architecture", "unet"),
        ("resolution", 9),
        ("resolution", 0),
        ("model_channels", 18),
        ("model_channels", 132),  # 132 channels do not divide into 32 groups
        ("channel_mult", ()),
        ("num_blocks", 0),
        ("dropout", 1.0),
        ("label_dim", -1),
        ("label_dim", 10.0),
        ("channels", 10**18),
        ("channel_mult", [1, 2]),
        ("channel_mult", (1.0, 2.0)),
        ("init_sigma", "2.5"),
    ],
)
def test_a_shape_that_cannot_work_is_refused_by_name(field, value):
    with pytest.raises(UserError, match=field):
        EDMNetwork(dataclasses.replace(SMALL, **{field: value}))


def test_adm_heads_must_divide():
    with pytest.raises(UserError, match="heads of 64"):
        dataclasses.replace(SMALL, architecture="adm", model_channels=32, channel_mult=(1, 3))
