"""What a run records of its machine: libraries and device in config.json, memory in the log."""

import platform
import resource
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from sid_fast.performance import process_group


def environment(device: torch.device) -> dict[str, Any]:
    """Describe the libraries and hardware of this rank, as config.json holds them."""
    gpu = device.type == "cuda"
    total = torch.cuda.get_device_properties(device).total_memory if gpu else None
    return {
        "sid_fast": installed("sid-fast"),
        "torch": torch.__version__,
        "triton": installed("triton"),
        "cuda": torch.version.cuda if gpu else None,
        "python": platform.python_version(),
        "system": platform.platform(),
        "device": torch.cuda.get_device_name(device) if gpu else processor(),
        "device_gib": total and total / 2**30,
        "threads": torch.get_num_threads(),
        "processes": process_group.world_size(),
    }


def processor() -> str:
    """The CPU's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def peak_gib(device: torch.device) -> float:
    """Peak memory so far, GiB: what PyTorch has reserved on a GPU, or the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 2**30


def installed(package: str) -> str | None:
    """Return the version of a package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
