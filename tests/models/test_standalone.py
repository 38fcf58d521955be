"""The network's source in exported pickles: the recorded numbers, on its own, and in training."""

import ast
import copy
import math
from pathlib import Path

import pytest
import torch

from sid_fast import kernels
from sid_fast.io.pickles import read_pickle
from sid_fast.models.edm_unet import standalone
from sid_fast.models.exporters import plain_network
from sid_fast.models.registry import load_network
from tests.helpers.golden import NETWORKS, TOLERANCE, read, relative
from tests.helpers.networks import small_teacher

SOURCE = Path(standalone.__file__).read_text("utf-8")


@pytest.mark.parametrize("name", NETWORKS)
def test_it_computes_what_was_recorded(golden, name):
    net = load_network(golden / f"{name}.pkl")
    plain, data = plain_network(net), read(golden / f"{name}.forward.npz")
    labels = data.get("class_labels"), data.get("augment_labels")
    output = plain(data["x"], data["sigma"], *labels)
    assert relative(output, data["D"]) <= TOLERANCE
    with kernels.dispatch.forced("eager"):
        assert torch.equal(output, net(data["x"], data["sigma"], *labels))
        assert torch.equal(plain(data["x"], data["sigma"]), net(data["x"], data["sigma"]))
        one = data["sigma"].flatten()[0]
        assert torch.equal(plain(data["x"], one), net(data["x"], one))


@pytest.mark.parametrize("name", NETWORKS)
def test_its_weights_have_the_published_names(golden, name):
    published = read_pickle(golden / f"{name}.pkl").state
    state = plain_network(load_network(golden / f"{name}.pkl")).state_dict()
    assert set(state) == set(published)
    assert all(torch.equal(state[key], value) for key, value in published.items())


def test_it_stands_alone():
    tree = ast.parse(SOURCE, feature_version=(3, 8))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {getattr(node, "module", None) or node.names[0].name for node in imports}
    assert names == {"__future__", "math", "torch", "torch.nn.functional"}
    # In another folder, as a module that nothing else knows.
    exec(compile(SOURCE, "x", "exec"), {"__name__": "elsewhere"})


def test_what_upstream_s_tools_ask_of_it():
    net = plain_network(small_teacher())
    assert (net.img_resolution, net.img_channels, net.label_dim) == (8, 1, 10)
    assert (net.sigma_min, net.sigma_max) == (0, math.inf)
    assert torch.equal(net.round_sigma([0.5, 2.0]), torch.tensor([0.5, 2.0]))
    x, sigma, labels = torch.randn(2, 1, 8, 8), torch.tensor([1.0, 2.0]), torch.eye(10)[:2]
    expected = net(x, sigma, labels)
    assert torch.equal(net(x, sigma[:, None, None, None], labels), expected)
    augment = torch.zeros(2, 9)
    same = net(x.double(), sigma, labels, augment_labels=augment, force_fp32=True, other=3)
    assert torch.equal(same, expected)
    assert not torch.equal(net(x, sigma, labels, augment_labels=augment + 1), expected)
    assert torch.equal(net(x, sigma), net(x, sigma, torch.zeros(2, 10)))


@pytest.mark.parametrize("name", ["ncsnpp_uncond", "adm_cond"])
def test_it_trains(golden, name):
    net = copy.deepcopy(plain_network(load_network(golden / f"{name}.pkl")))
    for layer in net.modules():
        if hasattr(layer, "dropout"):
            layer.dropout = 0.5
    x, sigma = torch.randn(2, 3, 16, 16), torch.tensor([1.0, 2.0])
    labels = torch.eye(10)[:2] if net.label_dim else None
    augment = torch.ones(2, 9) if net.model.map_augment else None
    assert torch.equal(net(x, sigma, labels), net(x, sigma, labels))
    net.train().requires_grad_(True)
    assert not torch.equal(net(x, sigma, labels), net(x, sigma, labels))
    net(x, sigma, labels, augment).square().sum().backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in net.parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_half_precision(golden, name):
    net = plain_network(load_network(golden / f"{name}.pkl"))
    data = read(golden / f"{name}.forward.npz")
    inputs = data["x"], data["sigma"].flatten().log() / 4, data.get("class_labels")
    half = net.model(inputs[0].half(), *inputs[1:])
    assert half.dtype == torch.float16
    assert relative(half.float(), net.model(*inputs)) < 0.02


def test_fp16_is_for_devices_other_than_the_cpu():
    """The meta device stands for a GPU."""
    net = plain_network(small_teacher(), use_fp16=True)
    types = []
    net.model.register_forward_hook(lambda module, inputs, output: types.append(output.dtype))
    x, sigma = torch.randn(2, 1, 8, 8), torch.ones(2)
    assert net(x, sigma).dtype == torch.float32
    net.to("meta")
    assert net(x.to("meta"), sigma.to("meta")).dtype == torch.float32
    net(x.to("meta"), sigma.to("meta"), force_fp32=True)
    net.use_fp16 = False
    net(x.to("meta"), sigma.to("meta"))
    assert types == [torch.float32, torch.float16, torch.float32, torch.float32]
