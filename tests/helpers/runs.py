"""Run folders as `train` leaves them, without training."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sid_fast.data.images import save_grid
from tests.helpers.images import pictures

DISTANCE = "Fréchet distance (pixels)"
OPTIONS = {
    "method": "sid", "preset": "digits", "alpha": 1.2, "batch_size": 128, "kimg": 8.0,
    "micro_batch": None, "teacher": "digits", "data": "digits", "seed": 0, "teacher_steps": 18,
    "eval_every": 2.0, "out": "runs/000",
}  # fmt: skip


def progress(images: int, **more: float | None) -> dict[str, Any]:
    """A record of a progress line."""
    values = {
        "fake/loss": 20.0 - images / 1e3, "fake/dropped": 0.0, "generator/loss": -0.5,
        "generator/distance": 1 / (1 + images), "it_per_s": 4.0, "img_per_s": 512.0,
        "peak_gib": 0.5,
    }  # fmt: skip
    return {"images": images} | values | more


def make_run(
    folder: Path,
    images: int = 8192,
    every: int = 2048,
    options: dict[str, Any] | None = None,
    best: float = 0.4,
    **entries: Any,
) -> Path:
    """Write config.json, log.jsonl and sample grids of a run that got as far as `images`.

    options: Change those of OPTIONS. best: the last distance. entries: further ones of config.json.
    """
    folder.mkdir(parents=True)
    config = OPTIONS | (options or {})
    config |= {"changed": {"kimg": 32, "out": None}, "started_at": 1.79e9}
    config |= {"environment": {"torch": "2.13.0", "device": "a CPU", "processes": 1}}
    config |= {"headline": "distilling digits on cpu"} | entries
    (folder / "config.json").write_text(json.dumps(config))
    records: list[dict[str, Any]] = []
    steps = range(0, images + 1, every)
    for i, distance in zip(steps, np.geomspace(3.4, best, len(steps)), strict=True):
        records.append(progress(i) if i else {"images": 0, "teacher": 0.21})
        records.append({"images": i, DISTANCE: distance, "evaluation_s": 1.5})
        save_grid(folder / f"samples-{i:010d}.png", torch.from_numpy(pictures(6)), 3)
    (folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder
