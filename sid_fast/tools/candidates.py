"""Ways to run a step, and in what order they are worth trying."""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from sid_fast.config.types import micro_batches
from sid_fast.io.untrusted import brief
from sid_fast.kernels import _apex, _cuda, dispatch
from sid_fast.kernels._triton import AVAILABLE

if TYPE_CHECKING:  # it imports this module
    from sid_fast.tools.proof import Job

# Operations of networks, of which a family uses some.
NETWORK_OPERATIONS = ("group_norm", "block", "attention", "mp", "weight_norm")
FUSED = ("block", "group_norm", "attention")  # what the fused block is made of


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A whole step's choices; they change how fast it is, and its numbers by rounding alone.

    kernels: the backend of each operation that --kernels leaves open. cudnn_search: cuDNN times its
    algorithms. micro_batch, threads: None leaves them as they are.
    """

    kernels: Mapping[str, str]
    cuda_graph: bool = False
    channels_last: bool = False
    cudnn_search: bool = False
    compile: bool = False
    micro_batch: int | None = None
    threads: int | None = None

    def apply(self, kernels: str, device: torch.device) -> None:
        """Set what holds for the whole process; kernels: what --kernels asks for."""
        dispatch.configure(kernels, device)
        dispatch.force(self.kernels)
        torch.backends.cudnn.benchmark = self.cudnn_search
        if self.threads:
            torch.set_num_threads(self.threads)

    def changed(self, **changes: Any) -> "Candidate":
        """Return a copy with changed fields; `kernels` is merged into the existing mapping."""
        kernels = {**self.kernels, **changes.pop("kernels", {})}
        return dataclasses.replace(self, kernels=kernels, **changes)

    def text(self, device: str) -> str:
        """Summarise what differs from eager steps on a device, in a few words."""
        kernels = {op: backend for op, backend in self.kernels.items() if backend != "eager"}
        fused = all(kernels.get(op) == "triton" for op in FUSED)
        if fused:
            kernels = {op: backend for op, backend in kernels.items() if op not in FUSED}
        backends = ["fused block"] * fused
        backends += [name_of(op, backend, device) for op, backend in kernels.items()]
        words = {
            "CUDA graphs": self.cuda_graph,
            "channels-last": self.channels_last,
            "cuDNN search": self.cudnn_search,
            "compiled blocks": self.compile,
            f"micro-batch {self.micro_batch}": self.micro_batch,
            f"{self.threads} threads": self.threads,
        }
        return ", ".join([*(backends or ["eager"]), *(word for word, on in words.items() if on)])


def name_of(operation: str, backend: str, device: str) -> str:
    """Name an operation's backend in tables; on a CPU, `cuda` is the library's C++."""
    if (backend, device) == ("cuda", "cpu"):
        return f"C++ {operation}"
    return f"{operation} {backend}"


def from_json(values: Any) -> Candidate:
    """ValueError for what is no candidate here."""
    hints = {f.name: f.default for f in dataclasses.fields(Candidate)}
    try:
        made = Candidate(**values)
        for op, backend in made.kernels.items():
            if backend not in backends_of(op):
                raise ValueError(f"{brief(op)} {brief(backend)} is not there")
    except (TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"no candidate: {error}") from error
    for name, default in hints.items():
        value = getattr(made, name)
        kind = bool if isinstance(default, bool) else int
        if name != "kernels" and not (value is None is default or type(value) is kind):
            raise ValueError(f"{name}={brief(value)}")
    for name, high in (("micro_batch", 2**24), ("threads", 1024)):
        value = getattr(made, name)
        if value is not None and not 1 <= value <= high:
            raise ValueError(f"{name}={brief(value)}")
    return made


def backends_of(operation: str) -> list[str]:
    """The backends of an operation that this machine has."""
    missing = {
        "apex": not _apex.installed(),
        "cuda": _cuda.library() is None,
        "triton": not AVAILABLE,
    }
    found = ["eager", *dispatch.OPERATIONS[operation]]
    return [name for name in found if not missing.get(name, False)]


def open_operations(kernels: str, device: torch.device) -> list[str]:
    """List the operations whose backend --kernels leaves open, except random numbers.

    Random numbers are identical in every backend; the device determines theirs.
    """
    with dispatch.forced(None):
        dispatch.configure(kernels, device)
        pinned = dispatch.pinned()
    return [op for op in dispatch.OPERATIONS if op not in pinned and op != "random"]


def operations(job: "Job") -> Iterator[tuple[str, str]]:
    """Yield each (operation, backend) besides eager that can run here and has work to do."""
    device = torch.device(job.device)
    cuda = device.type == "cuda"
    for op in open_operations(job.kernels, device):
        idle = op == "augment" and not job.settings.augment_p
        idle |= op == "sida_loss" and job.method != "sida"
        idle |= op in NETWORK_OPERATIONS and op not in job.network.operations
        for backend in backends_of(op)[1:]:
            host_only = backend == "cuda" and op in dispatch.HOST_ONLY
            if not idle and (not host_only if cuda else backend == "cuda"):
                yield op, backend


def restores_defaults(before: Candidate, after: Candidate, device: str) -> bool:
    """Whether all that changes from one to the other is that operations get their defaults."""
    usual = dispatch.DEFAULTS[torch.device(device).type]
    changed = {op: b for op, b in after.kernels.items() if before.kernels.get(op) != b}
    defaults = all(usual.get(op, "eager") == backend for op, backend in changed.items())
    return bool(changed) and defaults and after == before.changed(kernels=changed)


Change = tuple[str, dict[str, Any]]  # a name, and what it changes of a Candidate


def shortlist(job: "Job", base: Candidate, proven: list[tuple[str, str]]) -> list[Change]:
    """List changes to try on the best candidate so far, safest first.

    base: the candidate that came first; proven: operations and backends that are right alone.
    """
    single = [(op, backend) for op, backend in proven if op != "block"]
    usual = dispatch.DEFAULTS[torch.device(job.device).type]
    kernels: list[Change] = []
    # Together, as each alone may gain less than steps vary by.
    defaults = {op: backend for op, backend in single if usual.get(op) == backend}
    if len(defaults) > 1:
        kernels.append(("defaults", {"kernels": defaults}))
    kernels += [(name_of(op, b, job.device), {"kernels": {op: b}}) for op, b in single]
    if job.device == "cpu":
        changes = [*kernels, ("channels-last", {"channels_last": True})]
        now, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
        if "OMP_NUM_THREADS" not in os.environ:
            counts = sorted({1, max(cores // 2, 1), cores} - {now}, reverse=True)
            changes += [(f"{n} threads", {"threads": n}) for n in counts]
        return changes
    changes = [("CUDA graphs", {"cuda_graph": True}), *kernels]
    if all((op, "triton") in proven for op in FUSED):
        changes.append(("fused block", {"kernels": dict.fromkeys(FUSED, "triton")}))
    changes += [
        ("channels-first", {"channels_last": False}),
        ("cuDNN search", {"cudnn_search": True}),
    ]
    now = base.micro_batch or job.share
    for size in reversed(micro_batches(job.settings, job.ranks)):
        if size >= 2 * now:
            changes.append((f"micro-batch {size}", {"micro_batch": size}))
            now = size
    changes.append(("compiled blocks", {"compile": True}))
    pinned = job.pinned | ({"cudnn_search"} if job.deterministic else set())
    return [(name, change) for name, change in changes if not pinned & set(change)]
