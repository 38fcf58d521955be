"""torchvision's layouts: CIFAR's pickles, read without executing them, and MNIST's idx files."""

import gzip
import pickle

import numpy as np
import pytest

from sid_fast.data.sources import open_source
from sid_fast.errors import UserError
from tests.helpers.pickled import Call, Python2, dump

RNG = np.random.default_rng(0)


def array(values):
    """An array as NumPy pickled it under Python 2."""
    kind = Call(
        "numpy", "dtype", (Python2(b"u1"), 0, 1), (3, Python2(b"|"), *[None] * 3, -1, -1, 0)
    )
    return Call(
        "numpy.core.multiarray",
        "_reconstruct",
        (Call("numpy", "ndarray", None), (0,), Python2(b"b")),
        (1, values.shape, kind, False, Python2(values.tobytes())),
    )


def batch(images, labels, key=b"labels"):
    """A batch of CIFAR as Python 2 pickled it."""
    return dump(
        {
            Python2(b"batch_label"): Python2(b"training batch"),
            Python2(key): labels,
            Python2(b"data"): array(images),
            Python2(b"filenames"): [Python2(b"a.png")] * len(labels),
        }
    )


@pytest.fixture
def cifar10(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    images = RNG.integers(256, size=(3, 4, 3072), dtype=np.uint8)
    for i, name in enumerate(["data_batch_1", "data_batch_2", "test_batch"]):
        (folder / name).write_bytes(batch(images[i], [i, 1, 2, 9]))
    names = [f"class {i}" for i in range(10)]
    (folder / "batches.meta").write_bytes(
        dump({Python2(b"label_names"): [Python2(n.encode()) for n in names]})
    )
    return folder, images.reshape(3, 4, 3, 32, 32).transpose(0, 1, 3, 4, 2), names


def everything(source):
    return np.stack([source.read(i) for i in range(source.count)])


def test_cifar10(cifar10):
    path, images, names = cifar10
    source = open_source(path, None, True)
    assert np.array_equal(everything(source), images[:2].reshape(-1, 32, 32, 3))
    assert source.labels.tolist() == [0, 1, 2, 9, 1, 1, 2, 9]
    assert source.class_names == names
    assert source.what == "CIFAR-10, split train (not read: test)"
    assert source.name(5) == "data_batch_2 image 1"
    assert np.array_equal(everything(open_source(path, "test", True)), images[2])
    assert open_source(path, "all", True).count == 12
    assert open_source(path.parent, None, True).count == 8  # torchvision's root


def test_cifar10_pickled_by_python_3(cifar10):
    path, images, _ = cifar10
    data = images[0].transpose(0, 3, 1, 2).reshape(4, 3072)
    for protocol in (2, 3, 4):
        content = pickle.dumps({"data": data, "labels": [0, 1, 2, 3]}, protocol)
        (path / "test_batch").write_bytes(content)
        assert np.array_equal(everything(open_source(path, "test", True)), images[0])


def test_cifar100(tmp_path):
    images = RNG.integers(256, size=(2, 3072), dtype=np.uint8)
    for name in ("train", "test"):
        (tmp_path / name).write_bytes(batch(images, [0, 99], b"fine_labels"))
    names = [Python2(b"class %d" % i) for i in range(100)]
    (tmp_path / "meta").write_bytes(dump({Python2(b"fine_label_names"): names}))
    source = open_source(tmp_path, None, True)
    assert source.labels.tolist() == [0, 99]
    assert source.class_names[99] == "class 99"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (dump({"data": Call("os", "system", ("touch owned",))}), ["os.system", "not", "executed"]),
        (dump([1]), ["its content is [1]"]),
        (dump({"labels": [1]}), ["no array `data`"]),
        (dump({Python2(b"data"): array(np.zeros((1, 30), np.uint8))}), ["3072 columns"]),
        (batch(np.zeros((2, 3072), np.uint8), [1]), ["2 images and 1 labels"]),
        (batch(np.zeros((1, 3072), np.uint8), [-1]), ["a label is -1"]),
        (batch(np.zeros((1, 3072), np.uint8), [1])[:-900], ["cut short"]),
        (b"", ["cut short"]),
        (
            pickle.dumps({"data": np.zeros((1, 3072)), "labels": [1]}, 2),
            ["another type than uint8"],
        ),
    ],
)
def test_pickles_that_are_no_batches_are_refused(cifar10, content, words, monkeypatch):
    path, *_ = cifar10
    monkeypatch.chdir(path)
    (path / "data_batch_1").write_bytes(content)
    with pytest.raises(UserError) as refused:
        open_source(path, None, True)
    for word in ["data_batch_1", *words]:
        assert word in str(refused.value)
    assert not (path / "owned").exists()


def idx(values):
    header = bytes([0, 0, 8, values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
    return header + values.tobytes()


@pytest.fixture
def mnist(tmp_path):
    folder = tmp_path / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    images = RNG.integers(256, size=(3, 28, 28), dtype=np.uint8)
    labels = np.uint8([3, 0, 9])
    for split in ("train", "t10k"):
        (folder / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(idx(labels))
    return tmp_path, folder, images


def test_mnist(mnist):
    path, folder, images = mnist
    for root in (path, folder):
        source = open_source(root, None, True)
        assert np.array_equal(everything(source), images)
        assert source.labels.tolist() == [3, 0, 9]
    assert open_source(path, "test", True).count == 3
    (folder / "train-images-idx3-ubyte").write_bytes(idx(images[:, :14]))  # unpacked beside it
    with_both = open_source(path, None, True)
    assert everything(with_both).shape == (3, 14, 28)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "not of uint8"),
        (b"\0\0\x0d\3" + bytes(12), "not of uint8"),
        (b"\0\0\x08\3" + b"\xff" * 12, "too many elements"),
        (b"\0\0\x08\3" + (2).to_bytes(4, "big") * 3 + b"1234567", "cut short"),
    ],
)
def test_damaged_idx_files_are_refused(mnist, content, word):
    path, folder, _ = mnist
    for name, data in (("", content), (".gz", gzip.compress(content, mtime=0))):
        file = folder / f"train-images-idx3-ubyte{name}"
        file.write_bytes(data)
        with pytest.raises(UserError, match=word):
            open_source(path, None, True)
        file.unlink()


def test_missing_labels_are_named(mnist):
    path, folder, _ = mnist
    (folder / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(UserError, match=r"train-labels-idx1-ubyte.* does not exist"):
        open_source(path, None, True)


def test_svhn_is_refused_by_name(tmp_path):
    (tmp_path / "train_32x32.mat").write_bytes(b"MATLAB 5.0 MAT-file")
    with pytest.raises(UserError, match=r"SVHN's \.mat files are not supported: give its Parquet"):
        open_source(tmp_path, None, True)
