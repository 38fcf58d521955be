"""Measure images against real ones: FID, IS, KID, precision and recall, in one pass.

python -m sid_fast.evaluate --network runs/000-cifar10 --data cifar10.zip --protocol edm
python -m sid_fast.evaluate reference --data cifar10.zip --out cifar10.npz
"""

import dataclasses
import json
import statistics
from collections.abc import Iterator, Sequence

import torch

from sid_fast import cli
from sid_fast.config.types import Settings, check, option
from sid_fast.data.datasets import ImageDataset
from sid_fast.data.digits import open_dataset
from sid_fast.data.readers import choose, read
from sid_fast.errors import UserError
from sid_fast.evaluation.features import Detector, Pixels, label, load_detector
from sid_fast.evaluation.references import real_sample, reference_of, write_reference
from sid_fast.evaluation.sample import (
    METRICS,
    FeatureStats,
    StageTimer,
    compare,
    generated,
    look,
    shard_by_rank,
)
from sid_fast.io.atomic import atomic_path, open_target
from sid_fast.models.registry import load_network
from sid_fast.performance import process_group
from sid_fast.performance.cuda_graphs import resolve_cuda_graph

NUM = 50_000
# Draws, and what is subtracted from the number of images under a covariance.
PROTOCOLS = {None: (1, 1), "edm": (3, 1), "sid": (10, 0)}


@dataclasses.dataclass
class DetectorOptions:
    detector: str = option(
        "inception",
        "feature network: inception (the published one of 2015-12-05, downloaded once), pixels, "
        "or the file or https address of a TorchScript module from uint8 [N, 3, R, R] to features",
    )
    trust: bool = option(
        False, "run a TorchScript file that is not known here; it is a program, not mere data"
    )
    batch: int | None = option(
        None, "images in every call of the detector; default: 512 on a GPU, 64 on a CPU", 1
    )
    reader: str = option(
        "auto", "how PNGs are read: dali, plain (several times slower), or auto for the best there"
    )
    device: str = option("auto", "auto, cpu or cuda; auto takes a GPU where there is one")


@dataclasses.dataclass
class EvaluateConfig(DetectorOptions):
    network: str | None = option(
        None, "what to measure: a snapshot, pickle, run folder, https address or name"
    )
    images: str | None = option(None, "or: images that are there already, a zip or folder of PNGs")
    data: str | None = option(
        None, "real images: an EDM data set zip or folder, or `digits`; measured once, then cached"
    )
    ref: str | None = option(
        None, "or: statistics of real images, an .npz; for FID and IS, which is all they allow"
    )
    metrics: str = option(",".join(METRICS), "which to compute: FID, IS, KID, precision/recall")
    protocol: str | None = option(
        None,
        "edm: the best of 3 draws, covariances over N−1; sid: mean ± std of 10 draws, over N; "
        "default: 1 draw, over N−1. Draw i takes the seeds from i·num on",
    )
    num: int | None = option(
        None,
        f"images a draw; default: {NUM:,}, or all of --images. Behind torchrun write -n: it takes "
        "--num for an option of its own",
        2,
        short="-n",
    )
    seeds: str | None = option(None, "in place of --num: these seeds, as in 0-999, in one draw")
    steps: int = option(
        1, "1, or the sampler steps of a teacher: 18 at 32x32 pixels, 40 at 64x64", 1, 1000
    )
    init_sigma: float | None = option(
        None, "noise level of one-step generation; default: as the file says, or 2.5", 1e-3, 1e3
    )
    out: str | None = option(None, "file for the results as JSON")


@dataclasses.dataclass
class ReferenceConfig(DetectorOptions):
    data: str | None = option(None, "real images: an EDM data set zip or folder, or `digits`")
    out: str | None = option(None, "file for their statistics: an .npz with `mu` and `sigma`")


Draw = tuple[Sequence[int], Iterator[torch.Tensor]]  # what the images are; a process's batches


def run(config: EvaluateConfig, given: set[str]) -> None:
    check(config)
    if bool(config.network) == bool(config.images):
        raise UserError("what to measure? give --network SNAPSHOT, or --images FOLDER or ZIP")
    if not (config.data or config.ref):
        raise UserError("compared with what? give real images as --data, or statistics as --ref")
    metrics = [m.strip() for m in config.metrics.split(",")]
    if unknown := [m for m in metrics if m not in METRICS]:
        raise UserError(f"metrics: {unknown[0]!r} is unknown: choose from {', '.join(METRICS)}")
    if config.protocol not in PROTOCOLS:
        raise UserError(f"protocol={config.protocol!r} is unknown: choose edm or sid")
    if config.protocol == "edm" and "fid" not in metrics:
        raise UserError(
            "metrics: edm reports the draw of the least FID; add fid, or leave --protocol"
        )
    if config.out:
        open_target(config.out)
    device = process_group.pick_device(config.device)
    clock = StageTimer(device)
    with process_group.joined(device):
        detector, data, reader = prepare(config, device)
        draws = by_network(config, device) if config.network else by_files(config, device, reader)
        real = real_sample(config.ref, data, detector, clock, reader)
        figures = []
        for i, (what, batches) in enumerate(draws):
            title = f"images, draw {i + 1} of {len(draws)}"
            sample = look(batches, len(what), detector, clock, title)
            if process_group.rank() == 0:
                correction = PROTOCOLS[config.protocol][1]
                figures.append(compare(real, sample, detector, clock, metrics, correction))
            process_group.barrier()  # precision and recall can take longer than a time-out
        if process_group.rank() == 0:
            report(config, detector, real, [what for what, _ in draws], figures, clock)


def prepare(
    config: "EvaluateConfig | ReferenceConfig", device: torch.device
) -> tuple[Detector | Pixels, ImageDataset | None, str]:
    """The detector, the real images if any, and the reader of PNGs."""
    with process_group.main_process_first():  # it may download
        detector = load_detector(config.detector, device, config.trust, config.batch)
        data = open_dataset(config.data) if config.data else None
    return detector, data, choose(config.reader)


def by_network(config: EvaluateConfig, device: torch.device) -> list[Draw]:
    """The draws that a network makes."""
    num = config.num or NUM
    draws: list[Sequence[int]] = [
        range(i * num, (i + 1) * num) for i in range(PROTOCOLS[config.protocol][0])
    ]
    if config.seeds is not None:
        if config.num or config.protocol:
            raise UserError("seeds: are one draw; leave out --seeds, or --num and --protocol")
        draws = [cli.parse_seeds(config.seeds)]
    assert config.network
    with process_group.main_process_first():  # it may download
        net = load_network(config.network).to(device)
    sigma = config.init_sigma or net.config.init_sigma or Settings.init_sigma
    graph, _ = resolve_cuda_graph("auto", device)
    return [(seeds, generated(net, seeds, sigma, config.steps, graph)) for seeds in draws]


def by_files(config: EvaluateConfig, device: torch.device, reader: str) -> list[Draw]:
    """One draw, of images that are there already."""
    if config.seeds is not None:
        raise UserError("seeds: are for --network; --num takes the first of --images")
    assert config.images
    data = open_dataset(config.images)
    num = config.num or len(data)
    if num > len(data):
        raise UserError(f"num={num}: {config.images} has {len(data)} images")
    return [(range(num), read(data, shard_by_rank(range(num)), device, reader))]


def summary(protocol: str | None, figures: list[dict[str, float]]) -> dict[str, float]:
    """What a protocol reports of several draws; NAME_std beside NAME where it is a mean."""
    if protocol == "sid" and len(figures) > 1:
        names = [n for n in figures[0] if not n.endswith("_std")]
        values = {n: [f[n] for f in figures] for n in names}
        means = {n: statistics.fmean(v) for n, v in values.items()}
        return means | {f"{n}_std": statistics.pstdev(v) for n, v in values.items()}
    return min(figures, key=lambda f: f.get("frechet_distance", 0.0))  # one draw may have none


def report(
    config: EvaluateConfig,
    detector: Detector | Pixels,
    real: FeatureStats,
    draws: list[Sequence[int]],
    figures: list[dict[str, float]],
    clock: StageTimer,
) -> None:
    """Print a table; write --out."""
    reported = summary(config.protocol, figures)
    ends = " and ".join(f"{d[0]}-{d[-1]}" for d in draws)
    what = f"seeds {ends}" if config.network else "files"
    against = " and ".join(p for p in (config.ref, config.data) if p)
    print(f"{config.network or config.images}, {len(draws[0]):,} images a draw ({what})")
    print(f"against {against}, {f'{real.count:,} images' if real.count else 'of unknown number'}")
    if len(figures) > 1:
        rule: dict[str | None, str]
        rule = {"edm": "the draw of least distance", "sid": "mean ± std of the draws"}
        print(f"{'':32} {rule[config.protocol]:32} all draws")
    for name in (n for n in reported if not n.endswith("_std")):
        std = reported.get(f"{name}_std")
        text = f"{reported[name]:.5g}" + ("" if std is None else f" ± {std:.2g}")
        each = "  ".join(f"{f[name]:.5g}" for f in figures) if len(figures) > 1 else ""
        print(f"{label(name, detector):32} {text:32} {each}".rstrip())
    if "is" in config.metrics and "inception_score" not in reported:
        print(f"no {label('inception_score', detector)}: it knows no classes")
    if real.features is None and ("kid" in config.metrics or "pr" in config.metrics):
        print("no kernel distance, precision or recall: they take real images, --data")
    seconds = {stage: round(s, 3) for stage, s in clock.seconds.items()}
    print("seconds: " + ", ".join(f"{stage} {s:.3g}" for stage, s in seconds.items()))
    if config.out:
        results = {
            "reported": reported,
            "draws": figures,
            "options": dataclasses.asdict(config),
            "covariance_over": "N-1" if PROTOCOLS[config.protocol][1] else "N",
            "images": len(draws[0]),
            "seeds": [[d[0], d[-1]] for d in draws] if config.network else None,
            "reference_images": real.count,
            "detector": {"name": detector.name, "key": detector.key},
            "seconds": seconds,
            "device": str(clock.device),
            "processes": process_group.world_size(),
            "torch": torch.__version__,
        }
        with atomic_path(config.out) as temporary:
            temporary.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", "utf-8")


def run_reference(config: ReferenceConfig, given: set[str]) -> None:
    check(config)
    if not config.data:
        raise UserError("data is missing: --data dataset.zip names the real images")
    if not config.out or not config.out.endswith(".npz"):
        raise UserError(f"out={config.out}: give the name of an .npz file, --out stats.npz")
    open_target(config.out)
    device = process_group.pick_device(config.device)
    with process_group.joined(device):
        detector, data, reader = prepare(config, device)
        assert data is not None
        clock = StageTimer(device)
        sample = reference_of(data, detector, clock, reader)
        if process_group.rank() == 0:
            write_reference(config.out, sample, detector)
            seconds = sum(clock.seconds.values())
            how = f"at {len(data) / seconds:.0f} images a second" if seconds else "from the cache"
            print(
                f"{config.out}: statistics of {len(data):,} images in {len(sample.mean)} features "
                f"of {detector.name}, {how}"
            )


_reference = cli.command(
    ReferenceConfig, run_reference, None, "Make the statistics of a data set that --ref takes."
)
main = cli.command(EvaluateConfig, run, None, __doc__, reference=_reference)

if __name__ == "__main__":
    cli.main(main, "sid_fast.evaluate")
