"""Write PLAN.md: what every preset would take of five machines, without a GPU.

python -m benchmarks.plan
"""

from pathlib import Path

import click

from sid_fast import cli
from sid_fast.cli import presets
from sid_fast.config.types import Card, Precision, Settings, part
from sid_fast.io.atomic import atomic_path
from sid_fast.models.teachers import TEACHERS
from sid_fast.tools import estimator, planner
from sid_fast.train import TrainConfig

MACHINES: tuple[tuple[int, Card], ...] = (
    (1, "rtx4090"),
    (1, "h100"),
    (1, "h200"),
    (8, "h100"),
    (64, "h100"),
)
PRECISION: Precision = "bf16"
HEAD = f"""# What a run takes, planned

**Estimates, all of them: nothing here was measured.** Made by `python -m benchmarks.plan`; each
block is what `python -m sid_fast.plan --preset NAME --gpus N --card CARD --kernels triton`
prints, which takes other precisions, sizes, rates and MFU too.

- Memory is counted: a step of the real network runs on tensors without values ({PRECISION}, Triton
  kernels, rounds of 1 and 2 images), and what is alive at its peak is linear in the images. On top
  comes one allowance of {estimator.ALLOWANCE // estimator.GIB} GiB for the CUDA context, cuDNN's
  workspaces and what the allocator cannot use.
- FLOP are counted in the same step, 2 a multiply-add.
- Time is FLOP over an **assumed** MFU of {planner.Cluster.mfu:.0%} of the card's matrix rate, and
  communication that neither network's last backward hides, reckoned for whole networks (in parts,
  weights are gathered too: an eighth less in 16 bit, a quarter more in float32), at an **assumed**
  {planner.LINKS["inside a node"]:.0f} GB/s a GPU inside a node of {planner.NODE},
  {planner.LINKS["between nodes"]:.0f} between nodes.
"""
COLUMNS = (
    "preset", "machine", "micro-batch x grad. accum.", "GiB per GPU (ddp / fsdp)", "TFLOP per step",
    "ms per step", "GB sent", "ms not hidden", "images/s", "days",
)  # fmt: skip


@click.command(help=__doc__)
def main() -> None:
    parts, rows = [], []
    for name in TEACHERS:
        config = TrainConfig(**presets("train")[name])
        config.precision = PRECISION
        settings, network = part(config, Settings), TEACHERS[name].network
        print(f"counting {name}", flush=True)
        found = estimator.counts(network, settings)
        parts.append(f"## {name}\n")
        for gpus, card in MACHINES:
            options = planner.Cluster(gpus=gpus, card=card)
            shown = planner.text(name, network, found, settings, config.kimg, options)
            parts.append(f"```\n{shown}\n```\n")
            p = planner.plan(found, settings, config.kimg, options)
            size = [m.total() / estimator.GIB for m in p.memory.values()]
            rows.append(
                f"| {name} | {gpus} x {card}, {planner.memory_of(options)} GiB "
                f"| {p.micro_batch} x {p.grad_accum_steps} "
                f"| {' / '.join(f'{s:.1f}' for s in size)} "
                f"| {p.flop / 1e12:,.0f} | {(p.compute + p.exposed) * 1e3:,.0f} "
                f"| {p.traffic / 1e9:.2f} | {p.exposed * 1e3:.0f} | {p.images_per_second:,.0f} "
                f"| {p.days:.1f} |"
            )
    table = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|", *rows]
    with atomic_path(Path(__file__).with_name("PLAN.md")) as temporary:
        temporary.write_text("\n".join([HEAD, *table, "", *parts]), "utf-8")


if __name__ == "__main__":
    cli.main(main, "benchmarks.plan")
