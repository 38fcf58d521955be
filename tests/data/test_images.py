"""Pixels and PNG files."""

import numpy as np
import pytest
import torch
from PIL import Image

from sid_fast.data.images import save_grid, save_png
from sid_fast.errors import UserError
from sid_fast.sampling import to_uint8


def read(path):
    return np.asarray(Image.open(path))


def test_to_uint8_truncates_and_clamps():
    x = torch.tensor([-9.0, -1.0, -1 + 0.99 / 127.5, 0.0, 0.5, 0.995, 1.0, 9.0])
    expected = torch.tensor([0, 0, 1, 128, 191, 254, 255, 255], dtype=torch.uint8)
    for dtype in torch.float32, torch.float64:
        assert torch.equal(to_uint8(x.to(dtype)), expected)


def test_to_uint8_of_half_precision_is_that_of_its_float32_values():
    x = torch.linspace(-1.1, 1.1, 5001)
    for dtype in torch.float16, torch.bfloat16:
        assert torch.equal(to_uint8(x.to(dtype)), to_uint8(x.to(dtype).float()))


@pytest.mark.parametrize("channels", [1, 3])
def test_save_png(tmp_path, channels):
    image = torch.randint(256, [channels, 8, 6], dtype=torch.uint8)
    save_png(tmp_path / "a.png", image)
    save_png(tmp_path / "b.png", image)
    expected = image[0] if channels == 1 else image.permute(1, 2, 0)
    assert np.array_equal(read(tmp_path / "a.png"), expected)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("channels", [1, 3])
def test_save_grid_places_enlarged_tiles_row_by_row(tmp_path, channels):
    images = torch.randint(128, [5, channels, 4, 4], dtype=torch.uint8)  # 128 is the gap
    save_grid(tmp_path / "a.png", images)  # 3 columns, 2 rows
    side, gap = 4 * 42, 16  # 500 / 12 rounded up is 42; the gap is a tenth of a tile
    grid = read(tmp_path / "a.png").reshape(-1, 3 * side + 2 * gap, channels)
    assert grid.shape[0] == 2 * side + gap
    tile = images[4].repeat_interleave(42, 1).repeat_interleave(42, 2).permute(1, 2, 0)
    start = side + gap
    assert np.array_equal(grid[start:, start : start + side], tile)
    assert (grid[side:start] == 128).all()
    assert (grid[:, side:start] == 128).all()
    assert (grid[start:, 2 * start :] == 128).all()  # the place of the sixth


def test_save_grid_columns_and_large_images(tmp_path):
    images = torch.zeros([3, 3, 300, 300], dtype=torch.uint8)
    save_grid(tmp_path / "a.png", images, columns=3)
    assert read(tmp_path / "a.png").shape == (300, 960, 3)
    save_grid(tmp_path / "a.png", images[:1])
    assert read(tmp_path / "a.png").shape == (600, 600, 3)


def test_missing_folder(tmp_path):
    with pytest.raises(UserError, match="create the folder"):
        save_png(tmp_path / "none" / "a.png", torch.zeros([3, 4, 4], dtype=torch.uint8))
