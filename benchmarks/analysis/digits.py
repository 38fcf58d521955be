"""Copy a digits run to results/digits and draw the figure that opens the README.

python -m benchmarks.analysis.digits runs/000-digits
"""

import json
import shutil
import sys
from pathlib import Path

import matplotlib.image
from matplotlib.figure import Figure

from benchmarks.results import RESULTS
from sid_fast.evaluation.curve import draw_curve
from sid_fast.evaluation.features import Pixels, label
from sid_fast.io.atomic import atomic_path
from sid_fast.training.logging import read_log

NAME = label("frechet_distance", Pixels())
FOLDER = RESULTS / "digits"


def main(run: Path) -> None:
    """Copy a run's log and configuration, and draw its curve and samples."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    grid = sorted(run.glob("samples-*.png"))[-1]
    for source, name in ((run / "log.jsonl", "log.jsonl"), (run / "config.json", "config.json")):
        shutil.copy(source, FOLDER / name)
    figure = Figure(figsize=(14.5, 6), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.35, 1))
    records = [r for r in read_log(FOLDER / "log.jsonl") if NAME in r]
    teacher = next(r["teacher"] for r in records if "teacher" in r)
    draw_curve(left, [r["images"] for r in records], [r[NAME] for r in records], NAME, teacher)
    right.imshow(matplotlib.image.imread(grid), cmap="gray")
    right.set_axis_off()
    right.set_title("one step each")
    with atomic_path(FOLDER / "digits.png") as temporary:
        figure.savefig(temporary, format="png")
    print(json.dumps({"start": records[0][NAME], "end": records[-1][NAME], "teacher": teacher}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
