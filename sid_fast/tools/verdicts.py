"""A cache of tuning results, keyed by everything that they depend on."""

import functools
import hashlib
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from sid_fast.config.types import group_size
from sid_fast.errors import UserError
from sid_fast.io.atomic import atomic_path, remove_abandoned
from sid_fast.io.cache import user_cache
from sid_fast.io.untrusted import parse_json, read_limited
from sid_fast.kernels import _cuda, dispatch
from sid_fast.performance import mixed_precision
from sid_fast.tools import timing
from sid_fast.tools.proof import Job
from sid_fast.tools.trial import reference_kernel
from sid_fast.training.environment import installed, processor

# Whatever decides how a step runs, by folder or file of the package.
CODE = (
    "performance", "models", "methods", "training", "tools", "augment.py", "distiller.py",
    "losses.py", "noise.py",
)  # fmt: skip
SOURCES = (".py", ".cu", ".h", ".cpp")


def machine(name: str) -> dict[str, Any]:
    """Return the properties of a device that tuning results depend on.

    For a GPU also its free memory in bytes and its matrix rate, which are not part of the key.
    Opens the device, so call it in a child for a GPU.
    """
    device = torch.device(name)
    if device.type == "cpu":
        return {"device": processor(), "cores": cores(), "threads": torch.get_num_threads()}
    free, total = torch.cuda.mem_get_info(device)
    driver = Path("/proc/driver/nvidia/version")
    return {
        "tflops": matrix_rate(device),
        "device": torch.cuda.get_device_name(device),
        "memory": total,
        "free": free + torch.cuda.memory_reserved(device),
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
        "driver": driver.read_text().partition("\n")[0] if driver.exists() else "",
        "cudnn": torch.backends.cudnn.version(),
        "precision": mixed_precision.set_precision("auto", device),
    }


def matrix_rate(device: torch.device) -> float:
    """TFLOP/s of a matrix product."""
    kernel = reference_kernel(device)
    for _ in range(2):
        kernel()
    ms = min(timing.time_call(kernel, device)[0] for _ in range(3))
    return 2 * len(kernel.args[0]) ** 3 / ms / 1e9


def cores() -> int:
    """Count the CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def code() -> str:
    """A digest of what a step is made of."""
    sha = hashlib.sha256()
    root = Path(__file__).parents[1]
    for source in (Path(dispatch.__file__).parent, *(root / name for name in CODE)):
        files = [source] if source.is_file() else source.rglob("*")
        for path in sorted(p for p in files if p.suffix in SOURCES):
            sha.update(path.read_bytes())
    return sha.hexdigest()[:16]


def key(job: Job, found: dict[str, Any]) -> dict[str, Any]:
    """Collect everything that a result depends on."""
    settings, transient = job.settings, ("tflops", "free")
    return {
        **{name: value for name, value in found.items() if name not in transient},
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": installed("triton") or "",
        "library": _cuda.library() is not None,
        "code": code(),
        "network": job.network.to_dict(),
        "method": job.method,
        "asked precision": settings.precision,
        "dropout": settings.dropout,
        "augmentation": bool(settings.augment_p),
        "deterministic": job.deterministic,
        "layout": job.layout,
        "ranks": job.ranks,
        "images": job.share,
        "group": group_size(settings),
        "micro_batch": settings.micro_batch,
        "kernels": job.kernels,
        "cuda_graph": job.cuda_graph,
        "compile": job.compile,
        "recompute": job.recompute,
        "pinned": sorted(job.pinned),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
    }


def place(key: dict[str, Any]) -> Path:
    """The file of a verdict."""
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return user_cache() / "verdicts" / f"{name}.json"


def load(key: dict[str, Any]) -> tuple[Any, str]:
    """The rows stored under a key, or None; and a note if the file is damaged or foreign."""
    path = place(key)
    if not path.exists():
        return None, ""
    try:
        kept = parse_json(read_limited(path, 1 << 20))
        if kept["key"] == json.loads(json.dumps(key)):
            return kept["rows"], ""
        return None, f"{path} is of another machine or version"
    except (UserError, KeyError, TypeError) as error:
        return None, f"{path} is damaged ({str(error) or type(error).__name__})"


def save(key: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Store a result; return the reason if it cannot be written, else ""."""
    path = place(key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(path.parent)
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps({"key": key, "rows": rows}, indent=1), "utf-8")
    except OSError as error:
        return (
            f"{path.parent} cannot be written ({error.strerror}): set SID_FAST_CACHE to a folder "
            "you can write to"
        )
    except UserError as error:
        return str(error)
    return ""
