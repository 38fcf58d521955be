"""Bad input to the commands: one clear line, exit status 2, nothing half-written."""

import dataclasses
import os
import subprocess
import sys
from unittest.mock import Mock

import numpy as np
import pytest
from click.testing import CliRunner

from sid_fast import evaluate, generate, plan, pretrain, train
from sid_fast.data.datasets import write_dataset
from sid_fast.models import EDMNetwork
from sid_fast.models.registry import save_network
from tests.helpers.networks import SMALL, small_teacher


@pytest.fixture
def teacher(tmp_path):
    save_network(tmp_path / "teacher.safetensors", small_teacher())
    return tmp_path / "teacher.safetensors"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--preset", "cifar"], ["'cifar'", "cifar10-uncond", "digits"]),
        (["--alphas", "1"], ["--alphas", "--alpha"]),
        (["--alpha", "abc"], ["abc", "--alpha"]),
        (["--alpha", "7"], ["alpha=7.0", "-0.5 to 2"]),
        (["--alpha", "nan"], ["alpha=nan"]),
        (["--tmax", "1001"], ["tmax=1001", "1 to 1000"]),
        (["--kimg", "0"], ["kimg=0"]),
        (  # here and for --eval-every alone: before the teacher is fetched
            ["--batch-size", "100", "--micro-batch", "32", "--teacher", "none.pkl"],
            ["batch_size=100", "nearest", "96"],
        ),
        (["--teacher", "none.pkl"], ["none.pkl", "cifar10-uncond"]),
        (["--device", "tpu"], ["tpu", "cpu"]),
        (["--kernels", "apex"], ["apex", "triton", "eager"]),
        (["--augment-p", "0.1", "--data", "none.zip"], ["none.zip"]),
        (["--eval-every", "1", "--teacher", "none.pkl"], ["eval_every=1.0", "--data", "--ref"]),
        (["--eval-every", "1", "--ref", "none.npz", "--detector", "pixels"], ["none.npz"]),
        (["--resume", "latest"], ["latest", "no training state"]),
        (["--seed", "-1"], ["seed=-1"]),
        (["--out", "teacher.safetensors/run"], ["teacher.safetensors/run", "--out"]),
    ],
)
def test_train_refuses(run_command, teacher, monkeypatch, tmp_path, arguments, words):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    base = [] if "--teacher" in arguments else ["--teacher", teacher]
    status, error = run_command("train", *base, *arguments)
    assert status == 2
    assert error.strip().count("\n") == 0, error
    for word in words:
        assert word in error
    assert sorted(tmp_path.rglob("*")) == before


def test_train_without_a_teacher_says_how_to_give_one(run_command):
    status, error = run_command("train")
    assert status == 2
    assert "--teacher" in error
    assert "--preset" in error


@pytest.mark.parametrize(
    ("labels", "label_dim", "noted"), [(None, 10, True), ([3, 1], 10, False), (None, 0, False)]
)
def test_train_notes_a_data_set_without_labels(
    run_command, monkeypatch, tmp_path, labels, label_dim, noted
):
    """Where the teacher takes some: nothing tells how often its classes are to be drawn."""
    write_dataset(tmp_path / "data.zip", np.zeros((2, 1, 8, 8), np.uint8), labels)
    network = EDMNetwork(dataclasses.replace(SMALL, label_dim=label_dim))
    save_network(tmp_path / "teacher.safetensors", network)
    monkeypatch.setattr(train, "Loop", loop := Mock())
    arguments = ["--teacher", tmp_path / "teacher.safetensors", "--data", tmp_path / "data.zip"]
    assert run_command("train", *arguments) == (0, "")
    headline = loop.call_args.args[4]
    assert headline.startswith("distilling")
    assert ("note: " in headline) == ("data.zip has no labels" in headline) == noted


ABANDONED = """
import threading, time, click
from sid_fast import cli
from sid_fast.performance import failure
from sid_fast.errors import RunFailed

@click.command()
def command():
    threading.Thread(target=time.sleep, args=(3600,)).start()
    print("a line that does not fit")
    failure.unclean_exit = True
    raise RunFailed("process 1 was lost")

cli.main(command, "x")
"""


def test_who_has_left_others_behind_waits_for_nothing_at_the_end():
    """Neither for a thread, which may wait for them, nor for a log on a full disk."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", ABANDONED],
            stdout=full, stderr=subprocess.PIPE, env=env, timeout=60,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, b"error: process 1 was lost\n")


def test_train_refuses_a_folder_that_holds_a_run(run_command, teacher, tmp_path):
    arguments = ["--teacher", teacher, "--out", tmp_path / "run", "--batch-size", 4]
    assert run_command("train", *arguments, "--kimg", 0.004)[0] == 0
    status, error = run_command("train", *arguments)
    assert status == 2
    assert "already holds a run: use --resume" in error
    status, error = run_command("train", *arguments, "--resume", "latest", "--alpha", 1)
    assert status == 2
    assert "alpha=1.2" in error
    assert "alpha=1.0" in error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--seeds", "5-1"], ["'5-1'"]),
        (["--seeds", "x"], ["'x'", "0-63"]),
        (["--grid", "grid.jpg"], ["grid.jpg", ".png"]),
        (["--out", "x.tar"], ["x.tar", "folder", ".zip or .npz"]),
        (["--out", "x.PNG"], ["x.PNG", "folder"]),
        (["--network", "x" * 5000], ["xxx"]),
        (["--class", "10"], ["class=10", "0 to 9"]),
        (["--class", "-1"], ["class"]),
        (["--network", "none"], ["none"]),
    ],
)
def test_generate_refuses(run_command, teacher, monkeypatch, tmp_path, arguments, words):
    monkeypatch.chdir(tmp_path)
    base = ["--network", teacher, "--out", "out"]
    status, error = run_command("generate", *base, *arguments)
    assert status == 2
    assert error.strip().count("\n") == 0
    for word in words:
        assert word in error
    assert list(tmp_path.iterdir()) == [teacher]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--data"]),
        (["--data", "none.zip"], ["none.zip"]),
        (["--data", "digits", "--channel-mult", "1,x"], ["1,x"]),
        (["--data", "digits", "--channel-mult", "1,2,2,2,2"], ["resolution=8"]),
        (["--data", "digits", "--model-channels", "36"], ["model_channels", "144"]),
    ],
)
def test_pretrain_refuses(run_command, monkeypatch, tmp_path, arguments, words):
    monkeypatch.chdir(tmp_path)
    status, error = run_command("pretrain", *arguments)
    assert status == 2
    assert error.strip().count("\n") == 0
    for word in words:
        assert word in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("module", "config"),
    [
        (train, train.TrainConfig),
        (generate, generate.GenerateConfig),
        (evaluate, evaluate.EvaluateConfig),
        (pretrain, pretrain.PretrainConfig),
        (plan, plan.PlanConfig),
    ],
)
def test_help_explains_every_option(module, config):
    text = CliRunner().invoke(module.main, ["--help"]).output
    for field in dataclasses.fields(config):
        assert f"--{field.name.strip('_').replace('_', '-')} " in text
    preset = CliRunner().invoke(train.main, ["--preset", "ffhq64", "--help"]).output
    preset = " ".join(preset.split())
    assert "[default: 0.9]" in preset, "--help does not show the preset's own defaults"
