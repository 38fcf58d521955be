"""The training loop: progress, logs, snapshots, states, signals and failures."""

import contextlib
import dataclasses
import json
import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from tqdm import tqdm

from sid_fast.config.types import RunOptions, ema_stds, recorded, smaller_micro_batch
from sid_fast.errors import OutOfMemory, RunFailed, UserError, WriteFailed
from sid_fast.io import invocation, progress, streams
from sid_fast.io.atomic import atomic_path
from sid_fast.io.lock import RunLock
from sid_fast.io.terminal import replaces_lines
from sid_fast.performance import determinism, process_group, ranges
from sid_fast.performance.compile import compiled_graphs
from sid_fast.training.checkpoint import (
    PATTERN,
    States,
    Trainer,
    changed_rates,
    load_state,
    remove_partial_files,
    restart_count,
    run_record,
    torchrun_run_id,
)
from sid_fast.training.environment import environment, peak_gib
from sid_fast.training.logging import Log, read_log
from sid_fast.training.profile import StepTrace
from sid_fast.training.sinks import FINISH_SECONDS, open_sinks

Artifact = tuple[str, Callable[[Path], dict[str, float]]]  # "snapshot" or "evaluation"

MAX_FAILED_STEPS = 20  # failed steps in a row after which a run stops
FAULT_METRICS = ("dropped", "nonfinite", "skipped", "failed")  # summed between log lines
SAVE_RATE = 100e6  # bytes/s: a slow disk's, until a save was timed
TIME_IS_UP = 75  # exit status of --max-hours: EX_TEMPFAIL of sysexits.h, "try again later"


def open_folder(options: RunOptions, name: str, resume: Path | None) -> Path:
    """Create the run folder; default: the next number below runs/.

    Raises:
        UserError: The folder is not writable, or holds another run.
    """
    folder = Path(options.out) if options.out else None
    refuse_other_run(folder, resume)
    try:
        if folder is None:
            number = process_group.broadcast_from_rank0(lambda: _next_number(name))
            folder = Path("runs") / f"{number:03d}-{name}"
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(
            f"out={folder} cannot be written ({error.strerror}); use another --out"
        ) from None
    return folder


def refuse_other_run(folder: str | Path | None, resume: Path | None) -> None:
    """Raise UserError if the folder of a new run holds one; called before anything takes long."""
    if folder is None:
        return
    folder = Path(folder)
    if any(folder.glob(PATTERN)) and not (resume and folder.samefile(resume.parent)):
        raise UserError(
            f"{folder} already holds a run: use --resume {folder} to continue it, or another --out "
            "for a new one"
        )


@contextlib.contextmanager
def locked(folder: Path, resume: Path | None) -> Iterator[RunLock | None]:
    """Lock a run folder for all ranks; yields the lock on rank 0.

    Raises:
        UserError: Another process writes to it; on all ranks.
    """
    lock, problem = None, ""
    if process_group.rank() == 0:
        try:
            lock = RunLock(folder, torchrun_run_id(), restart_count())
        except UserError as error:
            problem = str(error)
    with lock or contextlib.nullcontext():
        if problem := process_group.first_text(problem):
            raise UserError(problem)
        refuse_other_run(folder, resume)  # one that ended while this one started
        yield lock


def _next_number(name: str) -> int:
    """Create the next numbered folder; safe against concurrent runs."""
    number = max((int(d.name[:3]) for d in Path("runs").glob("[0-9][0-9][0-9]-*")), default=-1)
    while True:
        number += 1
        with contextlib.suppress(FileExistsError):
            Path(f"runs/{number:03d}-{name}").mkdir(parents=True)
            return number


# What a run folder offers at its end: the newest of each sort.
MADE = (
    "best-*.safetensors", "snapshot-*.safetensors", "samples-*.png", "distance.png", "log.jsonl",
    "tensorboard", "profile",
)  # fmt: skip


def made_by(folder: Path) -> list[Path]:
    """The files and folders of a run that a user looks for, those that exist."""
    return [sorted(paths)[-1] for kind in MADE if (paths := list(folder.glob(kind)))]


@contextlib.contextmanager
def signals(nothing_to_save: Callable[[], bool]) -> Iterator[list[signal.Signals]]:
    """Collect SIGTERM, SIGINT and SIGHUP in a list, to be read between steps.

    While there is nothing to save, a signal exits at once (SystemExit), even during compilation.
    Otherwise the first one restores the default handlers, so that a second one kills. Not under
    torchrun: there Ctrl-C arrives twice, from the terminal and from torchrun, which kills processes
    that do not exit in time.
    """
    caught: list[signal.Signals] = []

    def catch(number: int, frame: object) -> None:
        if nothing_to_save():
            raise SystemExit(128 + number)
        caught.append(signal.Signals(number))
        told = f"{caught[-1].name}: the run stops after this step or evaluation, its state saved"
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            restore()
            told += "; a second signal stops it at once"
        progress.announce(told)

    def restore() -> None:
        for s, handler in before.items():
            signal.signal(s, handler)

    numbers = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # set by nohup
        numbers.append(signal.SIGHUP)
    before = {s: signal.signal(s, catch) for s in numbers}
    try:
        yield caught
    finally:
        restore()


class Throughput:
    """Measures steps per second between two readings, without paused time."""

    def __init__(self) -> None:
        self.start, self.steps = time.perf_counter(), 0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the block's time."""
        began = time.perf_counter()
        yield
        self.start += time.perf_counter() - began

    def read(self) -> float:
        """Return steps per second since the last reading."""
        now = time.perf_counter()
        rate = self.steps / (now - self.start)
        self.start, self.steps = now, 0
        return rate


def start_options(options: RunOptions) -> tuple[str, ...]:
    """The options that a run does not resume with, and that its next command should repeat."""
    return ("--log-to", options.log_to) if options.log_to != "tensorboard" else ()


class TimeLimit:
    """--max-hours: tells when to stop so that a state is complete in time.

    Counts the longest save and step so far, and a twentieth of the time, at most half a minute, for
    what nobody measures.

    Args:
        hours: From the start of the process; None: no limit.
        state_bytes: Size of a state, which estimates the first save.
    """

    def __init__(self, hours: float | None, state_bytes: int = 0):
        self.hours = hours
        self.end = math.inf
        if hours is not None:
            self.end = invocation.started() + 3600 * hours - min(30.0, 180 * hours)
        self.estimate, self.save_seconds = state_bytes / SAVE_RATE, 0.0
        self.step_seconds = 0.0
        self._stepped = self._saving = math.nan

    def save_begun(self) -> None:
        """Call when a save begins."""
        self._saving = time.monotonic()

    def save_ended(self) -> None:
        """Call when a save is complete; without one in progress, it does nothing."""
        if not math.isnan(self._saving):
            self.save_seconds = max(self.save_seconds, time.monotonic() - self._saving)
        self._saving = math.nan

    def stepped(self) -> None:
        """Call after every step."""
        now = time.monotonic()
        if not math.isnan(self._stepped):
            self.step_seconds = max(self.step_seconds, now - self._stepped)
        self._stepped = now

    def paused(self) -> None:
        """Call after work between two steps, which must not count as a step."""
        self._stepped = time.monotonic()

    def is_up(self, more: float = 0.0) -> bool:
        """Whether another step, `more` seconds of work and a save no longer fit."""
        save = self.save_seconds or self.estimate
        return time.monotonic() + self.step_seconds + save + more >= self.end


class InputWaits:
    """The share of this rank's steps that waited for real images, since the last reading."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self._last = self._now()

    def _now(self) -> tuple[int, int]:
        feed = self.trainer.method.feed
        return self.trainer.steps, feed.waits if feed else 0

    def read(self) -> float:
        """Return the share, from 0 to 1, and start over."""
        (steps, waits), self._last = self._last, self._now()
        return (self._last[1] - waits) / max(self._last[0] - steps, 1)


class Loop:
    """Runs a trainer to its end and writes logs, snapshots and states into a run folder.

    Args:
        trainer: What to train.
        options: Options of the run.
        snapshot: Called with the folder every --snapshot-every kimg, on all ranks; returns metrics.
        name: Suffix of the default run folder's name.
        headline: Describes the run: a line, and perhaps further ones.
        evaluate: Like snapshot, called every --eval-every kimg and at the end.
        extra: Further entries of config.json and of the states' headers.
    """

    def __init__(
        self,
        trainer: Trainer,
        options: RunOptions,
        snapshot: Callable[[Path], dict[str, float]],
        name: str,
        headline: str,
        evaluate: Callable[[Path], dict[str, float]] | None = None,
        extra: Mapping[str, Any] = MappingProxyType({}),
    ):
        self.trainer, self.options = trainer, options
        self.snapshot, self.evaluate = snapshot, evaluate
        self.name, self.headline, self.extra = name, headline, dict(extra)
        self.end = round(options.kimg * 1000)
        self.throughput = Throughput()
        size = sum(v.numel() * v.element_size() for v in trainer.state_dict().values())
        self.limit = TimeLimit(options.max_hours, size)
        self.limit.end -= FINISH_SECONDS if options.log_to == "wandb" else 0.0
        self.took: dict[str, float] = {}  # the longest seconds of each sort of callback
        self.parts: list[str] = []  # of the progress line
        self.throttle = process_group.host_throttle(trainer.device)

    def run(self, resume: Path | None = None) -> bool:
        """Run to the end, from the start or from the state `resume`.

        Files that cannot be written during the run only cause a warning.

        Returns:
            Whether there was anything left to do.

        Raises:
            SystemExit: A signal (code 128 + signal) or --max-hours (TIME_IS_UP) stopped the run;
                its state is saved.
            RunFailed: Too many steps in a row failed, or a file at the end cannot be written.
            UserError: The first file cannot be written, or the device is out of memory; then it
                suggests a smaller micro-batch.
        """
        if restart_count() and self.limit.is_up():  # torchrun restarts whoever leaves with a status
            raise SystemExit(TIME_IS_UP)
        self.folder = open_folder(self.options, self.name, resume)
        with locked(self.folder, resume) as self.lock:
            header = None
            if resume:
                with progress.phase(f"reading {resume}"):
                    header = load_state(resume, self.trainer)
            missing = self._missing() if resume else []
            if self.trainer.images >= self.end and not missing:
                if process_group.rank() == 0:
                    remove_partial_files(self.folder)
                    streams.say(self._finished())
                return False
            self._run(resume, header, missing)
            return True

    def _finished(self) -> str:
        done = f"{self.trainer.images / 1000:g} kimg"
        return f"{self.folder} is finished at {done}: give a larger --kimg to continue it"

    def _missing(self) -> list[Artifact]:
        """Return the snapshot and the evaluation of the resumed state that a kill prevented."""
        before = self.trainer.images - self.trainer.settings.batch_size
        missing: list[Artifact] = []
        files = f"snapshot-{self.trainer.images:010d}*.safetensors"
        emas = max(1, len(ema_stds(self.trainer.settings)))
        if self.trainer.images >= self.end and process_group.broadcast_from_rank0(
            lambda: int(len(list(self.folder.glob(files))) < emas)
        ):
            missing.append(("snapshot", self.snapshot))
        evaluate = self._evaluation(before)
        if evaluate and not process_group.broadcast_from_rank0(self._evaluated):
            missing.append(("evaluation", evaluate))
        return missing

    def _run(
        self, resume: Path | None, header: dict[str, Any] | None, missing: list[Artifact]
    ) -> None:
        self.options = dataclasses.replace(self.options, out=str(self.folder), resume=None)
        first = process_group.rank() == 0
        keep = self.options.keep_states
        self.states = States(self.folder, self.trainer, self.options, keep, self.extra)
        if first:
            remove_partial_files(self.folder)
            machine = {"headline": self.headline, "environment": environment(self.trainer.device)}
            config = recorded(self.options) | run_record() | self.extra | machine
            text = json.dumps(config, indent=2, ensure_ascii=False)
            with atomic_path(self.folder / "config.json") as temporary:
                temporary.write_text(text + "\n", "utf-8")
        process_group.barrier()
        if not (self.folder / "config.json").exists():
            raise UserError(
                f"out={self.folder} of process {process_group.rank()} is not the folder of process "
                "0: use one on a file system that all nodes share"
            )
        with contextlib.ExitStack() as stack:
            stack.enter_context(determinism.refusals())
            self.log: Log | None = None
            self.trace: StepTrace | None = None
            if first:
                sinks = open_sinks(self.options.log_to, self.folder, config)
                log = Log(self.folder, self.trainer.images if resume else -1, sinks)
                self.log = stack.enter_context(log)
            if first and self.options.profile:
                trace = StepTrace(self.folder, self.trainer.device, self.trainer.grad_accum_steps)
                self.trace = stack.enter_context(trace)
            self.started = self.trainer.steps
            caught = stack.enter_context(signals(self._nothing_to_save))
            stack.push(self._stopped_early)
            title, *more = self.headline.splitlines()
            self._print("\n".join([f"{title}; run folder {self.folder}", *more]))
            if header:
                self._print(f"resumed {resume} at {self.trainer.images / 1000:g} kimg")
                count = process_group.world_size()
                if header["processes"] != count:
                    self._print(
                        f"note: the state was written by {header['processes']} processes and is "
                        f"resumed by {count}: results are equal up to rounding, not bit for bit"
                    )
                for change in changed_rates(header, self.trainer):
                    self._print(f"note: {change}")
                unwritten = [e for what, call in missing for e in self._run_callback(what, call)]
                if self.trainer.images >= self.end:
                    if unwritten:
                        raise RunFailed(f"{unwritten[0]}; the state is {resume}")
                    self._print(self._finished())
                    return
            else:
                self.trainer.before_sampling()
                self._run_callback("snapshot", self.snapshot)
                if self.evaluate:
                    self._run_callback("evaluation", self.evaluate)
            self._steps(caught)
            if self.trace and self.trace.pending:
                self._print("note: no profile: the run ended before the steps that it traces")
            if self.log:
                took = tqdm.format_interval(time.monotonic() - invocation.started())
                done = f"{self.trainer.images / 1000:g} kimg in {took}"
                invocation.report(f"done: {done}", made_by(self.folder))

    def _nothing_to_save(self) -> bool:
        return self.trainer.steps == self.started

    def _stopped_early(self, kind: type | None, *exception: object) -> None:
        if kind is SystemExit and self._nothing_to_save():
            self._print("stopped before the end of the first step: there is no new state to save")

    def _steps(self, caught: list[signal.Signals]) -> None:
        done, end = (images / 1000 for images in (self.trainer.images, self.end))
        with progress.phase("training", end, "kimg", done) as self.shown:
            self.shown.details = lambda: self.parts
            postponed = self._run_steps(caught)
            signalled = process_group.all_reduce_any(bool(caught))
        if self.trainer.images >= self.end and not postponed:
            return
        number = caught[0] if caught else signal.SIGTERM  # of another process
        why = number.name if signalled else f"--max-hours {self.limit.hours:g}"
        status = 128 + number if signalled else TIME_IS_UP
        if self.log:
            streams.say(
                f"{why}: stopped at {self.trainer.images / 1000:g} kimg with exit status {status}; "
                f"the state is saved: {self.states.path}"
            )
            invocation.suggest(self._resume_command())
        raise SystemExit(status)

    def _resume_command(self) -> str:
        command = type(self.options).__name__.removesuffix("Config").lower()
        more = start_options(self.options)
        if self.options.max_hours:
            more = *more, "--max-hours", f"{self.options.max_hours:g}"
        if process_group.world_size() > 1:
            return " ".join([f"torchrun … -m sid_fast.{command} --resume {self.folder}", *more])
        return invocation.command_line(command, "--resume", self.folder, *more)

    def _run_steps(self, caught: list[signal.Signals]) -> bool:
        """Run to the end, a signal or the time limit; whether an evaluation is left for resuming.

        The last state is complete when this returns.
        """
        trainer, options = self.trainer, self.options
        self.throughput, self.waits = Throughput(), InputWaits(trainer)
        failures: torch.Tensor | int = 0
        faults: dict[str, torch.Tensor] = {}
        stop = postponed = False
        unwritten: list[WriteFailed] = []
        while trainer.images < self.end and not stop:
            before = trainer.images
            first = trainer.steps == self.started
            try:
                alone = self._first_step() if first else contextlib.nullcontext()
                with alone, ranges.named(f"step {trainer.steps + 1}"):
                    metrics = trainer.step()
            except OutOfMemory as error:
                smaller = smaller_micro_batch(trainer.settings, process_group.world_size())
                advice = f"try --micro-batch {smaller}" if smaller else "try --parallel fsdp"
                raise UserError(f"{error}: {advice}") from error
            if self.lock and self.lock.lost:
                raise RunFailed(
                    f"another process has taken over {self.folder}: this one was paused for "
                    "minutes, or could not write; earlier states are kept"
                )
            self.throughput.steps += 1
            self.shown.update((trainer.images - before) / 1000)
            self.limit.stepped()
            # Summed on the device until the next log line, to avoid host syncs.
            for name in metrics:
                if name.endswith(FAULT_METRICS):
                    faults[name] = faults.get(name, 0) + metrics[name]
            failed = sum(v for name, v in metrics.items() if name.endswith("failed")) > 0
            failures = (failures + 1) * failed
            time_is_up = self.limit.is_up(self.took.get("snapshot", 0.0))
            stop = process_group.all_reduce_any(bool(caught) or time_is_up)
            self.throttle.step()
            end = trainer.images >= self.end

            if end or trainer.steps % options.log_every == 0:
                self._report(metrics | faults)
                faults.clear()
                if failures >= MAX_FAILED_STEPS:
                    self._give_up()
            elif trainer.steps == self.started + 2:  # an early estimate of the remaining time
                self._report(metrics, keep=False)
            if first:  # excluded from the throughput: it compiles
                self.throughput = Throughput()
            self._trace_step()
            self._warn(self.states.poll())
            if not self.states.writing:
                self.limit.save_ended()
            unwritten = []
            snapshot_due = end or self._is_due(before, options.snapshot_every)
            evaluate = self._evaluation(before)
            state_due = end or stop or bool(evaluate) or self._is_due(before, options.state_every)
            if snapshot_due or state_due:
                self.throttle.catch_up()
            with self.throughput.paused(), self.shown.paused():
                if snapshot_due or evaluate:
                    trainer.before_sampling()
                if snapshot_due:
                    unwritten += self._run_callback("snapshot", self.snapshot)
                if state_due:
                    with progress.phase("saving the state"):
                        self.limit.save_begun()
                        self._warn(self.states.begin())
                if evaluate and not stop:
                    # Complete the state first, in case the evaluation is interrupted.
                    self._finish() if end else self._warn(self._complete_state())
                    # An evaluation that does not fit is made when the run is resumed.
                    late = self.limit.is_up(self.took.get("evaluation", 0.0))
                    postponed = process_group.all_reduce_any(late)
                    if not postponed:
                        unwritten += self._run_callback("evaluation", evaluate)
                    stop = postponed or process_group.all_reduce_any(bool(caught))
                elif evaluate:
                    postponed = True
            if snapshot_due or state_due:
                self.limit.paused()
        self._finish()
        if unwritten and trainer.images >= self.end:
            raise RunFailed(f"{unwritten[0]}; the state is saved: {self.states.path}")
        return postponed

    @contextlib.contextmanager
    def _first_step(self) -> Iterator[None]:
        with progress.phase("first step, which compiles and allocates") as shown:
            shown.details = compiled_graphs
            yield

    def _trace_step(self) -> None:
        if self.trace and self.trace.pending:
            with self.throughput.paused(), self.shown.paused():
                try:
                    if written := self.trace.step(self.trainer.steps):
                        self._print(written)
                except WriteFailed as error:
                    self._warn(error)
            self.limit.paused()

    def _complete_state(self) -> str | None:
        """Wait until the state is written; return the error message, or None."""
        if not self.states.writing:
            return None
        with progress.phase("writing the state"):
            problem = self.states.finish()
        self.limit.save_ended()
        return problem

    def _is_due(self, before: int, every_kimg: float) -> bool:
        every = every_kimg * 1000
        return before // every != self.trainer.images // every

    def _evaluation(self, before: int) -> Callable[[Path], dict[str, float]] | None:
        """Return `evaluate` if it is due: every --eval-every kimg, and at the end."""
        every = self.options.eval_every
        if self.trainer.images >= self.end or (every and self._is_due(before, every)):
            return self.evaluate
        return None

    def _finish(self) -> None:
        """Wait for the last state; raise RunFailed if it cannot be written."""
        if problem := self._complete_state():
            names = sorted(p.name for p in self.folder.glob(PATTERN))
            last = f"the last good state is {names[-1]}" if names else "this run has no state"
            raise RunFailed(f"{problem}; {last}")

    def _warn(self, problem: object) -> None:
        if problem:
            self._print(f"warning: {problem}; training continues")

    def _run_callback(
        self, what: str, callback: Callable[[Path], dict[str, float]]
    ) -> list[WriteFailed]:
        """Call a snapshot or evaluation and log its metrics.

        Once training has begun, a failed write is a warning, and returned.
        """
        began = time.monotonic()
        try:
            with progress.phase(what):
                metrics = callback(self.folder)
        except WriteFailed as error:
            if not self.trainer.steps:
                raise
            process_group.barrier()
            self._print(f"warning: {error}")
            return [error]
        process_group.barrier()
        self.took[what] = max(self.took.get(what, 0.0), time.monotonic() - began)
        self._record(metrics)
        parts = [f"{self.trainer.images / 1000:9.2f} kimg  {what}"]
        self._print("  ".join(parts + [f"{name} {value:.4g}" for name, value in metrics.items()]))
        return []

    def _print(self, line: str) -> None:
        """Print a line; with --quiet, only a warning."""
        if self.log:
            tell = streams.say if line.startswith("warning") else streams.note
            tell(line, sys.stdout)

    def _record(self, values: dict[str, float]) -> None:
        if self.log and values:
            try:
                self.log.write(self.trainer.images, values)
            except WriteFailed as error:
                self._warn(error)

    def _report(self, metrics: dict[str, torch.Tensor], keep: bool = True) -> None:
        """Print a progress line and, if `keep`, log a record; reading the metrics syncs."""
        self.throttle.catch_up()
        values = {name: float(v) for name, v in metrics.items()}
        steps, rate = self.throughput.steps, self.throughput.read()
        images = rate * self.trainer.settings.batch_size
        method, now = self.trainer.method, self.trainer.images
        shown = {name: label for name, label in method.progress.items() if name in values}
        done = steps * self.trainer.settings.batch_size
        speed = rate * (method.work(now) - method.work(now - done)) / steps
        left = (method.work(self.end) - method.work(now)) / speed
        self.shown.left = left, time.monotonic()
        start = [
            f"{self.trainer.images / 1000:9.2f} kimg",
            f"{min(100 * self.trainer.images / self.end, 100):3.0f} %",
        ]
        speed = [f"{rate:.3g} it/s", f"{images:.0f} img/s"]
        eta = ["ETA " + tqdm.format_interval(max(left, 0))]
        parts = [f"{label} {values[name]:.4g}" for name, label in shown.items()]
        parts += [f"{k} {v:.0f}" for k, v in values.items() if k.endswith(FAULT_METRICS) and v]
        if method.feed:
            values["input_waits"] = share = self.waits.read()
            parts += [f"{share:.1%} of steps waited for images"] * (share > 0)
        self.parts = speed + parts
        if not replaces_lines():
            self._print("  ".join(start + speed + eta + parts))
        if keep:
            speed_and_memory = {"it_per_s": rate, "img_per_s": images}
            speed_and_memory["peak_gib"] = peak_gib(self.trainer.device)
            self._record(values | speed_and_memory)

    def _evaluated(self) -> int:
        """Return whether the log already has an evaluation at this point."""
        records = read_log(self.folder / "log.jsonl")
        return any(r["images"] == self.trainer.images and "evaluation_s" in r for r in records)

    def _give_up(self) -> None:
        self._warn(self.states.begin(keep_all=True))
        self._finish()
        raise RunFailed(
            f"the last {MAX_FAILED_STEPS} steps or more failed: no finite sample, or mostly NaN or "
            f"infinite gradients. The state is saved as {self.states.path}, and earlier states are "
            "kept. Start a new run with lower learning rates"
        )
