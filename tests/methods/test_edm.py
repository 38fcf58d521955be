"""A teacher learns from real images; its steps are a function of seed and step alone."""

import json

import pytest
import torch

from sid_fast.config.types import NetworkOptions, PretrainSettings, RunOptions, TeacherOptions
from sid_fast.data.digits import open_dataset
from sid_fast.data.feed import ImageFeed
from sid_fast.errors import UserError
from sid_fast.evaluation.decoding import make_decoder
from sid_fast.methods.edm import EDM, teacher_config
from sid_fast.models import EDM2Config
from sid_fast.models.families import build_network
from sid_fast.models.registry import load_network
from sid_fast.training import power_ema
from sid_fast.training.callbacks import Snapshots
from sid_fast.training.step import Trainer
from tests.helpers.networks import SMALL
from tests.helpers.processes import tensors_of

EDM2 = EDM2Config(
    resolution=8, channels=1, label_dim=10, model_channels=64, channel_mult=(1,), num_blocks=1,
    attention_resolutions=(), logvar_channels=8,
)  # fmt: skip


def pretrainer(seed: int = 0, network=SMALL, **settings) -> Trainer:
    data = open_dataset("digits")
    torch.manual_seed(0)
    values = {"batch_size": 32, "lr_rampup_kimg": 0.1, "lr": 3e-3, "augment_p": 0.2} | settings
    settings = PretrainSettings(**values)
    feed = ImageFeed(data, settings.batch_size, seed, torch.device("cpu"))
    return Trainer(EDM(build_network(network), settings, feed), settings, seed)


def edm2_pretrainer(**settings) -> Trainer:
    values = {"augment_p": 0.0, "dropout": 0.0, "lr": 1e-2, "batch_size": 16} | settings
    return pretrainer(network=EDM2, **values)


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.ema.parameters()])


def test_digits_are_an_edm_data_set():
    data = open_dataset("digits")
    assert (len(data), data.resolution, data.channels, data.label_dim) == (1797, 8, 1, 10)
    images = data.images()
    assert images.min() == 0
    assert images.max() == 255


@pytest.mark.slow
def test_the_loss_falls():
    trainer = pretrainer(dropout=0.0, augment_p=0.0)
    losses = [float(trainer.step()["loss"]) for _ in range(90)]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


def test_the_network_learns_in_training_mode_and_is_told_of_the_warps():
    trainer = pretrainer(dropout=0.2, augment_p=1.0)
    seen = []
    trainer.method.net.model.register_forward_pre_hook(
        lambda net, args: seen.append((net.training, args[3]))
    )
    trainer.step()
    training, augment_labels = seen[0]
    assert training
    assert augment_labels.shape == (32, 9)
    assert augment_labels.any(dim=1).all()


def test_a_stopped_teacher_resumes_bit_exactly(tmp_path, run_command):
    base = [
        "--data", "digits", "--model-channels", 16, "--channel-mult", "1,2", "--num-blocks", 1,
        "--attention-resolutions", "", "--batch-size", 4, "--state-every", 0.008,
        "--keep-states", 9, "--sampler-steps", 2, "--lr-rampup-kimg", 0.01,
    ]  # fmt: skip
    assert run_command("pretrain", *base, "--kimg", 0.016, "--out", tmp_path / "a")[0] == 0
    resume = ["--resume", tmp_path / "a" / "state-000000002", "--out", tmp_path / "b"]
    assert run_command("pretrain", *resume)[0] == 0
    a, b = (tensors_of(tmp_path / run / "state-000000004") for run in ("a", "b"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    status, error = run_command("pretrain", *resume[:3], tmp_path / "c", "--num-blocks", 2)
    assert status == 2
    assert "network num_blocks=1" in error
    status, error = run_command("train", "--resume", tmp_path / "a")
    assert status == 2
    assert "another command" in error


def test_steps_are_a_function_of_seed_and_step_alone():
    runs = []
    for seed in (1, 1, 2):
        trainer = pretrainer(seed, dropout=0.2, micro_batch=16)
        for _ in range(2):
            torch.rand(3)
            trainer.step()
        runs.append(weights(trainer))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_the_learning_rate_rises_over_a_20th_of_the_run(tmp_path, run_command):
    arguments = ["--data", "digits", "--out", tmp_path / "run", "--kimg", 0.016, "--batch-size", 4]
    arguments += ["--model-channels", 16, "--channel-mult", "1", "--num-blocks", 1]
    assert run_command("pretrain", *arguments, "--sampler-steps", 1)[0] == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["lr_rampup_kimg"] == 0.016 / 20


def test_resume_latest_finds_runs_of_the_same_command_only(tmp_path, run_command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["--data", "digits", "--batch-size", 4, "--model-channels", 16]
    arguments += ["--channel-mult", "1", "--num-blocks", 1, "--sampler-steps", 1]
    assert run_command("pretrain", *arguments, "--kimg", 0.004, "--out", "runs/teacher")[0] == 0
    distil = ["--teacher", "runs/teacher", "--batch-size", 4, "--kimg", 0.004]
    assert run_command("train", *distil, "--out", "runs/one-step")[0] == 0
    status, error = run_command("pretrain", "--resume", "latest", "--kimg", 0.008)
    assert status == 0, error
    assert (tmp_path / "runs" / "teacher" / "state-000000002").exists()
    status, error = run_command("pretrain", "--resume", "runs/one-step")
    assert status == 2
    assert "python -m sid_fast.train" in error


# --- learning rate and power-function EMAs


def test_the_learning_rate_rises_and_then_falls_with_the_square_root_of_the_steps():
    settings = PretrainSettings(
        lr=0.01, batch_size=100, lr_rampup_kimg=1, lr_decay_batches=50, augment_p=0
    )
    lr = EDM(build_network(SMALL), settings).lr
    found = [lr(100 * (steps - 1)) for steps in (1, 5, 10, 50, 51, 200, 5000)]
    expected = [0.001, 0.005, 0.01, 0.01, 0.01 * (50 / 51) ** 0.5, 0.005, 0.001]
    assert found == pytest.approx(expected, rel=1e-12)
    assert EDM(build_network(SMALL), PretrainSettings(lr_rampup_kimg=0)).lr(10**12) == 1e-3


def expected_emas(trainer, stds, steps, skip=()):
    """The EMAs after so many steps, in float64, from the weights after each update."""
    net, batch = trainer.method.net, trainer.settings.batch_size
    emas = [{k: v.detach().double() for k, v in net.named_parameters()} for _ in stds]
    after_update, seen = net.after_update, []

    def updated(*arguments):  # follows the update
        seen.append({k: v.detach().double().clone() for k, v in net.named_parameters()})
        after_update(*arguments)

    net.after_update = updated
    for i in range(steps):
        trainer.enabled.fill_(i not in skip)
        trainer.step()
        for ema, std in zip(emas, stds, strict=True):
            beta = power_ema.decay(batch * i, batch, power_ema.exponent(std))
            for name, value in seen[-1].items():
                if i not in skip:
                    ema[name] = beta * ema[name] + (1 - beta) * value
    return emas


@pytest.mark.parametrize("make", [pretrainer, edm2_pretrainer])
def test_every_width_is_tracked(make):
    """The widest is the one that the Adam kernel updates, and of grids and evaluations."""
    trainer = make(ema_std=(0.05, 0.2), batch_size=8, augment_p=0.0)
    assert trainer.ema is trainer.emas[0]
    for found, expected in zip(trainer.emas, expected_emas(trainer, (0.2, 0.05), 5), strict=True):
        for name, p in found.named_parameters():
            torch.testing.assert_close(p.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_a_step_without_an_update_leaves_every_ema_as_it_was():
    trainer = pretrainer(ema_std=(0.05, 0.2), batch_size=8)
    for _ in range(3):
        trainer.step()
    before = {name: t.clone() for name, t in trainer.state_dict().items() if ".ema" in name}
    assert {name.split(".")[1] for name in before} == {"ema", "ema2"}
    trainer.enabled.fill_(False)
    trainer.step()
    assert all(torch.equal(t, trainer.state_dict()[name]) for name, t in before.items())


def test_sample_grids_are_of_the_widest(tmp_path):
    trainer, seen = pretrainer(ema_std=(0.05, 0.2), batch_size=8), []

    def make(net, z, labels):
        seen.append(net)
        return z

    decoder = make_decoder(trainer.ema.config, None, torch.device("cpu"), "the network")
    Snapshots(RunOptions(), trainer, trainer.emas, make, decoder, (0.2, 0.05))(tmp_path)
    assert {id(net) for net in seen} == {id(trainer.ema)}


def test_a_grid_that_does_not_fit_ends_no_run(tmp_path, capsys):
    """The graph of a training step keeps its memory; the snapshot is written all the same."""
    trainer = pretrainer(ema_std=(0.2,), batch_size=8)

    def make(net, z, labels):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    decoder = make_decoder(trainer.ema.config, None, torch.device("cpu"), "the network")
    snapshots = Snapshots(RunOptions(), trainer, trainer.emas, make, decoder, (0.2,))
    with pytest.raises(torch.OutOfMemoryError):  # before the first step nothing is lost
        snapshots(tmp_path)
    trainer.step()
    assert snapshots(tmp_path) == {}
    assert "no sample grid at 0.008 kimg: CUDA out of memory" in capsys.readouterr().err
    assert list(tmp_path.glob("snapshot-0000000008-*.safetensors"))
    assert not list(tmp_path.glob("*.png"))


def test_one_width_needs_no_second_ema():
    trainer = pretrainer(ema_std=(0.1,), batch_size=8)
    trainer.step()
    assert len(trainer.emas) == 1
    params = dict(trainer.method.net.named_parameters())
    for name, p in trainer.ema.named_parameters():
        assert torch.equal(p, params[name])  # β of the first step is 0


# --- EDM2


def test_edm2_learns_with_its_log_variance_head():
    trainer = edm2_pretrainer(p_mean=0.0, p_std=0.2)
    head = trainer.method.net.logvar_linear.weight
    before = head.detach().clone()
    values = [float(trainer.step()["distance"]) for _ in range(24)]
    assert sum(values[-6:]) < 0.8 * sum(values[:6])
    assert not torch.allclose(head, before, atol=0.01)
    # Normalised after each update.
    assert float(head.detach().square().mean()) == pytest.approx(1, abs=0.01)


def test_noise_levels_follow_the_settings():
    trainer = edm2_pretrainer(p_mean=2.0, p_std=0.5, batch_size=512)
    ln = trainer.sample_inputs()[""][0].sigma.log()
    assert float(ln.mean()) == pytest.approx(2, abs=0.1)
    assert float(ln.std()) == pytest.approx(0.5, abs=0.05)


def test_options_have_the_defaults_of_the_architecture():
    edm, edm2 = TeacherOptions(), TeacherOptions(architecture="edm2")
    assert vars(edm) == vars(NetworkOptions()) | vars(PretrainSettings())
    found = (
        edm2.model_channels, edm2.channel_mult, edm2.num_blocks, edm2.attention_resolutions,
        edm2.lr, edm2.lr_decay_batches, edm2.beta1, edm2.beta2, edm2.ema_std, edm2.batch_size,
        edm2.dropout, edm2.augment_p,
    )  # fmt: skip
    expected = (
        128,
        (1, 2, 3, 4),
        3,
        (16, 8),
        0.012,
        35_000,
        0.9,
        0.99,
        (0.05, 0.1),
        2048,
        0,
        0,
    )
    assert found == expected
    large = TeacherOptions(architecture="edm2", model_channels=448, num_blocks=2, beta2=0.98)
    assert (large.dropout, large.num_blocks, large.beta2) == (0.1, 2, 0.98)
    assert large.lr == pytest.approx(0.0065, rel=0.06)  # published


def test_edm2_takes_no_augmentation_labels():
    options = TeacherOptions(architecture="edm2", augment_p=0.1)
    with pytest.raises(UserError, match=r"augment_p=0\.1: EDM2 networks take no augmentation"):
        teacher_config(options, options, open_dataset("digits"))


def test_a_stopped_edm2_teacher_resumes_to_the_same_bits(tmp_path, run_command):
    base = [
        "--architecture", "edm2", "--data", "digits", "--model-channels", 64, "--channel-mult", 1,
        "--num-blocks", 1, "--attention-resolutions", "", "--batch-size", 4, "--dropout", 0.1,
        "--state-every", 0.008, "--keep-states", 9, "--sampler-steps", 1, "--lr-decay-batches", 1,
        "--snapshot-every", 0.004, "--keep-snapshots", 4,
    ]  # fmt: skip
    status, error = run_command("pretrain", *base, "--kimg", 0.016, "--out", tmp_path / "a")
    assert status == 0, error
    resume = ["--resume", tmp_path / "a" / "state-000000002", "--out", tmp_path / "b"]
    assert run_command("pretrain", *resume)[0] == 0
    a, b = (tensors_of(tmp_path / run / "state-000000004") for run in ("a", "b"))
    assert {name.split(".")[1] for name in a} >= {"net", "ema", "ema2", "exp_avg", "exp_avg_sq"}
    assert all(torch.equal(a[name], b[name]) for name in a)
    # A file per width; of more than --keep-snapshots moments every second one goes.
    names = {p.name for p in (tmp_path / "a").glob("snapshot-*")}
    assert names == {f"snapshot-{n:010d}-{std}.safetensors" for n in (0, 8, 16)
                     for std in ("0.050", "0.100")}  # fmt: skip
    widest = tmp_path / "a" / "snapshot-0000000016-0.100.safetensors"
    content = widest.read_bytes()
    widest.unlink()  # as if a kill had prevented it
    assert run_command("pretrain", "--resume", tmp_path / "a")[0] == 0
    assert widest.read_bytes() == content
    newest = load_network(tmp_path / "a")  # the widest, as in grids
    assert all(torch.equal(p, a[f"teacher.ema.{name}"]) for name, p in newest.named_parameters())
    out = tmp_path / "x.safetensors"
    assert run_command("ema", tmp_path / "a", "--std", 0.08, "--out", out) == (0, "")
    assert load_network(out).config == newest.config
    # Snapshots of one run are alike, resumed or not; with another learning rate it is another run.
    (tmp_path / "b" / "snapshot-0000000016-0.050.safetensors").rename(
        tmp_path / "a" / "snapshot-0000000012-0.050.safetensors"
    )
    assert run_command("ema", tmp_path / "a", "--std", 0.08, "--out", out) == (0, "")
    arguments = [*base, "--lr", 0.5, "--kimg", 0.004, "--out", tmp_path / "c"]
    assert run_command("pretrain", *arguments)[0] == 0
    (tmp_path / "c" / "snapshot-0000000004-0.050.safetensors").rename(
        tmp_path / "a" / "snapshot-0000000004-0.050.safetensors"
    )
    status, error = run_command("ema", tmp_path / "a", "--std", 0.08, "--out", out)
    assert (status, "of different runs" in error) == (2, True)
