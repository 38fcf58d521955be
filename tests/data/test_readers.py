"""DALI and the PIL reader: identical bits, each image once, damaged files named."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from sid_fast.data.datasets import ImageDataset, write_dataset
from sid_fast.data.readers import choose, read
from sid_fast.errors import UserError
from tests.helpers.images import make_zip, png

CPU = torch.device("cpu")
RNG = np.random.default_rng(0)


@pytest.fixture(params=["plain", "dali"])
def kind(request):
    if request.param == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    return request.param


def colour(n: int, size: int = 16) -> np.ndarray:
    return RNG.integers(256, size=(n, size, size, 3), dtype=np.uint8)


def all_of(data: ImageDataset, kind: str, **options) -> torch.Tensor:
    return torch.cat(list(read(data, range(len(data)), CPU, kind, **options)))


def test_rgb_and_palettes_are_read_to_the_bit(tmp_path, kind):
    pictures = [Image.fromarray(pixels) for pixels in colour(9)]
    pictures[2:5] = [p.quantize(n) for p, n in zip(pictures[2:5], (200, 16, 2), strict=True)]
    files = {f"{i}.png": png(p) for i, p in enumerate(pictures)}
    files["3.png"] = png(pictures[3], bits=4)
    data = ImageDataset(make_zip(tmp_path / "a.zip", files))
    expected = np.stack([np.array(p.convert("RGB")) for p in pictures]).transpose(0, 3, 1, 2)
    assert np.array_equal(all_of(data, kind), expected)


@pytest.mark.parametrize("compression", [0, 8], ids=["stored", "deflated"])
def test_grey_is_read_to_the_bit(tmp_path, kind, compression):
    pixels = colour(5)[..., 0]
    files = {f"{i}.png": png(p) for i, p in enumerate(pixels)}
    data = ImageDataset(make_zip(tmp_path / "a.zip", files, compression))
    assert np.array_equal(all_of(data, kind), pixels[:, None])


def test_a_folder_is_read_like_a_zip(tmp_path, kind):
    for i, pixels in enumerate(colour(3)):
        (tmp_path / f"{i}.png").write_bytes(png(pixels))
    data = ImageDataset(tmp_path)
    assert np.array_equal(all_of(data, kind), data.images())


@pytest.mark.parametrize("batch", [1, 4, 7, 100])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_every_image_is_read_once_for_uneven_batches_and_ranks(tmp_path, kind, batch, processes):
    images = np.arange(11, dtype=np.uint8)[:, None, None, None] + np.zeros((1, 3, 4, 4), np.uint8)
    write_dataset(tmp_path / "a.zip", images)
    data = ImageDataset(tmp_path / "a.zip")
    for rank in range(processes):
        mine = range(len(data))[rank::processes]
        parts = list(read(data, mine, CPU, kind, batch=batch))
        assert torch.cat(parts)[:, 0, 0, 0].tolist() == list(mine)


def test_later_batches_do_not_overwrite_earlier_ones(tmp_path, kind):
    """Batches share memory with the reader; those still held keep their values."""
    images = colour(40).transpose(0, 3, 1, 2)
    write_dataset(tmp_path / "a.zip", images)
    parts = list(read(ImageDataset(tmp_path / "a.zip"), range(40), CPU, kind, batch=2))
    assert np.array_equal(torch.cat(parts), images)


def damage(data: bytes, where: int) -> bytes:
    return data[:where] + bytes([data[where] ^ 0xFF]) + data[where + 1 :]


@pytest.mark.parametrize("where", [0, 4, 9])
@pytest.mark.parametrize("how", ["cut", "bits"])
def test_a_damaged_image_is_named_and_nothing_after_it_is_read(tmp_path, kind, where, how):
    files = {f"{i}.png": png(p) for i, p in enumerate(colour(10))}
    name = f"{where}.png"
    files[name] = files[name][:300] if how == "cut" else damage(files[name], 200)
    data = ImageDataset(make_zip(tmp_path / "a.zip", files))
    for batch in (4, 100):
        with pytest.raises(UserError, match=rf"a\.zip: {where}\.png is damaged"):
            all_of(data, kind, batch=batch)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (lambda: png(np.zeros((16, 16), np.uint16)), "not 8-bit"),
        (lambda: png(Image.new("RGBA", (16, 16))), "alpha"),
        (lambda: png(Image.new("RGB", (16, 16)), transparency=(0, 0, 0)), "transparency"),
        (lambda: png(colour(1, 8)[0]), "8 pixels"),
        (lambda: png(colour(1)[0, ..., 0]), "1 channels"),
    ],
)
def test_unsupported_images_are_refused_by_name(tmp_path, kind, bad, words):
    files = {f"{i}.png": png(p) for i, p in enumerate(colour(3))} | {"2.png": bad()}
    data = ImageDataset(make_zip(tmp_path / "a.zip", files))
    with pytest.raises(UserError, match=rf"2\.png .*{words}"):
        all_of(data, kind)


def test_a_flipped_bit_in_the_zip_is_noticed(tmp_path, kind):
    path = tmp_path / "a.zip"
    write_dataset(path, colour(3).transpose(0, 3, 1, 2))
    data = ImageDataset(path)
    content = bytearray(path.read_bytes())
    content[content.index(b"IEND", 1500) - 30] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"img0000000\d\.png cannot be read"):
        all_of(data, kind)


def test_without_dali_the_plain_reader_says_what_it_costs(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    assert choose("auto", 1797) == "plain"
    assert capsys.readouterr().err == "", "PIL has read them before DALI has started"
    assert choose("auto") == "plain"
    assert "slower" in capsys.readouterr().err
    with pytest.raises(UserError, match="pip install"):
        choose("dali")
    with pytest.raises(UserError, match="auto, dali, plain"):
        choose("fast")
