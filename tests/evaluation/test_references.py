"""Reference statistics: what is read, what is refused, and when they are computed again."""

import io
import os
import tracemalloc
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sid_fast.data.datasets import ImageDataset, write_dataset
from sid_fast.data.images import save_png
from sid_fast.errors import UserError
from sid_fast.evaluation import sample
from sid_fast.evaluation.features import Pixels, load_detector
from sid_fast.evaluation.references import content_digest, measure, read_reference, reference_of
from sid_fast.evaluation.sample import StageTimer
from sid_fast.io.safetensors import read_snapshot, write_snapshot
from tests.helpers.images import pictures

pytestmark = pytest.mark.usefixtures("cache")
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"mu": np.zeros(64)}, "has no sigma: give a reference, an .npz with mu .D. and sigma"),
        ({"mu": np.zeros(64), "sigma": np.eye(63)}, "shapes"),
        ({"mu": np.full(64, np.nan), "sigma": np.eye(64)}, "NaN"),
        ({"mu": np.zeros(64), "sigma": np.eye(64), "detector": np.array("x")}, "another detector"),
        (
            {"mu": np.array([{}]), "sigma": np.eye(1)},
            "a reference, .*its mu is neither numbers nor text",
        ),
    ],
)
def test_what_is_no_reference_is_refused(tmp_path, values, words):
    np.savez(tmp_path / "stats.npz", **values)
    with pytest.raises(UserError, match=rf"stats\.npz.*{words}"):
        read_reference(str(tmp_path / "stats.npz"), load_detector("pixels", CPU))


def save(path, **values):
    np.savez(path, **{"mu": np.zeros(64), "sigma": np.eye(64)} | values)
    return str(path)


SKEW = np.eye(64) + np.eye(64, k=1)
INDEFINITE = np.diag([1.0] * 63 + [-0.01])
ALMOST = np.diag([1.0] * 63 + [-1e-9]) + 1e-9 * np.eye(64, k=1)  # within rounding


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"sigma": -np.eye(64)}, "a sigma with the negative eigenvalue -1, so it is no covariance"),
        ({"sigma": INDEFINITE}, r"a sigma with the negative eigenvalue -0\.01"),
        ({"sigma": SKEW}, "a sigma that is not symmetric"),
        ({"images": np.array(1)}, "of 1 images, which must be an integer of at least 2"),
        ({"images": np.array(0)}, "of 0 images"),
        ({"images": np.array(2.5)}, "of 2.5 images"),
        ({"images": np.array([5, 6])}, "images shape .2. has more than 1 elements"),
        ({"mu": np.zeros(64, complex)}, "mu is neither numbers nor text"),
        ({"mu": np.array(["1"] * 64)}, "mu or sigma that are not numbers"),
        ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, "shapes"),
        ({"mu": np.zeros(16_385, np.int8)}, "mu shape .16385. has more than 16,384 elements"),
        ({"detector": np.array("x" * 10**5)}, "detector has 400,128 bytes, more than"),
    ],
)
def test_what_is_no_covariance_or_too_large_is_refused(tmp_path, values, words):
    path = save(tmp_path / "stats.npz", **values)
    with pytest.raises(UserError, match=rf"stats\.npz.*{words}"):
        read_reference(path, load_detector("pixels", CPU))


@pytest.mark.parametrize("sigma", [np.zeros((64, 64)), ALMOST, np.eye(64, dtype=np.float32)])
def test_a_covariance_up_to_rounding_is_read(tmp_path, sigma):
    path = save(tmp_path / "stats.npz", sigma=sigma, images=np.array([7]))
    found = read_reference(path, load_detector("pixels", CPU))
    assert np.allclose(found.covariance, sigma)
    assert found.count == 7


def test_an_array_is_read_only_if_its_header_says_no_more_than_there_is(tmp_path):
    for shape, words in (((10**4,), "is cut short"), ((2**40, 2**40), "has more than 16,384")):
        buffer = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            buffer, {"descr": "<f8", "fortran_order": False, "shape": shape}
        )
        with zipfile.ZipFile(tmp_path / "stats.npz", "w") as archive:
            archive.writestr("mu.npy", buffer.getvalue())
        with pytest.raises(UserError, match=rf"its mu .*{words}"):
            read_reference(str(tmp_path / "stats.npz"), load_detector("pixels", CPU))


def test_a_reference_of_python_2_is_read_without_a_warning(tmp_path, recwarn):
    np.savez(tmp_path / "stats.npz", sigma=np.eye(3))
    np.save(buffer := io.BytesIO(), np.zeros(3))
    content = buffer.getvalue().replace(b"(3,), }", b"(3L,),}")
    with zipfile.ZipFile(tmp_path / "stats.npz", "a") as archive:
        archive.writestr("mu.npy", content)
    found = read_reference(str(tmp_path / "stats.npz"), load_detector("pixels", CPU))
    assert torch.equal(found.mean, torch.zeros(3, dtype=torch.float64))
    assert not recwarn.list


def test_other_arrays_of_a_reference_are_not_unpacked(tmp_path):
    values = {"mu": np.zeros(64), "sigma": np.eye(64), "other": np.zeros(10**7)}
    np.savez_compressed(tmp_path / "stats.npz", **values)
    tracemalloc.start()
    read_reference(str(tmp_path / "stats.npz"), load_detector("pixels", CPU))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6


@pytest.mark.parametrize("spoil", [lambda f: f.write_bytes(b"x"), lambda f: write_nan(f)])
def test_damaged_cached_statistics_are_measured_again(real, cache, spoil):
    detector = load_detector("pixels", CPU)
    expected = reference_of(ImageDataset(real), detector, StageTimer(CPU))
    (cached,) = cache.glob("reference-*.safetensors")
    spoil(cached)
    (record,) = cache.glob("content-*.txt")
    record.write_text("not a digest")
    found = reference_of(ImageDataset(real), detector, StageTimer(CPU))
    assert torch.equal(found.covariance, expected.covariance)
    assert [cached] == list(cache.glob("reference-*.safetensors"))


def write_nan(path):
    values, config = read_snapshot(path)
    write_snapshot(path, values | {"mean": values["mean"] * torch.nan}, config)


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_reading_a_reference_runs_nothing_in_it(tmp_path):
    mu = np.array([Trap(tmp_path / "sprung")], dtype=object)
    np.savez(tmp_path / "stats.npz", mu=mu, sigma=np.eye(1))
    with pytest.raises(UserError, match="mu is neither numbers nor text"):
        read_reference(str(tmp_path / "stats.npz"), load_detector("pixels", CPU))
    assert not (tmp_path / "sprung").exists()


def test_statistics_are_measured_once_and_again_when_the_zip_changes(real, script, monkeypatch):
    from sid_fast.evaluation import references

    measured = []
    monkeypatch.setattr(references, "measure", lambda *a: measured.append(a) or measure(*a))
    detector, clock = load_detector("pixels", CPU), StageTimer(CPU)

    def look() -> float:
        return float(reference_of(ImageDataset(real), detector, clock).mean.sum())

    first = look()
    assert look() == first
    assert len(measured) == 1
    # Copied elsewhere it is the same data set.
    before, content = real.stat(), real.read_bytes()
    real.rename(real.with_name("moved.zip"))
    real.write_bytes(content)
    assert look() == first
    assert len(measured) == 1
    # One of another content is not, though size and time of change are made to agree.
    write_dataset(real, 255 - ImageDataset(real).images())
    changed = real.read_bytes()
    if len(changed) == len(content):
        os.utime(real, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert look() != first
    assert len(measured) == 2
    # Nor are those of another detector.
    detector = load_detector(str(script), CPU, trust=True)
    assert look() != first
    assert len(measured) == 3


def test_a_byte_changed_in_place_gives_another_digest(real):
    first = content_digest(ImageDataset(real))
    before = real.stat()
    with real.open("r+b") as file:
        file.seek(60)
        file.write(b"x")
    os.utime(real, ns=(before.st_atime_ns, before.st_mtime_ns))
    data = ImageDataset.__new__(ImageDataset)
    data.path, data._zip = real, True
    assert content_digest(data) != first


def test_any_file_of_a_folder_changes_its_digest(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, image in zip("ab", pictures(2), strict=True):
        save_png(folder / f"{name}.png", torch.from_numpy(image))
    digests = [content_digest(ImageDataset(folder))]
    for name in "ab":
        save_png(folder / f"{name}.png", torch.from_numpy(pictures(1)[0]))
        digests.append(content_digest(ImageDataset(folder)))
    assert len(set(digests)) == 3


def test_features_of_a_large_set_are_spread_over_it(tmp_path, monkeypatch):
    from sid_fast.evaluation import references

    monkeypatch.setattr(references, "MAX_FEATURES", 100)
    monkeypatch.setattr(sample, "MAX_FEATURES", 100)
    write_dataset(tmp_path / "large.zip", pictures(150))  # several batches
    data = ImageDataset(tmp_path / "large.zip")
    found = measure(data, load_detector("pixels", CPU), StageTimer(CPU))
    pixels = data.images().reshape(150, 64) / 127.5 - 1
    spread = [3 * i // 2 for i in range(100)]
    assert found.features.shape == (100, 64)
    assert np.allclose(found.features, pixels[spread], atol=1e-6)
    assert found.count == 150
    assert np.allclose(found.mean, pixels.mean(0))


def test_the_embedded_reference_is_that_of_its_detector():
    stats = read_reference("fashion", load_detector("pixels", CPU))
    assert stats.mean.shape == (256,)
    assert stats.count == 70_000
    with pytest.raises(UserError, match="another detector"):
        read_reference("fashion", SimpleNamespace(name="other", key="0" * 64))


@pytest.mark.slow
def test_a_small_file_of_gigabytes_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "a.npz", mu=np.zeros(3000), sigma=np.zeros((3000, 3000)))
    real, opened = zipfile.ZipFile.open, []

    def spy(self, member, *arguments, **more):
        opened.append(getattr(member, "filename", member))
        return real(self, member, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "open", spy)
        with pytest.raises(UserError, match=r"sigma would unpack from [\d,]+ bytes to 72,000,128"):
            read_reference(str(tmp_path / "a.npz"), Pixels())
    assert set(opened) == {"mu.npy"}
    noise = np.random.default_rng(0).normal(size=(3000, 3000))
    with zipfile.ZipFile(tmp_path / "b.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, value in (("mu", np.zeros(3000)), ("sigma", noise)):
            np.save(data := io.BytesIO(), value)
            archive.writestr(f"{name}.npy", data.getvalue(), compresslevel=1)
    with pytest.raises(UserError, match="not symmetric"):
        read_reference(str(tmp_path / "b.npz"), Pixels())
