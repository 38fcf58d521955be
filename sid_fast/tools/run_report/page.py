"""The page as HTML: one file with style sheet, script, charts and images in it.

Every text from a run goes through `charts.text`, which escapes it. A content security policy
forbids any network request and any script but the page's own.
"""

import base64
import dataclasses
import datetime
import hashlib
import json
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from importlib import resources
from typing import Any

from sid_fast.config.types import Settings, SiDASettings
from sid_fast.io.untrusted import brief
from sid_fast.tools.run_report.charts import (
    STYLES,
    Level,
    Line,
    Point,
    chart,
    marker,
    text,
    value_text,
)
from sid_fast.tools.run_report.grids import Grid, evenly
from sid_fast.tools.run_report.runs import RATE, Run, number

MAX_ROWS = 200  # of a table
KIMG = "thousand images seen (kimg)"
NOTHING = "–"

# Charts of the log: title, explanation (HTML), and the metrics drawn with their names.
METRICS: tuple[tuple[str, str, dict[str, str]], ...] = (
    (
        "Loss of the fake score",
        "‖f<sub>ψ</sub> − y‖², weighted and summed over an image",
        {"fake/loss": ""},
    ),
    ("Loss of the generator", "summed over an image; may be negative", {"generator/loss": ""}),
    (
        "Distance of teacher and fake score",
        "‖f<sub>φ</sub> − f<sub>ψ</sub>‖² on generated images; 0 where both agree",
        {"generator/distance": ""},
    ),
    ("Error of the fake score", "‖f<sub>ψ</sub> − y‖², unweighted", {"fake/distance": ""}),
    (
        "Adversarial losses",
        "filled: the discriminator's; hollow, dashed: the generator's",
        {"fake/discriminator": "discriminator", "generator/adversarial": "generator"},
    ),
    (
        "Mean logits of the discriminator",
        "filled: real images; hollow, dashed: generated images",
        {"fake/real_logit": "real", "fake/fake_logit": "generated"},
    ),
    (
        "Taken for real",
        "fraction of positive logits; filled: real images, hollow, dashed: generated images",
        {"fake/real_share": "real", "fake/fake_share": "generated"},
    ),
    ("Mean logit in the generator's phase", "of generated images", {"generator/logit": ""}),
    (
        "Taken for real in the generator's phase",
        "fraction of positive logits of generated images",
        {"generator/share": ""},
    ),
    ("Clipped values", "of the fake score's gradient, per step", {"fake/clipped": ""}),
    ("Loss", "of the denoiser, weighted", {"loss": ""}),
    ("Error of the denoiser", "‖D − y‖², unweighted", {"distance": ""}),
)
FAULTS = {  # endings of metrics that count, and what they count
    "dropped": "samples dropped as not finite",
    "nonfinite": "gradient values that were not finite",
    "skipped": "updates skipped, as no sample was valid",
    "failed": "updates that failed",
}
_SPEED = (RATE, "it_per_s", "input_waits", "peak_gib")
_MISSING = object()  # an option that a run does not have
_FOLDERS = ("out", "resume")  # options that differ between any two runs
_FIRST = ("method", "preset", "teacher", "generator", "data")  # options that tables begin with
_SIDA = {f.name for f in dataclasses.fields(SiDASettings)} - {
    f.name for f in dataclasses.fields(Settings)
}
_ENVIRONMENT = {
    "device": "device",
    "device_gib": "memory of the device, GiB",
    "processes": "processes",
    "threads": "CPU threads",
    "torch": "PyTorch",
    "cuda": "CUDA",
    "triton": "Triton",
    "python": "Python",
    "sid_fast": "sid_fast",
    "system": "system",
}


def page(
    runs: Sequence[Run], stops: Sequence[int], grids: Sequence[Sequence[Grid]], version: str
) -> str:
    """Return the page.

    Args:
        runs: What it shows, side by side.
        stops: Images seen at the slider's positions.
        grids: The sample grids of each run.
        version: Of sid_fast.
    """
    sections = {
        "Overview": _overview(runs),
        "Distance": _distances(runs),
        "Images": _images(runs, stops, grids),
        "Losses and diagnostics": _losses(runs),
        "Throughput and memory": _throughput(runs),
        "Configuration": _configuration(runs),
        "Tuning": _tuning(runs),
        "Environment": _environment(runs),
    }
    title = _joined([run.name for run in runs])
    made = datetime.datetime.now(datetime.timezone.utc)
    folder = resources.files("sid_fast.tools.run_report")
    style, script = (folder.joinpath(f"page.{kind}").read_text("utf-8") for kind in ("css", "js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    links = "".join(f'<a href="#{_anchor(name)}">{name}</a>' for name in sections)
    body = "".join(
        f'<section id="{_anchor(name)}"><h2>{name}</h2>{content}</section>'
        for name, content in sections.items()
    )
    count = "A distillation run" if len(runs) == 1 else f"{len(runs)} runs side by side"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{title} · sid_fast</title>'
        f"<style>{style}</style>"
        "<noscript><style>.player{display:none}.frame.print{display:block}</style></noscript>"
        f"</head><body><header><h1>{title}</h1>"
        f'<p class="soft">{count}, written by sid_fast {text(version)} on '
        f'<time datetime="{made:%Y-%m-%dT%H:%MZ}">{made.day} {made:%B %Y, %H:%M} UTC</time></p>'
        f'</header><nav aria-label="Sections"><div>{links}</div></nav>'
        f"<main>{body}</main><footer>{_sources(runs)}</footer>"
        f"<script>{script}</script></body></html>\n"
    )


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")


def _joined(names: Sequence[str]) -> str:
    shown = [text(name) for name in names]
    return ", ".join(shown[:-1]) + " and " + shown[-1] if len(shown) > 1 else shown[0]


def _sources(runs: Sequence[Run]) -> str:
    return "Made from " + ", ".join(f"<code>{text(run.folder)}</code>" for run in runs) + "."


def _key(style: int) -> str:
    """The line and marker of a run, for a legend."""
    return (
        f'<svg class="key r{style % STYLES}" viewBox="-17 -7 34 14" aria-hidden="true">'
        f'<line x1="-17" x2="17" y1="0" y2="0"/>{marker(style)}</svg>'
    )


def _legend(runs: Sequence[Run], levels: Sequence[Level] = ()) -> str:
    if len(runs) == 1 and not levels:
        return ""
    entries = [f"<li>{_key(i)}{text(run.name)}</li>" for i, run in enumerate(runs)]
    for level in levels:
        style = "all" if level.style is None else f"r{level.style % STYLES}"
        entries.append(
            f'<li><svg class="key level {style}" viewBox="-17 -7 34 14" aria-hidden="true">'
            '<line x1="-17" x2="17" y1="0" y2="0"/></svg>'
            f"{text(level.label)}: {value_text(level.value)}</li>"
        )
    return f'<ul class="legend">{"".join(entries)}</ul>'


def _table(
    head: Sequence[str],
    rows: Iterable[tuple[str, Sequence[str]]],
    label: str,
    numbers: bool = False,
    kind: str = "",
) -> str:
    """A table that scrolls by itself.

    Args:
        head: HTML of the head's cells.
        rows: Class of each row, and HTML of its cells; the first one heads the row.
        label: What the table holds, for screen readers.
        numbers: All cells but the first hold numbers.
        kind: Class of the table.
    """
    aligned = ' class="number"' if numbers else ""
    cells = "".join(
        f'<th scope="col"{aligned if i else ""}>{cell}</th>' for i, cell in enumerate(head)
    )
    body = "".join(
        f'<tr class="{name}"><th scope="row">{first}</th>'
        + "".join(f"<td{aligned}>{cell}</td>" for cell in rest)
        + "</tr>"
        for name, (first, *rest) in rows
    )
    return (
        f'<div class="table {kind}" tabindex="0" role="region" aria-label="{text(label)}"><table>'
        f"<thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _empty(reason: str) -> str:
    return f'<p class="soft">{reason}</p>'


def duration(seconds: float) -> str:
    """Show a duration, such as "2 h 05 min"."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600:,} h {seconds % 3600 // 60:02d} min"


def kimg(images: float) -> str:
    """Show a number of images in thousands."""
    return f"{images / 1000:,.2f}".rstrip("0").rstrip(".")


# Overview


def _overview(runs: Sequence[Run]) -> str:
    cards = "".join(_card(run, i) for i, run in enumerate(runs))
    notes = "".join(
        f"<li>{text(run.name)}: {text(note)}</li>" for run in runs for note in run.notes[:20]
    )
    notes = f'<div class="notes" role="note"><ul>{notes}</ul></div>' if notes else ""
    return f'<div class="cards">{cards}</div>{notes}'


def _card(run: Run, style: int) -> str:
    rows: list[tuple[str, str]] = []
    big, what = NOTHING, "no evaluation"
    names = run.evaluation_metrics()
    curve = run.curve(names[0]) if names else []
    points = [(images, value) for images, value in curve if value is not None]
    if points:
        images, best = min(points, key=lambda point: point[1])
        first = points[0][1]
        big = value_text(best)
        what = f"best {text(names[0])}, at {kimg(images)} kimg"
        rows.append(("first", f"{value_text(first)} at {kimg(points[0][0])} kimg"))
        if (teacher := run.teacher()) is not None:
            rows.append((text(_teacher_label(run)), value_text(teacher)))
    named = [n for n in ("method", "preset", "seed") if run.options.get(n) is not None]
    rows += [(name, _show(run.options[name])) for name in named]
    seconds = run.training_seconds()
    if seconds:
        rows.append(("throughput", f"{value_text(_median_rate(run))} img/s"))
        rows.append(("training time", duration(seconds[-1][0])))
    peak = _peak(run)
    if peak is not None:
        rows.append(("peak memory", _gib(peak)))
    device = run.section("environment").get("device") or _machine(run).get("device")
    if device:
        rows.append(("device", _show(device)))
    items = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in rows)
    return (
        f'<article class="card r{style % STYLES}"><h3>{_key(style)}{text(run.name)}</h3>'
        f'<p class="big">{big}</p><p class="what">{what}</p>{_progress(run)}<dl>{items}</dl>'
        "</article>"
    )


def _progress(run: Run) -> str:
    if not run.total:
        return f'<p class="what">{kimg(run.seen)} kimg</p>'
    fraction = min(run.seen / run.total, 1.0)
    state = "finished" if fraction == 1 else f"{fraction:.0%}, running or stopped"
    label = f"{kimg(run.seen)} of {kimg(run.total)} kimg, {state}"
    return (
        f'<svg class="bar" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect width="{100 * fraction:.1f}" height="8"/></svg><p class="what">{label}</p>'
    )


def _teacher_label(run: Run) -> str:
    steps = run.options.get("teacher_steps")
    return f"teacher, {steps} steps" if type(steps) is int else "teacher"


def _median_rate(run: Run) -> float:
    return statistics.median([rate for _, rate in run.training_seconds()])


def _peak(run: Run) -> float | None:
    return max((v for _, v in run.curve("peak_gib") if v is not None), default=None)


def _machine(run: Run) -> dict[str, Any]:
    machine = run.section("tuning").get("machine")
    return machine if isinstance(machine, dict) else {}


# Distance


def _distances(runs: Sequence[Run]) -> str:
    metrics = dict.fromkeys(name for run in runs for name in run.evaluation_metrics())
    if not metrics:
        return _empty(
            "No evaluation yet. <code>--eval-every</code> makes a run measure its distance from "
            "real images."
        )
    levels = _teacher_levels(runs)
    charts = "".join(
        chart(
            name,
            [
                Line(run.name, i, _in_kimg(run.curve(name)), measured=True)
                for i, run in enumerate(runs)
            ],
            KIMG,
            "of generated images from real ones; lower is better",
            levels if _is_frechet(name) else (),
            log_x=True,
            log_y=True,
        )
        for name in metrics
    )
    tables = "".join(f"<div><h3>{text(name)}</h3>{_values(runs, name)}</div>" for name in metrics)
    return (
        f'{_legend(runs, levels)}<div class="charts large">{charts}</div>'
        f'<details><summary>Values</summary><p class="soft">The best '
        f'value of each run is bold.</p><div class="charts">{tables}</div></details>'
    )


def _is_frechet(metric: str) -> bool:
    """Whether a metric is the one that the teacher is measured by."""
    return metric == "FID" or metric.startswith("Fréchet")


def _teacher_levels(runs: Sequence[Run]) -> list[Level]:
    known = [(i, run, run.teacher()) for i, run in enumerate(runs)]
    values = {(value, _teacher_label(run)) for _, run, value in known if value is not None}
    if len(values) == 1:
        ((value, label),) = values
        return [Level(label, None, value)]
    return [
        Level(f"{_teacher_label(run)}, of {run.name}", i, value)
        for i, run, value in known
        if value is not None
    ]


def _values(runs: Sequence[Run], metric: str) -> str:
    curves = [dict(run.curve(metric)) for run in runs]
    best = [min((v for v in c.values() if v is not None), default=None) for c in curves]
    images = evenly(sorted({i for curve in curves for i in curve}), MAX_ROWS)

    def cell(curve: dict[int, float | None], i: int, best: float | None) -> str:
        value = curve.get(i)
        if value is None:
            return "not finite" if i in curve else ""
        return f"<b>{value_text(value)}</b>" if value == best else value_text(value)

    rows = [
        ("", [kimg(i), *(cell(c, i, b) for c, b in zip(curves, best, strict=True))]) for i in images
    ]
    return _table(["kimg", *(text(run.name) for run in runs)], rows, metric, True)


def _in_kimg(curve: Sequence[tuple[int, float | None]]) -> list[Point]:
    return [(images / 1000, value) for images, value in curve]


# Images


def _images(runs: Sequence[Run], stops: Sequence[int], grids: Sequence[Sequence[Grid]]) -> str:
    if not stops:
        return _empty("There is no sample grid yet.")
    last = len(stops) - 1
    printed = {stops[0], stops[last // 2], stops[last]}
    strips = "".join(
        _strip(run, i, shown, printed)
        for i, (run, shown) in enumerate(zip(runs, grids, strict=True))
    )
    disabled = " disabled" if not last else ""
    return (
        "<p>All grids of a run show the same latents. The slider and the arrow keys move through "
        f"training{', all runs at once' * (len(runs) > 1)}.</p>"
        '<div class="player">'
        f'<button type="button" data-by="-1" aria-label="Earlier grid"{disabled}>‹</button>'
        f'<button type="button" data-play{disabled}>Play</button>'
        f'<button type="button" data-by="1" aria-label="Later grid"{disabled}>›</button>'
        f'<input type="range" min="0" max="{last}" value="{last}" aria-label="Images seen" '
        f'aria-valuetext="{kimg(stops[-1])} kimg" data-stops="{" ".join(map(str, stops))}"'
        f"{disabled}><output>{kimg(stops[-1])} kimg</output></div>"
        f'<div class="grids">{strips}</div>'
    )


def _strip(run: Run, style: int, grids: Sequence[Grid], printed: set[int]) -> str:
    def at(stop: int) -> int:
        return max((g.images for g in grids if g.images <= stop), default=grids[0].images)

    on_paper = {at(stop) for stop in printed} if grids else set()
    frames = []
    for grid in grids:
        classes = "frame" + " on" * (grid is grids[-1]) + " print" * (grid.images in on_paper)
        label = f"{kimg(grid.images)} kimg"
        picture = (
            f'<img src="{grid.url}" width="{grid.width}" height="{grid.height}" decoding="async" '
            f'alt="Sample grid of {text(run.name)} at {label}: images from fixed latents">'
            if grid.url
            else '<div class="missing">This grid cannot be read.</div>'
        )
        frames.append(
            f'<figure class="{classes}" data-images="{grid.images}">{picture}'
            f"<figcaption>{label}</figcaption></figure>"
        )
    content = "".join(frames) or _empty("There is no sample grid yet.")
    return f'<div class="strip"><h3>{_key(style)}{text(run.name)}</h3>{content}</div>'


# Losses and diagnostics


def _losses(runs: Sequence[Run]) -> str:
    evaluation = {name for run in runs for name in run.evaluation_metrics()}
    metrics = dict.fromkeys(name for run in runs for name in run.metrics())
    names = [n for n in metrics if n not in evaluation and n not in _SPEED and not _fault(n)]
    if not names:
        return _empty("No progress was logged yet (<code>--log-every</code>).")
    charts, drawn = [], set[str]()
    for title, note, shown in METRICS:
        charts.append(_metric_chart(runs, title, note, shown))
        drawn |= shown.keys()
    charts += [_metric_chart(runs, name, "", {name: ""}) for name in names if name not in drawn]
    return f'{_legend(runs)}<div class="charts">{"".join(charts)}</div>{_faults(runs)}'


def _metric_chart(runs: Sequence[Run], title: str, note: str, shown: dict[str, str]) -> str:
    lines = [
        Line(f"{run.name} {name}".strip(), i, _in_kimg(run.curve(metric)), dashed=n > 0)
        for i, run in enumerate(runs)
        for n, (metric, name) in enumerate(shown.items())
    ]
    return chart(title, lines, KIMG, note)


def _fault(metric: str) -> str:
    """The ending by which a metric counts faults, or ""."""
    return next((ending for ending in FAULTS if re.fullmatch(rf"(.+/)?{ending}", metric)), "")


def _faults(runs: Sequence[Run]) -> str:
    names = dict.fromkeys(n for run in runs for n in run.metrics() if _fault(n))
    totals = {
        name: [sum(v for _, v in run.curve(name) if v is not None) for run in runs]
        for name in names
    }
    found = {name: sums for name, sums in totals.items() if any(sums)}
    if not names:
        return ""
    if not found:
        return _empty("Nothing was dropped, skipped or not finite in any logged step.")
    rows = []
    for name, sums in found.items():
        phase = name.rpartition("/")[0]
        label = f"{phase}: {FAULTS[_fault(name)]}" if phase else FAULTS[_fault(name)]
        rows.append(("", [text(label), *(f"{value:,.0f}" for value in sums)]))
    return _table(["count", *(text(r.name) for r in runs)], rows, "Faults", True)


# Throughput and memory


def _throughput(runs: Sequence[Run]) -> str:
    seconds = [run.training_seconds() for run in runs]
    longest = max((points[-1][0] for points in seconds if points), default=0.0)
    units = {3 * 3600: ("hours", 3600), 180: ("minutes", 60), 0: ("seconds", 1)}
    unit, divisor = next(unit for least, unit in units.items() if longest >= least)
    rates = [
        Line(run.name, i, [(t / divisor, rate) for t, rate in points])
        for i, (run, points) in enumerate(zip(runs, seconds, strict=True))
    ]
    pauses = "without compilation, snapshots and evaluations"
    charts = chart("Throughput, img/s", rates, f"{unit} of training", pauses, from_zero=True)
    waits = [run.curve("input_waits") for run in runs]
    if any(share for curve in waits for _, share in curve):
        lines = [Line(r.name, i, _percent(waits[i])) for i, r in enumerate(runs)]
        note = "share of the steps that waited for real images"
        charts += chart("Waits for images, %", lines, KIMG, note, from_zero=True)
    charts += chart(
        "Peak memory, GiB",
        [Line(run.name, i, _in_kimg(run.curve("peak_gib"))) for i, run in enumerate(runs)],
        KIMG,
        "so far: reserved by PyTorch on a GPU, or used by the process on a CPU",
        from_zero=True,
    )
    if not charts:
        return _empty("No progress was logged yet (<code>--log-every</code>).")
    rows: list[tuple[str, Callable[[Run], str]]] = [
        ("median throughput, img/s", lambda run: value_text(_median_rate(run))),
        ("training time", lambda run: duration(run.training_seconds()[-1][0])),
        ("time of evaluations", _evaluation_time),
        ("steps that waited for images", _waits),
        ("peak memory", lambda run: _gib(_peak(run))),
    ]
    table = [
        ("", [name, *(cell(run) if run.training_seconds() else NOTHING for run in runs)])
        for name, cell in rows
    ]
    head = ["", *(text(run.name) for run in runs)]
    return f'{_legend(runs)}<div class="charts">{charts}</div>' + _table(
        head, table, "Throughput and memory", True
    )


def _percent(curve: Sequence[tuple[int, float | None]]) -> list[Point]:
    return [(x, None if y is None else 100 * y) for x, y in _in_kimg(curve)]


def _gib(value: float | None) -> str:
    return "not recorded" if value is None else f"{value:,.2f} GiB"


def _evaluation_time(run: Run) -> str:
    spent = [v for _, v in run.curve("evaluation_s") if v is not None]
    return duration(sum(spent)) if spent else NOTHING


def _waits(run: Run) -> str:
    waits = [v for _, v in run.curve("input_waits") if v is not None]
    return f"{statistics.mean(waits):.1%}" if waits else "reads none"


# Configuration


def _show(value: Any) -> str:
    """Show a value of a configuration as escaped HTML."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return text(value) if value else "“”"
    if type(value) is float and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return text(brief(value))


def _plain(value: Any) -> Any:
    """A value that compares as configurations do: 2 equals 2.0."""
    return json.dumps(float(value) if type(value) is int else value, sort_keys=True)


def _configuration(runs: Sequence[Run]) -> str:
    options = [_effective(run) for run in runs]
    mentioned = dict.fromkeys([*_FIRST, *(name for each in options for name in each)])
    names = [n for n in mentioned if any(n in each for each in options)]
    rows: list[tuple[str, list[str]]] = []
    prominent: list[tuple[str, list[str]]] = []
    for name in names:
        values = [each.get(name, _MISSING) for each in options]
        known = [_plain(v) for v in values if v is not _MISSING]
        differs = len(set(known)) > 1 or len(known) < len(runs)
        changed = any(
            name in each and _is_changed(run, name) for run, each in zip(runs, options, strict=True)
        )
        sign = '<span title="differs between the runs" aria-label="differs: ">≠&nbsp;</span>'
        label = text(name).replace("_", "_<wbr>")
        cells = [f"{sign * (differs and len(runs) > 1)}{label}"]
        cells += [
            _option(run, name) if name in each else NOTHING
            for run, each in zip(runs, options, strict=True)
        ]
        row = ("differs" if differs and len(runs) > 1 else "", cells)
        rows.append(row)
        if changed or row[0]:
            prominent.append(row)
    head = ["option", *(text(run.name) for run in runs)]
    everything = _table(head, rows[:MAX_ROWS], "All options", kind="options")
    presets = {_preset(run) for run in runs}
    base = presets.pop() if len(presets) == 1 else "their presets"
    if len(runs) > 1:
        intro = f"Options that differ between the runs (≠, marked) or from {base}."
    else:
        intro = f"Options that differ from {base}."
    if all(run.changed is None for run in runs):
        intro += " What the preset had was not recorded."
    first = (
        _table(head, prominent[:MAX_ROWS], "Options that differ", kind="options")
        if prominent
        else ""
    )
    first = first or _empty("There are none.")
    return (
        f"<p>{intro}</p>{first}<details><summary>All {len(rows)} options</summary>{everything}"
        "</details>"
    )


def _preset(run: Run) -> str:
    preset = run.options.get("preset")
    return f"preset <code>{_show(preset)}</code>" if preset else "the defaults"


def _is_changed(run: Run, name: str) -> bool:
    chosen_by_itself = name == "micro_batch" and run.options.get(name) is None
    return name in (run.changed or {}) and name not in _FOLDERS and not chosen_by_itself


def _effective(run: Run) -> dict[str, Any]:
    """The options of a run without folders and, for SiD, without SiDA's, which have no effect."""
    idle = _SIDA if run.options.get("method") == "sid" else set()
    return {k: v for k, v in run.options.items() if k not in _FOLDERS and k not in idle}


def _option(run: Run, name: str) -> str:
    value = _show(run.options[name])
    if not _is_changed(run, name):
        return value
    origin = "preset" if run.options.get("preset") else "default"
    return f'<b>{value}</b><span class="was">{origin}: {_show((run.changed or {})[name])}</span>'


# Tuning


def _tuning(runs: Sequence[Run]) -> str:
    tuned: dict[str, list[str]] = {}  # the runs of each result
    for i, run in enumerate(runs):
        name = f'<span class="name">{_key(i)} {text(run.name)}</span>'
        tuned.setdefault(_tuned(run), []).append(name)
    if len(runs) == 1:
        return next(iter(tuned))
    return "".join(
        f'<h3 class="names">{" ".join(names)}</h3>{result}' for result, names in tuned.items()
    )


def _tuned(run: Run) -> str:
    tuning = run.section("tuning")
    said = tuning.get("text")
    sentence = (
        f"<p>{text(said[0].upper() + said[1:])}.</p>" if isinstance(said, str) and said else ""
    )
    rows = tuning.get("rows")
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    if not rows:
        sentence = sentence or "<p>Not tuned.</p>"
        return sentence + _empty("The run took the default implementation of each operation.")
    fastest = max((number(row.get("img_s")) or 0.0 for row in rows), default=0.0)
    chosen = tuning.get("candidate")
    body = [_candidate(row, chosen, fastest) for row in rows[:MAX_ROWS]]
    machine = ", ".join(
        f"{text(name)} {_show(_machine(run)[name])}"
        for name in ("device", "capability", "driver", "cores", "threads")
        if _machine(run).get(name) not in (None, "")
    )
    where = f"Each candidate was proven correct, then timed on this machine ({machine})." * bool(
        machine
    )
    head = ["candidate", "verdict", "img/s", "", "ms a step (range)", "GiB"]
    return sentence + _table(head, body, "Candidates of tuning", kind="candidates") + _empty(where)


def _candidate(row: dict[str, Any], chosen: Any, fastest: float) -> tuple[str, list[str]]:
    ms, low, high, rate, gib = (number(row.get(k)) for k in ("ms", "low", "high", "img_s", "gib"))
    wrong = row.get("wrong")
    is_chosen = bool(row.get("won")) and row.get("candidate") == chosen
    verdict = text(wrong) if wrong and isinstance(wrong, str) else "right"
    if is_chosen:
        first = rate is not None and rate >= fastest
        verdict += ", chosen: " + ("fastest" if first else "none is faster beyond the spread")
    elif row.get("won"):
        verdict += ", fastest so far"
    elif ms is not None and not wrong:
        verdict += ", not faster beyond the spread"
    spread = "" if low is None or high is None else f" ({value_text(low)} to {value_text(high)})"
    width = 100 * (rate or 0.0) / fastest if fastest else 0.0
    bar = (
        '<svg class="bar r0" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect width="{width:.1f}" height="8"/></svg>'
    )
    return "won" if is_chosen else "", [
        _show(row.get("name")),
        verdict,
        "" if rate is None else value_text(rate),
        "" if rate is None else bar,
        "" if ms is None else value_text(ms) + spread,
        "" if gib is None else value_text(gib),
    ]


# Environment


def _environment(runs: Sequence[Run]) -> str:
    sections = [run.section("environment") for run in runs]
    names = dict.fromkeys([*_ENVIRONMENT, *(name for each in sections for name in each)])
    rows = []
    for name in list(names)[:MAX_ROWS]:
        values = [each.get(name) for each in sections]
        if all(value is None for value in values):
            continue
        differs = len({_plain(value) for value in values}) > 1
        label = text(_ENVIRONMENT.get(name, name))
        cells = [NOTHING if value is None else _environment_value(value) for value in values]
        rows.append(("differs" if differs else "", [label, *cells]))
    started = [_time(number(run.config.get("started_at"))) for run in runs]
    rows.append(("", ["started", *started]))
    table = _table(["", *(text(run.name) for run in runs)], rows, "Environment", kind="facts")
    headlines = "".join(
        f"<p><b>{text(run.name)}</b><br><code>{_lines(run.config['headline'])}</code></p>"
        for run in runs
        if isinstance(run.config.get("headline"), str)
    )
    return table + headlines


def _environment_value(value: Any) -> str:
    return value_text(value) if type(value) is float and number(value) is not None else _show(value)


def _lines(value: str) -> str:
    return "<br>".join(text(line) for line in value[:10_000].split("\n")[:10])


def _time(seconds: float | None) -> str:
    if seconds is None or not 0 < seconds < 4e9:
        return "not recorded"
    when = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)
    return f"{when.day} {when:%B %Y, %H:%M} UTC"
