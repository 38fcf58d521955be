"""Feature networks: TorchScript files from uint8 images to features, or the pixels themselves."""

import contextlib
import hashlib
import io
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sid_fast.errors import UserError
from sid_fast.io.download import fetch

INCEPTION = (
    "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/"
    "inception-2015-12-05.pt"
)
# NVIDIA publishes no digest; a dozen unrelated public projects record this one.
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"


class Pixels:
    """Pixels in [-1, 1] as features: a measure for very small images."""

    name, key, batch = "pixels", "pixels", 1024

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Features [N, C·R·R] of uint8 images [N, C, R, R]."""
        return images.flatten(1).double() / 127.5 - 1

    def probabilities(self, features: torch.Tensor) -> torch.Tensor | None:
        return None


class Detector:
    """A TorchScript module from uint8 images [N, 3, R, R] to features [N, D].

    One that takes `return_features`, as the published Inception network does, is asked for them;
    a last layer called `output` gives class probabilities.
    """

    def __init__(self, module: torch.jit.ScriptModule, name: str, key: str, batch: int):
        self.module, self.name, self.key, self.batch = module, name, key, batch
        forward: Any = module.forward  # of a script module, which has a schema
        arguments = {a.name for a in forward.schema.arguments}
        self.options = {"return_features": True} if "return_features" in arguments else {}

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Features [N, D], float32, of uint8 images [N, C, R, R]; grey is repeated.

        The network always sees whole groups, the last one filled up, so that an image's features
        do not depend on how many images are looked at together.
        """
        images = images.expand(-1, 3, -1, -1)
        parts = []
        with exact_float32():
            for some in images.split(self.batch):
                rows = torch.arange(self.batch, device=images.device) % len(some)
                features = self.module(some[rows].contiguous(), **self.options)
                parts.append(features[: len(some)].flatten(1).float())
        return torch.cat(parts)

    @torch.no_grad()
    def probabilities(self, features: torch.Tensor) -> torch.Tensor | None:
        """Class probabilities [N, C], float64; None if there is no last layer to give them.

        Without the output bias, as the published Inception score has it.
        """
        output = getattr(self.module, "output", None)
        if output is None:
            return None
        return (features.double() @ output.weight.double().T).softmax(1)


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """float32 as it says: no TF32, no autocast, no rewriting of the graph between two calls."""
    cudnn, before = torch.backends.cudnn, torch.backends.cudnn.allow_tf32
    matmul = torch.get_float32_matmul_precision()
    cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    try:
        with (
            torch.autocast("cuda", enabled=False),
            torch.autocast("cpu", enabled=False),
            torch.jit.optimized_execution(False),
        ):
            yield
    finally:
        cudnn.allow_tf32 = before
        torch.set_float32_matmul_precision(matmul)


def load_detector(
    source: str, device: torch.device, trust: bool = False, batch: int | None = None
) -> Detector | Pixels:
    """The detector that --detector means: `pixels`, `inception`, or a TorchScript file or URL.

    TorchScript is code: a file whose sha256 is not known here is run only with `trust`. batch:
    images in every call. Raises UserError where there is no such file, or no trust in it.
    """
    if source == "pixels":
        return Pixels()
    inception = source == "inception"
    try:
        address = f"{INCEPTION}#sha256={INCEPTION_SHA256}"
        path = fetch(address if inception else source, " or one of inception, pixels")
    except UserError as error:
        hint = " as --detector; --detector pixels needs no file" if inception else ""
        raise UserError(f"{error}{hint}") from error
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    digest = hashlib.sha256(content).hexdigest()
    known = digest == INCEPTION_SHA256
    if not known and not trust:
        raise UserError(
            f"{source} is TorchScript, a program that would run here, and its sha256 {digest} is "
            "not a known one: give --trust if you trust where it comes from"
        )
    which = "the published Inception network" if known else f"sha256 {digest}, as you trust it"
    print(f"running the TorchScript code of {path}: {which}", file=sys.stderr)
    try:
        with warnings.catch_warnings():  # the formats to come do not read the published file
            warnings.simplefilter("ignore", DeprecationWarning)
            module = torch.jit.load(io.BytesIO(content), map_location=device)
    except (RuntimeError, ValueError) as error:
        first = str(error).strip().partition("\n")[0]
        raise UserError(f"{source} is damaged or not TorchScript ({first})") from None
    batch = batch or (512 if device.type == "cuda" else 64)
    name = "inception" if known else Path(path).stem
    return Detector(module.eval(), name, digest, batch)


def label(metric: str, detector: Detector | Pixels) -> str:
    """What a metric is called: FID, KID and IS are those of the published Inception network."""
    names = {
        "frechet_distance": ("FID", "Fréchet distance"),
        "kernel_distance": ("KID", "kernel distance"),
        "inception_score": ("IS", "class score"),
        "inception_score_std": ("IS std", "class score std"),
    }
    short, long = names.get(metric, (metric, metric))
    return short if detector.key == INCEPTION_SHA256 else f"{long} ({detector.name})"
