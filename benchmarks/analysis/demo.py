"""Copy a run of an embedded preset to results/: the figure and the figures that README shows.

python -m benchmarks.analysis.demo runs/000-fashion
"""

import json
import shutil
import sys
from pathlib import Path

from benchmarks.results import RESULTS
from sid_fast.evaluation.features import Pixels, label
from sid_fast.training.logging import read_log

NAME = label("frechet_distance", Pixels())


def main(run: Path) -> None:
    """Copy a run's configuration, log and picture, and print its distances."""
    folder = RESULTS / json.loads((run / "config.json").read_text("utf-8"))["preset"]
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "log.jsonl", "distance.png"):
        shutil.copy(run / name, folder / name)
    records = [r for r in read_log(folder / "log.jsonl") if NAME in r]
    teacher = next(r["teacher"] for r in records if "teacher" in r)
    print(json.dumps({"start": records[0][NAME], "end": records[-1][NAME], "teacher": teacher}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
