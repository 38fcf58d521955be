"""Seconds of an evaluation by stage, and images a second of the readers and of training's feed.

    python -m benchmarks.evaluation --detector inception --images 50000

The readers of PNGs take turns over the whole data set, and so do the ways to feed it to training
steps ("feed": nothing happens between the batches). Steps of a teacher's training ("fed step") then
show what share of them waits for images. Last come the pass over the real images, the pass that
generates and looks at as many as --images says, and the comparison of the two. On a GPU this is
FID over 50,000 images of the CIFAR-10 network; on a CPU the same at a reduced size, as a check of
itself and for the ratio of the readers. Networks have random weights: the time does not depend on
them.
"""

import contextlib
import copy
import dataclasses
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks import measure
from benchmarks.record import RESULTS, Record, percentiles
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
from sid_fast.models import EDMNetwork, NetworkConfig
from sid_fast.models.teachers import TEACHERS
from sid_fast.performance import process_group
from sid_fast.training.step import Trainer

SMALL = NetworkConfig(
    "ddpmpp", resolution=16, label_dim=10, model_channels=32, channel_mult=(1, 1), num_blocks=1,
    attention_resolutions=(),
)  # fmt: skip
INIT_SIGMA = 2.5
WARM_UP = 512  # images
BATCH = 512  # images a training step; a step of a network on a CPU takes a micro-batch
MICRO_BATCH = 32
STEPS = 10  # with a network, after one that compiles


@dataclasses.dataclass
class Options:
    detector: str = option("", "pixels, inception or a TorchScript file; default: pixels on a CPU")
    trust: bool = option(False, "run a TorchScript file that is not known here")
    images: int = option(0, "images to generate; default: 50,000, on a CPU 1,000", 0)
    data: str = option("", "zip of real images; default: as many made up as are generated")
    rounds: int = option(3, "turns of the readers, and passes", 1)
    device: str = option("auto", "auto, cpu or cuda")
    out: str | None = option(None, "the result file; default: benchmarks/results/evaluation.json")


def pictures(path: Path, n: int, resolution: int) -> ImageDataset:
    """n images that compress about as photographs do: smooth, with a little noise."""
    rng = np.random.default_rng(0)
    size = (n, 3, resolution, resolution)
    coarse = rng.normal(128, 60, (n, 3, resolution // 8, resolution // 8))
    smooth = coarse.repeat(8, axis=2).repeat(8, axis=3)
    write_dataset(path, (smooth + rng.normal(0, 8, size)).clip(0, 255).astype(np.uint8))
    return ImageDataset(path)


class Bench:
    """Measures and writes rows, what is done first."""

    def __init__(self, record: Record, device: torch.device, rounds: int):
        self.record, self.device, self.rounds = record, device, rounds

    def readers(self, data: ImageDataset, best: str) -> None:
        """The best reader and the plain one in turns, over all images of a data set."""
        kinds = dict.fromkeys((best, "plain"))

        def whole(kind: str) -> None:
            assert sum(map(len, read(data, range(len(data)), self.device, kind))) == len(data)

        calls = {kind: partial(whole, kind) for kind in kinds}
        found = measure.in_turns(calls, self.device, 0, self.rounds, self.rounds)
        times = {kind: [ms for ms, _ in found[kind]] for kind in kinds}
        for kind in kinds:
            pairs = zip(times["plain"], times[kind], strict=True)
            ratio = measure.median([plain / ms for plain, ms in pairs])
            self.add("reading", kind, times[kind], len(data), ratio)

    def feeds(self, data: ImageDataset, best: str, net: EDMNetwork) -> None:
        """The ways to feed training steps, in turns; with steps of the network, one by one."""
        batch = min(BATCH, len(data))
        count = len(data) // batch
        counter = torch.zeros(3, dtype=torch.int64, device=self.device)
        ways = {"resident": (True, "plain"), best: (False, best), "plain": (False, "plain")}
        feeds = {way: self.feed(data, batch, *how) for way, how in ways.items()}
        begun = dict.fromkeys(feeds, 0)

        def alone(way: str) -> None:
            for step in range(begun[way], begun[way] + count):
                feeds[way].load(step)
                feeds[way].take(counter, batch)
            begun[way] += count

        for way in feeds:
            alone(way)
        calls = {way: partial(alone, way) for way in feeds}
        found = measure.in_turns(calls, self.device, 0, self.rounds, self.rounds)
        times = {way: [ms for ms, _ in turns] for way, turns in found.items()}
        for way, feed in feeds.items():
            pairs = zip(times["plain"], times[way], strict=True)
            ratio = measure.median([plain / ms for plain, ms in pairs])
            self.add("feed", way, times[way], count * batch, ratio)
            feed.close()

        micro_batch = min(MICRO_BATCH, len(data))
        if self.device.type != "cuda":
            batch = micro_batch
        elif batch % micro_batch:
            micro_batch = batch
        settings = PretrainSettings(batch_size=batch, micro_batch=micro_batch, augment_p=0.0)
        for way, how in ways.items():
            with contextlib.closing(self.feed(data, batch, *how)) as feed:
                trainer = Trainer(EDM(copy.deepcopy(net), settings, feed), settings)
                trainer.step()
                before = feed.waits
                steps = [measure.once(trainer.step, self.device)[0] for _ in range(STEPS)]
                self.add("fed step", way, steps, batch, waits=(feed.waits - before) / STEPS)

    def feed(self, data: ImageDataset, batch: int, resident: bool, reader: str) -> ImageFeed:
        return ImageFeed(data, batch, 0, self.device, resident=resident, reader=reader)

    def passes(
        self, variant: str, images: int | None, work: Callable[[StageTimer], FeatureStats | dict]
    ):
        """A row for every stage of some work, on so many images; returns what the work does."""
        times: dict[str, list[float]] = {}
        for _ in range(self.rounds):
            clock = StageTimer(self.device)
            found = work(clock)
            for stage, seconds in clock.seconds.items():
                times.setdefault(stage, []).append(seconds * 1e3)
        for stage, ms in times.items():
            self.add(stage, variant, ms, images)
        return found

    def add(
        self, stage: str, variant: str, times: list[float], images, ratio=None, waits=None
    ) -> None:
        ms = percentiles(times)
        row = {"stage": stage, "variant": variant, "ms": ms, "images": images}
        row |= {"img_s": images and images / ms["p50"] * 1e3, "over_plain": ratio}
        row["wait_share"] = waits
        self.record.add(**row)
        print(line(row), flush=True)


HEAD = (
    f"{'stage':22} {'of':12} {'images':>7} {'seconds':>9} {'img/s':>9} {'over plain':>10} "
    f"{'waits':>6}"
)


def line(row: dict) -> str:
    formats = {"images": "", "img_s": ".0f", "over_plain": ".2f", "wait_share": ".0%"}
    images, rate, ratio, waits = (
        "" if row.get(name) is None else format(row[name], spec) for name, spec in formats.items()
    )
    text = f"{row['stage']:22} {row['variant']:12} {images:>7} {row['ms']['p50'] / 1e3:9.3f}"
    return f"{text} {rate:>9} {ratio:>10} {waits:>6}".rstrip()


def run(options: Options, given: set[str]) -> None:
    check(options)
    device = process_group.pick_device(options.device)
    cuda = device.type == "cuda"
    count = options.images or (50_000 if cuda else 1000)
    config = TEACHERS["cifar10-cond"].network if cuda else SMALL
    name = options.detector or ("inception" if cuda else "pixels")
    detector = load_detector(name, device, options.trust)
    with tempfile.TemporaryDirectory() as folder:
        made_up = Path(folder) / "made-up.zip"
        data = (
            ImageDataset(options.data)
            if options.data
            else pictures(made_up, count, config.resolution)
        )
        config = dataclasses.replace(
            config, resolution=data.resolution, channels=data.channels, label_dim=data.label_dim
        )
        net = network(config, device)
        path = Path(options.out or RESULTS / "evaluation.json")
        record = Record(
            path, "evaluation", detector=detector.name, network=str(net.config),
            data=data.path.name,
        )  # fmt: skip
        print(f"{record.head['device']}, {detector.name}, {len(data)} real images\n{HEAD}")
        bench = Bench(record, device, options.rounds)
        best = choose()
        bench.readers(data, best)
        bench.feeds(data, best, net)
        net.requires_grad_(False).eval()

        def generate(n: int, clock: StageTimer) -> FeatureStats:
            return compute_stats(
                generate_batches(net, range(n), INIT_SIGMA), n, detector, clock, "generated"
            )

        generate(min(count, WARM_UP), StageTimer(device))
        look_at_real = partial(references.measure, data, detector, reader=best)
        real = bench.passes("reference", len(data), lambda clock: look_at_real(timer=clock))
        sample = bench.passes("generated", count, partial(generate, count))
        bench.passes("comparison", None, partial(compare, real, sample, detector))
    print(f"kept as {record.path} and .csv")


main = cli.command(Options, run, None, __doc__)

if __name__ == "__main__":
    cli.main(main, "benchmarks.evaluation")
