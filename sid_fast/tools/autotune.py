"""Choose the fastest implementation of a run's steps that is proven correct on this machine."""

import dataclasses
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sid_fast.config.types import grad_accum_steps, micro_batches
from sid_fast.errors import UserError
from sid_fast.io import progress, streams
from sid_fast.io.untrusted import brief
from sid_fast.models import NetworkConfig
from sid_fast.performance import process_group
from sid_fast.tools import op_counter, verdicts
from sid_fast.tools.candidates import Candidate, from_json, open_operations
from sid_fast.tools.estimator import FORWARDS, GIB
from sid_fast.tools.isolation import Child, Failed
from sid_fast.tools.proof import Job
from sid_fast.tools.tournament import LIMIT, NOT_TRIED, Row, Say, Tournament, best
from sid_fast.training.checkpoint import read_header

BUDGET_FRACTION = 0.01  # of the run's estimated time
BUDGET_MINUTES = {"cuda": (2.0, 10.0), "cpu": (0.75, 10.0)}  # minimum and maximum
MIN_RUN_BUDGETS = 20  # auto tunes only runs at least this many budgets long
ASSUMED_MFU = 0.3  # fraction of the measured matrix rate, to estimate a run's length


def agreed(answers: list[list[Row]]) -> Row | None:
    """Combine the results of all nodes into one.

    Returns the fastest of the first node's winners that every other node also proved correct and
    timed; None if there is none.
    """
    others = [[row.candidate for row in rows if not row.wrong and row.ms] for rows in answers[1:]]
    for row in reversed(answers[0] if answers else []):
        if row.won and all(row.candidate in each for each in others):
            return row
    return None


def job_of(
    config: Any, given: set[str], network: NetworkConfig, settings: Any, device: torch.device,
    open_micro_batch: bool,
) -> Job:  # fmt: skip
    """Build the tuning job for the options of a run (config.types.StepOptions and RunOptions)."""
    pinned = {
        "cuda_graph": config.cuda_graph != "auto" or config.parallel in ("fsdp", "hsdp"),
        "compile": config.compile or "compile" in given,
        "micro_batch": not open_micro_batch,
    }
    return Job(
        network, settings, str(device), kernels=config.kernels, compile=config.compile,
        cuda_graph=config.cuda_graph == "on", recompute=config.checkpoint_activations,
        deterministic=config.deterministic, layout=config.parallel,
        ranks=process_group.world_size(),
        pinned=frozenset(name for name, is_pinned in pinned.items() if is_pinned),
    )  # fmt: skip


@dataclasses.dataclass
class Tuning:
    """The decision. candidate: None keeps the defaults; text: for the headline."""

    candidate: Candidate | None = None
    text: str = ""
    machine: dict[str, Any] = dataclasses.field(default_factory=dict)
    rows: list[Row] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """As config.json and a state's header hold it."""
        candidate = self.candidate and dataclasses.asdict(self.candidate)
        rows = [row.to_json() for row in self.rows]
        return {"candidate": candidate, "text": self.text, "machine": self.machine, "rows": rows}


def for_run(
    config: Any, given: set[str], settings: Any, network: Callable[[], NetworkConfig],
    device: torch.device, resume: Path | None, open_micro_batch: bool,
) -> Tuning:  # fmt: skip
    """Decide how a run takes its steps; all ranks decide the same, in a process group of its own.

    Args:
        config: the run's options (config.types.StepOptions and RunOptions).
        given: names of the fields that the command line set.
        settings: of the run's method.
        network: returns the network's configuration; it may download.
        device: the run's, not opened yet.
        resume: the checkpoint to resume, if any.
        open_micro_batch: whether the run leaves its micro-batch open.
    """
    ranks = process_group.launch().world_size
    grad_accum_steps(settings, ranks)
    saved = read_header(resume).get("tuning", {}) if resume else None
    # A run that torchrun restarts continues as it was, whatever its command says.
    mode = "auto" if resume and "resume" not in given else config.tune
    idle = mode == "auto" and device.type == "cpu" and ranks > 1 and not (saved or {}).get("rows")
    if mode == "off" or idle:
        return Tuning()
    tuning = progress.phase("looking for a faster way to take steps")
    with process_group.joined(torch.device("cpu"), "ddp", config.timeout, "tuning"), tuning:
        with process_group.main_process_first():
            net = network()
        job = job_of(config, given, net, settings, device, open_micro_batch)
        return decide(job, mode, config.kimg, config.tune_minutes, saved)


def inspect(job: Job) -> dict[str, Any]:
    """Describe the machine; a GPU is opened in a child. UserError if it cannot be used."""
    if job.device == "cpu":
        return verdicts.machine(job.device)
    try:
        with Child(partial, verdicts.machine, job.device) as child:
            return child.call("__call__", limit=LIMIT)
    except Failed as failed:
        raise UserError(f"device={job.device} cannot be used: {failed}") from None


def notes_on(machine: dict[str, Any], precision: str) -> list[str]:
    """What a user should know of a GPU before its figures."""
    notes = []
    free, memory = machine.get("free"), machine.get("memory")
    if free and memory and free < 0.9 * memory:
        notes.append(
            f"the GPU is busy: others hold {(memory - free) / GIB:.1f} of {memory / GIB:.1f} GiB, "
            "and slow down what is measured"
        )
    if precision == "auto" and machine.get("precision") == "fp32":
        notes.append(
            f"this GPU (compute capability {machine['capability']}) has no bf16: --precision fp16 "
            "is its fast type"
        )
    return notes


def run_seconds(job: Job, kimg: float, machine: dict[str, Any]) -> float:
    """How long a run of so many thousand images is estimated to take on such GPUs."""
    forward = sum(op.flops for op in op_counter.forward(job.network, "fp32", "eager"))
    flop = FORWARDS[job.method] * forward
    rate = machine.get("tflops") or verdicts.matrix_rate(torch.device(job.device))
    return kimg * 1000 / job.ranks * flop / (ASSUMED_MFU * rate * 1e12)


def _say(line: str) -> None:
    streams.note(line, sys.stdout)


def decide(
    job: Job, mode: str, kimg: float, minutes: float | None, saved: Any = None, say: Say = _say
) -> Tuning:
    """Use the result of the resumed state, a cached one, or a new one.

    Every rank calls this and gets the same decision.

    Args:
        job: what is tuned.
        mode: "auto", or "again" to tune in any case.
        kimg: length of the run.
        minutes: the budget; default: BUDGET_FRACTION of the run.
        saved: the "tuning" entry of the resumed state's header.
        say: prints a line.
    """
    if saved is not None and not saved.get("candidate") and mode == "auto":
        return Tuning(text="not tuned")  # as before
    tuning, local = Tuning(), int(os.environ.get("LOCAL_RANK", 0))
    say = say if process_group.rank() == 0 else (lambda line: None)
    rows = [] if local else _node(job, mode, kimg, minutes, saved, say, tuning)
    answers = process_group.gather_objects((local, rows, tuning))
    nodes = [rows for local, rows, _ in answers if local == 0]
    _, _, tuning = answers[0]
    own, chosen = best(nodes[0]), agreed(nodes)
    if chosen is None:
        tuning.text = tuning.text or "not tuned: no candidate is right on every node"
        return tuning
    if own and chosen is not own:
        tuning.notes.append(f"{own.name} is not right on every node: {chosen.name} is taken")
    tuning.candidate = chosen.candidate
    first = next(row for row in tuning.rows if row.ms)
    gain = (chosen.img_s or 0) / (first.img_s or 1)
    what = chosen.candidate.text(job.device)
    tuning.text = f"tuned: {what} ({gain:.2f} times {first.name}{tuning.text})"
    return tuning


def _node(
    job: Job, mode: str, kimg: float, minutes: float | None, saved: Any, say: Say, tuning: Tuning
) -> list[Row]:
    """This node's candidates, by its first process."""
    tuning.machine = machine = inspect(job)
    tuning.notes = notes_on(machine, job.settings.precision)
    key = verdicts.key(job, machine)
    if mode == "auto":
        if rows := _of_state(saved, job, tuning) or _kept(key, tuning):
            return rows
        if job.device == "cpu":
            tuning.text = "not tuned"
            return []
    length = run_seconds(job, kimg, machine)
    low, high = BUDGET_MINUTES[torch.device(job.device).type]
    seconds = 60 * (minutes or min(max(length * BUDGET_FRACTION / 60, low), high))
    if mode == "auto" and length < MIN_RUN_BUDGETS * seconds:
        tuning.text = f"not tuned: the run is estimated at {length / 60:.0f} min"
        return []
    columns = f"{'a step':>12}  {'':>15}  {'at most':>10}"
    say(f"{'candidate':34} {'right':16} {columns}  <: the best so far")
    rows = tuning.rows = Tournament(job, seconds, machine.get("memory", 0), say).run()
    if not best(rows):
        memory = f", {machine['memory'] / GIB:.1f} GiB" if "memory" in machine else ""
        tuning.text = f"not tuned: not even eager steps run here ({rows[-1].wrong}{memory})"
        return []
    if rows[-1].wrong == NOT_TRIED and sum(row.ms is not None for row in rows) == 1:
        tuning.text = f"not tuned: {seconds / 60:.2g} min are too short for a verdict"
        return []
    if problem := verdicts.save(key, [row.to_json() for row in rows]):
        tuning.notes.append(f"the verdict is not kept: {problem}")
    return rows


def _of_state(saved: Any, job: Job, tuning: Tuning) -> list[Row]:
    """The verdict of a state, where the GPU is the same; options given since then override it."""
    if not saved:
        return []
    there = saved.get("machine")
    there = there if isinstance(there, dict) else {}
    if any(there.get(name) != tuning.machine.get(name) for name in ("device", "memory")):
        device = brief(there.get("device"))
        tuning.notes.append(f"the state's verdict is of {device}: not taken here")
        return []
    try:
        tuning.rows = _rows(saved.get("rows"))
        candidate = from_json(saved.get("candidate"))
        adapted = _adapted(candidate, job)
    except ValueError as error:
        tuning.rows = []
        tuning.notes.append(f"the state's verdict cannot be taken here: {error}")
        return []
    tuning.text = ", of the state"
    rows = [row for row in tuning.rows if row.candidate == candidate]
    return [dataclasses.replace(row, candidate=adapted, won=True) for row in rows]


def _adapted(candidate: Candidate, job: Job) -> Candidate:
    """Return a state's candidate without what the user has decided since then.

    Raises:
        ValueError: --kernels or the number of ranks leave no place for it.
    """
    if set(candidate.kernels) != set(open_operations(job.kernels, torch.device(job.device))):
        raise ValueError(f"it is of another --kernels, not {job.kernels}")
    changes: dict[str, Any] = {}
    if "micro_batch" in job.pinned:
        changes["micro_batch"] = None
    elif (size := candidate.micro_batch) and size not in micro_batches(job.settings, job.ranks):
        raise ValueError(f"its micro-batch of {size} does not divide the {job.share} images here")
    if "compile" in job.pinned:
        changes["compile"] = job.compile
    if job.deterministic:
        changes["cudnn_search"] = False
    return candidate.changed(**changes)


def _rows(values: Any) -> list[Row]:
    """Read the rows of a verdict; ValueError for what is none."""
    if not isinstance(values, list):
        raise ValueError("it has no rows")
    rows = [Row.from_json(row) for row in values]
    if not any(row.ms for row in rows):
        raise ValueError("it has no figures")
    return rows


def _kept(key: dict[str, Any], tuning: Tuning) -> list[Row]:
    """The rows that were kept on this machine."""
    found, note = verdicts.load(key)
    try:
        tuning.rows = [] if found is None else _rows(found)
    except ValueError as error:
        note = f"{verdicts.place(key)} is damaged ({error})"
    if note:
        tuning.notes.append(f"{note}: ignored, and replaced by the next tuning")
    if not best(tuning.rows):
        return []
    tuning.text = ", kept"
    return tuning.rows
