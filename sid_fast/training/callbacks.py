"""What a run leaves to look at: the network, a grid of its images, and how good they are."""

import time
from collections.abc import Callable
from pathlib import Path

import torch

from sid_fast.config.types import RunOptions
from sid_fast.data.datasets import ImageDataset
from sid_fast.data.images import save_grid
from sid_fast.data.readers import choose
from sid_fast.evaluation.curve import save_curve
from sid_fast.evaluation.features import label, load_detector
from sid_fast.evaluation.references import real_stats
from sid_fast.evaluation.sample import StageTimer, compare, compute_stats, generate_batches
from sid_fast.models import EDMNetwork
from sid_fast.models.registry import save_network
from sid_fast.performance import fsdp, process_group
from sid_fast.performance.cuda_graphs import usable
from sid_fast.sampling import to_uint8
from sid_fast.training.checkpoint import Trainer, prune
from sid_fast.training.logging import read_log
from sid_fast.training.random_streams import gallery

Make = Callable[[EDMNetwork, torch.Tensor, torch.Tensor | None], torch.Tensor]

GRID = 100  # images
UNBIASED = 50_000  # images from which on the Fréchet distance needs no other beside it


class Snapshots:
    """Called at a snapshot: saves `net` and a grid of its images.

    make(net, latents, labels) gives the images. Every process gives its part of a sharded network;
    all else the first process does alone.
    """

    def __init__(self, options: RunOptions, trainer: Trainer, net: EDMNetwork, make: Make):
        self.trainer, self.net, self.make = trainer, net, make
        self.seed, self.keep = options.seed, options.keep_snapshots

    @torch.no_grad()
    def __call__(self, folder: Path) -> dict[str, float]:
        net = fsdp.whole(self.net)
        if net is None:
            return {}
        images = f"{self.trainer.images:010d}"
        save_network(folder / f"snapshot-{images}.safetensors", net)
        prune(folder, "snapshot-*.safetensors", self.keep)
        columns = net.config.label_dim
        columns = columns if 1 < columns <= 16 else 10
        device = next(net.parameters()).device
        z, labels = gallery(net.config, self.seed, GRID // columns * columns)
        grid = self.make(net, z.to(device), None if labels is None else labels.to(device))
        save_grid(folder / f"samples-{images}.png", to_uint8(grid), columns)
        return {}


class Evaluations:
    """Called every --eval-every kimg, on every process: measures the images of `net`.

    They are compared with --ref or `data`, and once with those of the teacher. The first process
    draws the curve and keeps the network of the least distance so far. steps: of the sampler,
    for each of the two. cuda_graph: auto, on or off, as usable has it.
    """

    def __init__(
        self,
        options: RunOptions,
        trainer: Trainer,
        net: EDMNetwork,
        data: ImageDataset | None,
        steps: int = 1,
        teacher: EDMNetwork | None = None,
        teacher_steps: int = 1,
        cuda_graph: str = "auto",
    ):
        self.trainer, self.net, self.steps = trainer, net, steps
        self.teacher, self.teacher_steps = teacher, teacher_steps
        self.count = options.eval_images
        device = next(net.parameters()).device
        self.cuda_graph, _ = usable(cuda_graph, device)
        self.clock = StageTimer(device)
        with process_group.main_process_first():  # it may download
            self.detector = load_detector(options.detector, device, options.trust)
        self.name = label("frechet_distance", self.detector)
        reader = choose() if data else "plain"
        self.real = real_stats(options.ref, data, self.detector, self.clock, reader)

    def __call__(self, folder: Path) -> dict[str, float]:
        """Figures for the log, on the first process; their time is not the training's."""
        began = time.perf_counter()
        records = [r for r in read_log(folder / "log.jsonl") if self.name in r]
        baseline = next((r["teacher"] for r in records if "teacher" in r), None)
        figures = {}
        if self.teacher and process_group.broadcast_from_rank0(lambda: int(baseline is None)):
            teacher = fsdp.whole(self.teacher, everywhere=True)
            found = self._figures(teacher, None, self.teacher_steps)
            if found:
                baseline = figures["teacher"] = found[self.name]
        sigma = self.net.config.init_sigma
        net = fsdp.whole(self.net, everywhere=True)
        figures |= self._figures(net, sigma, self.steps)
        if process_group.rank():
            return {}
        if all(figures[self.name] < r[self.name] for r in records):
            best = folder / f"best-{self.trainer.images:010d}.safetensors"
            save_network(best, net)
            prune(folder, "best-*.safetensors", 1)
        points = [(r["images"], r[self.name]) for r in records]
        points.append((self.trainer.images, figures[self.name]))
        save_curve(folder / "distance.png", *zip(*points, strict=True), self.name, baseline)
        return figures | {"evaluation_s": time.perf_counter() - began}

    def _figures(self, net: EDMNetwork, sigma: float | None, steps: int) -> dict[str, float]:
        images = generate_batches(net, range(self.count), sigma, steps, self.cuda_graph)
        sample = compute_stats(images, self.count, self.detector, self.clock, "evaluation")
        if process_group.rank():
            return {}
        metrics = ("fid", "kid") if self.count < UNBIASED else ("fid",)
        found = compare(self.real, sample, self.detector, self.clock, metrics)
        return {label(name, self.detector): value for name, value in found.items()}
