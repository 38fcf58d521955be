"""Time the stages of an evaluation, and the readers of real images.

    python -m benchmarks.evaluation --detector inception --images 50000

Stages: read all images with the fastest reader and with `plain`, interleaved; compute the reference
statistics; generate --images images and compute theirs; compare the two. Networks have random
weights, which do not affect the time. By default a GPU evaluates FID of 50,000 images of the
CIFAR-10 network, a CPU 1,000 images of a small one. `speedup` is the throughput of a reader over
that of `plain`, interleaved.
"""

import dataclasses
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks import timing
from benchmarks.results import RESULTS, Results, times
from benchmarks.train import network
from sid_fast import cli
from sid_fast.config.types import check, option
from sid_fast.data.datasets import ImageDataset, write_dataset
from sid_fast.data.readers import choose, read
from sid_fast.evaluation import references
from sid_fast.evaluation.features import load_detector
from sid_fast.evaluation.sample import FeatureStats, StageTimer, compare, generated, look
from sid_fast.models import NetworkConfig
from sid_fast.models.teachers import TEACHERS
from sid_fast.performance import process_group

SMALL = NetworkConfig(
    "ddpmpp", resolution=16, label_dim=10, model_channels=32, channel_mult=(1, 1), num_blocks=1,
    attention_resolutions=(),
)  # fmt: skip
INIT_SIGMA = 2.5
WARM_UP = 512  # images


@dataclasses.dataclass
class Options:
    """Options of the command."""

    detector: str = option("", "pixels, inception or a TorchScript file; default: pixels on a CPU")
    trust: bool = option(False, "run a TorchScript file that is not known here")
    images: int = option(0, "images to generate; default: 50,000, on a CPU 1,000", 0)
    data: str = option("", "zip of real images; default: --images synthetic ones")
    rounds: int = option(3, "repetitions of every stage", 1)
    device: str = option("auto", "auto, cpu or cuda")
    out: str | None = option(
        None, "result file to append to; default: benchmarks/results/evaluation.jsonl"
    )


def synthetic_images(path: Path, n: int, resolution: int) -> ImageDataset:
    """Write n smooth, slightly noisy images, which compress about as well as photographs."""
    rng = np.random.default_rng(0)
    size = (n, 3, resolution, resolution)
    coarse = rng.normal(128, 60, (n, 3, resolution // 8, resolution // 8))
    smooth = coarse.repeat(8, axis=2).repeat(8, axis=3)
    write_dataset(path, (smooth + rng.normal(0, 8, size)).clip(0, 255).astype(np.uint8))
    return ImageDataset(path)


class Bench:
    """Times the stages and writes a row after each."""

    def __init__(self, results: Results, device: torch.device, rounds: int):
        self.results, self.device, self.rounds = results, device, rounds

    def readers(self, data: ImageDataset, best: str) -> None:
        """Time `best` and the plain reader, interleaved, on all images of a data set."""
        kinds = dict.fromkeys((best, "plain"))

        def read_all(kind: str) -> None:
            assert sum(map(len, read(data, range(len(data)), self.device, kind))) == len(data)

        calls = {kind: partial(read_all, kind) for kind in kinds}
        timed = timing.interleaved(calls, self.device, 0, self.rounds, self.rounds)
        plain = [ms for ms, _ in timed["plain"]]
        for kind in kinds:
            ms = [ms for ms, _ in timed[kind]]
            ratios = [a / b for a, b in zip(plain, ms, strict=True)]
            self.add("reading", kind, ms, len(data), speedup=timing.median(ratios))

    def stages(
        self, variant: str, images: int | None, work: Callable[[StageTimer], FeatureStats | dict]
    ):
        """Write a row for every stage that `work` times; returns the result of `work`."""
        ms: dict[str, list[float]] = {}
        for _ in range(self.rounds):
            timer = StageTimer(self.device)
            result = work(timer)
            for stage, seconds in timer.seconds.items():
                ms.setdefault(stage, []).append(seconds * 1e3)
        for stage, values in ms.items():
            self.add(stage, variant, values, images)
        return result

    def add(self, stage: str, variant: str, ms: list[float], images: int | None, **columns) -> None:
        """Append a row to the results and print it."""
        row = {"stage": stage, "variant": variant, **times(ms), **columns}
        if images is not None:
            row |= {"images": images, "img_s": images / row["ms_p50"] * 1e3}
        self.results.add(row)
        print(line(row), flush=True)


HEAD = f"{'stage':22} {'variant':12} {'images':>7} {'seconds':>9} {'img/s':>9} {'speedup':>10}"


def line(row: dict) -> str:
    """Format a row for the terminal, below HEAD."""
    images, rate, speedup = (
        format(row[name], spec) if name in row else ""
        for name, spec in (("images", ""), ("img_s", ".0f"), ("speedup", ".2f"))
    )
    seconds = row["ms_p50"] / 1e3
    head = f"{row['stage']:22} {row['variant']:12} {images:>7}"
    return f"{head} {seconds:9.3f} {rate:>9} {speedup:>10}"


def run(options: Options, given: set[str]) -> None:
    """Run the command."""
    check(options)
    device = process_group.pick_device(options.device)
    cuda = device.type == "cuda"
    count = options.images or (50_000 if cuda else 1000)
    config = TEACHERS["cifar10-cond"].network if cuda else SMALL
    name = options.detector or ("inception" if cuda else "pixels")
    detector = load_detector(name, device, options.trust)
    with tempfile.TemporaryDirectory() as folder:
        if options.data:
            data = ImageDataset(options.data)
        else:
            data = synthetic_images(Path(folder) / "synthetic.zip", count, config.resolution)
        config = dataclasses.replace(config, resolution=data.resolution, channels=data.channels)
        net = network(config, device).requires_grad_(False).eval()
        results = Results(
            options.out or RESULTS / "evaluation.jsonl",
            "evaluation",
            detector=detector.name,
            network=str(net.config),
            data=data.path.name,
        )
        print(f"{results.columns['device']}, {detector.name}, {len(data)} real images\n{HEAD}")
        bench = Bench(results, device, options.rounds)
        best = choose()
        bench.readers(data, best)

        def generate(n: int, timer: StageTimer) -> FeatureStats:
            return look(generated(net, range(n), INIT_SIGMA), n, detector, timer, "generated")

        generate(min(count, WARM_UP), StageTimer(device))
        reference = partial(references.measure, data, detector, reader=best)
        real = bench.stages("reference", len(data), lambda timer: reference(clock=timer))
        sample = bench.stages("generated", count, partial(generate, count))
        bench.stages("comparison", None, partial(compare, real, sample, detector))
    print(f"results: {results.path}")


main = cli.command(Options, run, None, __doc__)

if __name__ == "__main__":
    cli.main(main, "benchmarks.evaluation")
