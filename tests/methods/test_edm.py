"""A teacher learns from real images; its steps are a function of seed and step alone."""

import json

import torch

from sid_fast.config.types import PretrainSettings
from sid_fast.data.digits import open_dataset
from sid_fast.data.feed import ImageFeed
from sid_fast.methods.edm import EDM
from sid_fast.models import EDMNetwork
from sid_fast.training.step import Trainer
from tests.helpers.networks import SMALL
from tests.helpers.processes import tensors_of


def pretrainer(seed: int = 0, **settings) -> Trainer:
    data = open_dataset("digits")
    torch.manual_seed(0)
    values = {"batch_size": 32, "lr_rampup_kimg": 0.1, "lr": 3e-3, "augment_p": 0.2} | settings
    settings = PretrainSettings(**values)
    feed = ImageFeed(data, settings.batch_size, seed, torch.device("cpu"))
    return Trainer(EDM(EDMNetwork(SMALL), settings, feed), settings, seed)


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.ema.parameters()])


def test_digits_are_an_edm_data_set():
    data = open_dataset("digits")
    assert (len(data), data.resolution, data.channels, data.label_dim) == (1797, 8, 1, 10)
    images = data.images()
    assert images.min() == 0
    assert images.max() == 255


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
