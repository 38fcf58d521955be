"""Short digits runs in float32 and in 16 bit, over seeds: do their distances fall together?

    python -m benchmarks.precision

On a CPU 16 bit is emulated for the most part and takes about twenty times as long. Keeps
results/precision/digits.json and .png.
"""

import json
from pathlib import Path
from typing import Any

import click
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from sid_fast import Distiller, Settings, cli, load_network
from sid_fast.config.types import Precision
from sid_fast.data.digits import open_dataset
from sid_fast.evaluation import frechet_distance, moments
from sid_fast.io.atomic import atomic_path
from sid_fast.sampling import to_uint8
from sid_fast.training.random_streams import fixed_grid_inputs

RESULTS = Path(__file__).parent / "results" / "precision"
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "fp16")
SEEDS = 0, 1, 2
STEPS, EVERY, IMAGES = 48, 8, 500
SETTINGS: dict[str, Any] = dict(
    batch_size=16, fake_lr=4e-4, generator_lr=1.5e-4, ema_halflife_kimg=0.5, ema_rampup_ratio=0.1
)


def features(images: torch.Tensor) -> torch.Tensor:
    """Pixels, in [-1, 1]."""
    return images.flatten(1).double() / 127.5 - 1


def curve(precision: Precision, seed: int, real: tuple[torch.Tensor, torch.Tensor]) -> list[float]:
    """Distances of the average's images at the start and after every EVERY steps."""
    trainer = Distiller(
        load_network("digits"), Settings(precision=precision, **SETTINGS), seed=seed
    )
    trainer.ema.compute_dtype = torch.float32  # the weights are compared, not how they are run
    z, labels = fixed_grid_inputs(trainer.ema.config, 0, IMAGES)
    sigma = torch.full((IMAGES,), trainer.settings.init_sigma)

    @torch.no_grad()
    def distance() -> float:
        images = to_uint8(trainer.ema(z * sigma[0], sigma, labels))
        return frechet_distance(*moments(features(images)), *real)

    found = [distance()]
    for step in tqdm(range(1, STEPS + 1), desc=f"{precision}, seed {seed}"):
        metrics = trainer.step()
        assert not metrics["generator/skipped"]
        assert not metrics["fake/skipped"]
        if step % EVERY == 0:
            found.append(distance())
    return found


def draw(curves: dict[str, list[list[float]]]) -> None:
    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    kimg = [i * EVERY * SETTINGS["batch_size"] / 1000 for i in range(STEPS // EVERY + 1)]
    # Wide to narrow: where the lines lie on each other, all of them are seen.
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
    with atomic_path(RESULTS / "digits.png") as temporary:
        figure.savefig(temporary, format="png")


@click.command(help=__doc__)
def main() -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    real = moments(features(torch.from_numpy(open_dataset("digits").images())))
    curves: dict[str, list[list[float]]] = {}
    for precision in PRECISIONS:
        for seed in SEEDS:
            curves.setdefault(precision, []).append(curve(precision, seed, real))
            with atomic_path(RESULTS / "digits.json") as temporary:
                text = json.dumps({"settings": SETTINGS, "every": EVERY, "distances": curves})
                temporary.write_text(text + "\n", "utf-8")
            draw(curves)


if __name__ == "__main__":
    cli.main(main, "benchmarks.precision")
