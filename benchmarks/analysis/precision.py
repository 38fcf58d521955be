"""Compare the learning curves of short digits runs in fp32, bf16 and fp16, over seeds.

    python -m benchmarks.analysis.precision

Writes results/precision/digits.json and .png. Most CPUs emulate 16 bit, at about a twentieth of the
speed of float32.
"""

import json
from typing import Any

import click
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks.results import RESULTS
from sid_fast import Distiller, Settings, cli, load_network
from sid_fast.config.types import Precision
from sid_fast.data.digits import open_dataset
from sid_fast.evaluation import frechet_distance, moments
from sid_fast.io.atomic import atomic_path
from sid_fast.sampling import to_uint8
from sid_fast.training.random_streams import fixed_grid_inputs

FOLDER = RESULTS / "precision"
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "fp16")
SEEDS = 0, 1, 2
STEPS, EVERY, IMAGES = 48, 8, 500
SETTINGS: dict[str, Any] = dict(
    batch_size=16, fake_lr=4e-4, generator_lr=1.5e-4, ema_halflife_kimg=0.5, ema_rampup_ratio=0.1
)


def features(images: torch.Tensor) -> torch.Tensor:
    """Flatten images to pixels in [-1, 1]."""
    return images.flatten(1).double() / 127.5 - 1


def curve(precision: Precision, seed: int, real: tuple[torch.Tensor, torch.Tensor]) -> list[float]:
    """Return Fréchet distances of the EMA's images at the start and every EVERY steps."""
    trainer = Distiller(
        load_network("digits"), Settings(precision=precision, **SETTINGS), seed=seed
    )
    trainer.ema.compute_dtype = torch.float32  # compare weights, not inference precision
    z, labels = fixed_grid_inputs(trainer.ema.config, 0, IMAGES)
    sigma = torch.full((IMAGES,), trainer.settings.init_sigma)

    @torch.no_grad()
    def distance() -> float:
        images = to_uint8(trainer.ema(z * sigma[0], sigma, labels))
        return frechet_distance(*moments(features(images)), *real)

    distances = [distance()]
    for step in tqdm(range(1, STEPS + 1), desc=f"{precision}, seed {seed}"):
        metrics = trainer.step()
        assert not metrics["generator/skipped"]
        assert not metrics["fake/skipped"]
        if step % EVERY == 0:
            distances.append(distance())
    return distances


def draw(curves: dict[str, list[list[float]]]) -> None:
    """Draw the curves of all seeds, one colour per precision."""
    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    kimg = [i * EVERY * SETTINGS["batch_size"] / 1000 for i in range(STEPS // EVERY + 1)]
    # Wide to narrow, so that coinciding lines all stay visible.
    styles = ("lightgray", 7), ("tab:blue", 3), ("tab:red", 1)
    for (colour, width), (precision, runs) in zip(styles, curves.items(), strict=False):
        for i, run in enumerate(runs):
            label = None if i else precision
            axes.plot(kimg, run, color=colour, linewidth=width, label=label)
    axes.set(
        xlabel="kimg",
        ylabel="Fréchet distance (pixels)",
        title=f"digits, {len(SEEDS)} seeds each",
    )
    axes.set_ylim(0)
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_path(FOLDER / "digits.png") as temporary:
        figure.savefig(temporary, format="png")


@click.command(help=__doc__)
def main() -> None:
    """Run the command."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    real = moments(features(torch.from_numpy(open_dataset("digits").images())))
    curves: dict[str, list[list[float]]] = {}
    for precision in PRECISIONS:
        for seed in SEEDS:
            curves.setdefault(precision, []).append(curve(precision, seed, real))
            with atomic_path(FOLDER / "digits.json") as temporary:
                text = json.dumps({"settings": SETTINGS, "every": EVERY, "distances": curves})
                temporary.write_text(text + "\n", "utf-8")
            draw(curves)


if __name__ == "__main__":
    cli.main(main, "benchmarks.analysis.precision")
