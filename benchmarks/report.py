"""Write README.md and its figures from the result files, or compare two result files.

    python -m benchmarks.report
    python -m benchmarks.report --compare OLD.jsonl NEW.jsonl

A row counts as slower or faster only if the two ranges from the 20th to the 80th percentile are
disjoint. The exit status is 1 if any row is slower.
"""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
import matplotlib
from matplotlib.figure import Figure

from benchmarks.results import KEYS, PROVENANCE, RESULTS, Row, read
from sid_fast import cli
from sid_fast.errors import RunFailed, UserError
from sid_fast.io.atomic import atomic_path

HEAD = """# Results

`python -m benchmarks.report` writes this page from the files in `results/`. Each table names the
device, date and commit of its figures. Times are medians; error bars span the 20th to the 80th
percentile. An estimate is counted, not measured. See also [PLAN.md](PLAN.md), the estimated cost of
a run on several machines, and [LOG.md](LOG.md), what was tried.
"""
NO_GPU = "**No GPU measurements yet: these are measured on CPUs, or estimates.**\n"
TITLES = {
    "check": "Correctness on the device",
    "train": "Training",
    "breakdown": "Step time by operation",
    "kernels": "Kernels",
    "evaluation": "Evaluation",
    "roofline": "Rooflines (estimates)",
}
MAX_ROWS = 12  # layers of a roofline, single operations of a breakdown
TIME = "ms_p50"


def provenance(rows: list[Row]) -> str:
    """Device, load, versions, date and commit of the rows, in one line."""
    row = rows[0]
    load = max((row["load"] for row in rows if row["load"] is not None), default=None)
    parts = [
        row["device"],
        load is not None and f"load {load:g} before",
        row["driver"] and f"driver {row['driver']}",
        *(f"{name} {row[name]}" for name in ("python", "cuda", "torch", "triton") if row[name]),
        row["date"][:10],
        f"commit {row['commit']}",
    ]
    return ", ".join(part for part in parts if part)


def number(value: Any) -> str:
    """Format a number with three significant digits, whole numbers in full."""
    if not isinstance(value, float):
        return "" if value is None else str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def table(rows: list[Row], *hidden: str) -> str:
    """A Markdown table of the rows without provenance, hidden, rate_* and empty columns."""
    names = dict.fromkeys(
        name
        for row in rows
        for name, value in row.items()
        if value is not None
        and name not in ("benchmark", *PROVENANCE, *hidden)
        and not name.startswith("rate_")
    )
    lines = [list(names), ["---"] * len(names)]
    lines += [[number(row.get(name)) for name in names] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def groups(rows: Iterable[Row], *names: str) -> dict[tuple, list[Row]]:
    """Group rows by the values of some columns, in order of appearance."""
    grouped: dict[tuple, list[Row]] = {}
    for row in rows:
        grouped.setdefault(tuple(row[name] for name in names), []).append(row)
    return grouped


def draw_bars(path: Path, title: str, rows: list[Row], label: tuple[str, ...], by: str) -> None:
    """Draw median times as horizontal bars, clustered by `label` and coloured by `by`."""
    clusters = groups(rows, *label)
    series = list(dict.fromkeys(row[by] for row in rows))
    height = 1.2 + 0.22 * sum(len(cluster) + 1 for cluster in clusters.values())
    figure, axes = _figure(title, height)
    start, ticks = 0, []
    for cluster in clusters.values():
        positions = [start + i for i in range(len(cluster))]
        axes.barh(
            positions,
            [row[TIME] for row in cluster],
            xerr=[
                [row[TIME] - row["ms_p20"] for row in cluster],
                [row["ms_p80"] - row[TIME] for row in cluster],
            ],
            color=[matplotlib.colormaps["tab10"](series.index(row[by]) % 10) for row in cluster],
            error_kw={"elinewidth": 1},
            height=0.9,
        )
        for position, row in zip(positions, cluster, strict=True):
            text = f" {row[by]} {number(row[TIME])}"
            axes.text(row["ms_p80"], position, text, va="center", fontsize=7)
        ticks.append(sum(positions) / len(positions))
        start = positions[-1] + 2
    axes.set_yticks(ticks, [" ".join(map(str, key)) for key in clusters], fontsize=8)
    axes.invert_yaxis()
    longest = max(row["ms_p80"] for row in rows)
    axes.set(xlabel="ms, 20th to 80th percentile", xlim=(0, 1.3 * longest))
    _save(figure, path)


def draw_throughput(path: Path, title: str, rows: list[Row]) -> None:
    """Draw images per second over the micro-batch, one line per variant."""
    figure, axes = _figure(title, 5)
    for i, ((variant,), line) in enumerate(groups(rows, "variant").items()):
        line = sorted(line, key=lambda row: row["micro_batch"])
        axes.plot(
            [row["micro_batch"] for row in line],
            [row["img_s"] for row in line],
            color=matplotlib.colormaps["tab10"](i % 10),
            linestyle=("-", "--", ":")[i // 10 % 3],
            marker="o",
            label=variant,
        )
    sizes = sorted({row["micro_batch"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set(xlabel="micro-batch", ylabel="images per second", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, path)


def _figure(title: str, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(9, height), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=8, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def _timed(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row.get(TIME) is not None]


# Each section returns its Markdown and its figures. stem: path of the result file, no suffix.
Section = tuple[list[str], list[Path]]


def _kernels(rows: list[Row], stem: Path) -> Section:
    texts, figures = [], []
    for (name,), group in groups(rows, "name").items():
        if timed := _timed(group):
            figures.append(stem.with_name(f"{stem.name}-{name}.png"))
            title = f"{name}\n{provenance(group)}"
            draw_bars(figures[-1], title, timed, ("shape", "dtype", "mode"), "provider")
        texts.append(f"**{name}**\n\n{table(group)}")
    return texts, figures


def _train(rows: list[Row], stem: Path) -> Section:
    texts, figures = [], []
    for (preset,), group in groups(rows, "preset").items():
        sizes = groups(_timed(group), "micro_batch")
        if len(sizes) > 1:
            figures.append(stem.with_name(f"{stem.name}-{preset}.png"))
            draw_throughput(figures[-1], f"{preset}\n{provenance(group)}", _timed(group))
        if sizes:  # bars for the micro-batch at which most variants ran
            (size,), shared = max(sizes.items(), key=lambda item: (len(item[1]), item[0]))
            figures.append(stem.with_name(f"{stem.name}-{preset}-step.png"))
            title = f"{preset}, one step of {size} images\n{provenance(group)}"
            draw_bars(figures[-1], title, shared, ("preset",), "variant")
        texts.append(f"**{preset}**\n\n{table(group, 'preset')}")
    return texts, figures


def _breakdown(rows: list[Row], stem: Path) -> Section:
    keys = "preset", "precision", "micro_batch"
    texts = []
    for key, group in groups(rows, *keys).items():
        kinds = [row for row in group if row["name"] == "all"]
        single = [row for row in group if row["name"] != "all"][:MAX_ROWS]
        texts.append(f"**{', '.join(map(str, key))} images**\n\n{table(kinds + single, *keys)}")
    return texts, []


def _evaluation(rows: list[Row], stem: Path) -> Section:
    figure = stem.with_suffix(".png")
    head = f"{rows[0]['detector']} on {rows[0]['data']}, by stage"
    draw_bars(figure, f"{head}\n{provenance(rows)}", rows, ("stage",), "variant")
    return [f"**{head}**\n", table(rows, "detector", "network", "data")], [figure]


def _roofline(rows: list[Row], stem: Path) -> Section:
    step = [row for row in rows if row["scope"] == "step"]
    layers = [row for row in rows if row["scope"] == "forward"]
    layers = sorted(layers, key=lambda row: -row["floor_us"])[:MAX_ROWS]
    preset, precision, kernels, images = (
        rows[0][name] for name in ("preset", "precision", "kernels", "images")
    )
    ms = sum(row["floor_us"] for row in step) / 1e3
    hidden = "preset", "precision", "kernels", "images", "scope"
    return [
        f"**{preset}**, {precision}, {kernels} kernels, micro-batch {images}. Estimate: at least "
        f"{ms:.3g} ms per micro-batch, at most {images / ms * 1e3:,.0f} img/s per GPU. The whole "
        f"step by kind:\n\n{table(step, *hidden, 'layer')}",
        f"The {len(layers)} layers with the highest floor in one forward pass:\n\n"
        f"{table(layers, *hidden)}",
    ], [stem.with_suffix(".png")]  # drawn by benchmarks.analysis.roofline


def _check(rows: list[Row], stem: Path) -> Section:
    return [table(rows)], []


SECTIONS: dict[str, Callable[[list[Row], Path], Section]] = {
    "check": _check,
    "train": _train,
    "breakdown": _breakdown,
    "kernels": _kernels,
    "evaluation": _evaluation,
    "roofline": _roofline,
}


def write(results: Path, readme: Path) -> int:
    """Write the report of all result files below a folder; returns the number of files."""
    files = {path: read(path) for path in sorted(results.rglob("*.jsonl")) if _is_result(path)}
    lines = [HEAD]
    if not any(
        row["driver"] and row["benchmark"] != "roofline" for r in files.values() for row in r
    ):
        lines.append(NO_GPU)
    for benchmark, title in TITLES.items():
        chosen = {path: rows for path, rows in files.items() if rows[0]["benchmark"] == benchmark}
        lines += [f"## {title}\n"] * bool(chosen)
        for path, rows in chosen.items():
            name = Path(os.path.relpath(path, readme.parent)).as_posix()
            # One section for each machine and commit that the file has rows of.
            for i, group in enumerate(groups(rows, *PROVENANCE[:-2]).values()):
                stem = path.with_name(path.stem + (f"-{i}" if i else ""))
                texts, figures = SECTIONS[benchmark](group, stem)
                lines += [f"### {provenance(group)}\n", f"[{name}]({name})\n"]
                for figure in figures:
                    link = Path(os.path.relpath(figure, readme.parent)).as_posix()
                    lines.append(f"![{figure.stem}]({link})\n")
                lines += texts
    with atomic_path(readme) as temporary:
        temporary.write_text("\n".join(lines), "utf-8")
    return len(files)


def _is_result(path: Path) -> bool:
    """Tell result files from a run's log.jsonl, which also lies below results/."""
    return path.read_text("utf-8").startswith('{"benchmark"')


def compare(old: Path, new: Path) -> None:
    """Print the rows that are slower or faster; raises RunFailed if any is slower."""
    before, after = read(old), read(new)
    for name in ("benchmark", "device"):
        values = [sorted({row[name] for row in rows}) for rows in (before, after)]
        if values[0] != values[1]:
            a, b = (", ".join(each) for each in values)
            raise UserError(f"{old} and {new} cannot be compared: {name} {a}, not {b}")

    def by_key(rows: list[Row]) -> dict[tuple, Row]:
        return {tuple(row[name] for name in KEYS[row["benchmark"]]): row for row in _timed(rows)}

    was, now = by_key(before), by_key(after)
    print(f"{old}: {provenance(before)}\n{new}: {provenance(after)}")
    counts = {"slower": 0, "faster": 0, "missing": 0}
    for key, before_row in was.items():
        after_row = now.get(key)
        if after_row is None:
            verdict = "missing"
        elif after_row["ms_p20"] > before_row["ms_p80"]:
            verdict = "slower"
        elif after_row["ms_p80"] < before_row["ms_p20"]:
            verdict = "faster"
        else:
            continue
        counts[verdict] += 1
        ranges = [_range(row) for row in (before_row, after_row) if row]
        print(f"{verdict:7} {' '.join(map(str, key))}", *ranges)
    summary = f"{len(was)} rows: {', '.join(f'{n} {verdict}' for verdict, n in counts.items())}"
    print(f"{summary}, {len(now.keys() - was.keys())} new")
    if counts["slower"]:
        raise RunFailed(f"{new} is slower than {old} in {counts['slower']} rows")


def _range(row: Row) -> str:
    low, middle, high = (number(row[name]) for name in ("ms_p20", TIME, "ms_p80"))
    return f"{middle} ms ({low}-{high})"


@click.command(help=__doc__)
@click.option("--compare", "pair", nargs=2, type=Path, help="Compare two result files instead.")
@click.option("--results", type=Path, default=RESULTS, help="Folder of the result files.")
@click.option("--out", type=Path, help="Default: README.md beside the folder.")
def main(pair: tuple[Path, Path] | None, results: Path, out: Path | None) -> None:
    """Run the command."""
    if pair:
        compare(*pair)
        return
    readme = out or results.parent / "README.md"
    print(f"{readme}: {write(results, readme)} result files")


if __name__ == "__main__":
    cli.main(main, "benchmarks.report")
