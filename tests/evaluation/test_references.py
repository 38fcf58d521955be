"""Reference statistics: what is read, what is refused, and when they are computed again."""

import os

import numpy as np
import pytest
import torch

from sid_fast.data.datasets import ImageDataset, write_dataset
from sid_fast.data.images import save_png
from sid_fast.errors import UserError
from sid_fast.evaluation import sample
from sid_fast.evaluation.features import load_detector
from sid_fast.evaluation.references import content_digest, measure, read_reference, reference_of
from sid_fast.evaluation.sample import StageTimer
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
