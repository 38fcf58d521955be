"""The generate command: each seed gives one image, whatever the batch; bad input is refused."""

import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from sid_fast.cli import parse_seeds
from sid_fast.data.datasets import ImageDataset
from sid_fast.models.registry import save_network
from tests.helpers.networks import small_teacher
from tests.helpers.processes import TORCHRUN, python


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    path = tmp_path_factory.mktemp("generate") / "teacher.safetensors"
    save_network(path, small_teacher())
    return path


def pngs(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.mark.slow
def test_the_same_images_at_any_batch_size_and_number_of_processes(network, tmp_path, run_command):
    base = ["--network", network, "--init-sigma", 2.5, "--seeds", "0-7"]
    for batch in (8, 3, 1):
        status, _ = run_command("generate", *base, "--batch", batch, "--out", tmp_path / f"{batch}")
        assert status == 0
    done = python(*TORCHRUN, 2, "-m", "sid_fast.generate", *base, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    expected = pngs(tmp_path / "8")
    assert list(expected) == [f"seed{i:06d}.png" for i in range(8)]
    assert len(set(expected.values())) == 8
    assert pngs(tmp_path / "3") == pngs(tmp_path / "1") == pngs(tmp_path / "two") == expected
    # A seed makes its image in other company too.
    run_command("generate", *base[:-1], "5,100", "--out", tmp_path / "other")
    assert pngs(tmp_path / "other")["seed000005.png"] == expected["seed000005.png"]


def test_zip_npz_and_grid_hold_the_same_images(network, tmp_path, run_command):
    base = ["--network", network, "--init-sigma", 2.5, "--seeds", "0-4", "--class", 3]
    for out in ("folder", "set.zip", "set.npz"):
        status, _ = run_command("generate", *base, "--out", tmp_path / out)
        assert status == 0
    data = ImageDataset(tmp_path / "set.zip")
    assert (len(data), data.resolution, data.channels) == (5, 8, 1)
    assert data.labels.tolist() == [3] * 5
    with np.load(tmp_path / "set.npz") as found:
        assert found["seeds"].tolist() == [0, 1, 2, 3, 4]
        assert found["labels"].tolist() == [3] * 5
        assert np.array_equal(found["images"].transpose(0, 3, 1, 2), data.images())
    single = np.array(Image.open(tmp_path / "folder" / "seed000002.png"))
    assert np.array_equal(single, data[2][0])
    assert all(i.compress_type == 0 for i in zipfile.ZipFile(tmp_path / "set.zip").infolist())
    assert run_command("generate", *base, "--grid", tmp_path / "grid.png")[0] == 0
    assert min(Image.open(tmp_path / "grid.png").size) > 100


def test_a_teacher_is_sampled_in_many_steps(network, tmp_path, run_command):
    base = ["--network", network, "--seeds", "0-2", "--out", tmp_path / "x.npz"]
    status, _ = run_command("generate", *base, "--steps", 4)
    assert status == 0


def test_seeds_are_read_as_written():
    assert parse_seeds("0-2,7, 9-9") == [0, 1, 2, 7, 9]
    assert torch.Generator().manual_seed(2**63 - 1)
    assert parse_seeds(str(2**63 - 1)) == [2**63 - 1]


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
