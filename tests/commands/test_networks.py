"""Networks that load but that a command cannot use: refused in one line, before any work."""

import numpy as np
import pytest
import torch

from sid_fast.errors import WriteFailed
from sid_fast.models import NetworkConfig
from sid_fast.models.registry import save_network
from tests.helpers.networks import SMALL, small_teacher

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def generator(tmp_path):
    """A one-step generator as a file."""
    net = small_teacher()
    net.config = NetworkConfig.from_dict(SMALL.to_dict() | {"init_sigma": 2.5})
    save_network(tmp_path / "generator.safetensors", net)
    return tmp_path / "generator.safetensors"


@pytest.fixture
def overflowing(tmp_path):
    """A network with finite weights whose output is not."""
    net = small_teacher()
    for p in net.parameters():
        p.data.mul_(1e30)
    assert all(p.isfinite().all() for p in net.parameters())
    save_network(tmp_path / "large.safetensors", net)
    return tmp_path / "large.safetensors"


@pytest.mark.parametrize("command", ["train", "generate", "evaluate"])
def test_a_one_step_generator_is_no_denoiser(run_command, tmp_path, generator, real, command):
    arguments = {
        "train": ["--teacher", generator, "--out", tmp_path / "out"],
        "generate": ["--network", generator, "--steps", 18, "--grid", tmp_path / "out"],
        "evaluate": ["--network", generator, "--steps", 18, "--data", real],
    }[command]
    if command == "generate":
        arguments[-1] = tmp_path / "out.png"
    if command == "evaluate":
        arguments += ["--detector", "pixels"]
    status, error = run_command(command, *arguments)
    assert (status, error.count("\n")) == (2, 1)
    assert f"{generator} is a one-step generator (init_sigma=2.5)" in error
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("out")]


def test_a_one_step_generator_makes_images_in_one_step(run_command, tmp_path, generator):
    arguments = ["--network", generator, "--seeds", "0-3", "--grid", tmp_path / "x.png"]
    assert run_command("generate", *arguments) == (0, "")


@pytest.mark.parametrize("channels", [2, 4, 5])
@pytest.mark.parametrize("out", [["--grid", "x.png"], ["--out", "x.zip"], ["--out", "x"]])
def test_png_files_hold_one_or_three_channels(
    run_command, golden, tmp_path, monkeypatch, channels, out
):
    monkeypatch.chdir(tmp_path)
    path = golden.parent / "cases" / "07-channels-not-1-or-3" / f"tiny-ch{channels}.pkl"
    status, error = run_command("generate", "--network", path, "--seeds", "0-3", *out)
    assert (status, error.count("\n")) == (2, 1)
    assert f"{path} makes images of {channels} channels" in error
    assert "NAME.npz" in error
    assert not list(tmp_path.glob("x*"))


@pytest.mark.parametrize("channels", [2, 5])
def test_npz_files_hold_any_number_of_channels(run_command, golden, tmp_path, channels):
    path = golden.parent / "cases" / "07-channels-not-1-or-3" / f"tiny-ch{channels}.pkl"
    out = tmp_path / "x.npz"
    arguments = ["--network", path, "--seeds", "0-3", "--out", out, "--init-sigma", 2.5]
    assert run_command("generate", *arguments)[0] == 0
    with np.load(out) as file:
        assert file["images"].shape == (4, 8, 8, channels)


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_other_commands_need_one_or_three_channels(run_command, golden, tmp_path, real, command):
    path = golden.parent / "cases" / "07-channels-not-1-or-3" / "tiny-ch4.pkl"
    arguments = {
        "train": ["--teacher", path, "--out", tmp_path / "run"],
        "evaluate": ["--network", path, "--data", real, "--detector", "pixels"],
    }[command]
    status, error = run_command(command, *arguments)
    assert status == 2
    assert f"{path} makes images of 4 channels" in error


@pytest.mark.parametrize("command", ["generate", "evaluate"])
@pytest.mark.parametrize("steps", [1, 4])
def test_output_that_is_not_finite_is_noticed(
    run_command, overflowing, tmp_path, real, command, steps
):
    arguments = {
        "generate": ["--seeds", "0-3", "--grid", tmp_path / "x.png"],
        "evaluate": ["--data", real, "--detector", "pixels", "--num", 20],
    }[command]
    arguments += [] if steps == 1 and command == "evaluate" else ["--steps", steps]
    status, error = run_command(command, "--network", overflowing, *arguments)
    assert status == 2
    assert "images have NaN or infinite pixels" in error.splitlines()[-1]
    assert "Traceback" not in error
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("command", ["generate", "train", "evaluate"])
def test_weights_that_are_not_finite_are_refused(run_command, tmp_path, real, command):
    net = small_teacher()
    net.model.map_layer0.weight.data[0, 0] = torch.nan
    save_network(path := tmp_path / "nan.safetensors", net)
    arguments = {
        "generate": ["--network", path, "--grid", tmp_path / "x.png"],
        "train": ["--teacher", path, "--out", tmp_path / "run"],
        "evaluate": ["--network", path, "--data", real, "--detector", "pixels"],
    }[command]
    status, error = run_command(command, *arguments)
    assert status == 2
    assert f"{path}: model.map_layer0.weight has values that are NaN or infinite" in error


def test_evaluate_goes_on_without_a_cache_that_cannot_be_written(
    run_command, tmp_path, teacher, real, cache, monkeypatch
):
    def fail(path, *arguments, **options):
        raise WriteFailed(f"{path} cannot be written (Permission denied): check the permissions")

    monkeypatch.setattr("sid_fast.data.datasets.atomic_path", fail)
    monkeypatch.setattr("sid_fast.evaluation.references.write_snapshot", fail)
    arguments = ["--network", teacher, "--data", real, "--detector", "pixels", "--num", 20]
    status, error = run_command("evaluate", *arguments)
    assert status == 0
    warnings = [line for line in error.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 2
    assert all("SID_FAST_CACHE" in line and str(cache) in line for line in warnings)
