"""EDM2: networks against recorded numbers of the original, sizes, files and what is refused."""

import dataclasses
import json

import numpy as np
import pytest
import torch

import sid_fast
from sid_fast import kernels, losses, noise
from sid_fast.data.datasets import write_dataset
from sid_fast.distiller import data_free_method
from sid_fast.errors import UserError
from sid_fast.kernels import dispatch, mp
from sid_fast.models import EDM2Config, EDM2Network, EDMNetwork, NetworkConfig
from sid_fast.models.edm2 import layers
from sid_fast.models.edm2.config import SIZES
from sid_fast.models.families import build_network
from sid_fast.models.registry import save_network
from sid_fast.tools import op_counter
from sid_fast.tools.proof import RandomFeed
from sid_fast.training.step import Trainer
from tests.helpers.golden import TOLERANCE, check_gradients, check_sida_losses, read, relative
from tests.helpers.images import pictures
from tests.helpers.networks import SMALL_EDM2, small_edm2, small_teacher
from tests.helpers.pickled import edm2_pickle, network_pickle

# Millions of parameters and GFLOP of a forward image at 64x64, counted from the publication.
PUBLISHED = {
    "xxs": (31.3, 22.7),
    "xs": (124.7, 89.9),
    "s": (280.2, 201.6),
    "m": (497.8, 357.9),
    "l": (777.5, 558.7),
    "xl": (1119.3, 804.0),
    "xxl": (1523.2, 1093.8),
}


def load(golden, name="edm2_cond.pkl") -> EDM2Network:
    net = sid_fast.load_network(golden / name)
    assert isinstance(net, EDM2Network)
    return net


def inputs(config, n=2):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, config.channels, 8, 8, generator=generator)
    return x, torch.linspace(0.3, 3, n), torch.eye(3)[:n] if config.label_dim else None


# --- golden data


@pytest.fixture(params=["eager", pytest.param("triton", marks=pytest.mark.slow)])
def backend(request):
    """Every operation in one backend; Triton's in its interpreter without a GPU."""
    with dispatch.forced(request.param):
        yield request.param


@pytest.mark.usefixtures("backend")
def test_forward_gradients_and_log_variance_match_golden(golden):
    net, data = load(golden).requires_grad_(True), read(golden / "edm2_cond.forward.npz")
    x = data["x"].requires_grad_(True)
    found = net(x, data["sigma"], data["class_labels"])
    u = net.log_variance(data["sigma"].log() / 4)
    assert found.dtype == u.dtype == torch.float32
    assert relative(found, data["D"]) <= TOLERANCE
    assert relative(u, data["logvar"].flatten()) <= TOLERANCE
    (found * data["cotangent"]).sum().backward()
    assert relative(x.grad, data["grad_x"]) <= TOLERANCE
    u.sum().backward()
    check_gradients(net, data, "grad")


def test_forced_weight_normalisation_matches_golden(golden):
    net, data = load(golden), read(golden / "edm2_cond.forward.npz")
    before = data["forced_norm_before"]

    def head(p):
        return p.detach().flatten()[: len(before)]

    (weight,) = (p for p in net.parameters() if p.numel() >= 512 and torch.equal(head(p), before))
    net.normalize_weights()
    assert relative(head(weight), data["forced_norm_after"]) <= TOLERANCE
    assert relative(head(weight), before) > 10 * TOLERANCE


def test_half_precision_storage(golden):
    net, half = load(golden), load(golden, "edm2_cond.half.pkl")
    assert half.config == net.config
    assert {p.dtype for p in half.state_dict().values()} == {torch.float32}
    data = read(golden / "edm2_cond.forward.npz")
    found = half(data["x"], data["sigma"], data["class_labels"])
    assert 0 < relative(found, data["D"]) < 2e-3


# --- losses over e^u


def losses_of(golden, name):
    """The golden teacher, fake score and data; ψ has a log-variance head if the file says so."""
    teacher, data = load(golden), read(golden / f"edm2_cond.{name}.npz")
    state = read(golden / "edm2_cond.fake.weights.npz")
    config = teacher.config
    if name.endswith("logvar0"):
        config = dataclasses.replace(config, logvar_channels=0)
        state = {k: v for k, v in state.items() if not k.startswith("logvar")}
    fake_score = EDM2Network(config)
    fake_score.load_state_dict(state)
    data["g_sigma"] = noise.generator_sigma(data["g_rand_t"] * data["tmax"] / 1000)
    data["f_sigma"] = (data["f_rnd_normal"] - 0.4).exp()
    return teacher, fake_score.requires_grad_(False).eval(), data


@pytest.mark.usefixtures("backend")
def test_sid_losses_match_golden(golden):
    teacher, fake_score, data = losses_of(golden, "sid_loss_logvar1")
    y, labels = data["y"].requires_grad_(True), data["class_labels"]
    found = losses.generator_loss(
        teacher, fake_score, y, data["g_sigma"], data["g_noise"], float(data["alpha"]), labels
    ).loss
    assert relative(found, data["g_loss_map"].sum((1, 2, 3))) <= TOLERANCE
    found.sum().backward()
    assert relative(y.grad, data["g_grad_y"]) <= TOLERANCE
    fake_score.requires_grad_(True)
    y.grad = None
    found = losses.fake_score_loss(fake_score, y, data["f_sigma"], data["f_noise"], labels).loss
    assert relative(found, data["f_loss_map"].sum((1, 2, 3))) <= TOLERANCE
    found.sum().backward()
    check_gradients(fake_score, data, "f_grad")
    assert fake_score.logvar_linear.weight.grad.any()
    assert y.grad is None


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    ("logvar", "backend"),
    [(0, "eager"), (1, "eager"), pytest.param(1, "triton", marks=pytest.mark.slow)],
    indirect=["backend"],
)
def test_sida_losses_match_golden(golden, logvar):
    teacher, fake_score, data = losses_of(golden, f"sida_loss_logvar{logvar}")
    labels = data["class_labels"]
    images, logits = fake_score.denoise_and_logits(data["enc_x"], data["enc_sigma"], labels)
    assert relative(images, data["enc_D"]) <= TOLERANCE
    assert relative(logits, data["enc_logits"]) <= TOLERANCE
    assert torch.equal(fake_score.logits(data["enc_x"], data["enc_sigma"], labels), logits)
    check_sida_losses(teacher, fake_score, data)


def test_a_dropped_sample_does_not_train_the_head():
    """Its loss is 0, u included, and the head's gradient is that of the other samples."""
    net = small_edm2().requires_grad_(True)
    x, sigma, labels = inputs(net.config, 3)
    grads = []
    for rows in ([0, 1, 2], [0, 2]):
        y = x.clone()
        y[1] = torch.nan
        found = losses.fake_score_loss(net, y[rows], sigma[rows], 0.1 * x[rows], labels[rows]).loss
        net.zero_grad()
        found.sum().backward()
        grads.append(net.logvar_linear.weight.grad)
        assert (found == 0).sum() == len(rows) - 2
    assert relative(*grads) < 1e-5


# --- sizes


@pytest.mark.parametrize("size", SIZES)
def test_parameters_match_the_publication(size):
    with torch.device("meta"):
        net = build_network(EDM2Config.of_size(size))
    parameters = sum(p.numel() for p in net.parameters())
    assert parameters / 1e6 == pytest.approx(PUBLISHED[size][0], abs=0.051)
    assert len(net.backbone.blocks()) == 36
    assert sum(v.dim() == 0 for v in net.state_dict().values()) == 37
    assert sum(p.dim() > 1 for p in net.parameters()) == 162


@pytest.mark.parametrize(
    "size", [s if s == "xs" else pytest.param(s, marks=pytest.mark.slow) for s in SIZES]
)
def test_flop_match_the_publication(size):
    gflop = sum(op.flops for op in op_counter.forward(EDM2Config.of_size(size))) / 1e9
    assert gflop == pytest.approx(PUBLISHED[size][1], abs=0.051)


# --- layers


def test_layers_preserve_magnitude():
    torch.manual_seed(0)
    a, b = torch.randn(4, 64, 16, 16), torch.randn(4, 32, 16, 16)
    conv = layers.MPConv(64, 128, 3)
    conv.weight.data.mul_(7)
    interior = conv(a)[..., 1:-1, 1:-1]  # padding lowers the border's
    left, right = mp.cat_gains(64, 32, 0.5)
    joined = torch.cat([left * a, right * b], 1)
    made = [
        mp.mp_silu_eager(a), mp.mp_sum_eager(a, a.flip(0), 0.3), joined,
        kernels.pixel_norm(5 * a).n, interior, layers.MPFourier(512)(torch.randn(64)),
    ]  # fmt: skip
    for x in made:
        assert float(x.square().mean().sqrt()) == pytest.approx(1, abs=0.03)
    for part in joined[:, :64], joined[:, 64:]:  # both tensors contribute alike
        assert float(part.square().sum(1).mean()) == pytest.approx(96 / 2, rel=0.05)


def test_a_block_clips_its_output():
    net = small_edm2()
    x = torch.randn(2, 64, 8, 8) * 1e4
    out, again = net.unet.dec["8x8_in1"](x, torch.randn(2, 64))
    assert torch.equal(out, again)
    assert float(out.abs().max()) == 256


@pytest.mark.parametrize("kernel", [None, 1, 3])
def test_the_gradient_of_a_normalised_weight_is_exact(kernel):
    torch.manual_seed(0)
    conv = layers.MPConv(3, 2, kernel).double()
    x = torch.randn(2, 3, *(() if kernel is None else (3, 3)), dtype=torch.float64)
    gain = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def run(weight, gain, x):
        return torch.func.functional_call(conv, {"weight": weight}, (x, gain))

    assert torch.autograd.gradcheck(run, (conv.weight, gain, x.requires_grad_(True)))


def test_normalising_weights_changes_no_output():
    net = small_edm2()
    for p in net.parameters():
        if p.dim() > 1:
            p.mul_(3)
    expected = net(*inputs(net.config))
    net.normalize_weights()
    once = [p.clone() for p in net.parameters()]
    assert relative(net(*inputs(net.config)), expected) < 2e-3
    for p in net.parameters():
        if p.dim() > 1:
            assert torch.allclose(p[0].square().mean().sqrt(), torch.ones(()), atol=2e-4)
    net.normalize_weights()
    assert all(torch.allclose(a, b, rtol=2e-4) for a, b in zip(once, net.parameters(), strict=True))


def test_dropout_acts_in_training_only_and_follows_its_seeds():
    net = small_edm2(dropout=0.5)
    x = inputs(net.config)
    expected = net(*x)
    assert torch.equal(net(*x), expected)
    net.train()
    assert not torch.equal(net(*x), net(*x))
    seeds = torch.arange(len(net.backbone.blocks()))[:, None] * torch.tensor([1, 5, 0])
    net.set_dropout(0.5, seeds)
    assert torch.equal(net(*x), net(*x))
    assert not torch.equal(net(*x), expected)
    assert not torch.equal(net.logits(*x), net.denoise_and_logits(*x)[1])  # masks of their own
    net.set_dropout(0)
    assert torch.equal(net(*x), expected)


def test_a_fresh_network_is_the_skip_connection_and_has_unit_weights():
    torch.manual_seed(0)
    net = EDM2Network(SMALL_EDM2)
    x, sigma, labels = inputs(SMALL_EDM2)
    c_skip = (0.25 / (sigma**2 + 0.25)).reshape(-1, 1, 1, 1)
    assert torch.allclose(net(x, sigma, labels), c_skip * x)
    assert not net.unet.out_gain.any()
    for p in net.parameters():
        if p.dim() > 1 and p.numel() > 1000:
            assert float(p.square().mean().detach()) == pytest.approx(1, abs=0.1)


def test_16_bit_weights_are_cast_where_they_are_used():
    net = small_edm2()
    x = inputs(net.config)
    expected = net(*x)
    net.compute_in(torch.bfloat16)
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert net.raw(x[0].bfloat16(), torch.zeros(2), x[2]).dtype == torch.bfloat16
    assert 0 < relative(net(*x), expected) < 0.05


def test_an_unconditional_network_takes_no_labels():
    net = small_edm2(label_dim=0)
    assert net.unet.emb_label is None
    assert net(*inputs(net.config)).isfinite().all()


# --- files


def test_a_snapshot_keeps_network_and_family(tmp_path):
    net = small_edm2()
    save_network(tmp_path / "net.safetensors", net)
    again = sid_fast.load_network(tmp_path / "net.safetensors")
    assert isinstance(again, EDM2Network)
    assert again.config == SMALL_EDM2
    assert torch.equal(again(*inputs(SMALL_EDM2)), net(*inputs(SMALL_EDM2)))


def test_families_are_told_apart_by_the_class_in_the_file(tmp_path):
    path = tmp_path / "net.pkl"
    path.write_bytes(edm2_pickle(small_edm2()))
    assert sid_fast.load_network(path).config == SMALL_EDM2
    path.write_bytes(network_pickle(small_teacher()))
    assert isinstance(sid_fast.load_network(path), EDMNetwork)


REFUSED = {
    "another class": (dict(class_name="VPPrecond"), "'VPPrecond' is not a supported class"),
    "guidance": (dict(img_channels=4, label_dim=0), "published only to guide a class-conditional"),
    "another balance": (dict(res_balance=0.5), "res_balance=0.5 is not supported; 0.3 is"),
    "an unknown argument": (dict(extra_attn=1), "extra_attn=1 is not supported"),
    "no model_channels": (dict(model_channels=None), "lacks the argument model_channels"),
    "another number of channels": (dict(img_channels=1), "unet.enc.8x8_conv.weight is"),
    "another width": (dict(model_channels=96), "cannot be split into heads of 64"),
    "another head": (dict(logvar_channels=16), "logvar_fourier.freqs is (8,)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_pickles_are_refused_in_one_line(tmp_path, case):
    arguments, words = REFUSED[case]
    path = tmp_path / "net.pkl"
    path.write_bytes(edm2_pickle(small_edm2(), **arguments))
    with pytest.raises(UserError) as caught:
        sid_fast.load_network(path)
    message = str(caught.value)
    assert words in message
    assert message.startswith(f"{path}: ")
    assert "\n" not in message


def test_a_pickle_without_the_head_has_no_log_variance(tmp_path):
    path = tmp_path / "generator.pkl"
    path.write_bytes(edm2_pickle(small_edm2(logvar_channels=0)))
    net = sid_fast.load_network(path)
    assert isinstance(net, EDM2Network)
    assert net.config.logvar_channels == 0
    with pytest.raises(UserError, match="no log-variance head"):
        net.log_variance(torch.zeros(2))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("architecture", "adm"),
        ("augment_dim", 9),
        ("logvar_channels", -1),
        ("logvar_channels", 8.0),
        ("model_channels", 96),
        ("resolution", 0),
    ],
)
def test_a_shape_that_cannot_work_is_refused_by_name(field, value):
    with pytest.raises(UserError, match=rf"^network: {field}="):
        dataclasses.replace(SMALL_EDM2, **{field: value})


def test_configurations_of_unknown_families_are_refused(tmp_path):
    net = small_edm2()
    path = tmp_path / "net.safetensors"
    save_network(path, net)
    data = path.read_bytes()
    for name in "edm3", "adm_":
        path.write_bytes(data.replace(b'\\"edm2\\"', json.dumps(json.dumps(name))[1:-1].encode()))
        with pytest.raises(UserError, match=rf"architecture='{name}'.*use one of .*adm, edm2"):
            sid_fast.load_network(path)


# --- runs


def settings_of(kind=sid_fast.Settings, **options):
    rates = {"fake_lr": 1e-3, "generator_lr": 1e-3}
    return kind(batch_size=4, micro_batch=2, **rates, **options)


def sida(**options):
    starts = {"generator_start_kimg": 0, "adversarial_start_kimg": 0, "adversarial_group": 2}
    return settings_of(sid_fast.SiDASettings, **starts, **options)


def train(settings, steps=2, **config):
    """Distil a small network, SiDA on made-up images; return the trainer."""
    net = small_edm2(**config)
    trainer = Trainer(data_free_method(net, settings, RandomFeed), settings)
    trainer.images = settings.batch_size  # past SiDA's starts
    for _ in range(steps):
        metrics = trainer.step()
        assert not any(metrics[f"{phase}/failed"] for phase in ("fake", "generator"))
    return trainer


def unit_rows(net):
    """Whether every row of every weight has a root mean square of 1."""
    rms = torch.cat([p.flatten(1).square().mean(1).sqrt() for p in net.parameters() if p.dim() > 1])
    return bool((rms - 1).abs().max() < 2e-4)


@pytest.mark.parametrize(
    ("settings", "fake", "generator"),
    [
        (settings_of(), True, True),
        (sida(), False, True),
        (settings_of(forced_normalization="generator"), False, True),
        (settings_of(forced_normalization="none"), False, False),
        (sida(forced_normalization="both"), True, True),
        (settings_of(forced_normalization="upstream"), True, True),
        (sida(forced_normalization="upstream"), False, True),
    ],
)
def test_runs_normalise_the_weights_of_the_chosen_networks(settings, fake, generator):
    trainer = train(settings, 1)
    assert unit_rows(trainer.method.fake_score) == fake
    assert unit_rows(trainer.method.generator) == generator
    assert not unit_rows(trainer.ema)
    trainer.before_sampling()
    sampled = settings.forced_normalization == "upstream" and not fake
    assert unit_rows(trainer.ema) == sampled


@pytest.mark.slow
def test_an_ema_that_evaluations_normalise_resumes_to_the_same_bits(run_command, tmp_path):
    """Evaluations follow the state of their step: its EMA must be normalised already."""
    save_network(tmp_path / "teacher.safetensors", small_edm2())
    write_dataset(tmp_path / "a.zip", pictures(8, 3), [0, 1, 2, 0, 1, 2, 0, 1])
    options = [
        "--teacher", tmp_path / "teacher.safetensors", "--method", "sida", "--data",
        tmp_path / "a.zip", "--batch-size", 4, "--adversarial-group", 2, "--generator-start-kimg",
        0, "--fake-lr", 1e-3, "--generator-lr", 1e-3, "--forced-normalization", "upstream",
        "--eval-every", 0.004, "--state-every", 0.004, "--eval-images", 4, "--detector", "pixels",
        "--teacher-steps", 0, "--ema-rampup-ratio", 0, "--ema-halflife-kimg", 0.01,
        "--keep-states", 9,
    ]  # fmt: skip
    whole = tmp_path / "whole"
    assert run_command("train", *options, "--kimg", 0.016, "--out", whole)[0] == 0
    state, again = whole / "state-000000002", tmp_path / "again"
    status, error = run_command("train", "--resume", state, "--out", again, "--kimg", 0.016)
    assert status == 0, error
    name = "snapshot-0000000016.safetensors"
    assert (again / name).read_bytes() == (whole / name).read_bytes()


def test_updates_that_are_disabled_normalise_nothing():
    trainer = train(settings_of(), 0)
    start = {name: t.clone() for name, t in trainer.state_dict().items()}
    with trainer.updates_disabled():
        trainer.dry_run()
    trainer.clear()
    assert all(torch.equal(t, start[name]) for name, t in trainer.state_dict().items())


def test_the_generator_has_no_log_variance_head_and_the_fake_scores_is_trained():
    trainer = train(settings_of())
    assert trainer.ema.config.logvar_channels == 0
    assert not any("logvar" in name for name in trainer.method.generator.state_dict())
    head = trainer.method.fake_score.logvar_linear.weight
    assert relative(head, trainer.method.teacher.logvar_linear.weight) > 1e-3
    without = train(settings_of(log_variance="off"))
    assert without.method.fake_score.config.logvar_channels == 0


def test_settings_of_another_family_are_refused():
    with pytest.raises(UserError, match="log_variance=on: the teacher has no log-variance head"):
        train(settings_of(log_variance="on"), logvar_channels=0)
    edm = EDMNetwork(NetworkConfig("ddpmpp", 8, model_channels=16, channel_mult=(1,), num_blocks=1))
    for options in {"log_variance": "off"}, {"forced_normalization": "both"}:
        with pytest.raises(
            UserError, match="is of EDM2 networks, and the teacher is a ddpmpp, 8x8"
        ):
            sid_fast.Distiller(edm, settings_of(**options))


def test_noise_levels_are_those_of_the_family_or_the_settings():
    assert train(settings_of(), 0).method.noise == (-0.8, 1.6)
    assert train(settings_of(), 0, channels=4).method.noise == (-0.4, 1.0)
    assert train(settings_of(p_mean=0.0, p_std=2.0), 0).method.noise == (0.0, 2.0)


# --- commands


@pytest.fixture
def latents(tmp_path):
    """A network of latents as a file."""
    save_network(tmp_path / "latents.safetensors", small_edm2(channels=4))
    return tmp_path / "latents.safetensors"


def test_latents_are_written_as_they_are(run_command, tmp_path, latents):
    out = tmp_path / "out.npz"
    status, _ = run_command(
        "generate", "--network", latents, "--steps", 2, "--seeds", "0-2", "--out", out
    )
    assert status == 0
    with np.load(out) as file:
        assert sorted(file) == ["labels", "latents", "seeds"]
        assert file["latents"].shape == (3, 4, 8, 8)
        assert file["latents"].dtype == np.float32
        assert file["latents"].min() < 0 < file["latents"].max()


@pytest.mark.parametrize("command", ["generate --out", "evaluate"])
def test_latents_are_no_images(run_command, tmp_path, latents, real, command):
    name, *target = command.split()
    arguments = [*target, tmp_path / "folder"]
    if name == "evaluate":
        arguments = ["--data", real, "--detector", "pixels"]
    status, error = run_command(name, "--network", latents, "--steps", 2, *arguments)
    assert (status, error.count("\n")) == (2, 1)
    assert f"{latents} makes latents" in error
    assert "--vae FOLDER" in error
    assert not (tmp_path / "folder").exists()


def test_pixels_become_a_grid(run_command, tmp_path):
    net, out = tmp_path / "net.safetensors", tmp_path / "x.png"
    save_network(net, small_edm2())
    status, _ = run_command(
        "generate", "--network", net, "--steps", 2, "--seeds", "0-3", "--grid", out
    )
    assert status == 0
    assert out.exists()
