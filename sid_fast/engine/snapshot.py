"""What a run leaves to look at: the network, a grid of its images, and how good they are."""

from collections.abc import Callable
from pathlib import Path

import torch

from sid_fast.config.settings import RunOptions
from sid_fast.draws import gallery
from sid_fast.engine import parallel
from sid_fast.engine.checkpoint import Trainer, prune
from sid_fast.engine.log import read_log
from sid_fast.errors import UserError
from sid_fast.evaluation.curve import save_curve
from sid_fast.evaluation.pixels import NAME, PixelDistance
from sid_fast.files.dataset import ImageDataset
from sid_fast.files.images import save_grid, to_uint8
from sid_fast.files.network import save_network
from sid_fast.networks import EDMNetwork

Make = Callable[[EDMNetwork, torch.Tensor, torch.Tensor | None], torch.Tensor]

GRID = 100  # images
BATCH = 128  # images made at a time


class Snapshots:
    """Called at a snapshot: writes into a run's folder and returns figures for its log.

    net is saved; make(net, latents, labels) gives its images. data: real images that theirs, and
    once those of `teacher`, a network with its own `make`, are compared with. Every process gives
    its part of a sharded network; all else the first process does alone.
    """

    def __init__(
        self,
        options: RunOptions,
        trainer: Trainer,
        net: EDMNetwork,
        make: Make,
        data: ImageDataset | None,
        teacher: tuple[EDMNetwork, Make] | None = None,
    ):
        self.trainer, self.net, self.make, self.teacher = trainer, net, make, teacher
        self.seed, self.keep = options.seed, options.keep_snapshots
        self.distance, self.count = None, options.distance_images
        if self.count:
            if data is None or self.count < 2:
                raise UserError(
                    f"distance_images={self.count}: a distance needs 2 images and --data to compare"
                )
            if parallel.rank() == 0:
                self.distance = PixelDistance(data)

    def __call__(self, folder: Path) -> dict[str, float]:
        net = parallel.whole(self.net)
        teacher = self.count and self.teacher and (parallel.whole(self.teacher[0]), self.teacher[1])
        if net is None:
            return {}
        images = f"{self.trainer.images:010d}"
        save_network(folder / f"snapshot-{images}.safetensors", net)
        prune(folder, "snapshot-*.safetensors", self.keep)
        columns = net.config.label_dim
        columns = columns if 1 < columns <= 16 else 10
        grid = self._images(net, self.make, GRID // columns * columns)
        save_grid(folder / f"samples-{images}.png", grid, columns)
        return self._measure(folder, net, teacher) if self.distance else {}

    def _measure(
        self, folder: Path, net: EDMNetwork, teacher: tuple[EDMNetwork, Make] | None
    ) -> dict[str, float]:
        figures = {}
        records = [r for r in read_log(folder / "log.jsonl") if NAME in r]
        baseline = next((r["teacher"] for r in records if "teacher" in r), None)
        if baseline is None and teacher:
            baseline = figures["teacher"] = self.distance(self._images(*teacher, self.count))
        figures[NAME] = self.distance(self._images(net, self.make, self.count))
        points = [(r["images"], r[NAME]) for r in records] + [(self.trainer.images, figures[NAME])]
        images, distances = zip(*points, strict=True)
        save_curve(folder / "distance.png", images, distances, NAME, baseline)
        return figures

    @torch.no_grad()
    def _images(self, net: EDMNetwork, make: Make, n: int) -> torch.Tensor:
        """n images of fixed latents and labels, uint8."""
        device = next(net.parameters()).device
        z, labels = gallery(net.config, self.seed, n)
        done = []
        for i in range(0, n, BATCH):
            c = None if labels is None else labels[i : i + BATCH].to(device)
            done.append(to_uint8(make(net, z[i : i + BATCH].to(device), c)).cpu())
        return torch.cat(done)
