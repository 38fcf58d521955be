"""EDM data sets: what is read, and what is refused."""

import json
import os
import zipfile

import numpy as np
import pytest
from PIL import Image

from sid_fast.data.datasets import ImageDataset, write_dataset
from sid_fast.errors import UserError
from tests.helpers.images import make_zip, png

RNG = np.random.default_rng(0)
RGB = RNG.integers(256, size=(4, 3, 8, 8), dtype=np.uint8)


def colour(seed=0, size=8):
    return np.random.default_rng(seed).integers(256, size=(size, size, 3), dtype=np.uint8)


# --- reading


def test_round_trip(tmp_path):
    write_dataset(tmp_path / "a.zip", RGB, [2, 0, 1, 2])
    dataset = ImageDataset(tmp_path / "a.zip")
    assert (len(dataset), dataset.resolution, dataset.channels, dataset.label_dim) == (4, 8, 3, 3)
    assert dataset.path == tmp_path / "a.zip"
    assert dataset.labels.dtype == np.int64
    assert dataset.labels.tolist() == [2, 0, 1, 2]
    assert dataset[2].dtype == np.uint8
    assert np.array_equal(dataset[2], RGB[2])
    assert np.array_equal(dataset.images(), RGB)


def test_grey_without_labels(tmp_path):
    write_dataset(tmp_path / "a.zip", iter(RGB[:, :1]))
    dataset = ImageDataset(tmp_path / "a.zip")
    assert (dataset.channels, dataset.label_dim, dataset.labels) == (1, 0, None)
    assert np.array_equal(dataset.images(), RGB[:, :1])


def test_written_zip_is_stored_and_deterministic(tmp_path):
    for name in "ab":
        write_dataset(tmp_path / name, RGB, [0, 1, 2, 3])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with zipfile.ZipFile(tmp_path / "a") as archive:
        assert archive.namelist()[0] == "00000/img00000000.png"
        assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
        assert json.loads(archive.read("dataset.json")) == {
            "labels": [[f"00000/img{i:08d}.png", i] for i in range(4)]
        }


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match="4 images but 2 labels"):
        write_dataset(tmp_path / "a.zip", RGB, [0, 1])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", ["compressed", "folder"])
def test_other_layouts_sorted_by_name_and_foreign_files_ignored(tmp_path, kind):
    members = {
        "b/2.png": png(colour(2)),
        "a/9.PNG": png(colour(1)),
        "b/10.png": png(colour(3)),
        "readme.txt": b"hello",
        "dataset.json": {"labels": [["b/2.png", 5], ["b/10.png", 6], ["a/9.PNG", 7]]},
    }
    if kind == "compressed":
        path = make_zip(tmp_path / "a.zip", members, zipfile.ZIP_DEFLATED)
    else:
        path = tmp_path / "set"
        for name, data in members.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(
                data if isinstance(data, bytes) else json.dumps(data).encode()
            )
    dataset = ImageDataset(path)
    assert dataset.labels.tolist() == [7, 6, 5]
    assert dataset.label_dim == 8
    for i, seed in enumerate([1, 3, 2]):
        assert np.array_equal(dataset[i], colour(seed).transpose(2, 0, 1))


def test_null_labels(tmp_path):
    members = {"a.png": png(colour()), "dataset.json": {"labels": None}}
    dataset = ImageDataset(make_zip(tmp_path / "a.zip", members))
    assert dataset.labels is None
    assert dataset.label_dim == 0


def test_palette_becomes_rgb(tmp_path):
    image = Image.fromarray(colour()).quantize(7)  # fewer than 8 bits a pixel
    path = make_zip(tmp_path / "a.zip", {"a.png": png(image)})
    assert np.array_equal(
        ImageDataset(path)[0], np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    )


def test_zip_members_are_never_extracted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_zip(tmp_path / "a.zip", {"../evil.png": png(colour()), "/abs.png": png(colour())})
    ImageDataset("a.zip").images()
    assert os.listdir(tmp_path) == ["a.zip"]


def test_the_real_data(golden):
    path = golden.parent / "data" / "cifar10-32x32-20k.zip"
    if not path.exists():
        pytest.skip("no real data")
    dataset = ImageDataset(path)
    assert (len(dataset), dataset.resolution, dataset.channels) == (20000, 32, 3)
    assert dataset.label_dim == 10
    assert dataset.labels[:5].tolist() == [6, 9, 9, 4, 1]  # the known start of CIFAR-10
    assert dataset[0][:, 0, 0].tolist() == [59, 62, 63]


# --- refusals


def refused(path, match):
    with pytest.raises(UserError) as caught:
        ImageDataset(path).images()
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert match in message.replace(str(path), "")


def test_containers(tmp_path):
    refused(tmp_path / "none.zip", "does not exist")
    refused(tmp_path, "no PNG images")
    refused(make_zip(tmp_path / "empty.zip", {}), "no PNG images")
    (tmp_path / "text.zip").write_bytes(b"hello")
    refused(tmp_path / "text.zip", "damaged or not a zip file")
    write_dataset(tmp_path / "cut.zip", RGB)
    data = (tmp_path / "cut.zip").read_bytes()
    for keep in range(50, len(data) - 1, 50):
        (tmp_path / "cut.zip").write_bytes(data[:keep])
        refused(tmp_path / "cut.zip", "damaged or not a zip file")
    (tmp_path / "cut.zip").write_bytes(b"")
    refused(tmp_path / "cut.zip", "is empty: give a data set zip or folder")
    (tmp_path / "page.zip").write_bytes(b"<!DOCTYPE html><html>log in</html>")
    refused(tmp_path / "page.zip", "is an HTML page")


@pytest.mark.parametrize("kind", ["jpg", "JPEG", "webp"])
def test_a_folder_of_other_pictures_names_the_way_out(tmp_path, kind):
    (tmp_path / "cats").mkdir()
    for name in (f"cats/1.{kind}", "readme.txt"):
        (tmp_path / name).write_bytes(b"")
    refused(tmp_path, f"no PNG images: convert its .{kind.lower()} files, for example with magick")
    refused(make_zip(tmp_path / "a.zip", {f"1.{kind}": b""}), f"convert its .{kind.lower()} files")


GOOD = png(colour())
IMAGES = {
    "mixed size": (png(colour(size=4)), "has 3 channels of 4x4 pixels, the first"),
    "mixed channels": (png(colour()[..., 0]), "has 1 channels of 8"),
    "not square": (png(colour()[:4]), "8x4 pixels"),
    "alpha": (png(np.zeros((8, 8, 4), np.uint8)), "alpha or is not 8-bit"),
    "grey with alpha": (png(np.zeros((8, 8, 2), np.uint8)), "alpha or is not 8-bit"),
    "16 bits": (png(np.zeros((8, 8), np.uint16)), "alpha or is not 8-bit"),
    "1 bit": (png(np.zeros((8, 8), bool)), "alpha or is not 8-bit"),
    "transparent colour": (png(colour(), transparency=(1, 2, 3)), "transparency"),
    "transparent palette": (
        png(Image.fromarray(colour()).quantize(7), transparency=0),
        "transparency",
    ),
    "cut short": (GOOD[:-60], "damaged"),
    "header only": (GOOD[:40], "damaged"),
    "empty": (b"", "damaged or not a PNG"),
    "jpeg": (b"\xff\xd8\xff" + GOOD, "damaged or not a PNG"),
    "broken data": (GOOD[:60] + b"xxxx" + GOOD[64:], "damaged"),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_images(tmp_path, kind):
    data, match = IMAGES[kind]
    path = make_zip(tmp_path / "a.zip", {"1.png": GOOD, "2.png": data, "3.png": GOOD})
    refused(path, match)
    refused(path, "2.png")


def test_damage_within_a_zip_member_is_found_by_its_checksum(tmp_path):
    path = make_zip(tmp_path / "a.zip", {"1.png": GOOD})
    path.write_bytes(path.read_bytes().replace(GOOD[70:80], bytes(10)))
    refused(path, "1.png cannot be read")


FORM = 'must be of the form {"labels": [[name, class], ...] or null}'
LABELS = {
    "broken": (b'{"labels": [["1.png"', f"not JSON: Expecting ',' delimiter in line 1): it {FORM}"),
    "binary": (b"\xff\xfe\xfd", f"not UTF-8 text): it {FORM}"),
    "nested": (b'{"labels": ' + b"[" * 100_000, f"nest deeper than 4 levels): it {FORM}"),
    "deep": (b'{"labels": ' + b"[" * 5 + b"]" * 5 + b"}", "nest deeper than 4 levels"),
    "many": (b"{}" + b"," * 10_000_001, "more than 10,000,000 values"),
    "list": ([1], FORM),
    "no labels": ({"classes": 3}, FORM),
    "dict": ({"labels": {"1.png": 0, "2.png": 1}}, FORM),
    "text": ({"labels": "ab"}, FORM),
    "not pairs": ({"labels": [["1.png", 0, 1]]}, FORM),
    "number as name": ({"labels": [["1.png", 0], ["2.png", 0], [7, 0]]}, FORM),
    "missing": ({"labels": [["1.png", 0]]}, "no label for 2.png"),
    "twice": ({"labels": [["1.png", 0], ["2.png", 0], ["2.png", 1]]}, "twice"),
    "vector": ({"labels": [["1.png", 0], ["2.png", [0.5, 0.5]]]}, "2.png the label [0.5, 0.5]"),
    "fraction": ({"labels": [["1.png", 0], ["2.png", 1.5]]}, "2.png the label 1.5"),
    "negative": ({"labels": [["1.png", 0], ["2.png", -1]]}, "2.png the label -1"),
    "boolean": ({"labels": [["1.png", 0], ["2.png", True]]}, "2.png the label True"),
    "large": ({"labels": [["1.png", 0], ["2.png", 10**5]]}, "2.png the label 100000: only class"),
    "infinite": ({"labels": [["1.png", 0], ["2.png", float("inf")]]}, "2.png the label inf"),
    "huge": (b'{"labels": [["1.png", 0], ["2.png", 1' + b"0" * 10**6 + b"]]}", "1000001 char"),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels(tmp_path, kind):
    labels, match = LABELS[kind]
    members = {"1.png": GOOD, "2.png": GOOD, "dataset.json": labels}
    refused(make_zip(tmp_path / "a.zip", members), match)


def test_any_damage_is_a_user_error(tmp_path):
    path = tmp_path / "a.zip"
    write_dataset(path, RGB, [0, 1, 2, 3])
    data = path.read_bytes()
    for seed in range(300):
        rng = np.random.default_rng(seed)
        damaged = bytearray(data)
        for position in rng.integers(len(data), size=3):
            damaged[position] = rng.integers(256)
        path.write_bytes(damaged)
        message = str(path)
        try:
            ImageDataset(path).images()
        except UserError as error:
            message = str(error)
        assert str(path) in message
