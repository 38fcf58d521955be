"""Feature extractors: TorchScript networks on uint8 images, or the raw pixels."""

import contextlib
import hashlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sid_fast.errors import UserError
from sid_fast.io import streams
from sid_fast.io.download import fetch
from sid_fast.io.untrusted import describe, read_limited, sniff

INCEPTION = (
    "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/"
    "inception-2015-12-05.pt"
)
# NVIDIA publishes no digest; a dozen unrelated public projects record this one.
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"


MAX_BYTES = 2**33  # of a TorchScript file; the Inception network has 96 MB


class Pixels:
    """Raw pixels in [-1, 1] as features, for very small images."""

    name, key, batch = "pixels", "pixels", 1024

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Convert uint8 images [N, C, R, R] to float64 features [N, C·R·R]."""
        return images.flatten(1).double() / 127.5 - 1

    def probabilities(self, features: torch.Tensor) -> torch.Tensor | None:
        """None: pixels have no classes."""
        return None


class Detector:
    """A TorchScript module that maps uint8 images [N, 3, R, R] to features [N, D].

    If its forward has an argument `return_features`, as NVIDIA's Inception network does, it is
    called with True. If it has a last layer `output`, that gives class probabilities.

    Args:
        module: the TorchScript module, in eval mode, on its device.
        name: shown in metric labels.
        key: sha256 of its file; identifies cached and saved statistics.
        batch: images per call of the module.
    """

    def __init__(self, module: torch.jit.ScriptModule, name: str, key: str, batch: int):
        self.module, self.name, self.key, self.batch = module, name, key, batch
        forward: Any = module.forward  # a ScriptMethod: type stubs leave out its schema
        arguments = {a.name for a in forward.schema.arguments}
        self.options = {"return_features": True} if "return_features" in arguments else {}

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Extract float32 features [N, D] of uint8 images [N, C, R, R]; C = 1 is repeated to 3.

        The module always gets full batches, the last one padded, so an image's features do not
        depend on the number of images passed in.
        """
        images = images.expand(-1, 3, -1, -1)
        chunks = []
        with exact_float32():
            for chunk in images.split(self.batch):
                rows = torch.arange(self.batch, device=images.device) % len(chunk)
                features = self._run(chunk[rows].contiguous())
                chunks.append(features[: len(chunk)].flatten(1).float())
        return torch.cat(chunks)

    def _run(self, images: torch.Tensor) -> torch.Tensor:
        """Call the module; UserError unless it gives a row of numbers for each image."""
        given = f"uint8 images {list(images.shape)}"
        try:
            features = self.module(images, **self.options)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the module is another's program
            reason = str(error).strip().rpartition("\n")[2][:200]
            raise UserError(
                f"detector {self.name} fails on {given} ({reason}): give another --detector"
            ) from error
        if not isinstance(features, torch.Tensor):
            what = f"a {type(features).__name__}"
        elif features.layout != torch.strided or features.is_complex() or features.is_quantized:
            what = f"a tensor of {features.dtype} in the layout {features.layout}"
        elif features.dim() < 2 or len(features) != len(images) or not features.numel():
            what = f"a tensor of shape {list(features.shape)}"
        else:
            return features
        raise UserError(
            f"detector {self.name} gives {what} for {given}, not features [{len(images)}, D]: give "
            "another --detector"
        )

    @torch.no_grad()
    def probabilities(self, features: torch.Tensor) -> torch.Tensor | None:
        """Float64 class probabilities [N, C] of features [N, D]; None without an `output` layer.

        The layer must have D inputs. Its bias is left out, as in the upstream Inception score.
        """
        weight = getattr(getattr(self.module, "output", None), "weight", None)
        if not isinstance(weight, torch.Tensor) or weight.dim() != 2:
            return None
        if weight.shape[1] != features.shape[1]:
            return None
        return (features.double() @ weight.double().T).softmax(1)


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Compute in full float32: no TF32, no autocast, no TorchScript graph optimisation."""
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
    """Load the feature extractor that --detector names.

    Args:
        source: `pixels`, `inception`, or the path or https URL of a TorchScript file.
        device: where it runs.
        trust: run a file whose sha256 is unknown. TorchScript is code.
        batch: images per call; default 512 on a GPU, 64 on a CPU.

    Raises:
        UserError: the file is missing, damaged, or unknown and not trusted.
    """
    if source == "pixels":
        return Pixels()
    inception = source == "inception"
    try:
        url = f"{INCEPTION}#sha256={INCEPTION_SHA256}"
        path = fetch(url if inception else source, " or one of inception, pixels")
    except UserError as error:
        hint = " as --detector; --detector pixels needs no file" if inception else ""
        raise UserError(f"{error}{hint}") from error
    content = read_limited(path, MAX_BYTES)
    digest = hashlib.sha256(content).hexdigest()
    known = digest == INCEPTION_SHA256
    if not known and not trust:
        raise UserError(
            f"{source} is TorchScript, a program that would run on this machine, and its sha256 "
            f"{digest} is not a known one: give --trust if you trust its source"
        )
    which = "NVIDIA's Inception network" if known else f"sha256 {digest}, allowed by --trust"
    streams.note(f"running the TorchScript code of {path}: {which}")
    try:
        with warnings.catch_warnings():  # torch.jit is deprecated, but NVIDIA's file is TorchScript
            warnings.simplefilter("ignore", DeprecationWarning)
            module = torch.jit.load(io.BytesIO(content), map_location=device).eval()
        batch = batch or (512 if device.type == "cuda" else 64)
        return Detector(module, "inception" if known else Path(path).stem, digest, batch)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # damaged bytes can fail in any way
        reason = str(error).strip().partition("\n")[0][:200]
        kind = sniff(content)
        what = "damaged or not TorchScript"
        if kind not in ("torch", "zip", "unknown"):
            what = f"{describe(kind)} and not TorchScript"
        raise UserError(
            f"{source} is {what} ({reason}): give a file of torch.jit.save, or download it again"
        ) from None


def label(metric: str, detector: Detector | Pixels) -> str:
    """Display name of a metric; FID, KID and IS only with NVIDIA's Inception network."""
    names = {  # with the Inception network, with another detector
        "frechet_distance": ("FID", "Fréchet distance"),
        "kernel_distance": ("KID", "kernel distance"),
        "inception_score": ("IS", "class score"),
        "inception_score_std": ("IS std", "class score std"),
    }
    short, long = names.get(metric, (metric, metric))
    return short if detector.key == INCEPTION_SHA256 else f"{long} ({detector.name})"
