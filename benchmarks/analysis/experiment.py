"""Collect runs of several methods and seeds as an experiment, and draw their distances.

python -m benchmarks.analysis.experiment digits-sida SiD=runs/sid-0,runs/sid-1 SiDA=runs/sida-0

The first argument is a folder of benchmarks/experiments; its README.md says how the runs are
trained. Each run's config.json, the evaluations of its log.jsonl and its last sample grid are
copied there. Of each run over_time.png shows the first images of its grids, of all runs
distance.png the distances.
"""

import json
import math
import shutil
import statistics
import sys
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from PIL import Image

from sid_fast.io.atomic import atomic_path
from sid_fast.training.callbacks import GRID
from sid_fast.training.logging import read_log

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


def copy(run: Path, folder: Path) -> tuple[str, list[dict]]:
    """Copy what an experiment keeps of a run; return the distance's name and the evaluations."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((run / "config.json").read_text("utf-8"))
    for name in ("out", "generator", "data", "detector"):  # without the folders of the machine
        config[name] = config.get(name) and Path(config[name]).name
    kept = {
        name: value for name, value in config.items() if name not in ("headline", "environment")
    }
    with atomic_path(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", "utf-8")
    log = read_log(run / "log.jsonl")
    name = next(key for record in log for key in record if key.startswith(("FID", "Fréchet")))
    records = [record for record in log if name in record]
    with atomic_path(folder / "log.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(r) + "\n" for r in records), "utf-8")
    shutil.copy(max(run.glob("samples-*.png")), folder / "samples.png")
    draw_over_time(run, folder / "over_time.png")
    return name, records


def draw_over_time(run: Path, path: Path) -> None:
    """Draw the first row of some grids: of the first, about each doubling of images, the last."""
    grids = {int(grid.stem.split("-")[1]): grid for grid in sorted(run.glob("samples-*.png"))}
    shown: list[int] = []
    for images in grids:
        if not shown or images >= max(1.9 * shown[-1], 1):
            shown.append(images)
    shown = sorted({*shown, *list(grids)[-1:]})
    rows = []
    for images in shown:
        with Image.open(grids[images]) as grid:
            columns = round(math.sqrt(GRID * grid.width / grid.height))
            rows.append(grid.convert("RGB").crop((0, 0, grid.width, grid.width // columns)))
    width, height = rows[0].size
    figure = Figure(figsize=(8, 0.3 + 7.2 * len(rows) * height / width), dpi=90)
    for axes, images, row in zip(
        figure.subplots(len(rows), squeeze=False)[:, 0], shown, rows, strict=True
    ):
        axes.imshow(row)
        axes.set_ylabel(f"{images / 1000:.0f}", rotation=0, ha="right", va="center")
        axes.set(xticks=[], yticks=[], frame_on=False)
    figure.supylabel("kimg")
    figure.subplots_adjust(0.1, 0.01, 0.99, 0.99, hspace=0.02)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def main(experiment: str, groups: dict[str, list[Path]]) -> None:
    """Copy the runs, draw one line per run and print the last distances of each group."""
    figure = Figure(figsize=(8, 5), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    teacher = None
    for number, (group, runs) in enumerate(groups.items()):
        last: list[float] = []
        for i, run in enumerate(runs):
            name, records = copy(run, EXPERIMENTS / experiment / run.name)
            teacher = next((r["teacher"] for r in records if "teacher" in r), teacher)
            points = [(r["images"], r[name]) for r in records if r["images"]]
            text = group if i == 0 else None
            xs, ys = zip(*points, strict=True) if points else ((), ())
            axes.plot(xs, ys, "o-", color=f"C{number}", label=text, alpha=0.7)
            last.extend(ys[-1:])
        if last:
            values = ", ".join(f"{v:.4g}" for v in last)
            print(f"{group}: {values}; mean {statistics.mean(last):.4g}")
        else:
            print(f"{group}: no evaluation of a trained network")
    if teacher is not None:
        axes.axhline(teacher, color="black", linestyle="--", label=f"teacher: {teacher:.3g}")
    axes.set(xscale="log", yscale="log", xlabel="images seen", ylabel=name)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axis.set_major_formatter("{x:,g}")
        axis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_path(EXPERIMENTS / experiment / "distance.png") as temporary:
        figure.savefig(temporary, format="png")


if __name__ == "__main__":
    pairs = (argument.split("=", 1) for argument in sys.argv[2:])
    main(sys.argv[1], {name: [Path(run) for run in runs.split(",")] for name, runs in pairs})
