"""The train command: bad input is one line, exit status 2 and nothing half-written."""

import dataclasses
from unittest.mock import Mock

import numpy as np
import pytest

from sid_fast import train
from sid_fast.data.datasets import write_dataset
from sid_fast.models import EDMNetwork
from sid_fast.models.registry import save_network
from tests.helpers.networks import SMALL


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
    """A conditional teacher needs class frequencies, which unlabelled data lacks."""
    write_dataset(tmp_path / "data.zip", np.zeros((2, 1, 8, 8), np.uint8), labels)
    network = EDMNetwork(dataclasses.replace(SMALL, label_dim=label_dim))
    save_network(tmp_path / "teacher.safetensors", network)
    monkeypatch.setattr(train, "Loop", loop := Mock())
    arguments = ["--teacher", tmp_path / "teacher.safetensors", "--data", tmp_path / "data.zip"]
    assert run_command("train", *arguments) == (0, "")
    headline = loop.call_args.args[4]
    assert headline.startswith("distilling")
    assert ("note: " in headline) == ("data.zip has no labels" in headline) == noted


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
