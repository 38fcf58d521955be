"""Run tune's proofs on all Triton operations, in Triton's interpreter on a CPU.

python -m benchmarks.analysis.proofs --method sid --method sida --method edm

A tiny network (4x4 pixels, 16 and 32 channels, attention, dropout, augmentation) takes SiD's,
SiDA's and a teacher's steps. Each operation is proven alone in float32, then all of them together
in float32 and bfloat16: losses, gradients, optimizer update and dropout; see tools/proof.py. Takes
minutes per method. CUDA graphs need a GPU. Exits with status 1 if a proof fails.
"""

import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence

os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported

import click
import numpy as np
from triton.runtime import interpreter

from sid_fast import Settings, SiDASettings, cli
from sid_fast.config.types import PretrainSettings
from sid_fast.kernels import dispatch
from sid_fast.models import NetworkConfig
from sid_fast.tools import proof
from sid_fast.tools.candidates import FUSED, Candidate
from sid_fast.tools.proof import Job

NETWORK = NetworkConfig(
    "ddpmpp", resolution=4, channels=1, model_channels=16, channel_mult=(1, 2), num_blocks=1,
    attention_resolutions=(2,), label_dim=10, augment_dim=9,
)  # fmt: skip
SETTINGS = {
    "sid": Settings(batch_size=4, dropout=0.2, augment_p=0.3),
    "sida": SiDASettings(batch_size=4, dropout=0.2, augment_p=0.3, adversarial_group=2),
    "edm": PretrainSettings(batch_size=4, dropout=0.2, augment_p=0.3),
}
OPERATIONS = tuple(op for op in dispatch.OPERATIONS if op not in ("random", "mp"))


def round_to_nearest_even() -> None:
    """Round to bfloat16 as GPUs do; the interpreter truncates, which shrinks every value."""
    convert = interpreter._convert_float

    def rounded(values, source, target, mode):
        if (source.name, target.name) == ("fp32", "bf16"):
            bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
            nearest = bits + np.uint32(0x7FFF) + (bits >> 16 & 1)
            values = np.where(np.isfinite(values), nearest, bits).astype(np.uint32)
            values = values.view(np.float32)
        return convert(values, source, target, mode)

    interpreter._convert_float = rounded


def prove(method: str, operations: Sequence[str], only: str | None) -> Iterator[tuple[str, ...]]:
    """Yield (method, precision, operations, "right" or what is wrong, seconds) of each proof.

    only: "alone" or "together"; None: both.
    """
    job = Job(NETWORK, SETTINGS[method], "cpu")
    eager = Candidate(dict.fromkeys(OPERATIONS, "eager"))
    used = [op for op in operations if op != "sida_loss" or method == "sida"]
    trials: list[tuple[str, str, Sequence[str], Callable[[Job, Candidate], str]]] = []
    if only != "together":
        alone = {op: FUSED if op == "block" else (op,) for op in used}
        trials += [("fp32", op, some, proof.wrong_alone) for op, some in alone.items()]
    if only != "alone":
        trials += [(precision, "all", used, proof.wrong) for precision in ("bf16", "fp32")]
    for precision, name, some, wrong in trials:
        settings = dataclasses.replace(job.settings, precision=precision)
        candidate = eager.changed(kernels=dict.fromkeys(some, "triton"))
        began = time.perf_counter()
        reason = wrong(dataclasses.replace(job, settings=settings), candidate)
        seconds = f"{time.perf_counter() - began:.1f}"
        yield method, precision, name, reason or "right", seconds


@click.command(help=__doc__)
@click.option("--method", "methods", multiple=True, type=click.Choice(list(SETTINGS)))
@click.option("--operation", "operations", multiple=True, type=click.Choice(OPERATIONS))
@click.option("--alone", "trials", flag_value="alone", help="Only each operation alone.")
@click.option("--together", "trials", flag_value="together", help="Only all of them together.")
def main(methods: Sequence[str], operations: Sequence[str], trials: str | None) -> None:
    """Run the command."""
    round_to_nearest_even()
    proof.MAX_IMAGES = 16  # of 16-bit gradients; 64 take an hour
    print("| method | precision | operations | result | s |", flush=True)
    print("|---|---|---|---|---|", flush=True)
    failed = False
    for method in methods or SETTINGS:
        for row in prove(method, operations or OPERATIONS, trials):
            print(f"| {' | '.join(row)} |", flush=True)
            failed |= row[3] != "right"
    sys.exit(int(failed))


if __name__ == "__main__":
    cli.main(main, "benchmarks.analysis.proofs")
