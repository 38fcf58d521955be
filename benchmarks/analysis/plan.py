"""Write PLAN.md: plans of every published preset on several machines, made without a GPU.

python -m benchmarks.analysis.plan
"""

from pathlib import Path

import click

from sid_fast import cli
from sid_fast.cli import presets
from sid_fast.config.types import Card, Precision, group_size
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
EDM2_MACHINES = MACHINES[-2:]  # its batch of 2,048 takes weeks on one GPU
PRECISION: Precision = "bf16"
HEAD = f"""# Plans of the published presets

**All figures are estimates; nothing was measured.** `python -m benchmarks.analysis.plan` writes
this page. Each block is the output of
`python -m sid_fast.plan --preset NAME --gpus N --card CARD --kernels triton`,
whose other options change the precision, batch, rates and MFU.

- Memory is counted: a step of the real network runs on fake tensors ({PRECISION}, Triton kernels,
  micro-batches of {" and ".join(map(str, estimator.COUNTED))} images). Its peak is linear in the
  images. An allowance of {estimator.ALLOWANCE // estimator.GIB} GiB is added for the CUDA context,
  cuDNN's workspaces and the allocator's fragmentation.
- FLOP are counted in the same step, 2 per multiply-add.
- Time is FLOP at an **assumed** MFU of {planner.Cluster.mfu:.0%} of the card's matrix rate, plus
  the communication that the last micro-batch's backward does not hide. Communication is estimated
  for DDP at an **assumed** {planner.LINKS["inside a node"]:.0f} GB/s per GPU inside a node of
  {planner.NODE} and {planner.LINKS["between nodes"]:.0f} GB/s between nodes. FSDP also gathers
  weights: it sends an eighth less in 16 bit, a quarter more in float32.
"""
COLUMNS = (
    "preset", "machine", "micro-batch x grad. accum.", "GiB per GPU (ddp / fsdp)", "TFLOP per step",
    "ms per step", "GB sent", "ms not hidden", "images/s", "days",
)  # fmt: skip


@click.command(help=__doc__)
def main() -> None:
    """Run the command."""
    parts, rows = [], []
    for name in (*TEACHERS, *(f"{name}-sida" for name in TEACHERS)):
        config = TrainConfig(**presets("train")[name])
        config.precision = PRECISION
        assert config.teacher
        settings, network = config.settings(), TEACHERS[config.teacher].network
        print(f"counting {name}", flush=True)
        counts = estimator.counts(network, settings)
        parts.append(f"## {name}\n")
        for gpus, card in EDM2_MACHINES if name.startswith("edm2-") else MACHINES:
            if settings.batch_size // gpus % group_size(settings):
                parts.append(f"Not on {gpus} x {card}: the batch has fewer groups of images.\n")
                continue
            options = planner.Cluster(gpus=gpus, card=card)
            shown = planner.text(name, network, counts, settings, config.kimg, options)
            parts.append(f"```\n{shown}\n```\n")
            p = planner.plan(counts, settings, config.kimg, options)
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
    with atomic_path(Path(__file__).parents[1] / "PLAN.md") as temporary:
        temporary.write_text("\n".join([HEAD, *table, "", *parts]), "utf-8")


if __name__ == "__main__":
    cli.main(main, "benchmarks.analysis.plan")
