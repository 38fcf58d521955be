"""Normalised copies of EDM2's weights: what a network computes with them, and training on them."""

import copy
import dataclasses

import pytest
import torch

import sid_fast
from sid_fast import Settings, SiDASettings, losses, noise
from sid_fast.distiller import data_free_method
from sid_fast.kernels import Losses, dispatch
from sid_fast.models import EDM2Network, Network
from sid_fast.models.edm2.layers import MPConv
from sid_fast.tools import op_counter
from sid_fast.training.optimizer import AdamWithEMA
from sid_fast.training.step import Trainer
from tests.helpers.golden import (
    TOLERANCE,
    check_gradients,
    check_sida_losses,
    collect_gradients,
    read,
    relative,
)
from tests.helpers.networks import SMALL_EDM2

TINY = dataclasses.replace(SMALL_EDM2, resolution=4, attention_resolutions=())
SETTINGS = dict(
    batch_size=4, micro_batch=2, fake_lr=1e-2, generator_lr=1e-2, precision="fp32", p_mean=-0.4,
    p_std=1.0, eps=1e-2,  # so that an update is no sign, which the last bit of a gradient flips
)  # fmt: skip


def network(config=SMALL_EDM2, **fields) -> EDM2Network:
    """A network of weights of several magnitudes and gains that are not 0: all branches matter."""
    torch.manual_seed(0)
    net = EDM2Network(dataclasses.replace(config, **fields))
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.mul_(2.0 ** (i % 5 - 2)) if p.dim() > 1 else p.fill_(0.5)
    return net


def arguments(config=SMALL_EDM2, n=2):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, config.channels, config.resolution, config.resolution, generator=generator)
    return x, torch.linspace(0.3, 3, n), torch.eye(3)[torch.arange(n) % 3]


def objective(net, config=SMALL_EDM2):
    """A scalar that depends on all parameters."""
    x, sigma, labels = arguments(config)
    return (net(x, sigma, labels) * x).sum() + net.log_variance(sigma.log() / 4).sum()


# --- one network


@pytest.mark.parametrize("logvar", [0, 1])
def test_golden_sida_losses(golden, logvar):
    """Losses, the gradient of the images and those of the raw weights."""
    data = read(golden / f"edm2_cond.sida_loss_logvar{logvar}.npz")
    teacher, fake_score = golden_networks(golden, data, has_head=bool(logvar))
    check_sida_losses(teacher, fake_score, data)


def test_golden_sid_losses(golden):
    data = read(golden / "edm2_cond.sid_loss_logvar1.npz")
    teacher, fake_score = golden_networks(golden, data)
    y, labels = data["y"].requires_grad_(True), data["class_labels"]
    found = losses.generator_loss(
        teacher, fake_score, y, data["g_sigma"], data["g_noise"], float(data["alpha"]), labels
    ).loss
    found.sum().backward()
    assert relative(y.grad, data["g_grad_y"]) <= TOLERANCE
    fake_score.requires_grad_(True)
    found = losses.fake_score_loss(fake_score, y, data["f_sigma"], data["f_noise"], labels).loss
    found.sum().backward()
    check_gradients(fake_score, data, "f_grad")


def golden_networks(golden, data, has_head=True):
    """The golden teacher and fake score, which compute with copies; adds the σ of the losses."""
    teacher = sid_fast.load_network(golden / "edm2_cond.pkl")
    config = teacher.config
    state = read(golden / "edm2_cond.fake.weights.npz")
    if not has_head:
        config = dataclasses.replace(config, logvar_channels=0)
        state = {k: v for k, v in state.items() if not k.startswith("logvar")}
    fake_score = EDM2Network(config)
    fake_score.load_state_dict(state)
    data["g_sigma"] = noise.generator_sigma(data["g_rand_t"] * data["tmax"] / 1000)
    data["f_sigma"] = (data["f_rnd_normal"] - 0.4).exp()
    for net in teacher, fake_score:
        net.requires_grad_(False).eval().compute_in(torch.float32, frozen=net is teacher)
    return teacher, fake_score


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_outputs_and_gradients_are_those_of_the_weights(dtype, tolerance):
    nets = network(), network()
    nets[0].compute_dtype = dtype
    nets[1].compute_in(dtype)
    values = [objective(net) for net in nets]
    for value, net in zip(values, nets, strict=True):
        value.backward()
        collect_gradients(net)
    assert relative(values[1].detach(), values[0]) <= tolerance
    errors = {}
    for (name, p), q in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
        errors[name] = relative(q.grad, p.grad)
    assert max(errors.values()) <= 10 * tolerance, errors


def test_a_forward_normalises_no_weight():
    """It launches less by a normalisation, a product and a cast per layer."""
    counts = []
    for uses_copies in (False, True):
        with op_counter.fake("eager"), torch.no_grad():
            net = EDM2Network(SMALL_EDM2).eval().requires_grad_(False)
            if uses_copies:
                net.compute_in(torch.bfloat16)
            net.compute_dtype = torch.bfloat16
            layers = sum(isinstance(m, MPConv) for m in net.modules()) - 1  # but the head
            inputs = torch.empty(2, 3, 8, 8), torch.ones(2), torch.empty(2, 3)
            with op_counter.Count() as count:
                net(*inputs)
        counts.append(count.ops)
    norms = [sum(op.name == "linalg_vector_norm" for op in ops) for ops in counts]
    assert norms[0] - norms[1] == layers
    before, after = (sum(op.launches for op in ops) for ops in counts)
    assert before - after >= 5 * layers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_frozen_network_keeps_no_float32_weights(dtype):
    frozen, other = (network().requires_grad_(False).eval() for _ in range(2))
    frozen.compute_in(dtype, frozen=True)
    other.compute_in(dtype)
    assert torch.equal(frozen(*arguments()), other(*arguments()))
    assert not frozen.compute_copies
    wide = {n for n, p in frozen.named_parameters() if p.dim() > 1 and p.dtype != dtype}
    assert wide == {"unet.emb_noise.weight", "unet.emb_label.weight", "logvar_linear.weight"}
    for layer in frozen.modules():
        if isinstance(layer, MPConv):
            assert layer.weight.data_ptr() == layer.compute_weight.data_ptr()


def test_a_frozen_float32_network_keeps_its_weights():
    net = network().requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    expected = objective(net)
    net.compute_in(torch.float32, frozen=True)
    assert net.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert relative(objective(net), expected) <= 1e-5
    assert not any(leaf.tensor.requires_grad for leaf in net.compute_copies)


def test_a_deep_copy_has_copies_of_its_own():
    net = network()
    net.compute_in(torch.float32)
    twin = copy.deepcopy(net)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(0.3)
    expected = objective(net)
    twin.update_compute_copies()
    assert torch.equal(objective(net), expected)
    fresh = network()
    fresh.load_state_dict(twin.state_dict())
    assert relative(objective(twin), objective(fresh)) <= 1e-5


# --- training


def distiller(kind, monkeypatch, uses_copies=True, teacher=None, **settings):
    teacher = network(TINY).eval() if teacher is None else teacher
    if not uses_copies:
        monkeypatch.setattr(EDM2Network, "compute_in", Network.compute_in)
    if kind is SiDASettings:
        settings |= dict(adversarial_group=2, generator_start_kimg=0, adversarial_start_kimg=0)
    settings = kind(**SETTINGS | settings)
    made = Trainer(data_free_method(teacher, settings), settings, seed=3)
    monkeypatch.undo()
    return made


@pytest.mark.parametrize("kind", [Settings, SiDASettings])
@pytest.mark.parametrize("forced", ["none", "auto"])
def test_steps_with_copies_are_those_without(kind, forced, monkeypatch):
    check_steps(kind, forced, monkeypatch, 2)


@pytest.mark.slow
def test_an_update_with_copies_in_triton(monkeypatch):
    """Of two micro-batches, against one in which autograd normalises the weights."""
    updates = []
    for uses_copies in (True, False):
        if not uses_copies:
            monkeypatch.setattr(EDM2Network, "compute_in", Network.compute_in)
        net = network(TINY)
        net.force_normalization = True
        with dispatch.forced({"weight_norm": "triton" if uses_copies else "eager"}):
            optimizer = AdamWithEMA(net, 0.0, 0.99, 1e-2)
            for last in (False, True):
                loss = objective(net, TINY).reshape(1)
                kept = torch.ones(1, dtype=torch.bool)
                optimizer.backward(loss, Losses(*[loss.detach()] * 3, kept), 1.0, last)
            optimizer.step(1e-3)
        updates.append((optimizer.grad_sync.local_grads(), optimizer.params))
    for ours, theirs in zip(*updates, strict=True):
        assert relative(flat(ours), flat(theirs)) <= 1e-5


def check_steps(kind, forced, monkeypatch, steps):
    """Gradients and weights after steps of two micro-batches."""
    runs = []
    for uses_copies in (False, True):
        trainer = distiller(kind, monkeypatch, uses_copies, forced_normalization=forced)
        for optimizer in trainer.optimizers.values():
            assert bool(optimizer.net.compute_copies) == uses_copies
        for _ in range(steps):
            metrics = trainer.step()
        runs.append((trainer, metrics))
    (without, metrics), (trainer, found) = runs
    for name in metrics:
        assert torch.allclose(found[name], metrics[name], rtol=1e-5), name
    for name, optimizer in trainer.optimizers.items():
        other = without.optimizers[name]
        ours, theirs = optimizer.grad_sync.local_grads(), other.grad_sync.local_grads()
        assert relative(flat(ours), flat(theirs)) <= 1e-5, name
        assert relative(flat(optimizer.params), flat(other.params)) <= 1e-5, name
    assert relative(flat(trainer.ema.parameters()), flat(without.ema.parameters())) <= 1e-5


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def test_forced_normalisation_follows_the_update(monkeypatch):
    """Weights have unit rows after it, and the copies are theirs to the bit."""
    trainer = distiller(SiDASettings, monkeypatch, forced_normalization="generator")
    for _ in range(2):  # the generator rests in the first
        trainer.step()
    for name, optimizer in trainer.optimizers.items():
        rows = torch.cat(
            [p.detach().flatten(1).square().mean(1) for p in optimizer.params if p.dim() > 1]
        )
        assert torch.allclose(rows, torch.ones_like(rows), atol=1e-3) == (name == "generator")
        check_copies(optimizer.net)


def check_copies(net):
    """Rebuilding the copies changes nothing: a resumed run computes the same."""
    before = [leaf.tensor.clone() for leaf in net.compute_copies]
    net.update_compute_copies()
    assert before
    for leaf, tensor in zip(net.compute_copies, before, strict=True):
        assert torch.equal(leaf.tensor, tensor)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_takes_the_same_steps(precision, monkeypatch):
    trainer = distiller(Settings, monkeypatch, precision=precision)
    trainer.step()
    state = {name: t.clone() for name, t in trainer.state_dict().items()}
    trainer.step()
    resumed = distiller(Settings, monkeypatch, precision=precision)
    resumed.load_state_dict(state)
    resumed.steps, resumed.images = 1, SETTINGS["batch_size"]
    resumed.step()
    expected = trainer.state_dict()
    assert all(torch.equal(t, expected[name]) for name, t in resumed.state_dict().items())


def test_a_skipped_update_changes_nothing(monkeypatch):
    trainer = distiller(Settings, monkeypatch)
    trainer.step()
    state = {name: t.clone() for name, t in trainer.state_dict().items()}
    with trainer.updates_disabled():
        trainer.dry_run()
    assert all(torch.equal(t, state[name]) for name, t in trainer.state_dict().items())
    for optimizer in trainer.optimizers.values():
        check_copies(optimizer.net)


def test_the_average_is_of_the_weights_not_the_copies(monkeypatch):
    trainer = distiller(Settings, monkeypatch, precision="bf16", forced_normalization="none")
    generator = trainer.method.networks["generator"]
    assert not trainer.ema.compute_copies
    assert trainer.ema.state_dict().keys() == generator.state_dict().keys()
    assert all(map(torch.equal, trainer.ema.parameters(), generator.parameters()))
