"""The prepare command: what it writes, what it leaves out, and what it refuses."""

import io
import json
import shutil
import zipfile

import numpy as np
import pytest
from PIL import Image

from sid_fast import prepare
from sid_fast.data.datasets import ImageDataset, write_dataset
from tests.helpers.images import make_zip

RNG = np.random.default_rng(0)


def picture(width, height, kind="PNG", mode="RGB"):
    pixels = RNG.integers(256, size=(height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(buffer := io.BytesIO(), kind)
    return buffer.getvalue()


@pytest.fixture
def photos(tmp_path):
    """A folder of photographs of different sizes and formats, some of them damaged."""
    folder = tmp_path / "photos"
    files = {
        "dog/a.png": picture(40, 50),
        "cat/b.jpg": picture(64, 64, "JPEG"),
        "cat/a.png": picture(33, 90),
        "dog/c.webp": picture(70, 32, "WEBP"),
        "cat/cut.jpg": picture(64, 64, "JPEG")[:700],
        "dog/tiny.png": picture(31, 99),
        "dog/empty.png": b"",
        "cat/text.txt": b"x",
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """run(source=…) -> the data set and the lines that were printed."""

    def run(out="data.zip", **options):
        monkeypatch.chdir(tmp_path)
        prepare.run(prepare.PrepareConfig(out=out, **options), set(options))
        return ImageDataset(out), capsys.readouterr().out.splitlines()

    return run


def test_a_folder_of_photographs(photos, run, tmp_path):
    data, lines = run(source="photos", resolution=32)
    assert (len(data), data.resolution, data.channels, data.note) == (4, 32, 3, "")
    assert data.labels.tolist() == [0, 0, 1, 1]
    square = Image.open(photos / "cat/a.png").crop((0, 28, 33, 61))
    expected = np.asarray(square.resize((32, 32), Image.Resampling.LANCZOS))
    assert np.array_equal(data[0].transpose(1, 2, 0), expected)
    assert lines[0] == "reading photos: folder of images, 7 images, 2 classes (cat, dog)"
    assert lines[1].startswith("wrote data.zip: 4 RGB images of 32x32 pixels, ")
    assert lines[2] == (
        "left out: 1 damaged (cat/cut.jpg), 1 empty (dog/empty.png), 1 smaller than 32 px "
        "(dog/tiny.png)"
    )
    assert lines[3] == "note: 1 other file ignored"
    assert lines[4].startswith("next: ")
    assert lines[4].endswith(" -m sid_fast.pretrain --data data.zip --out runs/teacher")
    with zipfile.ZipFile(tmp_path / "data.zip") as archive:
        assert archive.namelist() == [
            *(f"00000/img0000000{i}.png" for i in range(4)),
            "dataset.json",
        ]
        assert {i.compress_type for i in archive.infolist()} == {zipfile.ZIP_STORED}
        assert json.loads(archive.read("dataset.json")) == {
            "labels": [[f"00000/img0000000{i}.png", i // 2] for i in range(4)],
            "class_names": ["cat", "dog"],
        }


def test_the_same_bytes_each_time_and_from_a_zip(photos, run, tmp_path, monkeypatch):
    run("a.zip", source="photos", resolution=32)
    monkeypatch.setattr(prepare, "CHUNK", 1)
    run("b.zip", source="photos", resolution=32)
    shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path, "photos")
    run("c.zip", source="packed.zip", resolution=32)
    first = (tmp_path / "a.zip").read_bytes()
    assert (tmp_path / "b.zip").read_bytes() == first
    assert (tmp_path / "c.zip").read_bytes() == first


def test_a_data_set_is_halved_and_keeps_its_labels(run, tmp_path):
    images = RNG.integers(256, size=(7, 1, 8, 8), dtype=np.uint8)
    write_dataset(tmp_path / "a.zip", images, [3, 1, 0, 2, 2, 1, 3])
    data, _ = run(source="a.zip", resolution=4)
    means = np.round(images.reshape(7, 1, 4, 2, 4, 2).mean((3, 5)))
    assert np.array_equal(data.images(), means)
    assert data.labels.tolist() == [3, 1, 0, 2, 2, 1, 3]
    again, _ = run("same.zip", source="a.zip")
    assert np.array_equal(again.images(), images)
    assert (tmp_path / "same.zip").read_bytes() == (tmp_path / "a.zip").read_bytes()


def test_classes_are_chosen_or_left_out(photos, run):
    data, lines = run("one.zip", source="photos", resolution=32, classes="dog")
    assert data.labels.tolist() == [0, 0]
    assert lines[0].endswith("4 images, 1 class (dog)")
    data, lines = run("none.zip", source="photos", resolution=32, classes="none")
    assert data.labels is None
    assert lines[0].endswith("7 images, no classes")


def test_channels(photos, run):
    (photos / "cat/grey.png").write_bytes(picture(40, 40, mode="L"))
    for channels in (1, 3):
        name = f"{channels}.zip"
        data, _ = run(name, source="photos", resolution=32, channels=str(channels))
        assert (len(data), data.channels) == (5, channels)


def test_images_without_a_label_are_left_out(photos, run):
    (photos / "metadata.csv").write_text("file_name,label\ncat/b.jpg,7\ndog/a.png,9\n")
    data, lines = run(source="photos", resolution=32)
    assert data.labels.tolist() == [0, 1]
    assert lines[2].startswith("left out: 5 without a label (cat/a.png, cat/cut.jpg, ")


REFUSED = {
    "": "source is missing: give --source",
    "--source photos": "out is missing",
    "--source photos --out a.npz": "out=a.npz is not a .zip file",
    "--source photos --out there.zip": "out=there.zip exists: remove it",
    "--source nowhere --out a.zip": "nowhere does not exist",
    "--source photos --out a.zip --resolution 0": "resolution=0 is out of range: choose from 1 to",
    "--source photos --out a.zip --resolution 5000": "resolution=5000 is out of range",
    "--source photos --out a.zip": "the source mixes sizes, such as 31x31 pixels (dog/tiny.png)",
    "--source photos --out a.zip --resolution 400": "none of the 7 images can be used: 6 smaller",
    "--source photos --out a.zip --resolution 32 --classes cow": "'cow' is not a class",
    "--source photos --out a.zip --resolution 32 --split test": "has no splits",
    "--source photos --out a.zip --resolution 32 --channels 2": "'2' is not one of",
    "--source grey --out a.zip --resolution 8": "mixes grey images (b.png) and RGB (a.png): give",
    "--source empty --out a.zip": "empty holds no images",
    "--source photos --out /proc/a.zip --resolution 32": "/proc/a.zip cannot be written",
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_is_refused(photos, line, run_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.zip").touch()
    for name in ("empty", "grey"):
        (tmp_path / name).mkdir()
    (tmp_path / "grey/a.png").write_bytes(picture(8, 8))
    (tmp_path / "grey/b.png").write_bytes(picture(8, 8, mode="L"))
    status, error = run_command("prepare", *line.split())
    assert status == 2
    assert error.startswith("error: ")
    assert REFUSED[line] in error
    assert error.count("\n") == 1
    assert {p.name for p in tmp_path.iterdir()} == {"there.zip", "empty", "grey", "photos"}


def test_a_difference_that_shows_late_is_refused_as_well(run_command, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "INSPECTED", 1)
    images = {"a.png": picture(8, 8), "b.png": picture(9, 9), "c.png": picture(8, 8)}
    make_zip(tmp_path / "a.zip", images)
    status, error = run_command(
        "prepare", "--source", tmp_path / "a.zip", "--out", tmp_path / "b.zip"
    )
    assert (status, error.count("\n")) == (2, 1)
    assert "mixes sizes, such as 8x8 pixels (a.png) and 9x9 (b.png): give --resolution, to" in error
    assert [p.name for p in tmp_path.iterdir()] == ["a.zip"]


def test_a_full_disk_is_noticed_early(photos, run_command, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "INSPECTED", 2)
    usage = shutil._ntuple_diskusage(10**9, 10**9, 100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    arguments = ["--source", photos, "--out", tmp_path / "a.zip", "--resolution", 32]
    status, error = run_command("prepare", *arguments)
    assert status == 2
    assert "a.zip will take 0.0 GB, and 0.0 GB are free" in error
    assert [p.name for p in tmp_path.iterdir()] == ["photos"]
