"""The train command: bad input is one line, exit status 2 and nothing half-written."""

import dataclasses
import json
import math
import shutil
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from sid_fast import train
from sid_fast.data.datasets import write_dataset
from sid_fast.models import EDMNetwork
from sid_fast.models.registry import load_generator, load_network, save_network
from sid_fast.training.logging import read_log
from tests.helpers.images import pictures
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
        (["--resume", "latest"], ["latest", "no training state", "leave out --resume"]),
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
    ("labels", "label_dim", "noted"), [(None, 10, True), ([0, 1], 10, False), (None, 0, False)]
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
    out = "--out", tmp_path / "run"
    assert "already holds a run" in run_command("train", "--teacher", "missing.pkl", *out)[1]
    status, error = run_command("train", *arguments, "--resume", "latest", "--alpha", 1)
    assert status == 2
    assert "alpha=1.2" in error
    assert "alpha=1.0" in error


# ---- SiDA

SHORT = ["--batch-size", 4, "--adversarial-group", 2, "--kimg", 0.016, "--log-every", 1]
STARTS = ["--generator-start-kimg", 0.004, "--adversarial-start-kimg", 0.008]


@pytest.fixture
def data(tmp_path):
    write_dataset(tmp_path / "data.zip", pictures(6), np.arange(6))
    return tmp_path / "data.zip"


def one_line(run_command, *arguments):
    status, error = run_command("train", *arguments)
    assert status == 2, error
    assert error.strip().count("\n") == 0, error
    return error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "sida"], ["data is missing", "--data"]),
        (["--method", "sid2a", "--data", "DATA"], ["generator is missing", "--generator"]),
        (["--method", "sida2"], ["sida2", "sid2a"]),
        (["--adversarial-group", 16], ["adversarial_group=16", "--method sida"]),
        (["--generator", "x.safetensors"], ["generator=x.safetensors", "--method sida"]),
        (["--method", "sida", "--data", "none.zip"], ["none.zip"]),
        (["--method", "sida", "--alpha", 3], ["alpha=3", "2"]),
        (["--method", "sida", "--adversarial-loss-scale", -1], ["adversarial_loss_scale=-1", "0"]),
        (["--method", "sida", "--generator-start-kimg", "nan"], ["generator_start_kimg=nan"]),
        (["--method", "sida", "--adversarial-start-kimg", -1], ["adversarial_start_kimg=-1"]),
        (["--method", "sida", "--fake-grad-clip", 0], ["fake_grad_clip=0"]),
        (
            ["--method", "sida", "--data", "DATA", "--batch-size", 8],
            ["adversarial_group=32 does not divide", "batch_size=8", "nearest"],
        ),
        (
            ["--method", "sida", "--data", "DATA", "--batch-size", 8, "--adversarial-group", 4],
            ["6 images", "batch_size=8", "--batch-size 6"],
        ),
        (
            ["--method", "sida", "--data", "DATA", "--batch-size", 6, "--adversarial-group", 4],
            ["adversarial_group=4", "nearest", "3"],
        ),
        (
            ["--method", "sida", "--generator", "none.pkl", "--data", "DATA", *SHORT],
            ["none.pkl"],
        ),
        (
            ["--method", "sida", "--generator", "digits", "--data", "DATA", *SHORT],
            ["digits has augment_dim=0", "augment_dim=9"],
        ),
        (
            ["--method", "sida", "--generator", "GENERATOR", "--init-sigma", 2.5, "--data", "DATA"],
            ["generator.safetensors", "init_sigma=3.0", "2.5"],
        ),
    ],
)
def test_sida_refuses(run_command, teacher, data, monkeypatch, tmp_path, arguments, words):
    monkeypatch.chdir(tmp_path)
    config = dataclasses.replace(SMALL, init_sigma=3.0)
    save_network(tmp_path / "generator.safetensors", EDMNetwork(config))
    names = {"DATA": data, "GENERATOR": tmp_path / "generator.safetensors"}
    before = sorted(tmp_path.rglob("*"))
    small = "GENERATOR" in arguments
    arguments = [names.get(a, a) for a in arguments] + (SHORT if small else [])
    error = one_line(run_command, "--teacher", teacher, *arguments)
    for word in words:
        assert word in error
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("shape", "labels", "words"),
    [
        ((6, 1, 4, 4), range(6), ["data.zip has resolution 4", "8"]),
        ((6, 3, 8, 8), range(6), ["data.zip has channels 3", "1"]),
        ((12, 1, 8, 8), range(12), ["data.zip has 12 classes", "10"]),
        ((6, 1, 8, 8), None, ["data.zip has no labels", "10"]),
    ],
)
def test_sida_refuses_data_that_the_teacher_does_not_know(
    run_command, teacher, tmp_path, shape, labels, words
):
    labels = labels and list(labels)
    write_dataset(tmp_path / "data.zip", np.zeros(shape, np.uint8), labels)
    arguments = ["--teacher", teacher, "--method", "sida", "--data", tmp_path / "data.zip"]
    error = one_line(run_command, *arguments, *SHORT, "--out", tmp_path / "run")
    for word in words:
        assert word in error
    assert not (tmp_path / "run").exists()


def test_sida_starts_in_three_stages_and_logs_its_losses(
    run_command, teacher, data, tmp_path, capsys
):
    run_command(
        "train", "--teacher", teacher, "--method", "sida", "--data", data, *SHORT, *STARTS,
        "--kimg", 0.02, "--out", tmp_path / "run",
    )  # fmt: skip
    records = read_log(tmp_path / "run" / "log.jsonl")
    assert len(records) == 5
    assert ["generator/loss" in r for r in records] == [False, False, True, True, True]
    names = ["loss", "discriminator", "real_logit", "fake_logit", "real_share", "clipped"]
    for r in records:
        assert all(math.isfinite(r[f"fake/{name}"]) for name in names)
        assert r["input_waits"] == 0
    assert all("generator/adversarial" in r for r in records[2:])
    assert json.loads((tmp_path / "run" / "config.json").read_text())["alpha"] == 1.0


@pytest.mark.parametrize(
    ("kimg", "noted"),
    [
        (5, "the run ends at 5 kimg, before the generator learns (--generator-start-kimg 5)"),
        (9, "adversarial one (--adversarial-start-kimg 10)"),
        (11, ""),
    ],
)
def test_a_run_that_is_too_short_for_sida_says_so(
    run_command, teacher, data, monkeypatch, kimg, noted
):
    monkeypatch.setattr(train, "Loop", loop := Mock())
    monkeypatch.setattr(train.host_load, "advice", lambda device: f"{device} is busy")
    starts = ["--generator-start-kimg", 5, "--adversarial-start-kimg", 10, "--kimg", kimg]
    arguments = ["--teacher", teacher, "--method", "sida", "--data", data, *SHORT[:4], *starts]
    assert run_command("train", *arguments) == (0, "")
    headline = loop.call_args.args[4]
    assert "note: cpu is busy" in headline
    assert ("before" in headline) == bool(noted)
    assert noted in headline


def test_sid2a_starts_from_the_best_network_of_a_run(run_command, teacher, data, tmp_path):
    """And takes its init_sigma."""
    arguments = ["--teacher", teacher, "--data", data, *SHORT[:2], "--init-sigma", 3]
    sid, out = tmp_path / "sid", tmp_path / "run"
    assert run_command("train", *arguments, "--kimg", 0.004, "--out", sid)[0] == 0
    generator = load_network(sid)
    assert generator.config.init_sigma == 3.0

    def first_snapshot(out):
        arguments = ["--teacher", teacher, "--method", "sid2a", "--data", data, "--generator", sid]
        assert run_command("train", *arguments, *SHORT, "--out", out) == (0, "")
        return load_network(out / "snapshot-0000000000.safetensors")

    found = first_snapshot(out)
    assert found.config.init_sigma == 3.0
    assert_equal(found, generator)
    with torch.no_grad():
        for p in generator.parameters():
            p.mul_(2)
    save_network(sid / "best-0000000002.safetensors", generator)
    assert_equal(first_snapshot(tmp_path / "best"), generator)
    # It resumes without the generator's files, and only as it was.
    shutil.rmtree(sid)
    assert run_command("train", "--resume", out, "--kimg", 0.02) == (0, "")
    error = one_line(run_command, "--resume", out, "--generator", "x")
    assert "generator=x" not in error
    assert "not x" in error


def assert_equal(a, b):
    assert all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))


def test_a_state_resumes_with_its_own_method(run_command, teacher, data, tmp_path):
    sid, sida = tmp_path / "sid", tmp_path / "sida"
    arguments = ["--teacher", teacher, "--data", data]
    assert run_command("train", *arguments, *SHORT[:2], "--kimg", 0.004, "--out", sid)[0] == 0
    error = one_line(run_command, "--resume", sid, "--method", "sida")
    assert "method=sid, not sida" in error
    assert f"--generator {sid}" in error
    arguments += [*SHORT, "--method", "sida", "--out", sida]
    assert run_command("train", *arguments)[0] == 0
    assert "method=sida, not sid:" in one_line(run_command, "--resume", sida, "--method", "sid")
    assert run_command("train", "--resume", sida, "--kimg", 0.02) == (0, "")
    assert read_log(sida / "log.jsonl")[-1]["images"] == 20


def test_a_generator_without_a_mark_is_taken(run_command, golden, data, tmp_path):
    """Published SiD pickles do not say their init_sigma."""
    loaded = load_generator(golden / "ddpmpp_uncond.fake.pkl")
    assert loaded.config.init_sigma is None
    config = train.TrainConfig(method="sida", generator=str(golden / "ddpmpp_uncond.fake.pkl"))
    network = load_network(golden / "ddpmpp_uncond.pkl").config
    assert_equal(train.open_generator(config, set(), network), loaded)
    assert config.init_sigma == 2.5
