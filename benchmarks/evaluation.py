"""Time the stages of an evaluation, and how images reach evaluation and training.

    python -m benchmarks.evaluation --detector inception --images 50000

Stages, in this order:

- `reading`: all images, with the fastest reader and with `plain`, interleaved.
- `feed`: batches for training steps, without steps: kept on the device, or read; interleaved.
- `fed step`: steps of a teacher's training on these batches.
- the statistics of the real images; generating --images images and their statistics; comparing.

Networks have random weights, which do not affect the time. By default a GPU evaluates FID of 50,000
images of the CIFAR-10 network, a CPU 1,000 images of a small one. `speedup` is the throughput over
that of `plain`, `wait_share` the share of steps that waited for images.
"""

import contextlib
import copy
import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks import timing
from benchmarks.results import RESULTS, Results, times
from benchmarks.train import network
from sid_fast import cli
from sid_fast.config.types import PretrainSettings, check, option
from sid_fast.data.datasets import ImageDataset, write_dataset
from sid_fast.data.feed import ImageFeed
from sid_fast.data.readers import choose, read
from sid_fast.evaluation import references
from sid_fast.evaluation.features import load_detector
from sid_fast.evaluation.sample import (
    FeatureStats,
    StageTimer,
    compare,
    compute_stats,
    generate_batches,
)
from sid_fast.methods.edm import EDM
from sid_fast.models import Network, NetworkConfig
from sid_fast.models.teachers import TEACHERS
from sid_fast.performance import process_group
from sid_fast.training.step import Trainer

SMALL = NetworkConfig(
    "ddpmpp", resolution=16, label_dim=10, model_channels=32, channel_mult=(1, 1), num_blocks=1,
    attention_resolutions=(),
)  # fmt: skip
INIT_SIGMA = 2.5
WARM_UP = 512  # images
BATCH = 512  # images per training step; on a CPU one micro-batch
MICRO_BATCH = 32
STEPS = 10  # timed, after one that compiles


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
        self.compare("reading", calls, len(data))

    def compare(self, stage: str, calls: Mapping[str, Callable[[], object]], images: int) -> None:
        """Time calls interleaved; `speedup` is relative to "plain" in the same round."""
        timed = timing.interleaved(calls, self.device, 0, self.rounds, self.rounds)
        plain = [ms for ms, _ in timed["plain"]]
        for variant in calls:
            ms = [ms for ms, _ in timed[variant]]
            ratios = [a / b for a, b in zip(plain, ms, strict=True)]
            self.add(stage, variant, ms, images, speedup=timing.median(ratios))

    def feeds(self, data: ImageDataset, best: str, net: Network) -> None:
        """Time the sources of training batches, alone and with steps of a network."""
        batch = min(BATCH, len(data))
        count = len(data) // batch
        counter = torch.zeros(3, dtype=torch.int64, device=self.device)
        sources = {"resident": (True, "plain"), best: (False, best), "plain": (False, "plain")}

        def make(source: str, batch: int) -> ImageFeed:
            resident, reader = sources[source]
            return ImageFeed(data, batch, 0, self.device, resident=resident, reader=reader)

        feeds = {source: make(source, batch) for source in sources}
        begun = dict.fromkeys(feeds, 0)

        def take_epoch(source: str) -> None:
            for step in range(begun[source], begun[source] + count):
                feeds[source].load(step)
                feeds[source].take(counter, batch)
            begun[source] += count

        for source in feeds:
            take_epoch(source)
        calls = {source: partial(take_epoch, source) for source in feeds}
        self.compare("feed", calls, count * batch)
        for feed in feeds.values():
            feed.close()

        micro_batch = min(MICRO_BATCH, len(data))
        if self.device.type != "cuda":
            batch = micro_batch
        elif batch % micro_batch:
            micro_batch = batch
        settings = PretrainSettings(batch_size=batch, micro_batch=micro_batch, augment_p=0.0)
        for source in sources:
            with contextlib.closing(make(source, batch)) as feed:
                trainer = Trainer(EDM(copy.deepcopy(net), settings, feed), settings)
                trainer.step()
                before = feed.waits
                ms = [timing.time_call(trainer.step, self.device)[0] for _ in range(STEPS)]
                waits = (feed.waits - before) / STEPS
                self.add("fed step", source, ms, batch, wait_share=waits)

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


HEAD = (
    f"{'stage':22} {'variant':12} {'images':>7} {'seconds':>9} {'img/s':>9} {'speedup':>7} "
    f"{'waits':>5}"
)


def line(row: dict) -> str:
    """Format a row for the terminal, below HEAD."""
    formats = {"images": "", "img_s": ".0f", "speedup": ".2f", "wait_share": ".0%"}
    images, rate, speedup, waits = (
        format(row[name], spec) if name in row else "" for name, spec in formats.items()
    )
    head = f"{row['stage']:22} {row['variant']:12} {images:>7} {row['ms_p50'] / 1e3:9.3f}"
    return f"{head} {rate:>9} {speedup:>7} {waits:>5}".rstrip()


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
        config = dataclasses.replace(
            config, resolution=data.resolution, channels=data.channels, label_dim=data.label_dim
        )
        net = network(config, device)
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
        bench.feeds(data, best, net)
        net.requires_grad_(False).eval()

        def generate(n: int, timer: StageTimer) -> FeatureStats:
            batches = generate_batches(net, range(n), INIT_SIGMA)
            return compute_stats(batches, n, detector, timer, "generated")

        generate(min(count, WARM_UP), StageTimer(device))
        reference = partial(references.measure, data, detector, reader=best)
        real = bench.stages("reference", len(data), lambda timer: reference(timer=timer))
        sample = bench.stages("generated", count, partial(generate, count))
        bench.stages("comparison", None, partial(compare, real, sample, detector))
    print(f"results: {results.path}")


main = cli.command(Options, run, None, __doc__)

if __name__ == "__main__":
    cli.main(main, "benchmarks.evaluation")
