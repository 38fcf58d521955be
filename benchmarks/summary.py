"""What a folder of results says, on one screen.

python -m benchmarks.summary FOLDER
"""

import sys
from pathlib import Path

from benchmarks import breakdown, evaluation, train
from benchmarks.record import read
from sid_fast.errors import UserError

OURS = ("triton", "cuda")
MOST = 14  # lines of a benchmark


def checks(rows: list[dict]) -> list[str]:
    counts = {s: sum(row["status"] == s for row in rows) for s in ("pass", "fail", "error", "skip")}
    shown = [row for row in rows if row["status"] in ("fail", "error")]
    return [", ".join(f"{n} {status}" for status, n in counts.items())] + [
        f"{row['status']} {row['name']}: {row['found']} of {row['bound']}, {row['note']}"
        for row in shown
    ]


def kernels(rows: list[dict]) -> list[str]:
    """Ours against the best rival, the slowest of ours first."""
    found: dict[tuple, dict[str, float]] = {}
    shares = {}
    for row in rows:
        if row["status"] == "ok":
            key = row["name"], row["shape"], row["dtype"], row["mode"]
            found.setdefault(key, {})[row["provider"]] = row["ms"]["p50"]
            shares[key, row["provider"]] = row["floor_share"]
    lines = []
    for key, times in found.items():
        mine = {p: t for p, t in times.items() if p in OURS}
        theirs = {p: t for p, t in times.items() if p not in OURS}
        if mine and theirs:
            provider, rival = min(mine, key=mine.__getitem__), min(theirs, key=theirs.__getitem__)
            ms = mine[provider]
            text = f"{' '.join(key):64} {ms:8.3f} ms, {shares[key, provider]:4.0%} of the floor; "
            lines.append((ms, text + f"{rival} takes {theirs[rival] / ms:.2f} times as long"))
    return [text for _, text in sorted(lines, reverse=True)]


def training(rows: list[dict]) -> list[str]:
    return [train.HEAD, *map(train.line, rows)]


def evaluated(rows: list[dict]) -> list[str]:
    return [evaluation.HEAD, *map(evaluation.line, rows)]


def broken_down(rows: list[dict]) -> list[str]:
    return [breakdown.HEAD, *map(breakdown.line, rows)]


SECTIONS = {
    "check": checks,
    "kernels": kernels,
    "train": training,
    "breakdown": broken_down,
    "evaluation": evaluated,
}


def main(folder: Path) -> None:
    for path in sorted(folder.glob("*.json")):
        try:
            result = read(path)
        except UserError as error:
            print(f"\n{error}")
            continue
        print(f"\n{path.name}: {result['device']}, {result['date']}, {len(result['rows'])} rows")
        lines = SECTIONS.get(result["benchmark"], lambda rows: [])(result["rows"])
        print("\n".join(lines[:MOST]))
        if len(lines) > MOST:
            print(f"… and {len(lines) - MOST} more")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
