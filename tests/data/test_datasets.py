"""EDM data sets: what is read, and what is refused."""

import contextlib
import json
import os
import struct
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from sid_fast.data import datasets
from sid_fast.data.datasets import ImageDataset, content_digest, write_dataset
from sid_fast.data.digits import open_dataset
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


def test_an_empty_name_in_a_zip_is_no_image(tmp_path):
    path = make_zip(tmp_path / "a.zip", {"1.png": GOOD, "empty": b""})
    data = path.read_bytes().replace(b"empty", b"\0mpty")  # zipfile cuts names at a null byte
    path.write_bytes(data)
    assert "" in zipfile.ZipFile(path).namelist()
    assert len(ImageDataset(path)) == 1


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


def png_zip(path, names, **more):
    return make_zip(path, {name: png(colour(i)) for i, name in enumerate(names)} | more)


def unpack(archive, folder):
    with zipfile.ZipFile(archive) as file:
        file.extractall(folder)
    return folder


# --- what is left out, and said


def test_other_pictures_are_counted(tmp_path):
    """Beside PNGs, whether dataset.json labels them or not."""
    names = ["a.png", "b.jpg", "c.JPG", "d.webp", "readme.txt"]
    path = png_zip(tmp_path / "a.zip", names)
    for source in (path, unpack(path, tmp_path / "folder")):
        data = ImageDataset(source)
        assert len(data) == 1
        assert data.note == (
            "not read: 2 .jpg files (convert them, for example with python -m sid_fast.prepare), "
            "1 .webp file (convert them, for example with python -m sid_fast.prepare)"
        )
    labels = {"labels": [[name, 0] for name in names[:4]] + [["gone.png", 3]]}
    data = ImageDataset(png_zip(path, names, **{"dataset.json": labels}))
    assert data.labels.tolist() == [0]
    assert data.label_dim == 1
    assert data.note.endswith("; 4 labels of files that are not read")


def test_hidden_files_are_no_images_and_counted(tmp_path):
    """What macOS puts into a zip, and hidden folders."""
    names = ["a.png", "__MACOSX/._a.png", "._b.png", ".trash/c.png", "x/.t/d.jpg", ".DS_Store"]
    path = png_zip(tmp_path / "a.zip", [*names, "./e.png", "../f.png"])
    data = ImageDataset(path)
    assert data._names == ["../f.png", "./e.png", "a.png"]
    assert data.note == "not read: 4 hidden images"
    data = ImageDataset(unpack(path, tmp_path / "folder"))
    assert data._names == ["a.png", "e.png", "f.png"]
    assert data.note == "not read: 4 hidden images"
    refused(png_zip(path, [".a/b.png"]), "holds no PNG images: rename its 1 hidden images")


def test_a_folder_that_cannot_be_followed_is_counted_or_refused(tmp_path, monkeypatch):
    (tmp_path / "set" / "in").mkdir(parents=True)
    (tmp_path / "set" / "in" / "a.png").write_bytes(png(colour()))
    (tmp_path / "more").mkdir()
    (tmp_path / "set" / "link").symlink_to(tmp_path / "more")
    assert ImageDataset(tmp_path / "set").note == "not read: 1 link to a folder"

    def scandir(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", scandir)
    refused(tmp_path / "set", "cannot be read (Permission denied)")


def test_a_name_twice_in_a_zip_is_one_image(tmp_path):
    path = png_zip(tmp_path / "a.zip", ["1.png", "2.png"])
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("1.png", png(colour(7)))
    data = ImageDataset(path)
    assert data.note == "1 name twice in the zip, such as 1.png: the last is read"
    expected = np.stack([colour(7), colour(1)]).transpose(0, 3, 1, 2)
    assert np.array_equal(data.images(), expected)


@pytest.mark.parametrize(
    ("name", "zipped", "unpacked"),
    [
        ("in/dataset.json", "zip what is in in without the folder itself", "/in as the data set"),
        ("in/Dataset.JSON", "zip what is in in without the folder itself", "/in as the data set"),
        ("Dataset.json", "rename it to that", "rename it to that"),
        ("labels.json", "rename it to that", "rename it to that"),
    ],
)
def test_labels_that_would_be_ignored_are_refused(tmp_path, name, zipped, unpacked):
    path = png_zip(tmp_path / "a.zip", ["in/0/1.png"], **{name: {"labels": [["0/1.png", 0]]}})
    refused(path, f"{name} ")
    refused(path, zipped)
    refused(unpack(path, tmp_path / "folder"), unpacked)
    # Not beside labels that are read, nor hidden.
    labels = {"labels": [["in/0/1.png", 0]]}
    both = png_zip(path, ["in/0/1.png"], **{name: b"", "dataset.json": labels})
    assert ImageDataset(both).labels.tolist() == [0]
    assert not ImageDataset(png_zip(path, ["1.png"], **{f"__MACOSX/{name}": b""})).note


@pytest.mark.parametrize(
    ("labels", "note"),
    [
        ([0, 1, 2], ""),
        ([1, 2, 3], "no images of class 0:"),
        ([0, 2, 7], "no images of class 1, 3 to 6:"),
        ([9, 5, 99_999], "no images of class 0 to 4, 6 to 8, 10 to 99998:"),
    ],
)
def test_classes_without_images_are_noted(tmp_path, labels, note, capsys, monkeypatch):
    write_dataset(tmp_path / "a.zip", RGB[:3], labels)
    data = open_dataset(str(tmp_path / "a.zip"))
    assert data.classes == sorted(labels)
    assert data.label_dim == max(labels) + 1
    assert data.note.startswith(note)
    shown = capsys.readouterr().err
    assert shown == (f"note: {data.path}: {data.note}\n" if note else "")
    monkeypatch.setenv("RANK", "1")
    open_dataset(str(tmp_path / "a.zip"))
    assert not capsys.readouterr().err


def test_whole_numbers_with_a_point_are_labels(tmp_path):
    labels = b'{"labels": [["1.png", 1.0], ["2.png", 0e3]]}'
    members = {"1.png": GOOD, "2.png": GOOD, "dataset.json": labels}
    assert ImageDataset(make_zip(tmp_path / "a.zip", members)).labels.tolist() == [1, 0]


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
    os.mkfifo(tmp_path / "pipe.zip")
    refused(tmp_path / "pipe.zip", "is a device or a pipe")


@pytest.mark.parametrize("kind", ["jpg", "JPEG", "webp"])
def test_a_folder_of_other_pictures_names_the_way_out(tmp_path, kind):
    (tmp_path / "cats").mkdir()
    for name in (f"cats/1.{kind}", "readme.txt"):
        (tmp_path / name).write_bytes(b"")
    refused(tmp_path, f"no PNG images: convert its .{kind.lower()} files, for example with python")
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


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def header(side: int) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))


def bomb(*sides: int) -> bytes:
    """A PNG of a few KB that unpacks to the last of the sizes."""
    pixels = chunk(b"IDAT", zlib.compress(bytes(10**6)))
    return GOOD[:8] + b"".join(map(header, sides)) + pixels + chunk(b"IEND", b"")


@contextlib.contextmanager
def little_memory():
    """Fails if Python and NumPy take more than 40 MB within the block."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 40e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_what_says_that_it_is_large_is_refused_unread(tmp_path, monkeypatch, compression):
    monkeypatch.setattr(datasets, "_MAX_SAMPLE_BYTES", 10**6)
    for name, data, match in (
        ("side", bomb(30_000), "1.png is 30000x30000 pixels: scale it to 4096 at most"),
        ("none", bomb(0), "1.png is 0x0 pixels"),
        ("headers", bomb(8, 5000), "1.png is damaged (a second header says 5000x5000 pixels)"),
        ("bytes", bytes(10**6 + 1), "1.png has 1,000,001 bytes, more than the 1,000,000"),
    ):
        path = make_zip(tmp_path / f"{name}.zip", {"1.png": data}, compression)
        with little_memory():
            refused(path, match)
    folder = tmp_path / "folder"
    folder.mkdir()
    with (folder / "1.png").open("wb") as file:
        file.truncate(10**12)  # a sparse file
    refused(folder, "1.png has 1,000,000,000,000 bytes, more than the 1,000,000")


@pytest.mark.parametrize("name", ["1.png", "dataset.json"])
def test_no_more_is_unpacked_than_a_member_says(tmp_path, name):
    members = {"1.png": GOOD, name: bytes(10**8)}
    path = make_zip(tmp_path / "a.zip", members, zipfile.ZIP_DEFLATED)
    packed = path.read_bytes()
    assert packed.count(struct.pack("<I", 10**8)) == 2
    path.write_bytes(packed.replace(struct.pack("<I", 10**8), struct.pack("<I", 1000)))
    with little_memory():
        refused(path, f"{name} cannot be read (Bad CRC-32")


def test_labels_of_gigabytes_are_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "_MAX_LABEL_BYTES", 10**6)
    members = {"1.png": GOOD, "dataset.json": b"[" + bytes(10**6)}
    path = make_zip(tmp_path / "a.zip", members, zipfile.ZIP_DEFLATED)
    refused(path, "dataset.json has 1,000,001 bytes, more than the 1,000,000")


@pytest.mark.parametrize("name", ["1.png", "dataset.json"])
@pytest.mark.parametrize("kind", ["device", "pipe", "folder"])
def test_devices_and_pipes_are_not_opened(tmp_path, name, kind):
    (tmp_path / "0.png").write_bytes(GOOD)
    if kind == "device":
        (tmp_path / name).symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).mkdir()
        assert len(ImageDataset(tmp_path)) == 1
        return
    refused(tmp_path, f"/{name} is a device or a pipe")
    if name == "1.png":
        with pytest.raises(UserError, match=r"1\.png is a device or a pipe"):
            content_digest(ImageDataset(tmp_path))


def test_encrypted_zips_and_rare_compression_name_the_way_out(tmp_path):
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        path = make_zip(tmp_path / "a.zip", {"1.png": GOOD}, compression)
        data = bytearray(path.read_bytes())
        data[6] |= 1  # the flag of the local header
        data[data.index(b"PK\x01\x02") + 8] |= 1  # and of the directory
        path.write_bytes(data)
        refused(path, "1.png is encrypted: unzip it with its password, and zip it without one")
    for compression in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        path = make_zip(tmp_path / "a.zip", {"1.png": GOOD}, compression)
        refused(path, f"1.png is compressed by method {compression}: zip it with deflate")


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
    "many": (b"{}" + b"," * 10_000_001, "more than 8,000,000 values"),
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


@pytest.mark.parametrize("folder", [False, True])
def test_labels_that_are_too_many_are_refused_before_they_are_read(tmp_path, monkeypatch, folder):
    """The zip has 30 kB, its labels 30 MB."""
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("1.png", GOOD)
        archive.writestr("dataset.json", b'{"labels": [' + b"[]," * 10**7)
    if folder:
        path = unpack(path, tmp_path / "folder")
    monkeypatch.setattr(datasets, "_MAX_LABEL_VALUES", 1000)
    sizes, real = [], datasets.read_values

    def read(file, *limits):
        try:
            return real(file, *limits)
        finally:
            sizes.append(file.tell())

    monkeypatch.setattr(datasets, "read_values", read)
    refused(path, "dataset.json cannot be used (it holds more than 1,000 values)")
    assert sizes[0] <= 1 << 20
