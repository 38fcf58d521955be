"""The pretrain command: bad input is one line, exit status 2 and nothing half-written."""

import pytest
import torch

from sid_fast import Distiller, Settings
from sid_fast.data.datasets import ImageDataset, write_dataset
from sid_fast.models.registry import load_network
from sid_fast.training import callbacks
from tests.helpers.images import pictures

pytestmark = pytest.mark.usefixtures("cache")


EDM2 = ["--data", "digits", "--architecture", "edm2"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--data"]),
        (["--data", "none.zip"], ["none.zip"]),
        (["--data", "digits", "--channel-mult", "1,x"], ["1,x"]),
        (["--data", "digits", "--channel-mult", "1,2,2,2,2"], ["resolution=8"]),
        (["--data", "digits", "--model-channels", "36"], ["model_channels", "144"]),
        (["--data", "digits", "--ema-std", "0.3"], ["ema_std=0.3 is out of range"]),
        (["--data", "digits", "--ema-std", "0.1,0.1"], ["ema_std=0.1,0.1"]),
        (["--data", "digits", "--ema-std", "0.1;x"], ["0.1;x", "numbers such as 0.05,0.1"]),
        (
            ["--data", "digits", "--ema-std", "0.1", "--ema-halflife-kimg", "5"],
            ["--ema-halflife-kimg has no effect"],
        ),
        ([*EDM2, "--augment-p", "0.1"], ["augment_p=0.1", "EDM2", "leave out --augment-p"]),
        (
            [*EDM2, "--channel-mult", "1", "--model-channels", "96"],
            ["model_channels=96", "96 channels", "heads of 64"],
        ),
    ],
)
def test_pretrain_refuses(run_command, monkeypatch, tmp_path, arguments, words):
    monkeypatch.chdir(tmp_path)
    status, error = run_command("pretrain", *arguments)
    assert status == 2
    assert error.strip().count("\n") == 0
    for word in words:
        assert word in error
    assert {p.name for p in tmp_path.iterdir()} <= {"cache"}


def small(data, out):
    return [
        "pretrain", "--data", data, "--out", out, "--batch-size", 2, "--kimg", 0.002,
        "--model-channels", 8, "--channel-mult", "1", "--num-blocks", 1, "--sampler-steps", 1,
        "--attention-resolutions", "", "--augment-p", 0,
    ]  # fmt: skip


def test_classes_without_images_are_never_drawn(tmp_path, run_command, monkeypatch):
    """Of a teacher on such data: by the distillation, its sample grids, generate and evaluate."""
    write_dataset(tmp_path / "gaps.zip", pictures(4), [1, 4, 1, 4])
    write_dataset(tmp_path / "other.zip", pictures(5), [0, 1, 2, 3, 4])
    assert run_command(*small(tmp_path / "gaps.zip", tmp_path / "teacher"))[0] == 0
    teacher = load_network(tmp_path / "teacher")
    assert (teacher.config.label_dim, teacher.config.classes) == (5, [1, 4])

    distiller = Distiller(teacher, Settings(batch_size=64))
    for draws in distiller.draw().values():
        drawn = torch.cat([d.class_labels for d in draws]).argmax(1)
        assert set(drawn.tolist()) == {1, 4}
    grids, real = [], callbacks.fixed_grid_inputs
    monkeypatch.setattr(
        callbacks, "fixed_grid_inputs", lambda *a: grids.append(real(*a)) or real(*a)
    )
    base = ["train", "--batch-size", 4, "--kimg", 0.004, "--teacher", tmp_path / "teacher", "--out"]
    status, error = run_command(*base, tmp_path / "student")
    assert status == 0, error
    assert set(grids[-1][1].argmax(1).tolist()) == {1, 4}
    assert load_network(tmp_path / "student").config.classes == [1, 4]
    # Real images say more than the teacher.
    assert run_command(*base, tmp_path / "all", "--data", tmp_path / "other.zip")[0] == 0
    assert [*load_network(tmp_path / "all").config.classes] == [0, 1, 2, 3, 4]

    base = ["generate", "--network", tmp_path / "student", "--seeds", "0-39", "--out"]
    assert run_command(*base, tmp_path / "g.zip")[0] == 0
    assert set(ImageDataset(tmp_path / "g.zip").labels.tolist()) == {1, 4}
    status, error = run_command(*base, tmp_path / "h.zip", "--class", 0)
    assert (status, "class=0 had no images when" in error) == (2, True)
    assert not (tmp_path / "h.zip").exists()
    arguments = "--detector", "pixels", "-n", 8, "--metrics", "fid", "--ref", tmp_path / "r.npz"
    write = ["reference", "--data", tmp_path / "gaps.zip", "--out", tmp_path / "r.npz"]
    assert run_command("evaluate", *write, "--detector", "pixels")[0] == 0
    status, error = run_command("evaluate", "--network", tmp_path / "student", *arguments)
    assert status == 0
    assert "student was trained on images of 2 of the network's 5 classes: only those" in error


def test_data_with_gaps_say_which_classes_the_student_knows(tmp_path, run_command, teacher):
    write_dataset(tmp_path / "gaps.zip", pictures(4), [1, 4, 1, 4])
    status, error = run_command(
        "train", "--teacher", teacher, "--data", tmp_path / "gaps.zip", "--batch-size", 4,
        "--kimg", 0.004, "--out", tmp_path / "run",
    )  # fmt: skip
    assert status == 0, error
    assert load_network(tmp_path / "run").config.classes == [1, 4]
