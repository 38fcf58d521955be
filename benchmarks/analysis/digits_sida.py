"""Collect digits runs of several methods and seeds, and draw their distances in one picture.

python -m benchmarks.analysis.digits_sida SiD=runs/sid-0,runs/sid-1 SiDA=runs/sida-0

The runs are trained with --preset digits, digits-sida or a variant of them; see
benchmarks/experiments/digits-sida/README.md. Each run's config.json and the evaluations of its
log.jsonl are copied there, and so is the picture.
"""

import json
import statistics
import sys
from pathlib import Path

from matplotlib.figure import Figure

from sid_fast.evaluation.features import Pixels, label
from sid_fast.io.atomic import atomic_path
from sid_fast.training.logging import read_log

NAME = label("frechet_distance", Pixels())
FOLDER = Path(__file__).parents[1] / "experiments" / "digits-sida"


def copy(run: Path, folder: Path) -> list[dict]:
    """Copy a run's configuration and the evaluations of its log; return these."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((run / "config.json").read_text("utf-8"))
    for name in ("out", "generator"):  # without the folders of the machine
        config[name] = config.get(name) and Path(config[name]).name
    with atomic_path(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
    records = [r for r in read_log(run / "log.jsonl") if NAME in r]
    with atomic_path(folder / "log.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(r) + "\n" for r in records), "utf-8")
    return records


def main(groups: dict[str, list[Path]]) -> None:
    """Copy the runs, draw one line per run and print the last distances of each group."""
    figure = Figure(figsize=(8, 5), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    teacher = None
    for number, (group, runs) in enumerate(groups.items()):
        last = []
        for i, run in enumerate(runs):
            records = copy(run, FOLDER / run.name)
            teacher = next((r["teacher"] for r in records if "teacher" in r), teacher)
            points = [(r["images"], r[NAME]) for r in records if r["images"]]
            name = group if i == 0 else None
            axes.plot(*zip(*points, strict=True), "o-", color=f"C{number}", label=name, alpha=0.7)
            last.append(points[-1][1])
        mean = statistics.mean(last)
        print(f"{group}: {', '.join(f'{v:.4g}' for v in last)}; mean {mean:.4g}")
    if teacher is not None:
        axes.axhline(teacher, color="black", linestyle="--", label=f"teacher: {teacher:.3g}")
    axes.set(xscale="log", yscale="log", xlabel="images seen", ylabel=NAME)
    for axis, ticks in ((axes.xaxis, (4e3, 8e3, 16e3, 24e3)), (axes.yaxis, (0.2, 0.3, 0.5, 1))):
        axis.set_ticks(ticks, [f"{t:,g}" for t in ticks])
        axis.set_ticks([], minor=True)
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_path(FOLDER / "distance.png") as temporary:
        figure.savefig(temporary, format="png")


if __name__ == "__main__":
    pairs = (argument.split("=", 1) for argument in sys.argv[1:])
    main({name: [Path(run) for run in runs.split(",")] for name, runs in pairs})
