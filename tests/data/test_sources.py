"""Folders and zips of images: which are found, in which order, and with which labels."""

import json
import zipfile

import numpy as np
import pytest

from sid_fast.data.convert import LeftOut
from sid_fast.data.sources import open_source, select_classes
from sid_fast.errors import UserError
from tests.helpers.images import make_zip, png

IMAGE = png(np.zeros((8, 8), np.uint8))


def tree(root, *names, **contents):
    """Write images, and other files by their content; returns the folder."""
    for name in (*names, *contents):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        content = contents.get(name, IMAGE)
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def listed(source):
    """Name: label of every image."""
    labels = [None] * source.count if source.labels is None else source.labels.tolist()
    return {source.name(i): labels[i] for i in range(source.count)}


def test_folders_are_classes_in_the_order_of_their_names(tmp_path):
    tree(tmp_path, "cat/b.JPG", "cat/a.png", "dog/husky/c.webp", "bird/d.gif", "notes.txt")
    source = open_source(tmp_path, None, True)
    assert listed(source) == {
        "bird/d.gif": 0,
        "cat/a.png": 1,
        "cat/b.JPG": 1,
        "dog/husky/c.webp": 2,
    }
    assert list(listed(source)) == sorted(listed(source))
    assert source.class_names == ["bird", "cat", "dog"]
    assert source.notes == ["1 other file ignored"]
    assert source.read(1) == IMAGE
    assert open_source(tmp_path, None, False).labels is None


def test_a_zip_is_read_like_its_folder(tmp_path):
    names = ["cat/b.jpg", "dog/a.png", "__MACOSX/cat/b.jpg", "dog/.hidden.png"]
    tree(tmp_path / "pets", *names)
    make_zip(tmp_path / "pets.zip", {f"pets/{n}": IMAGE for n in names})
    source = open_source(tmp_path / "pets.zip", None, True)
    assert listed(source) == {"pets/cat/b.jpg": 0, "pets/dog/a.png": 1}
    assert listed(open_source(tmp_path / "pets", None, True)) == {"cat/b.jpg": 0, "dog/a.png": 1}
    assert source.read(0) == IMAGE


def test_numbers_as_names_are_sorted_as_numbers(tmp_path):
    tree(tmp_path, *[f"{i}/a.png" for i in (0, 2, 10, 1)])
    assert open_source(tmp_path, None, True).class_names == ["0", "1", "2", "10"]


@pytest.mark.parametrize(
    "names",
    [
        ["a.png", "b.png"],
        ["one/a.png", "one/b.png"],  # a single class would say nothing
        ["00000/img00000000.png", "00001/img00001000.png"],  # of an EDM data set
    ],
)
def test_images_without_classes(tmp_path, names):
    assert open_source(tree(tmp_path, *names), None, True).labels is None


def test_folders_that_hold_only_a_folder_are_no_classes(tmp_path):
    tree(tmp_path, "data/images/cat/a.png", "data/images/dog/b.png", "data/readme.txt")
    assert open_source(tmp_path, None, True).class_names == ["cat", "dog"]


def test_an_image_beside_the_folders_has_no_class(tmp_path):
    tree(tmp_path, "cat/a.png", "b.png")
    with pytest.raises(UserError, match=r"b\.png lies outside .* --classes none"):
        open_source(tmp_path, None, True)
    assert open_source(tmp_path, None, False).count == 2


def test_splits(tmp_path):
    tree(tmp_path, "train/cat/a.png", "train/dog/b.png", "val/dog/c.png", "val/cat/d.png")
    source = open_source(tmp_path, None, True)
    assert listed(source) == {"train/cat/a.png": 0, "train/dog/b.png": 1}
    assert source.what == "folder of images, split train (not read: val)"
    assert listed(open_source(tmp_path, "val", True)) == {"val/cat/d.png": 0, "val/dog/c.png": 1}
    assert list(listed(open_source(tmp_path, "all", True)).values()) == [0, 1, 0, 1]
    with pytest.raises(UserError, match=r"split=test is not in .*: choose from all, train, val"):
        open_source(tmp_path, "test", True)
    with pytest.raises(UserError, match="has no splits: leave out --split"):
        open_source(tmp_path / "train", "val", True)
    (tmp_path / "train").rename(tmp_path / "dev")
    with pytest.raises(UserError, match="has the splits dev, val: choose one with --split"):
        open_source(tmp_path, None, True)


def test_labels_of_dataset_json_are_kept(tmp_path):
    labels = json.dumps({"labels": [["x/b.jpg", 4], ["x/a.png", 2]], "class_names": ["p", "q"]})
    tree(tmp_path / "set", "x/a.png", "x/b.jpg", **{"dataset.json": labels})
    for root in (tmp_path / "set", tmp_path):  # it is found one folder down
        source = open_source(root, None, True)
        assert source.labels.tolist() == [2, 4]
        assert source.class_names == ["p", "q"]
        assert source.notes == []
    tree(tmp_path / "set", "x/c.png")
    with pytest.raises(UserError, match=r"dataset\.json has no label for x/c\.png"):
        open_source(tmp_path, None, True)


@pytest.mark.parametrize("values", [["tabby", "dog", "tabby"], [1, 0, 1]])
def test_labels_of_hugging_face_metadata(tmp_path, values):
    rows = [{"file_name": n, "label": v} for n, v in zip("abc", values, strict=True)]
    lines = "\n".join(json.dumps(row | {"file_name": f"{row['file_name']}.png"}) for row in rows)
    tree(tmp_path, "train/a.png", "train/b.png", "train/c.png", "train/d.png", "test/a.png")
    tree(tmp_path, **{"train/metadata.jsonl": lines})
    source = open_source(tmp_path, None, True)
    expected = {"tabby": 1, "dog": 0}
    assert source.labels.tolist() == [expected.get(v, v) for v in values] + [-1]
    (tmp_path / "train/metadata.jsonl").unlink()
    csv = "".join(f"{n}.png,{v}\n" for n, v in zip("abcd", [*values, "fox"], strict=True))
    tree(tmp_path, **{"train/metadata.csv": f"file_name,label\n{csv}"})
    assert open_source(tmp_path, None, True).labels.shape == (4,)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "it is not JSON"),
        ("[]", "no file_name"),
        ('{"file_name": "a.png", "label": [1]}', "the label"),
        ('{"file_name": "a.png", "label": -1}', "a label is -1"),
        ("\udcff", "not UTF-8"),
    ],
)
def test_damaged_metadata_is_refused(tmp_path, line, words):
    tree(tmp_path, "a.png", **{"metadata.jsonl": line.encode(errors="surrogateescape")})
    with pytest.raises(UserError, match=words):
        open_source(tmp_path, None, True)


def test_only_some_classes(tmp_path):
    source = open_source(tree(tmp_path, "a/1.png", "b/1.png", "c/1.png"), None, True)
    assert select_classes(source, ["c", "a"]).tolist() == [0, 2]
    assert source.labels.tolist() == [1, -1, 0]
    assert source.class_names == ["c", "a"]
    for wanted, words in ((["d"], "'d' is not a class: choose from c, a"), (["a", "a"], "twice")):
        with pytest.raises(UserError, match=words):
            select_classes(source, wanted)
    (tmp_path / "b/1.png").rename(tmp_path / "a/2.png")
    with pytest.raises(UserError, match="no classes to choose from"):
        select_classes(open_source(tmp_path / "a", None, True), ["a"])


def test_sources_that_are_none(tmp_path):
    def refused(path):
        with pytest.raises(UserError) as error:
            open_source(path, None, True)
        return str(error.value)

    assert "does not exist" in refused(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    assert "holds no images (it is empty): give a folder" in refused(tmp_path / "empty")
    tree(tmp_path / "text", "a.txt", ".hidden/b.png")
    assert "holds no images (its images" in refused(tmp_path / "text")
    tree(tmp_path, "one.png", **{"page.zip": b"<html>", "a.tar.gz": b"\x1f\x8b" + bytes(600)})
    assert "is a PNG image: give a folder or zip" in refused(tmp_path / "one.png")
    assert "is an HTML page" in refused(tmp_path / "page.zip")
    assert "compressed with gzip" in refused(tmp_path / "a.tar.gz")
    tree(tmp_path / "two", **{"a/data_batch_1": b"", "b/data_batch_1": b""})
    assert "holds several data sets: give one of" in refused(tmp_path / "two")


def test_an_image_that_cannot_be_read_is_left_out(tmp_path):
    source = open_source(tree(tmp_path / "a", "a.png", "b.png"), None, True)
    (tmp_path / "a/a.png").unlink()
    with pytest.raises(LeftOut, match="unreadable"):
        source.read(0)
    path = make_zip(tmp_path / "a.zip", {"a.png": IMAGE, "b.png": IMAGE}, zipfile.ZIP_LZMA)
    with pytest.raises(LeftOut, match="compressed in an unknown way"):
        open_source(path, None, True).read(0)
    path = make_zip(tmp_path / "b.zip", {"a.png": IMAGE, "b.png": IMAGE})
    path.write_bytes(path.read_bytes().replace(IMAGE, IMAGE[:-1] + b"?", 1))
    with pytest.raises(LeftOut, match="damaged"):  # its checksum says so
        open_source(path, None, True).read(0)
