"""Estimate the roofline of every layer and of the whole step, without a GPU.

    python -m benchmarks.analysis.roofline --preset cifar10-uncond --card h200

The floor of an operation is the larger of FLOP over the GPU's matrix rate and bytes over its memory
bandwidth, if it reads its inputs and writes its outputs once. FLOP and bytes are counted; nothing
is measured.
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import cast

import matplotlib
from matplotlib.figure import Figure

from benchmarks.results import RESULTS, Results
from sid_fast import cli
from sid_fast.cli import presets
from sid_fast.config.types import Card, Precision, check, option
from sid_fast.errors import UserError
from sid_fast.io.atomic import atomic_path
from sid_fast.models.registry import network_config
from sid_fast.performance.mixed_precision import TYPES
from sid_fast.tools import estimator, op_counter
from sid_fast.tools.gpu_specs import Specs, card
from sid_fast.train import TrainConfig

COLOURS = {
    kind: matplotlib.colormaps["tab10"](i)
    for i, kind in enumerate(
        ("convolution", "attention", "linear", "group norm", "pointwise", "resampling", "update")
    )
}


@dataclasses.dataclass
class Options:
    """Options of the command."""

    preset: str | None = None
    card: Card = option("h200", "the GPU to estimate for")
    precision: str = option("bf16", "fp32, tf32, bf16 or fp16")
    images: int = option(64, "images per micro-batch", 1, 2**16)
    kernels: str = option("triton", "backend of the kernels: triton or eager")
    out: str | None = option(None, "folder of the results; default: benchmarks/results/roofline")


def floor(op: op_counter.Op, card: Specs, precision: str) -> tuple[float, str]:
    """Return the minimum seconds of an operation and its bound: compute or memory."""
    compute = op.flops / (card.tflops[precision] * 1e12)
    memory = op.nbytes / (card.bandwidth * 1e12)
    return max(compute, memory), "compute" if compute > memory else "memory"


def rows(scope: str, ops: Iterable[op_counter.Op], card: Specs, precision: str) -> list[dict]:
    """Make a row for every layer and kind of operation, in order of first execution."""
    groups: dict[tuple[str, str], list[op_counter.Op]] = {}
    for op in ops:
        groups.setdefault((op.layer.removeprefix("EDMNetwork."), op.kind), []).append(op)
    table = []
    for (layer, kind), members in groups.items():
        floors = [floor(op, card, precision) for op in members]
        longest = max(floors)
        table.append(
            {
                "scope": scope,
                "layer": layer,
                "kind": kind,
                "calls": len(members),
                "gflop": sum(op.flops for op in members) / 1e9,
                "mb": sum(op.nbytes for op in members) / 1e6,
                "floor_us": sum(seconds for seconds, _ in floors) * 1e6,
                "bound": longest[1],
            }
        )
    return table


def norms(ops: Iterable[op_counter.Op]) -> tuple[int, float]:
    """Count operations and bytes of the group norms, including the operations fused into them."""
    within = [op for op in ops if "norm" in op.layer.rpartition(".")[2]]
    return len(within), sum(op.nbytes for op in within)


def show(title: str, table: list[dict]) -> None:
    """Print a table of rows and their sum."""
    total = sum(row["floor_us"] for row in table)
    print(
        f"\n{title}\n{'layer':34} {'kind':12} calls      GFLOP        MB  FLOP/B  floor us      %"
    )
    for row in [*table, {"layer": "sum", "kind": "", "bound": "", **_sum(table)}]:
        intensity = row["gflop"] * 1e3 / row["mb"] if row["mb"] else 0
        print(
            f"{row['layer'].removeprefix('model.'):34} {row['kind']:12} {row['calls']:5} "
            f"{row['gflop']:10.2f} {row['mb']:9.1f} {intensity:7.1f} {row['floor_us']:9.1f} "
            f"{100 * row['floor_us'] / total:6.1f} {row['bound']}"
        )


def _sum(table: list[dict]) -> dict:
    return {k: sum(row[k] for row in table) for k in ("calls", "gflop", "mb", "floor_us")}


def draw(path: Path, title: str, layers: list[dict], step: list[dict], card: Specs, rate: float):
    """Draw the layers of a forward pass under the roofline, and the step's floor by kind."""
    figure = Figure(figsize=(13, 5), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.4, 1))
    figure.suptitle(title)
    points = [row for row in layers if row["gflop"] > 1e-3]
    total = sum(row["floor_us"] for row in layers)
    for kind in dict.fromkeys(row["kind"] for row in points):
        chosen = [row for row in points if row["kind"] == kind]
        left.scatter(
            [row["gflop"] * 1e3 / row["mb"] for row in chosen],
            [row["gflop"] * 1e3 / row["floor_us"] for row in chosen],
            [12 + 4000 * row["floor_us"] / total for row in chosen],
            color=COLOURS[kind],
            alpha=0.5,
            label=kind,
        )
    ridge = rate / card.bandwidth
    left.plot([0.5, ridge, 1e4], [card.bandwidth / 2, rate, rate], color="black", linewidth=1)
    left.annotate(
        f"{card.bandwidth:g} TB/s", (ridge / 12, rate / 12), xytext=(-62, 2),
        textcoords="offset points",
    )  # fmt: skip
    left.annotate(f"{rate:g} TFLOP/s", (ridge, rate), xytext=(6, 6), textcoords="offset points")
    left.set(
        xscale="log", yscale="log", xlim=(0.5, 1e4), ylim=(card.bandwidth / 3, rate * 2),
        xlabel="FLOP per byte", ylabel="TFLOP/s at the floor",
        title="layers of a forward pass; area: share of its floor",
    )  # fmt: skip
    left.grid(alpha=0.3)
    left.legend(loc="lower right", markerscale=0.6)
    ordered = sorted(step, key=lambda row: row["floor_us"])
    values = [row["floor_us"] / 1e3 for row in ordered]
    bars = right.barh(
        [row["kind"] for row in ordered], values, color=[COLOURS[row["kind"]] for row in ordered]
    )
    labels = [f" {v:.3g} ms, {v / sum(values):.0%}" for v in values]
    right.bar_label(bars, labels)
    right.set(xlabel="ms", title="floor of the whole step, by kind", xlim=(0, 1.35 * max(values)))
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def run(options: Options, given: set[str]) -> None:
    """Run the command."""
    check(options)
    known = presets("train")
    if not options.preset:
        raise UserError(f"preset is missing: --preset with one of {', '.join(known)}")
    for name, choices in (("precision", TYPES), ("kernels", ("triton", "eager"))):
        if (value := getattr(options, name)) not in choices:
            raise UserError(f"{name}={value!r} is unknown: choose from {', '.join(choices)}")
    chosen, precision, images = card(options.card), options.precision, options.images
    config = TrainConfig(**known[options.preset])
    assert config.teacher
    network, settings = network_config(config.teacher), config.settings()
    print(
        f"{options.preset}: {network}; {precision}, micro-batch {images}, {options.kernels} kernels"
    )
    print(f"ESTIMATE for {options.card}: {chosen.tflops[precision]:g} TFLOP/s, ", end="")
    print(f"{chosen.bandwidth:g} TB/s ({chosen.source})")

    forward = op_counter.forward(network, precision, options.kernels, images)
    layers = rows("forward", forward, chosen, precision)
    show("forward pass by layer", layers)
    eager = op_counter.forward(network, precision, "eager", images)
    for backend, ops in ((options.kernels, forward), ("eager", eager)):
        calls, nbytes = norms(ops)
        print(f"group norms, forward, {backend}: {calls} operations, {nbytes / 1e6:,.0f} MB")
    settings = dataclasses.replace(settings, precision=cast(Precision, precision))
    (step,) = estimator.steps(network, settings, [images], options.kernels)
    kinds = rows("step", step.ops, chosen, precision)
    show("the whole step", kinds)
    floor_s = sum(row["floor_us"] for row in kinds) / 1e6
    flop = sum(op.flops for op in step.ops)
    mfu = flop / floor_s / (chosen.tflops[precision] * 1e12)
    print(
        f"\nestimate: a micro-batch of {images} takes at least {floor_s * 1e3:.2f} ms "
        f"({images / floor_s:,.0f} img/s, MFU {mfu:.0%}); compute alone "
        f"{flop / chosen.tflops[precision] / 1e9:.2f} ms"
    )

    folder = Path(options.out) if options.out else RESULTS / "roofline"
    name = f"{options.preset}-{options.card}-{precision}"
    path = folder / f"{name}.jsonl"
    path.unlink(missing_ok=True)  # counted anew, not measured once more
    results = Results(
        path,
        "roofline",
        device=f"estimate for {options.card}",
        load=None,
        preset=options.preset,
        precision=precision,
        images=images,
        kernels=options.kernels,
    )
    for row in layers + kinds:
        results.add(row)
    title = f"{options.preset}, {precision}, {images} images: estimate for {options.card}, counted"
    draw(folder / f"{name}.png", title, layers, kinds, chosen, chosen.tflops[precision])
    print(f"results: {path}, and .png")


main = cli.command(Options, run, "train", __doc__)

if __name__ == "__main__":
    cli.main(main, "benchmarks.analysis.roofline")
