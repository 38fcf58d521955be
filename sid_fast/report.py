"""Write a page about runs: one HTML file with configuration, curves, images, speed and memory.

python -m sid_fast.report runs/000-digits runs/001-digits-sida --out report.html

The page needs no network and no other file. Several runs stand side by side, with one line each in
every chart. A run that is still going is shown as far as it is.
"""

import dataclasses
from pathlib import Path

from sid_fast import cli
from sid_fast.config.types import option
from sid_fast.errors import UserError
from sid_fast.io import progress
from sid_fast.io.atomic import atomic_path, open_target
from sid_fast.io.streams import say
from sid_fast.tools.run_report.grids import MAX_PAGE_BYTES, Grid, chosen, encode, positions
from sid_fast.tools.run_report.page import page
from sid_fast.tools.run_report.runs import MAX_RUNS, read_runs
from sid_fast.training.environment import installed

SUFFIXES = (".html", ".htm")


@dataclasses.dataclass
class ReportConfig:
    """Options of `python -m sid_fast.report`."""

    runs: tuple[str, ...] = option((), f"run folders, at most {MAX_RUNS}")
    out: str | None = option(None, "HTML file to write", heading="Run and output")


def run(config: ReportConfig, given: set[str]) -> None:
    """Read the runs and write the page."""
    if not config.runs:
        raise UserError("no run is given: give one or more run folders, such as runs/000-digits")
    if not config.out:
        raise UserError("out is missing: give --out FILE.html")
    if Path(config.out).suffix.lower() not in SUFFIXES:
        raise UserError(f"out={config.out} is not an HTML file: give --out FILE.html")
    runs = read_runs(config.runs)
    open_target(config.out)
    stops = positions(runs)
    files = [chosen(run, stops) for run in runs]
    count = sum(map(len, files))
    grids: list[list[Grid]] = []
    with progress.phase(f"writing {Path(config.out).name}", count, "grids") as shown:
        for run, its_files in zip(runs, files, strict=True):
            grids.append([])
            for grid in encode(its_files, MAX_PAGE_BYTES // max(count, 1), run.notes):
                grids[-1].append(grid)
                shown.update()
    html = page(runs, stops, grids, installed("sid-fast") or "")
    with atomic_path(config.out) as temporary:
        temporary.write_text(html, "utf-8")
    what = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    say(f"wrote {config.out}: {what}, {count} sample grids, {len(html) / 2**20:.1f} MiB")


main = cli.command(ReportConfig, run, None, __doc__, positional="runs")

if __name__ == "__main__":
    cli.main(main, "sid_fast.report")
