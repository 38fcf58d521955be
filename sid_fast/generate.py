"""Make images with a one-step generator, one image a seed.

python -m sid_fast.generate --network runs/000-digits --seeds 0-63 --grid digits.png
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from sid_fast import cli
from sid_fast.config.types import Settings, check, option
from sid_fast.data.datasets import write_dataset
from sid_fast.data.images import save_grid, save_png
from sid_fast.errors import UserError
from sid_fast.io.atomic import atomic_path, open_target
from sid_fast.models import NetworkConfig
from sid_fast.models.registry import load_network
from sid_fast.performance import process_group
from sid_fast.sampling import generate_images, seed_inputs


@dataclasses.dataclass
class GenerateConfig:
    network: str | None = option(
        None, "a snapshot, pickle, run folder (its newest snapshot), https address or name"
    )
    seeds: str = option("0-63", "one image a seed: numbers and ranges, as in 0-63,100")
    out: str | None = option(
        None,
        "folder for PNGs, one a seed; or NAME.zip, an EDM data set; or NAME.npz with `images` "
        "uint8 [N, R, R, C], `seeds` and `labels`",
    )
    grid: str | None = option(None, "file for one PNG of all the images")
    class_: int | None = option(None, "make this class alone; default: each seed draws its own", 0)
    steps: int = option(
        1, "1, or the sampler steps of a teacher: 18 at 32x32 pixels, 40 at 64x64", 1, 1000
    )
    init_sigma: float | None = option(
        None, "noise level of one-step generation; default: as the file says, or 2.5", 1e-3, 1e3
    )
    batch: int = option(128, "images made at a time; never changes the images", 1)
    device: str = option("auto", "auto, cpu or cuda; auto takes a GPU where there is one")


def run(config: GenerateConfig, given: set[str]) -> None:
    check(config)
    if not config.network:
        raise UserError("network is missing: --network runs/000-digits, or another snapshot")
    if not (config.out or config.grid):
        raise UserError("nothing to write: give --out FOLDER (or .zip, .npz), --grid FILE, or both")
    seeds = cli.parse_seeds(config.seeds)
    device = process_group.pick_device(config.device)
    net = load_network(config.network).to(device)
    if config.class_ is not None and config.class_ >= net.config.label_dim:
        last = net.config.label_dim - 1
        known = f"the network knows 0 to {last}" if last > 0 else "the network has no classes"
        raise UserError(f"class={config.class_} is out of range: {known}")
    init_sigma = config.init_sigma or net.config.init_sigma
    open_targets(config.out, config.grid)
    if config.steps == 1 and init_sigma is None:
        init_sigma = Settings.init_sigma
        note = f"taken for a one-step generator from noise level {init_sigma}"
        print(f"{config.network} is {note}; --steps samples a teacher", file=sys.stderr)
    folder = Path(config.out) if config.out and not is_file(config.out) else None

    with process_group.joined(device):
        rank = process_group.rank()
        mine = seeds[rank :: process_group.world_size()]
        shape = net.config.channels, net.config.resolution, net.config.resolution
        images = torch.empty(len(mine), *shape, dtype=torch.uint8)
        classes = torch.empty(len(mine), dtype=torch.int64)
        bar = tqdm(total=len(mine), unit="img", disable=True if rank else None)
        for i in range(0, len(mine), config.batch):
            some = mine[i : i + config.batch]
            part = slice(i, i + len(some))
            latents, classes[part] = seed_inputs(some, net.config, config.class_)
            images[part] = generate_images(net, latents, classes[part], init_sigma, config.steps)
            if folder:
                for seed, image in zip(some, images[part], strict=True):
                    save_png(folder / f"seed{seed:06d}.png", image)
            bar.update(len(some))
        bar.close()
        images, classes = (process_group.gather(v, len(seeds)) for v in (images, classes))
        if rank == 0:
            write(config, net.config, seeds, images, classes)


# A folder is hardly called so; of these --out writes the first two, in small letters.
NO_FOLDER = (".zip", ".npz", ".npy", ".png", ".jpg", ".tar", ".gz", ".tgz")


def is_file(out: str) -> bool:
    """Whether --out names a .zip or .npz, not a folder for PNGs."""
    return Path(out).suffix in (".zip", ".npz")


def open_targets(out: str | None, grid: str | None) -> None:
    """Make the folders that will be written to; UserError if one of the files cannot be."""
    if grid and Path(grid).suffix != ".png":
        raise UserError(f"grid={grid} is not the name of a .png file")
    if out and not is_file(out) and (suffix := Path(out).suffix).lower() in NO_FOLDER:
        raise UserError(
            f"out={out}: {suffix} is not written: give a folder, or the name of a .zip or .npz file"
        )
    if out:
        open_target(out, folder=not is_file(out))
    if grid:
        open_target(grid)


def write(
    config: GenerateConfig,
    network: NetworkConfig,
    seeds: list[int],
    images: torch.Tensor,
    classes: torch.Tensor,
) -> None:
    labels = classes.numpy() if network.label_dim else None
    if config.grid:
        save_grid(config.grid, images)
    suffix = Path(config.out or "").suffix
    if config.out and suffix == ".zip":
        write_dataset(config.out, images, labels)
    if config.out and suffix == ".npz":
        values: dict[str, Any] = {"images": images.permute(0, 2, 3, 1).numpy()}
        values |= {"seeds": np.array(seeds)} | ({} if labels is None else {"labels": labels})
        with atomic_path(config.out) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **values)
    places = " and ".join(p for p in (config.out, config.grid) if p)
    print(f"{len(seeds)} images: {places}")


main = cli.command(GenerateConfig, run, None, __doc__)

if __name__ == "__main__":
    cli.main(main, "sid_fast.generate")
