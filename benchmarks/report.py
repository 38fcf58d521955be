"""Turn the committed result files into README.md with its pictures, or compare two of them.

python -m benchmarks.report
python -m benchmarks.report --compare OLD.json NEW.json

Comparing, a row is slower or faster only where the spreads of the two (20th to 80th percentile) do
not touch; the exit status is 1 if one is slower.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from benchmarks.record import FORMS, RESULTS, flatten, read
from sid_fast.errors import UserError
from sid_fast.io.atomic import atomic_path

Result = dict[str, Any]

HEAD = """# Results

Made from the files in `results/` by `python -m benchmarks.report`; every figure stands under the
device, date and commit it is of. Times are medians, with the 20th and 80th percentile where there
are bars. What is called an estimate was counted, not measured. [PLAN.md](PLAN.md) has what a run
would take of which machine, [LOG.md](LOG.md) what was tried.
"""
TITLES = {
    "check": "Correctness on the device",
    "train": "Training",
    "breakdown": "Where the time of a step goes",
    "kernels": "Kernels",
    "evaluation": "Evaluation",
    "roofline": "Rooflines (estimates)",
}
MOST = 12  # layers of a roofline that are shown


def provenance(result: Result) -> str:
    """Device, the load it was under, versions, date and commit, in a line."""
    versions, load = result["versions"], result.get("load")
    parts = [
        result["device"],
        load is not None and result["benchmark"] != "roofline" and f"load {load:g} before",
        result["driver"] and f"driver {result['driver']}",
        *(f"{name} {v}" for name, v in versions.items() if v and name != "numpy"),
        result["date"][:10],
        f"commit {result['commit']}",
    ]
    return ", ".join(part for part in parts if part)


def number(value: Any) -> str:
    """Three digits of what is not whole."""
    if not isinstance(value, float):
        return "" if value is None else str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of rows, their percentiles as columns; columns without a value left out."""
    flat = [flatten(row) for row in rows]
    names = [name for name in flat[0] if any(row.get(name) is not None for row in flat)]
    lines = [names, ["---"] * len(names)]
    lines += [[number(row.get(name)) for name in names] for row in flat]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def groups(rows: list[dict], *names: str) -> dict[tuple, list[dict]]:
    """Rows by the values of some columns, in the order in which they come."""
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found


def timed(rows: list[dict]) -> list[dict]:
    """Those that have a time; the others say why they have none."""
    return [row for row in rows if row["ms"]["p50"] is not None]


def _errors(rows: list[dict]) -> list[list[float]]:
    """How far the percentiles lie below and above the medians."""
    ms = [row["ms"] for row in rows]
    return [[m["p50"] - m["p20"] for m in ms], [m["p80"] - m["p50"] for m in ms]]


def _save(figure: Figure, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def draw_bars(path: Path, title: str, rows: list[dict], label: tuple[str, ...], by: str) -> None:
    """Horizontal bars of the median times, in groups named by `label`, coloured by `by`."""
    clusters = groups(rows, *label)
    series = list(dict.fromkeys(row[by] for row in rows))
    height = 1.2 + 0.22 * sum(len(c) + 1 for c in clusters.values())
    figure = Figure(figsize=(9, height), dpi=110, layout="constrained")
    axes = figure.subplots()
    at, ticks, longest = 0.0, [], max(row["ms"]["p80"] for row in rows)
    for cluster in clusters.values():
        places = [at + i for i in range(len(cluster))]
        axes.barh(
            places,
            [row["ms"]["p50"] for row in cluster],
            xerr=_errors(cluster),
            color=[matplotlib.colormaps["tab10"](series.index(row[by]) % 10) for row in cluster],
            error_kw={"elinewidth": 1},
            height=0.9,
        )
        for place, row in zip(places, cluster, strict=True):
            text = f" {row[by]} {number(row['ms']['p50'])}"
            axes.text(row["ms"]["p80"], place, text, va="center", fontsize=7)
        ticks.append(sum(places) / len(places))
        at = places[-1] + 2
    axes.set_yticks(ticks, [" ".join(map(str, key)) for key in clusters], fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="ms, with 20th and 80th percentile", xlim=(0, 1.3 * longest))
    axes.set_title(title, fontsize=8, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def draw_throughput(path: Path, title: str, rows: list[dict]) -> None:
    """Images a second by micro-batch, a line a variant."""
    figure = Figure(figsize=(9, 5), dpi=110, layout="constrained")
    axes = figure.subplots()
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
    axes.set(xlabel="images a round", ylabel="images a second", ylim=(0, None))
    axes.set_title(title, fontsize=8, loc="left")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, path)


def _kernels(result: Result, stem: Path) -> tuple[list[str], list[Path]]:
    parts, pictures = [], []
    for (name,), rows in groups(result["rows"], "name").items():
        if found := timed(rows):
            path = stem.with_name(f"{stem.name}-{name}.png")
            title = f"{name}\n{provenance(result)}"
            draw_bars(path, title, found, ("shape", "dtype", "mode"), "provider")
            pictures.append(path)
        parts.append(f"**{name}**\n\n{table(rows)}")
    return parts, pictures


def _train(result: Result, stem: Path) -> tuple[list[str], list[Path]]:
    parts, pictures = [], []
    for (preset,), rows in groups(result["rows"], "preset").items():
        sizes = groups(timed(rows), "micro_batch")
        if len(sizes) > 1:
            path = stem.with_name(f"{stem.name}-{preset}.png")
            draw_throughput(path, f"{preset}\n{provenance(result)}", timed(rows))
            pictures.append(path)
        if sizes:  # side by side where most variants have run
            (size,), shared = max(sizes.items(), key=lambda item: (len(item[1]), item[0]))
            path = stem.with_name(f"{stem.name}-{preset}-step.png")
            title = f"{preset}, a step in rounds of {size} images\n{provenance(result)}"
            draw_bars(path, title, shared, ("preset",), "variant")
            pictures.append(path)
        parts.append(f"**{preset}**\n\n{table(rows)}")
    return parts, pictures


def _breakdown(result: Result, stem: Path) -> tuple[list[str], list[Path]]:
    parts, pictures = [], []
    for keys, rows in groups(result["rows"], "preset", "precision", "micro_batch").items():
        kinds = [row for row in rows if row["name"] == "all" and row["kind"] != "all"]
        path = stem.with_name("-".join(map(str, (stem.name, *keys))) + ".png")
        figure = Figure(figsize=(8, 1.2 + 0.5 * len(kinds)), dpi=110, layout="constrained")
        axes = figure.subplots()
        places, names = range(len(kinds)), [row["kind"] for row in kinds]
        for shift, column, label in ((-0.2, "device_ms", "measured"), (0.2, "floor_ms", "floor")):
            values = [row[column] for row in kinds]
            bars = axes.barh([at + shift for at in places], values, 0.4, label=label)
            axes.bar_label(bars, [f" {number(v)}" for v in values], fontsize=7)
        axes.set_yticks(places, names, fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.1)
        axes.set(xlabel="ms of a step")
        axes.set_title(f"{', '.join(map(str, keys))} images\n{provenance(result)}", fontsize=8)
        axes.legend(fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        _save(figure, path)
        pictures.append(path)
        shown = [{k: v for k, v in row.items() if k not in ("preset", "precision")} for row in rows]
        parts.append(f"**{', '.join(map(str, keys))} images**\n\n{table(shown)}")
    return parts, pictures


def _evaluation(result: Result, stem: Path) -> tuple[list[str], list[Path]]:
    path = stem.with_name(f"{stem.name}.png")
    rows, head = result["rows"], f"{result['detector']} on {result['data']}, by stage"
    draw_bars(path, f"{head}\n{provenance(result)}", rows, ("stage",), "variant")
    ratios = [
        f"In turns, {row['variant']} {'feeds' if row['stage'] == 'feed' else 'reads'} "
        f"{row['over_plain']:.2f} times as fast as plain.\n"
        for row in rows
        if row["over_plain"] is not None and row["variant"] != "plain"
    ]
    return [f"**{head}**\n", *ratios, table(rows)], [path]


def _roofline(result: Result, stem: Path) -> tuple[list[str], list[Path]]:
    step = [row for row in result["rows"] if row["scope"] == "step"]
    layers = [row for row in result["rows"] if row["scope"] == "forward"]
    layers = sorted(layers, key=lambda row: -row["floor_us"])[:MOST]
    images, floor = result["images"], result["floor_ms"]
    hide = ("scope", "layer")
    kinds = [{k: v for k, v in row.items() if k not in hide} for row in step]
    text = (
        f"**{result['preset']}**, {result['precision']}, {result['kernels']} kernels, {images} "
        f"images a round. Estimate: at least {floor:.3g} ms a round, at most "
        f"{images / floor * 1e3:,.0f} img/s a GPU. The whole step by kind:\n\n{table(kinds)}"
    )
    costly = [{k: v for k, v in row.items() if k != "scope"} for row in layers]
    more = f"The {len(costly)} layers with the highest floor in a forward:\n\n{table(costly)}"
    return [text, more], [stem.with_suffix(".png")]  # drawn by benchmarks.roofline


def _check(result: Result, stem: Path) -> tuple[list[str], list[Path]]:
    return [table(result["rows"])], []


SECTIONS = {
    "check": _check,
    "kernels": _kernels,
    "train": _train,
    "breakdown": _breakdown,
    "evaluation": _evaluation,
    "roofline": _roofline,
}


def write(results: Path, readme: Path) -> int:
    """Write the report of all results below a folder, and its pictures; returns their number."""
    found = [(path, read(path)) for path in sorted(results.rglob("*.json")) if is_result(path)]
    lines = [HEAD]
    for benchmark, title in TITLES.items():
        chosen = [(path, result) for path, result in found if result["benchmark"] == benchmark]
        if not chosen:
            continue
        lines.append(f"## {title}\n")
        for path, result in chosen:
            parts, pictures = SECTIONS[benchmark](result, path.with_suffix(""))
            name = Path(os.path.relpath(path, readme.parent)).as_posix()
            lines.append(f"### {provenance(result)}\n")
            lines.append(f"[{name}]({name}), and `.csv` beside it\n")
            for picture in pictures:
                link = Path(os.path.relpath(picture, readme.parent)).as_posix()
                lines.append(f"![{picture.stem}]({link})\n")
            lines += parts
    if not any(result["driver"] and result["benchmark"] != "roofline" for _, result in found):
        lines.insert(1, "**Nothing was measured on a GPU yet: these are CPUs, or estimates.**\n")
    with atomic_path(readme) as temporary:
        temporary.write_text("\n".join(lines), "utf-8")
    return len(found)


def is_result(path: Path) -> bool:
    """Whether a .json below the results is one of ours, rather than a run's configuration."""
    return '"benchmark"' in path.read_text("utf-8")


def compare(old: Path, new: Path) -> int:
    """Print what is slower or faster beyond its spread; 1 if anything is slower."""
    before, after = read(old), read(new)
    form = FORMS[before["benchmark"]]
    if after["benchmark"] != before["benchmark"] or not form.timed:
        raise UserError(f"{old} and {new} are not two measurements of one benchmark")
    if after["device"] != before["device"]:
        raise UserError(
            f"{old} is of {before['device']}, {new} of {after['device']}: times of two devices "
            "do not compare"
        )

    def by_key(result: Result) -> dict[tuple, dict]:
        return {form.key(row): row["ms"] for row in timed(result["rows"])}

    was, now = by_key(before), by_key(after)
    shared = [key for key in was if key in now]
    print(f"{old}: {provenance(before)}\n{new}: {provenance(after)}")
    verdicts = {"slower": 0, "faster": 0}
    for key in shared:
        a, b = was[key], now[key]
        verdict = "slower" if b["p20"] > a["p80"] else "faster" if b["p80"] < a["p20"] else ""
        if verdict:
            verdicts[verdict] += 1
            print(
                f"{verdict}  {' '.join(map(str, key))}: {number(a['p50'])} ms "
                f"({number(a['p20'])}-{number(a['p80'])}) to {number(b['p50'])} ms "
                f"({number(b['p20'])}-{number(b['p80'])}), x{b['p50'] / a['p50']:.2f}"
            )
    missing = [key for key in was if key not in now]
    for key in missing:
        print(f"missing {' '.join(map(str, key))}")
    print(
        f"{len(shared)} rows compared: {verdicts['slower']} slower, {verdicts['faster']} faster "
        f"beyond their spread, {len(missing)} missing, {len(now) - len(shared)} new"
    )
    return int(verdicts["slower"] > 0)


def main(arguments: list[str] | None = None) -> int:
    about, _, details = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description=about,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"))
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: README.md beside FOLDER")
    options = parser.parse_args(arguments)
    try:
        if options.compare:
            return compare(*options.compare)
        readme = options.out or options.results.parent / "README.md"
        count = write(options.results, readme)
        print(f"{readme}: {count} results")
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
