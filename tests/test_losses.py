"""Both losses against recorded numbers, and with non-finite samples."""

import pytest
import torch

import sid_fast
from sid_fast import losses, noise
from sid_fast.models import NetworkConfig
from tests.helpers.golden import NETWORKS, TOLERANCE, check_gradients, read, relative


def load(golden, name, loss="loss"):
    teacher = sid_fast.load_network(golden / f"{name}.pkl")
    fake_score = sid_fast.load_network(golden / f"{name}.fake.pkl")
    data = read(golden / f"{name}.{loss}.npz")
    data["g_sigma"] = noise.generator_sigma(data["g_rand_t"] * data["tmax"] / 1000)
    data["f_sigma"] = noise.fake_score_sigma(data["f_rnd_normal"])
    return teacher, fake_score, data


def generator(teacher, fake_score, data, y):
    return losses.generator_loss(
        teacher,
        fake_score,
        y,
        data["g_sigma"],
        data["g_noise"],
        float(data["alpha"]),
        data.get("class_labels"),
    ).loss


def fake(fake_score, data, y):
    labels = data.get("class_labels")
    return losses.fake_score_loss(fake_score, y, data["f_sigma"], data["f_noise"], labels).loss


@pytest.mark.parametrize("name", NETWORKS)
def test_losses_match_golden(golden, name):
    teacher, fake_score, data = load(golden, name)
    y = data["y"].requires_grad_(True)
    loss = generator(teacher, fake_score, data, y)
    assert relative(loss, data["g_loss_map"].sum((1, 2, 3))) <= TOLERANCE
    loss.sum().backward()
    assert relative(y.grad, data["g_grad_y"]) <= TOLERANCE

    fake_score.requires_grad_(True)
    loss = fake(fake_score, data, y)
    assert relative(loss, data["f_loss_map"].sum((1, 2, 3))) <= TOLERANCE
    y.grad = None
    loss.sum().backward()
    check_gradients(fake_score, data, "f_grad")
    assert y.grad is None, "the fake score's loss has a gradient into the images"


def test_a_nan_sample_is_dropped_and_the_others_match_golden(golden):
    teacher, fake_score, data = load(golden, "ddpmpp_uncond", "loss_with_nan_sample")
    spoiled = ~torch.isfinite(data["y"]).all(dim=(1, 2, 3))
    assert spoiled.sum() == 1
    y = data["y"].requires_grad_(True)
    loss = generator(teacher, fake_score, data, y)
    assert float(loss[spoiled]) == 0
    assert relative(loss[~spoiled], data["g_loss_map"].sum((1, 2, 3))) <= TOLERANCE
    loss.sum().backward()
    assert not y.grad[spoiled].any()
    assert relative(y.grad[~spoiled], data["g_grad_y_kept"]) <= TOLERANCE

    fake_score.requires_grad_(True)
    loss = fake(fake_score, data, y)
    assert float(loss[spoiled]) == 0
    assert relative(loss.sum(), data["f_loss_sum"]) <= TOLERANCE
    loss.sum().backward()
    check_gradients(fake_score, data, "f_grad")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("spoil", ["y", "noise", "sigma"])
def test_a_bad_sample_does_not_change_the_other_gradients(golden, value, spoil):
    """They equal those of a loss that omits the sample, and of a batch without it.

    The first bit for bit, the second up to the rounding of convolutions at another batch size.
    """
    teacher, fake_score, data = load(golden, "ddpmpp_uncond")
    kept = torch.tensor([True, True, False, True, True])

    def run(data, rows=slice(None)):
        y = data["y"].clone().requires_grad_(True)
        fake_score.requires_grad_(False)
        generator(teacher, fake_score, data, y)[rows].sum().backward()
        fake_score.requires_grad_(True).zero_grad()
        fake(fake_score, data, y)[rows].sum().backward()
        grads = [p.grad.flatten() for p in fake_score.parameters() if p.grad is not None]
        return y.grad, torch.cat(grads)

    left_out_y, left_out_weights = run(data, kept)
    names = ("y", "g_noise", "f_noise", "g_sigma", "f_sigma")
    without_y, without_weights = run({**data, **{name: data[name][kept] for name in names}})
    for name in {"y": ["y"], "noise": names[1:3], "sigma": names[3:]}[spoil]:
        data[name] = data[name].clone()
        data[name][2] = value
    found_y, found_weights = run(data)
    assert torch.equal(found_y, left_out_y)
    assert torch.equal(found_weights, left_out_weights)
    assert relative(found_y[kept], without_y) < 1e-5
    assert relative(found_weights, without_weights) < 1e-5


def test_a_network_that_overflows_on_one_sample_spoils_only_that_sample():
    """Finite inputs give NaN: the sample's gradient is 0, not 0·NaN."""

    class Network:
        config, compute_dtype = NetworkConfig("ddpmpp", resolution=4), torch.float32

        def __init__(self, gain):
            self.gain = gain

        def raw(self, x, c_noise, labels=None, augment_labels=None):
            return x * torch.tensor([0.5, torch.nan, 0.5]).reshape(-1, 1, 1, 1) * self.gain

    y = torch.randn(3, 1, 4, 4, requires_grad=True)
    arguments = y, torch.ones(3), torch.randn(3, 1, 4, 4), 1.2
    loss = losses.generator_loss(Network(1.0), Network(0.9), *arguments).loss
    loss.sum().backward()
    assert float(loss[1]) == 0
    assert not y.grad[1].any()
    assert torch.isfinite(y.grad).all()
    assert y.grad[0].any()


def test_noise_levels_run_from_the_smallest_to_the_largest():
    assert torch.allclose(
        noise.generator_sigma(torch.tensor([0.0, 1.0])), torch.tensor([0.002, 80])
    )
    assert torch.allclose(
        noise.fake_score_sigma(torch.tensor([0.0, 1.0])).log(), torch.tensor([-1.2, 0])
    )
