"""Collect runs of several methods and seeds as an experiment, and draw their distances.

python -m benchmarks.analysis.experiment digits-sida SiD=runs/sid-0,runs/sid-1 SiDA=runs/sida-0

The first argument is a folder of benchmarks/experiments; its README.md says how the runs are
trained. Each run's config.json, the evaluations of its log.jsonl and its last sample grid are
copied there, and so is the picture, distance.png.
"""

import json
import shutil
import statistics
import sys
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from sid_fast.io.atomic import atomic_path
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
    return name, records


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
        ends = (
            f"{', '.join(f'{v:.4g}' for v in last)}; mean {statistics.mean(last):.4g}"
            if last
            else ""
        )
        print(f"{group}: {ends or 'no evaluation of a trained network'}")
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
