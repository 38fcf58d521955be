"""Seconds of an evaluation by stage, and images a second from a zip to the device.

python -m benchmarks.evaluation --detector inception --images 50000 --out results.json

On a GPU this is FID over 50,000 images of the CIFAR-10 network; on a CPU the same at a reduced
size, as a check of itself and for the ratio of the two readers. Networks have random weights: the
time does not depend on them.
"""

import argparse
import datetime
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from sid_fast.engine import parallel
from sid_fast.evaluation.detectors import load_detector
from sid_fast.evaluation.reader import choose, read
from sid_fast.evaluation.reference import measure
from sid_fast.evaluation.sample import Clock, compare, generated, look
from sid_fast.files.atomic import atomic_path
from sid_fast.files.dataset import ImageDataset, write_dataset
from sid_fast.networks import EDMNetwork, NetworkConfig

ROUNDS = 5  # of both readers in turn


def pictures(path: Path, n: int, resolution: int) -> ImageDataset:
    """n images that compress about as photographs do: smooth, with a little noise."""
    rng = np.random.default_rng(0)
    size = (n, 3, resolution, resolution)
    coarse = rng.normal(128, 60, (n, 3, resolution // 8, resolution // 8))
    smooth = coarse.repeat(8, axis=2).repeat(8, axis=3)
    write_dataset(path, (smooth + rng.normal(0, 8, size)).clip(0, 255).astype(np.uint8))
    return ImageDataset(path)


def readers(data: ImageDataset, device: torch.device) -> dict[str, float]:
    """Images a second of each reader: medians over rounds, one after the other in each."""
    kinds = ["dali", "plain"] if choose() == "dali" else ["plain"]
    rates: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(ROUNDS):
        for kind in kinds:
            began = time.perf_counter()
            seen = sum(len(images) for images in read(data, range(len(data)), device, kind))
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            rates[kind].append(seen / (time.perf_counter() - began))
    figures = {f"{kind}_images_per_s": statistics.median(v) for kind, v in rates.items()}
    if len(kinds) == 2:
        figures["dali_over_plain"] = statistics.median(
            d / p for d, p in zip(*rates.values(), strict=True)
        )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--detector", default=None, help="default: pixels on a CPU, else inception")
    parser.add_argument("--trust", action="store_true")
    parser.add_argument("--images", type=int, help="default: 50,000; 1,000 on a CPU")
    parser.add_argument("--data", help="zip of real images; default: made up")
    parser.add_argument("--out", help="file for the results as JSON")
    options = parser.parse_args()

    device = parallel.pick_device(options.device)
    gpu = device.type == "cuda"
    count = options.images or (50_000 if gpu else 1000)
    resolution, width = (32, 128) if gpu else (16, 32)
    network = NetworkConfig(
        architecture="ddpmpp", resolution=resolution, channels=3, label_dim=10,
        model_channels=width, channel_mult=(2, 2, 2) if gpu else (1, 1), num_blocks=4 if gpu else 1,
        attention_resolutions=(16,) if gpu else (), init_sigma=2.5,
    )  # fmt: skip
    net = EDMNetwork(network).to(device).requires_grad_(False).eval()
    detector = load_detector(
        options.detector or ("inception" if gpu else "pixels"), device, options.trust
    )
    clock, stages = Clock(device), {}
    with tempfile.TemporaryDirectory() as folder:
        data = (
            ImageDataset(options.data)
            if options.data
            else pictures(Path(folder) / "made-up.zip", count, resolution)
        )
        rates = readers(data, device)
        real = measure(data, detector, clock, choose())
        stages["reference"] = dict(clock.seconds)
        clock.seconds.clear()
        sample = look(generated(net, range(count), 2.5), count, detector, clock, "generated")
        compare(real, sample, detector, clock)
        stages["generated"] = dict(clock.seconds)
    results = {
        "device": torch.cuda.get_device_name(device) if gpu else "cpu",
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "detector": detector.name,
        "images": count,
        "network": str(network),
        "reference_images": len(data),
        "readers": rates,
        "seconds": stages,
    }
    text = json.dumps(results, indent=2, ensure_ascii=False)
    if options.out:
        with atomic_path(options.out) as temporary:
            temporary.write_text(text + "\n", "utf-8")
    print(text)


if __name__ == "__main__":
    main()
