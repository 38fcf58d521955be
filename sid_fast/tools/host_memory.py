"""The memory of this machine, and refusal of work that would not fit in it."""

import contextlib
import math
import os
import resource
from pathlib import Path

import torch

from sid_fast.errors import UserError
from sid_fast.evaluation.sample import MAX_FEATURES
from sid_fast.models import NetworkConfig
from sid_fast.sampling import group_size

GIB = 2**30
CGROUP_LIMITS = (  # of a container: version 2 and 1
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def host_memory() -> int:
    """Bytes this process may use: the machine's memory, or less in a container or with ulimit."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # missing, or "max"
            limits.append(int(path.read_text()))
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return min(limits if soft == resource.RLIM_INFINITY else [*limits, soft])


def require(nbytes: float, what: str, instead: str) -> None:
    """Raise UserError if `what` needs more bytes than host_memory(); `instead` is the way out.

    Linux grants more memory than there is and kills the process when it is used, so nothing can be
    caught later.
    """
    if nbytes > (available := host_memory()):
        raise UserError(
            f"{what} would take about {nbytes / GIB:,.0f} GiB of memory, and this machine has "
            f"{available / GIB:.0f}: {instead}"
        )


def require_features(shape: tuple[int, int, int], images: int, detector: str) -> None:
    """Raise UserError if the statistics of --detector pixels cannot fit in memory.

    Args:
        shape: Of an image, [C, H, W].
        images: In a sample set.
        detector: Of the command; other detectors have few features.
    """
    if detector == "pixels":
        features = math.prod(shape)
        stored = 4 * min(images, MAX_FEATURES) * features
        require(
            2 * stored + 4 * 8 * features**2,  # gathered; products, covariances
            f"statistics of {images:,} images of {features:,} pixel values",
            "use another --detector, or fewer images",
        )


def least_forward_bytes(network: NetworkConfig, images: int) -> int:
    """A lower bound of a forward pass's bytes: the skips and two feature maps, in float32."""
    maps = [
        network.model_channels * multiplier * (network.resolution >> level) ** 2
        for level, multiplier in enumerate(network.channel_mult)
    ]
    return 4 * images * (network.num_blocks * sum(maps) + 2 * max(maps))


def require_forward(network: NetworkConfig, device: torch.device) -> None:
    """Raise UserError if generating a batch of images on a CPU cannot fit in its memory."""
    if device.type == "cpu":
        images = group_size(device, network.resolution)
        require(
            least_forward_bytes(network, images),
            f"generating {images} images with a {network} network",
            "use a GPU or a smaller network",
        )
