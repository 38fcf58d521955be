"""Periodic callbacks of the loop: snapshots with image grids, and evaluations (FID, KID)."""

import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from sid_fast.config.types import RATES, RunOptions
from sid_fast.data.datasets import Dataset
from sid_fast.data.images import save_grid
from sid_fast.errors import UserError, is_out_of_memory, one_line
from sid_fast.evaluation.curve import save_curve
from sid_fast.evaluation.decoding import Decoder
from sid_fast.evaluation.features import label, load_detector
from sid_fast.evaluation.references import real_stats
from sid_fast.evaluation.sample import (
    StageTimer,
    classes_to_draw,
    compare,
    compute_stats,
    generate_batches,
)
from sid_fast.io import progress, streams
from sid_fast.models import Network
from sid_fast.models.registry import save_network
from sid_fast.performance import fsdp, process_group
from sid_fast.performance.cuda_graphs import resolve_cuda_graph
from sid_fast.sampling import group_size
from sid_fast.training.checkpoint import Trainer, prune, thin_out
from sid_fast.training.logging import read_log
from sid_fast.training.random_streams import fixed_grid_inputs

Make = Callable[[Network, torch.Tensor, torch.Tensor | None], torch.Tensor]

GRID = 100  # images of a sample grid, at most
GRID_PIXELS = 128 * 32**2  # generated at once on a GPU, which training leaves little memory
DETECTOR_BATCH = 128  # images, likewise
MAX_GRIDS = 200  # sample grids of a run; beyond, every second one is removed
FID_ONLY_FROM = 50_000  # images; below, FID is biased enough that KID is computed too


def require_reference(options: RunOptions, data: Dataset | None) -> None:
    """Raise UserError if --eval-every has latents to compare with, but no images."""
    if options.eval_every and not options.ref and data and data.is_latent:
        raise UserError(
            f"eval_every={options.eval_every}: {data.path} holds latents, and images are compared: "
            "give the statistics of the images that they were made from as --ref"
        )


class Snapshots:
    """Callback that saves the EMAs of a network and a grid of images.

    All ranks call it and take part in gathering a sharded network; rank 0 does the rest.

    Power-function EMAs are kept for post-hoc EMAs, which need those of the whole run: of more than
    `keep_snapshots` times, every second one is removed. Of other EMAs the newest are kept.

    Args:
        options: Options of the run.
        trainer: Counts the images.
        nets: The EMAs to save. The grid is of the first.
        make: Generates images from (net, latents, labels).
        decoder: Turns the network's outputs into images.
        stds: Widths of the EMAs, if they are power-function EMAs.
    """

    def __init__(
        self,
        options: RunOptions,
        trainer: Trainer,
        nets: Sequence[Network],
        make: Make,
        decoder: Decoder,
        stds: Sequence[float] = (),
    ):
        self.trainer, self.nets, self.make, self.stds = trainer, nets, make, stds
        self.decoder = decoder
        self.seed, self.keep = options.seed, options.keep_snapshots
        shared = {k: v for k, v in trainer.resume_fingerprint.items() if k not in RATES}
        text = json.dumps(shared, sort_keys=True)
        self.run = hashlib.sha256(text.encode()).hexdigest()[:16]

    @torch.no_grad()
    def __call__(self, folder: Path) -> dict[str, float]:
        """Save a snapshot to a run folder; returns no metrics."""
        images = f"{self.trainer.images:010d}"
        # The first comes last: its grid follows.
        for std, ema in reversed(list(zip(self.stds or (None,), self.nets, strict=True))):
            net = fsdp.gather_full(ema)
            if net is None:
                continue
            if std is None:
                snapshot = folder / f"snapshot-{images}.safetensors"
                save_network(snapshot, net)
                prune(folder, "snapshot-*.safetensors", self.keep, snapshot)
            else:
                record = {"std": std, "images": self.trainer.images, "run": self.run}
                save_network(folder / f"snapshot-{images}-{std:.3f}.safetensors", net, record)
                thin_out(folder, f"snapshot-*-{std:.3f}.safetensors", self.keep)
        if net is None:
            return {}
        columns = len(net.config.classes)
        columns = columns if 1 < columns <= 16 else 10
        try:
            grid = self._grid(net, columns)
        except RuntimeError as error:
            if not (self.trainer.steps and is_out_of_memory(error)):
                raise
            at = f"{self.trainer.images / 1000:g} kimg"
            warn = f"warning: no sample grid at {at}: {error}"
            streams.say(f"{one_line(warn)}; training continues", sys.stderr)
            return {}
        save_grid(folder / f"samples-{images}.png", grid, columns)
        thin_out(folder, "samples-*.png", MAX_GRIDS)
        return {}

    def _grid(self, net: Network, columns: int) -> torch.Tensor:
        """Generate the images of a grid, uint8 [N, C, H, W]."""
        device = next(net.parameters()).device
        z, labels = fixed_grid_inputs(net.config, self.seed, GRID // columns * columns)
        size = group_size(device, net.config.resolution)  # all at once may exceed the memory
        if device.type == "cuda":
            size = min(size, max(GRID_PIXELS // net.config.resolution**2, 1))
        grid = []
        with progress.phase("sample grid", len(z), "images") as shown:
            for rows in torch.arange(len(z)).split(size):
                c = None if labels is None else labels[rows].to(device)
                grid.append(self.decoder(self.make(net, z[rows].to(device), c)))
                shown.update(len(rows))
        return torch.cat(grid)


class Evaluations:
    """Callback for --eval-every: compares images of a network with real ones, on all ranks.

    Rank 0 plots the curve and keeps the best network so far. The teacher is measured once, as a
    baseline.

    Args:
        options: Options of the run; --ref replaces `data`.
        trainer: Counts the images.
        net: The network to evaluate.
        data: Real images; of latents only the classes are used.
        steps: Sampler steps of the network.
        teacher: The teacher, or None.
        teacher_steps: Sampler steps of the teacher.
        cuda_graph: auto, on or off; see resolve_cuda_graph.
        decoder: Turns the networks' outputs into images; needed for latents.
    """

    def __init__(
        self,
        options: RunOptions,
        trainer: Trainer,
        net: Network,
        data: Dataset | None,
        steps: int = 1,
        teacher: Network | None = None,
        teacher_steps: int = 1,
        cuda_graph: str = "auto",
        decoder: Decoder | None = None,
    ):
        self.trainer, self.net, self.steps, self.decoder = trainer, net, steps, decoder
        self.teacher, self.teacher_steps = teacher, teacher_steps
        self.count = options.eval_images
        device = next(net.parameters()).device
        self.cuda_graph, _ = resolve_cuda_graph(cuda_graph, device)
        self.clock = StageTimer(device)
        loading = progress.phase(f"loading the detector {options.detector}")
        with process_group.main_process_first(), loading:  # may download
            batch = DETECTOR_BATCH if device.type == "cuda" else None
            self.detector = load_detector(options.detector, device, options.trust, batch)
        self.name = label("frechet_distance", self.detector)
        images = None if data is None or data.is_latent else data
        self.real = real_stats(options.ref, images, self.detector, self.clock, "auto")
        self.classes = classes_to_draw(data, net)
        self.baseline_failed = False

    def __call__(self, folder: Path) -> dict[str, float]:
        """Evaluate; return metrics for the log on rank 0, and nothing on the others.

        An evaluation that fails is a warning: its metrics are left out.
        """
        began = time.perf_counter()
        log = read_log(folder / "log.jsonl")
        records = [r for r in log if _is_number(r.get(self.name))]
        known = (r["teacher"] for r in log if _is_number(r.get("teacher")))
        baseline = next(known, None)
        results = {}
        due = process_group.broadcast_from_rank0(
            lambda: int(baseline is None and not self.baseline_failed)
        )
        if self.teacher and due:
            teacher = fsdp.gather_full(self.teacher, everywhere=True)
            metrics = self._metrics(teacher, None, self.teacher_steps, "the teacher")
            if self.name in metrics:
                baseline = results["teacher"] = metrics[self.name]
            self.baseline_failed = baseline is None
        sigma = self.net.config.init_sigma
        net = fsdp.gather_full(self.net, everywhere=True)
        results |= self._metrics(net, sigma, self.steps, "the network")
        if process_group.rank():
            return {}
        if self.name in results:
            if all(results[self.name] < r[self.name] for r in records):
                best = folder / f"best-{self.trainer.images:010d}.safetensors"
                save_network(best, net)
                prune(folder, "best-*.safetensors", 1, best)
            points = [(r["images"], r[self.name]) for r in records]
            points.append((self.trainer.images, results[self.name]))
            curve = *zip(*points, strict=True), self.name, baseline
            save_curve(folder / "distance.png", *curve, grids=self._grids(folder))
        return results | {"evaluation_s": time.perf_counter() - began}

    def _grids(self, folder: Path) -> list[tuple[int, Path]]:
        """The sample grids up to now, not those of a run that a resumed state precedes."""
        found = ((p.stem.removeprefix("samples-"), p) for p in folder.glob("samples-*.png"))
        grids = sorted((int(number), p) for number, p in found if number.isdecimal())
        return [(images, p) for images, p in grids if images <= self.trainer.images]

    def _metrics(
        self, net: Network, sigma: float | None, steps: int, what: str
    ) -> dict[str, float]:
        """Compare a network's images with real ones; empty if that fails, and on other ranks."""
        images = generate_batches(
            net, range(self.count), sigma, steps, self.cuda_graph, self.classes, self.decoder
        )
        metrics = ("fid", "kid") if self.count < FID_ONLY_FROM else ("fid",)
        try:
            # Raises on all ranks or on none, so that the others do not wait for one that is gone.
            title = f"evaluation of {what}"
            sample = compute_stats(images, self.count, self.detector, self.clock, title)
            if process_group.rank():
                return {}
            values = compare(self.real, sample, self.detector, self.clock, metrics)
        except (UserError, RuntimeError) as error:
            if not (isinstance(error, UserError) or is_out_of_memory(error)):
                raise
            if process_group.rank() == 0:
                at = f"{self.trainer.images / 1000:g} kimg"
                warn = f"warning: the evaluation of {what} at {at} failed: {error}"
                streams.say(f"{one_line(warn)}; training continues", sys.stderr)
            return {}
        return {label(name, self.detector): value for name, value in values.items()}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
