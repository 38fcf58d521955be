"""The picture of a run: its curve, and beside it the first, the middle and the last grid."""

import numpy as np
import pytest
import torch
from PIL import Image

from sid_fast.data.images import save_png
from sid_fast.evaluation.curve import save_curve


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_first_middle_and_last_grid_are_shown(tmp_path, count):
    grids = []
    for i in range(count):
        grey = torch.full((1, 8, 8), 40 * i + 50, dtype=torch.uint8)
        save_png(tmp_path / f"{i}.png", grey)
        grids.append((1000 * i, tmp_path / f"{i}.png"))
    save_curve(tmp_path / "x.png", [0, 1000], [2.0, 1.0], "distance", 0.5, grids=grids)
    with Image.open(tmp_path / "x.png") as image:
        found = np.asarray(image.convert("L"))
    shown = {40 * i + 50 for i in ({0, count // 2, count - 1} if count else ())}
    areas = {i for i in range(50, 250, 40) if (abs(found.astype(int) - i) < 3).sum() > 10_000}
    assert areas == shown
