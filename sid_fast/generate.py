"""Generate images with a one-step generator or a teacher, one image per seed.

python -m sid_fast.generate --network runs/000-digits --seeds 0-63 --grid digits.png
"""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sid_fast import cli
from sid_fast.config.types import VAE, check, option
from sid_fast.data.datasets import write_dataset
from sid_fast.data.images import save_grid, save_png
from sid_fast.errors import UserError
from sid_fast.evaluation import decoding
from sid_fast.io import invocation, progress
from sid_fast.io.atomic import atomic_path, open_target
from sid_fast.io.streams import note
from sid_fast.models import NetworkConfig
from sid_fast.models.registry import (
    load_network,
    one_step_sigma,
    require_denoiser,
    require_png_channels,
)
from sid_fast.performance import process_group
from sid_fast.sampling import generate_images, seed_inputs
from sid_fast.tools import host_memory


@dataclasses.dataclass
class GenerateConfig:
    """Options of `python -m sid_fast.generate`."""

    network: str | None = option(
        None,
        "generator or teacher: a .safetensors snapshot, an EDM, EDM2 or SiD pickle (.pkl), a run "
        "folder (its newest snapshot), an https URL, or the name of a published teacher",
    )
    seeds: str = option("0-63", "one image per seed: numbers and ranges, such as 0-63,100")
    out: str | None = option(
        None,
        "a folder for one PNG per seed; NAME.zip for an EDM data set; or NAME.npz with `images` "
        "(uint8 [N, R, R, C]; `latents`, float32 [N, C, R, R], from a network that makes latents), "
        "`seeds` and, with classes, `labels`. PNGs of latents need --vae",
    )
    grid: str | None = option(
        None,
        "PNG file to write, a grid of all the images; of latents without --vae a preview, a linear "
        "map of the 4 channels to colours",
    )
    vae: str | None = option(None, VAE)
    class_: int | None = option(
        None, "generate only this class; default: a random class per seed", 0
    )
    steps: int = option(
        1,
        "1 for a one-step generator; for a teacher its sampler steps: 18 at 32x32 pixels, 40 at "
        "64x64, 32 for EDM2",
        1,
        1000,
    )
    init_sigma: float | None = option(
        None,
        "σ of the one-step generator's input noise; default: as saved in the file, else 2.5",
        1e-3,
        1e3,
    )
    batch: int = option(128, "images per forward pass; the images do not depend on it", 1)
    device: str = option("auto", "auto, cpu or cuda; auto: a GPU if there is one")


def run(config: GenerateConfig, given: set[str]) -> None:
    """Generate and write the images; `given` names the fields that the command line set."""
    check(config)
    if not config.network:
        raise UserError("network is missing: give --network FILE, a run folder or a published name")
    if not (config.out or config.grid):
        raise UserError(
            "nothing to write: give --out FOLDER (or NAME.zip, NAME.npz), --grid FILE.png, or both"
        )
    cli.refuse_idle(config, given, config.steps == 1, "--steps 1", "init_sigma")
    ranges = cli.seed_ranges(config.seeds)
    device = process_group.pick_device(config.device)
    with progress.phase(f"loading {config.network}"):
        net = load_network(config.network).to(device)
    if config.steps > 1:
        require_denoiser(net, config.network, f"a network that is sampled in {config.steps} steps")
    as_pngs = bool(config.grid) or not is_npz(config.out)
    if as_pngs:
        require_png_channels(net, config.network, "give --out NAME.npz, without --grid")
    cli.refuse_idle(config, given, as_pngs, "--grid or an --out of PNGs", "vae")
    decoder = decoding.make_decoder(net.config, config.vae, device, config.network)
    if config.out and not is_npz(config.out) and decoder.is_preview:
        raise UserError(
            f"{config.network} makes latents: give the VAE that decodes them to images as --vae "
            "FOLDER, or write the latents with --out NAME.npz"
        )
    if config.class_ is not None and config.class_ >= net.config.label_dim:
        last = net.config.label_dim - 1
        known = f"choose from 0 to {last}" if last > 0 else "the network has no classes"
        raise UserError(f"class={config.class_} is out of range: {known}")
    if config.class_ in net.config.absent_classes:
        raise UserError(
            f"class={config.class_} had no images when {config.network} was trained: choose another"
        )
    require_memory(config, net.config, decoder.shape, sum(map(len, ranges)))
    host_memory.require_forward(net.config, device)
    seeds = list(itertools.chain(*ranges))
    open_targets(config.out, config.grid)
    init_sigma, guess = one_step_sigma(net.config, config.network, config.init_sigma)
    if config.steps == 1 and guess and process_group.launch().rank == 0:
        note(f"note: {guess}")
    folder = Path(config.out) if config.out and not is_file(config.out) else None

    with process_group.joined(device):
        rank = process_group.rank()
        mine = seeds[rank :: process_group.world_size()]
        stored = buffers(config, net.config, decoder.shape, len(mine))
        classes = torch.empty(len(mine), dtype=torch.int64)
        with progress.phase("generating", len(seeds), "images") as shown:
            for i in range(0, len(mine), config.batch):
                batch = mine[i : i + config.batch]
                rows = slice(i, i + len(batch))
                latents, classes[rows] = seed_inputs(batch, net.config, config.class_)
                made = generate_images(net, latents, classes[rows], init_sigma, config.steps)
                if "latents" in stored:
                    stored["latents"][rows] = made
                if "images" in stored:
                    images = decoder(made) if net.config.is_latent else made
                    stored["images"][rows] = images
                if folder:
                    for seed, image in zip(batch, images, strict=True):
                        save_png(folder / f"seed{seed:06d}.png", image)
                shown.update(min(len(batch) * process_group.world_size(), len(seeds) - shown.done))
        stored = {name: process_group.gather(v, len(seeds)) for name, v in stored.items()}
        classes = process_group.gather(classes, len(seeds))
        if rank == 0:
            write(config, net.config, seeds, stored, classes)
            if config.grid and decoder.is_preview:
                note(f"note: {config.grid} is a preview of the latents: give --vae for images")


# Unlikely suffixes of a folder name. --out writes .zip and .npz, in lower case only.
FILE_SUFFIXES = (".zip", ".npz", ".npy", ".png", ".jpg", ".tar", ".gz", ".tgz")


def buffers(
    config: GenerateConfig, network: NetworkConfig, shape: tuple[int, int, int], count: int
) -> dict[str, torch.Tensor]:
    """Make room for what is written: `images`, uint8, and `latents`, float32, if they are needed.

    shape: of an image, [C, H, W].
    """
    made = {}
    if network.is_latent and is_npz(config.out):
        side = network.resolution
        made["latents"] = torch.empty(count, network.channels, side, side)
    if config.grid or not made:
        made["images"] = torch.empty(count, *shape, dtype=torch.uint8)
    return made


def require_memory(
    config: GenerateConfig, network: NetworkConfig, shape: tuple[int, int, int], count: int
) -> None:
    """Raise UserError if `count` images of a shape do not fit in this machine's memory."""
    with torch.device("meta"):
        made = buffers(config, network, shape, 1)
    copies = 1 + bool(config.grid) + bool(config.out and is_file(config.out))  # while writing
    per_image = 56 + copies * sum(v.nbytes for v in made.values())  # the seed, twice; the class
    values = network.channels * network.resolution**2
    latents = min(config.batch, count) * values * 8  # drawn one by one, then stacked, float32
    host_memory.require(
        count * per_image + latents,
        f"{count:,} images (--seeds) in batches of {config.batch:,}",
        "split --seeds over several calls, or use a smaller --batch",
    )


def is_file(out: str) -> bool:
    """Whether --out names a .zip or .npz, not a folder for PNGs."""
    return Path(out).suffix in (".zip", ".npz")


def is_npz(out: str | None) -> bool:
    """Whether --out names an .npz file."""
    return Path(out or "").suffix == ".npz"


def open_targets(out: str | None, grid: str | None) -> None:
    """Create the output folders; UserError if an output has a bad name or cannot be written."""
    if grid and Path(grid).suffix != ".png":
        raise UserError(f"grid={grid} is not a .png file: give --grid NAME.png")
    if out and not is_file(out) and (suffix := Path(out).suffix).lower() in FILE_SUFFIXES:
        raise UserError(
            f"out={out}: {suffix} files are not supported: give a folder, or a .zip or .npz file"
        )
    if out:
        open_target(out, folder=not is_file(out), files=r"seed\d+\.png")
    if grid:
        open_target(grid)


def write(
    config: GenerateConfig,
    network: NetworkConfig,
    seeds: list[int],
    made: dict[str, torch.Tensor],
    classes: torch.Tensor,
) -> None:
    """Write --grid, and --out if it is a file; made is as `buffers` says, classes int64 [N]."""
    labels = classes.numpy() if network.label_dim else None
    if config.grid:
        with progress.phase(f"writing {config.grid}"):
            save_grid(config.grid, made["images"])
    suffix = Path(config.out or "").suffix
    if config.out and suffix == ".zip":
        write_dataset(config.out, made["images"], labels)
    if config.out and suffix == ".npz":
        values: dict[str, Any] = (
            {"latents": made["latents"].numpy()}
            if network.is_latent
            else {"images": made["images"].permute(0, 2, 3, 1).numpy()}
        )
        values |= {"seeds": np.array(seeds)} | ({} if labels is None else {"labels": labels})
        writing = progress.phase(f"writing {config.out}")
        with writing, atomic_path(config.out) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **values)
    paths = [path for path in (config.out, config.grid) if path]
    invocation.report(f"wrote {len(seeds):,} images:", paths)
    invocation.suggest(*next_commands(config, network.is_latent))


def next_commands(config: GenerateConfig, latent: bool) -> list[str]:
    """What to type next: measure the images, or the network if there is only a grid."""
    out = config.out
    if out and Path(out).suffix != ".npz":
        return [invocation.command_line("evaluate", "--images", out, "--data", "DATASET.zip")]
    steps = ("--steps", config.steps) if config.steps > 1 else ()
    vae = ("--vae", config.vae or "VAE") if latent else ()
    network = "--network", config.network, *steps, *vae
    return [
        invocation.command_line("generate", *network, "--seeds", "0-49999", "--out", "images.zip"),
        invocation.command_line("evaluate", *network, "--data", "DATASET.zip"),
    ]


main = cli.command(GenerateConfig, run, None, __doc__)

if __name__ == "__main__":
    cli.main(main, "sid_fast.generate")
