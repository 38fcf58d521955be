"""Hugging Face's Parquet files and saved data sets."""

import json
import shutil

import numpy as np
import pytest

from sid_fast.data.convert import LeftOut
from sid_fast.data.sources import open_source
from sid_fast.errors import UserError

pa = pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'sid-fast[parquet]'")
from pyarrow import parquet  # noqa: E402

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def table(count, labels=None, names=None, column="label"):
    images = [{"bytes": b"image %d" % i, "path": None} for i in range(count)]
    columns = {"id": pa.array(range(count)), "image": pa.array(images, IMAGE)}
    if labels is not None:
        columns[column] = pa.array(labels)
    features = {"image": {"_type": "Image"}}
    if names:
        features[column] = {"_type": "ClassLabel", "names": names}
    info = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.table(columns).replace_schema_metadata(info)


def save_parquet(root, name, *arguments, **options):
    root.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table(*arguments, **options), root / name, row_group_size=3)


def save_arrow(root, *arguments):
    root.mkdir(parents=True)
    rows = table(*arguments)
    path = str(root / "data-00000-of-00001.arrow")
    with pa.OSFile(path, "wb") as file, pa.ipc.new_stream(file, rows.schema) as writer:
        writer.write_table(rows, max_chunksize=3)
    (root / "state.json").write_text("{}")


def test_parquet_files_of_a_split_in_order(tmp_path):
    labels = [0, 1, 1, 0, 1]
    save_parquet(tmp_path / "data", "train-00001-of-00002.parquet", 2, [1, 0], ["cat", "dog"])
    save_parquet(tmp_path / "data", "train-00000-of-00002.parquet", 5, labels, ["cat", "dog"])
    save_parquet(tmp_path / "data", "test-00000-of-00001.parquet", 1, [0], ["cat", "dog"])
    source = open_source(tmp_path, None, True)
    assert source.count == 7
    expected = [b"image %d" % i for i in (0, 1, 2, 3, 4, 0, 1)]
    assert [source.read(i) for i in range(7)] == expected
    assert source.read(0) == b"image 0"
    assert source.labels.tolist() == [*labels, 1, 0]
    assert source.class_names == ["cat", "dog"]
    assert source.name(6) == "train-00001-of-00002.parquet row 1"
    assert open_source(tmp_path, "test", True).count == 1
    assert open_source(tmp_path / "data/test-00000-of-00001.parquet", None, True).count == 1


def test_a_saved_data_set(tmp_path):
    save_arrow(tmp_path / "train", 5, [0, 1, 0, 1, 1], ["cat", "dog"])
    save_arrow(tmp_path / "test", 1, [0], ["cat", "dog"])
    (tmp_path / "dataset_dict.json").write_text("{}")
    source = open_source(tmp_path, None, True)
    assert [source.read(i) for i in range(5)] == [b"image %d" % i for i in range(5)]
    assert source.labels.tolist() == [0, 1, 0, 1, 1]
    assert open_source(tmp_path / "test", None, True).class_names == ["cat", "dog"]


def test_other_tables_are_not_mixed_in(tmp_path):
    save_arrow(tmp_path / "train", 5)
    shutil.copy(tmp_path / "train/data-00000-of-00001.arrow", tmp_path / "train/cache-12.arrow")
    assert open_source(tmp_path, None, True).count == 5
    for name in ("plain", "large"):
        save_parquet(tmp_path / "two" / name, "train-00000-of-00001.parquet", 2)
    with pytest.raises(UserError, match=r"several data sets: give one of .*large, .*plain"):
        open_source(tmp_path / "two", None, True)


def test_labels_of_other_columns(tmp_path):
    save_parquet(tmp_path, "a.parquet", 3, ["dog", "cat", None])
    source = open_source(tmp_path, None, True)
    assert (source.labels.tolist(), source.class_names) == ([1, 0, -1], ["cat", "dog"])
    save_parquet(tmp_path, "a.parquet", 2, [1, 0], ["x", "y"], column="species")
    assert open_source(tmp_path, None, True).labels.tolist() == [1, 0]
    save_parquet(tmp_path, "a.parquet", 2, [-1, -1])  # a test set whose labels are secret
    assert open_source(tmp_path, None, True).labels is None
    save_parquet(tmp_path, "a.parquet", 2)
    assert open_source(tmp_path, None, True).labels is None
    save_parquet(tmp_path, "a.parquet", 2, [[0.5], [1.0]])
    with pytest.raises(UserError, match=r"column label holds .* --classes none"):
        open_source(tmp_path, None, True)
    assert open_source(tmp_path, None, False).count == 2


def test_a_path_in_the_table_is_not_followed(tmp_path):
    (tmp_path / "secret.png").write_bytes(b"secret")
    image = [{"bytes": None, "path": str(tmp_path / "secret.png")}]
    (tmp_path / "set").mkdir()
    parquet.write_table(pa.table({"image": pa.array(image, IMAGE)}), tmp_path / "set/a.parquet")
    with pytest.raises(LeftOut, match="without an image in the file"):
        open_source(tmp_path / "set", None, True).read(0)


def test_tables_without_images_or_damaged(tmp_path):
    parquet.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"no column of encoded images \(its columns: 'text'\)"):
        open_source(tmp_path, None, True)
    save_parquet(tmp_path, "a.parquet", 50)
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(content[:-20])
    with pytest.raises(UserError, match=r"a\.parquet is damaged"):
        open_source(tmp_path, None, True)
    (tmp_path / "a.parquet").write_bytes(content[:200] + bytes(400) + content[600:])
    source = open_source(tmp_path, None, True)
    with pytest.raises(UserError, match=r"a\.parquet (is damaged|cannot be read)"):
        np.array([source.read(i) for i in range(50)])
