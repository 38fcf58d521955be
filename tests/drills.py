"""Fault drills: kill -9, full disks, closed pipes, signals and second writers lose no work.

python -m tests.drills [--short]

Each drill disturbs a small run and resumes it. The resumed run must end with the bits, the log and
the snapshots of an undisturbed one, and leave no temporary file. The long form also measures a run
of 1,000 steps: memory, descriptors, threads and files stay flat. Prints `N of N drills`.
"""

import argparse
import contextlib
import importlib
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process with OpenMP threads cannot be forked

import torch

from sid_fast import cli
from sid_fast.data import datasets
from sid_fast.data.digits import open_dataset
from sid_fast.evaluation.curve import save_curve
from sid_fast.io import download, lock
from sid_fast.models.registry import load_network, save_network
from sid_fast.tools.tournament import Row, Tournament
from sid_fast.training import callbacks, checkpoint, logging, loop, step, storage
from tests.helpers.networks import small_teacher
from tests.helpers.processes import tensors_of

LIMIT_SECONDS = 120
LAST = "state-000000006"
KIMG = 0.024
RUN = [
    "--batch-size", 4, "--dropout", 0.1, "--augment-p", 0.3, "--generator-beta1", 0.9,
    "--kimg", KIMG, "--log-every", 1, "--state-every", 0.008, "--snapshot-every", 0.008,
    "--eval-every", 0.012, "--eval-images", 20, "--detector", "pixels", "--teacher-steps", 0,
    "--keep-states", 1, "--data", "digits", "--cuda-graph", "off", "--device", "cpu",
]  # fmt: skip
# What --short takes: drills of what no quicker test covers.
SHORT = (
    "kill -9: state", "kill -9: replacing", "a full disk", "a second writer",
    "--resume latest beside a writer", "SIGTERM of generate", "kill -9 of generate",
)  # fmt: skip
Setup = Callable[[], None]


class Child:
    """A command in a forked process; its output is in `output`."""

    def __init__(self, output: Path, command: str, *arguments: object, setup: Setup = lambda: None,
                 stdout: int | None = None, **environment: object):  # fmt: skip
        self.output = output
        self.status: int | None = None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid:
            return
        status = 70
        try:
            file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 2)
            os.dup2(file if stdout is None else stdout, 1)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            os.environ.update({name: str(value) for name, value in environment.items()})
            for number in (signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.argv = [command, *map(str, arguments)]
            setup()
            cli.main(importlib.import_module(f"sid_fast.{command}").main, f"sid_fast.{command}")
        except SystemExit as stopped:
            status = stopped.code if isinstance(stopped.code, int) else int(bool(stopped.code))
        except BaseException:
            traceback.print_exc()
        finally:
            for thread in threading.enumerate():
                if thread.name == "kill":  # the kill comes after the end
                    thread.join()
            with contextlib.suppress(OSError):
                sys.stdout.flush()
            with contextlib.suppress(OSError):
                sys.stderr.flush()
            os._exit(status)

    def poll(self) -> int | None:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status

    def wait(self, seconds: float = LIMIT_SECONDS) -> int:
        deadline = time.monotonic() + seconds
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                self.status = 124
                raise AssertionError(f"it hangs:\n{self.text()[-500:]}")
            time.sleep(0.01)
        return status

    def wait_for(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + LIMIT_SECONDS
        while not condition():
            assert self.poll() is None, f"it ended with {self.status}:\n{self.text()[-1000:]}"
            assert time.monotonic() < deadline, "nothing happened"
            time.sleep(0.002)

    def text(self) -> str:
        return self.output.read_text("utf-8", "replace")


def at_call(owner: Any, name: str, number: int, act: Callable[[], object]) -> Setup:
    """Make the `number`th call of owner.name run act() first."""

    def setup() -> None:
        real, calls = getattr(owner, name), [0]

        def call(*arguments: Any, **more: Any) -> Any:
            calls[0] += 1
            if calls[0] == number:
                act()
            return real(*arguments, **more)

        setattr(owner, name, call)

    return setup


def kill_after(seconds: float) -> Callable[[], None]:
    def act() -> None:
        def kill() -> None:
            time.sleep(seconds)
            os.kill(os.getpid(), signal.SIGKILL)

        if seconds:
            threading.Thread(target=kill, name="kill", daemon=True).start()
        else:
            kill()

    return act


def channels_last_wins() -> None:
    """Make tuning find that channels-last steps are right and fastest, in no time."""

    def run(self: Tournament) -> list[Row]:
        eager = self._eager()
        times = {"eager": (eager, 2.0), "channels-last": (eager.changed(channels_last=True), 1.0)}
        return [
            Row(name, candidate, ms=ms, images=4, gib=0.1, won=True)
            for name, (candidate, ms) in times.items()
        ]

    Tournament.run = run  # type: ignore[method-assign,assignment]


class Drills:
    """The drills, as generators of (name, drill) that share a teacher and undisturbed runs."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.random = folder, random.Random(seed)
        self.count = 0
        self.teacher = folder / "teacher.safetensors"
        save_network(self.teacher, small_teacher())
        # What these import, no child has to.
        for command in ("train", "generate"):
            importlib.import_module(f"sid_fast.{command}")
        load_network(self.teacher)
        open_dataset("digits")
        save_curve(folder / "curve.png", [0, 1], [2, 1], "distance", None)
        self.whole, self.whole_of_two = folder / "whole", folder / "whole-of-two"

    # Starting runs.

    def arguments(self, out: Path) -> list[object]:
        return ["--teacher", self.teacher, *RUN, "--out", out]

    def start(self, *arguments: object, command: str = "train", **more: Any) -> Child:
        self.count += 1
        return Child(self.folder / f"output-{self.count:03d}", command, *arguments, **more)

    def start_two(self, *arguments: object, setup: Setup = lambda: None) -> list[Child]:
        """Two ranks; `setup` runs in the second one."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        return [
            self.start(*arguments, setup=s, RANK=rank, LOCAL_RANK=rank, **common)
            for rank, s in enumerate((lambda: None, setup))
        ]

    def undisturbed(self) -> None:
        child = self.start(*self.arguments(self.whole))
        assert child.wait() == 0, child.text()

    def undisturbed_two(self) -> None:
        for child in self.start_two(*self.arguments(self.whole_of_two)):
            assert child.wait() == 0, child.text()

    # What must hold afterwards.

    def resumed(self, out: Path, two: bool = False) -> None:
        """Resume a run, or start it again without a state, and compare it with the undisturbed."""
        arguments = self.arguments(out)
        if any(out.glob("state-*[0-9]")):
            arguments = ["--resume", out, "--kimg", KIMG]
        for child in self.start_two(*arguments) if two else [self.start(*arguments)]:
            assert child.wait() == 0, f"resume exits with {child.status}: {child.text()[-1000:]}"
            assert "Traceback" not in child.text(), child.text()
        self.compare(out, self.whole_of_two if two else self.whole)
        assert os.stat(out / lock.NAME).st_size == 0, "the lock is not released"

    @staticmethod
    def compare(out: Path, whole: Path) -> None:
        for state in out.glob("state-*[0-9]"):
            digests = checkpoint.read_header(state)["digests"]
            for name, sha256 in digests.items():
                assert download.file_sha256(state / name) == sha256, state / name
        for shards in ("shard-00001*", "shard-00002*"):
            a, b = (_tensors(folder / LAST, shards) for folder in (out, whole))
            assert a.keys() == b.keys()
            assert all(torch.equal(a[n], b[n]) for n in a), "the networks differ"
        assert _curve(out) == _curve(whole), "the logs differ"
        for pattern in ("snapshot-*", "samples-*.png"):
            names = [sorted(p.name for p in f.glob(pattern)) for f in (out, whole)]
            assert names[0] == names[1], names
        assert not list(out.glob("*.tmp")), list(out.glob("*.tmp"))

    # The drills.

    def kills(self, count: int) -> Iterator[tuple[str, Callable[[Path], None]]]:
        """kill -9 within a random time of a random call of each of these."""
        moments = [  # name, owner, function, number of its calls in a run, seconds
            ("start", loop.Loop, "run", 1, 0.3),
            ("state", checkpoint.States, "begin", 3, 0.1),
            ("evaluation", callbacks.Evaluations, "__call__", 3, 0.1),
            ("snapshot", callbacks, "save_network", 4, 0.05),
            ("pruning", checkpoint, "prune_states", 3, 0.005),
            ("replacing", checkpoint.States, "_complete", 0, 0.03),
            ("step", step.Trainer, "step", 6, 0.1),
            ("hashing", storage, "file_sha256", 12, 0.01),
            ("removing", checkpoint.shutil, "rmtree", 2, 0),
            ("sample grid", callbacks, "save_grid", 4, 0.05),
            ("end of evaluation", callbacks, "save_curve", 3, 0.05),
        ]
        for i in range(count):
            name, owner, function, calls, seconds = moments[i % len(moments)]
            seconds = self.random.uniform(0, seconds)
            if not calls:
                place = self.random.choice(["before", "after"]), self.random.randint(1, 5)
                yield f"kill -9: replacing, {place[0]} rename {place[1]}", self.replacing(*place)
                continue
            number = self.random.randint(1, calls)
            what = f"kill -9: {name} {number}, after {1000 * seconds:.0f} ms"
            yield what, self.killed(at_call(owner, function, number, kill_after(seconds)))

    def killed(self, setup: Setup) -> Callable[[Path], None]:
        def drill(out: Path) -> None:
            child = self.start(*self.arguments(out), setup=setup)
            assert child.wait() == -signal.SIGKILL, child.text()
            self.resumed(out)

        return drill

    def tuned_and_killed(self, out: Path) -> None:
        """kill -9 of a tuned run, whose verdict is then in its state alone."""
        whole, cache = out.parent / "whole", out.parent / "cache"
        kill, number = kill_after(self.random.uniform(0, 0.1)), self.random.randint(2, 3)

        def disturbed() -> None:
            channels_last_wins()
            at_call(checkpoint.States, "begin", number, kill)()

        again = {"command": "train", "SID_FAST_CACHE": cache}
        for folder, setup, status in (
            (whole, channels_last_wins, 0), (out, disturbed, -signal.SIGKILL)
        ):  # fmt: skip
            child = self.start(*self.arguments(folder), "--tune", "again", setup=setup, **again)
            assert child.wait() == status, child.text()
        shutil.rmtree(cache)
        child = self.start("--resume", out, "--kimg", KIMG, **again)
        assert child.wait() == 0, child.text()
        tuning = json.loads((out / "config.json").read_text("utf-8"))["tuning"]
        assert (tuning["candidate"] or {}).get("channels_last"), tuning
        assert tuning["text"].endswith(", of the state)"), tuning
        self.compare(out, whole)
        tuned, untuned = (_tensors(folder / LAST, "*") for folder in (whole, self.whole))
        assert any(not torch.equal(tuned[n], untuned[n]) for n in tuned), "tuning changes no bit"

    def replacing(self, place: str, number: int) -> Callable[[Path], None]:
        """kill -9 before or after a rename, in a run that replaces its own last state."""

        def drill(out: Path) -> None:
            shutil.copytree(self.whole, out)
            early = self.folder / "early"
            if not early.exists():
                child = self.start(*self.arguments(early), setup=at_call(
                    step.Trainer, "step", 5, kill_after(0)))  # fmt: skip
                assert child.wait() == -signal.SIGKILL, child.text()
            before = next(early.glob("state-*[0-9]"))
            shutil.copytree(before, out / before.name)

            def setup() -> None:
                real, calls = os.replace, [0]

                def replace(source: Any, target: Any) -> None:
                    mine = LAST in str(target) or (LAST in str(source))
                    calls[0] += mine
                    if mine and calls[0] == number and place == "before":
                        os.kill(os.getpid(), signal.SIGKILL)
                    real(source, target)
                    if mine and calls[0] == number:
                        os.kill(os.getpid(), signal.SIGKILL)

                checkpoint.os.replace = replace

            child = self.start("--resume", out / before.name, setup=setup)
            status = child.wait()
            assert status in (-signal.SIGKILL, 0), child.text()
            complete = [p for p in out.glob(f"{LAST}*") if p.suffix != ".tmp"]
            assert complete, "the last state is missing"
            self.resumed(out)

        return drill

    def two_killed(self, count: int) -> Iterator[tuple[str, Callable[[Path], None]]]:
        def drill(out: Path) -> None:
            seconds, number = self.random.uniform(0, 0.2), self.random.randint(1, 3)
            setup = at_call(checkpoint.States, "begin", number, kill_after(seconds))
            first, second = self.start_two(*self.arguments(out), setup=setup)
            assert second.wait() == -signal.SIGKILL, second.text()
            status = first.wait()
            assert status in (0, 1), first.text()
            self.resumed(out, two=True)

        for i in range(count):
            yield f"kill -9 of one of two ranks, {i + 1}", drill

    def signals(self, *numbers: signal.Signals) -> Iterator[tuple[str, Callable[[Path], None]]]:
        def drill(number: signal.Signals) -> Callable[[Path], None]:
            def act(out: Path) -> None:
                def send() -> None:
                    os.kill(os.getpid(), number)

                at = self.random.randint(2, 5)
                setup = at_call(step.Trainer, "step", at, send)
                child = self.start(*self.arguments(out), setup=setup)
                assert child.wait() == 128 + number, child.text()
                assert (out / f"state-{at:09d}").exists(), child.text()
                self.resumed(out)

            return act

        for number in numbers:
            yield f"{number.name} within a step", drill(number)

    def full_disk(self, out: Path) -> None:
        """From the second state on no file of over 8 KiB can be written."""

        def full() -> None:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))

        setup = at_call(checkpoint.States, "begin", 2, full)
        child = self.start(*self.arguments(out), setup=setup)
        assert child.wait() == 1, child.text()
        assert "last good state is state-000000002" in child.text(), child.text()
        self.resumed(out)

    def closed_pipe(self, out: Path) -> None:
        reading, writing = os.pipe()
        child = self.start(*self.arguments(out), stdout=writing)
        os.close(writing)
        os.read(reading, 1)
        os.close(reading)
        assert child.wait() in (0, 128 + signal.SIGHUP), child.text()
        self.resumed(out)

    def second_writer(self, out: Path, flock: bool = True) -> None:
        def no_flock() -> None:
            lock.fcntl.flock = mock.Mock(side_effect=OSError(37, "No locks available"))

        def long() -> None:
            if not flock:
                no_flock()
            at_call(step.Trainer, "step", 4, lambda: time.sleep(LIMIT_SECONDS))()

        first = self.start(*self.arguments(out), setup=long)
        first.wait_for(lambda: any(out.glob("state-*[0-9]")))
        for arguments in (["--resume", out], ["--resume", out, "--kimg", 1]):
            second = self.start(*arguments, setup=(lambda: None) if flock else no_flock)
            assert second.wait() == 2, second.text()
            holder = f"in use by process {first.pid} on {socket.gethostname()}"
            assert holder in second.text(), second.text()
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        self.resumed(out)

    def copied(self, out: Path) -> None:
        """A copied folder has no file times: the last state in it was copied first."""
        child = self.start(*self.arguments(out), "--keep-states", 3,
            setup=at_call(step.Trainer, "step", 6, kill_after(0)))  # fmt: skip
        assert child.wait() == -signal.SIGKILL, child.text()
        for age, state in enumerate(sorted(out.glob("state-*[0-9]"))):
            for path in (*state.iterdir(), state):
                os.utime(path, (1e9 - 1000 * age,) * 2)
        for state in sorted(out.glob("state-*[0-9]"))[:-1]:
            assert checkpoint.find_state(str(out), None) != state
        child = self.start("--resume", out, "--keep-states", 1)
        assert child.wait() == 0, child.text()
        self.compare(out, self.whole)

    def read_beside_a_writer(self, out: Path) -> None:
        """`--resume latest` finds a whole state at any time, while a run prunes its own."""
        rare = ["--state-every", 0.004, "--snapshot-every", 100, "--eval-every", 100]
        writer = self.start(*self.arguments(out), *rare, "--kimg", 100)
        writer.wait_for(lambda: any(out.glob("state-*[0-9]")))
        began, seen = time.monotonic(), set()
        deadline = began + LIMIT_SECONDS
        while len(seen) < 5 or time.monotonic() < began + 2:
            assert time.monotonic() < deadline, seen
            path, header = checkpoint.hold_state(
                lambda: checkpoint.find_state("latest", str(out.parent), "TrainConfig")
            )
            checkpoint._verify(path, header)
            seen.add(path)
            os.close(checkpoint._held.pop())
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()

    def generate_is_stopped(self, out: Path) -> None:
        """SIGTERM while the images are written leaves no file."""
        out.mkdir()

        def stop() -> None:
            os.kill(os.getpid(), signal.SIGTERM)

        child = self.start(
            "--network", self.teacher, "--seeds", "0-3", "--out", out / "images.zip",
            command="generate", setup=at_call(datasets.zipfile, "ZipFile", 1, stop),
        )  # fmt: skip
        assert child.wait() == -signal.SIGTERM, child.text()
        assert not list(out.iterdir()), list(out.iterdir())

    def generate_is_killed(self, out: Path) -> None:
        """kill -9 while the images are written leaves a file that the next run removes."""
        arguments = ["--network", self.teacher, "--seeds", "0-3", "--out", out / "images.zip"]

        def kill() -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        setup = at_call(datasets.zipfile.ZipFile, "writestr", 3, kill)
        child = self.start(*arguments, command="generate", setup=setup)
        assert child.wait() == -signal.SIGKILL, child.text()
        assert [p.suffix for p in out.iterdir()] == [".tmp"], list(out.iterdir())
        child = self.start(*arguments, command="generate")
        assert child.wait() == 0, child.text()
        assert [p.name for p in out.iterdir()] == ["images.zip"], list(out.iterdir())

    def long_run(self, out: Path, steps: int = 1000) -> str:
        """A run of many steps, states, snapshots and evaluations stays as large as it was.

        The largest of each measure in the second and in the last quarter are compared. The bounds
        of logs and sample grids are lower here, so that the run reaches them.

        Returns:
            The figures of both quarters.
        """
        measured = out.parent / "measures.jsonl"

        def setup() -> None:
            callbacks.MAX_GRIDS = 20
            logging.MAX_BYTES, logging.MAX_BOARD_BYTES = 64 << 10, 256 << 10
            real = step.Trainer.step

            def measure(trainer: step.Trainer, *more: Any) -> Any:
                if trainer.steps % 10 == 0:
                    with measured.open("a") as file:
                        file.write(json.dumps({"steps": trainer.steps} | _measures(out)) + "\n")
                return real(trainer, *more)

            step.Trainer.step = measure  # type: ignore[method-assign]

        digits = [
            "--teacher", "digits", *RUN, "--kimg", 0.004 * steps, "--augment-p", 0,
            "--state-every", 0.08,
            "--snapshot-every", 0.04, "--eval-every", 0.4, "--keep-snapshots", 3,
        ]  # fmt: skip
        child = self.start(*digits, "--out", out, setup=setup)
        assert child.wait(10 * LIMIT_SECONDS) == 0, child.text()
        rows = [json.loads(line) for line in measured.read_text().splitlines()]
        quarters = [
            [r for r in rows if low <= r["steps"] / steps < low + 0.25] for low in (0.25, 0.75)
        ]
        # A state may be being written in one of them: its threads, descriptors and files.
        slack = {"memory_mib": 8, "descriptors": 4, "threads": 2, "files": 8, "grids": 0,
                 "log_kib": 32, "tensorboard_kib": 128}  # fmt: skip
        told = []
        for name, more in slack.items():
            early, late = (max(r[name] for r in quarter) for quarter in quarters)
            assert late <= early + more, f"{name}: {early:.4g}, then {late:.4g}"
            told.append(f"{name} {early:.4g} -> {late:.4g}")
        assert max(r["log_kib"] for r in rows) <= 64, rows
        assert max(r["tensorboard_kib"] for r in rows) <= 256, rows
        assert max(r["grids"] for r in rows) <= 20, rows
        return ", ".join(told)

    def all(self) -> Iterator[tuple[str, Callable[[Path], None]]]:
        yield from self.kills(22)
        yield from self.signals(signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        yield "kill -9 of a tuned run", self.tuned_and_killed
        yield "a full disk", self.full_disk
        yield "a closed pipe", self.closed_pipe
        yield "a second writer", self.second_writer
        yield "without flock: a second writer", lambda out: self.second_writer(out, flock=False)
        yield "a copied folder", self.copied
        yield "--resume latest beside a writer", self.read_beside_a_writer
        yield "SIGTERM of generate", self.generate_is_stopped
        yield "kill -9 of generate", self.generate_is_killed
        yield "1,000 steps", self.long_run
        yield from self.two_killed(4)


def _tensors(state: Path, shards: str) -> dict[str, torch.Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        for path in state.glob(f"{shards}.safetensors"):
            os.symlink(path.resolve(), Path(folder) / path.name)
        return tensors_of(Path(folder))


def _measures(out: Path) -> dict[str, float]:
    """The memory, open files and threads of this process, and the files of its run."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    sizes = {}
    for path in out.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # a thread may be renaming it
            sizes[path.relative_to(out).as_posix()] = path.stat().st_size
    return {
        "memory_mib": int(status["VmRSS"].split()[0]) / 1024,
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": int(status["Threads"]),
        "files": len([name for name in sizes if not name.startswith("samples-")]),
        "grids": len([name for name in sizes if name.startswith("samples-")]),
        "log_kib": sizes.get("log.jsonl", 0) / 1024,
        "tensorboard_kib": sum(n for p, n in sizes.items() if p.startswith("tensorboard/")) / 1024,
    }


def _curve(folder: Path) -> list[Any]:
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    times = re.compile(r".*(_s|per_s|waits|_gib)$")
    return sorted(
        ([r["images"], {k: v for k, v in r.items() if not times.match(k)}] for r in records),
        key=str,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="one drill of each quick kind")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--only", default="", help="drills whose name contains this")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        drills = Drills(Path(folder), options.seed)
        passed = total = 0
        drills.undisturbed()
        if not options.short:
            drills.undisturbed_two()
        left = list(SHORT)
        for name, drill in drills.all():
            if options.only not in name:
                continue
            if options.short:
                if not (kind := next(filter(name.startswith, left), "")):
                    continue
                left.remove(kind)
            total += 1
            out = Path(folder) / f"drill-{total:02d}" / "run"
            out.parent.mkdir()
            began = time.monotonic()
            try:
                told = drill(out) or ""
                problem = ""
                passed += 1
            except Exception as error:
                problem = told = str(error) or repr(error)
            seconds = time.monotonic() - began
            print(f"{'FAILED' if problem else 'ok':6} {seconds:5.1f} s  {name}  {told}", flush=True)
            shutil.rmtree(out.parent, ignore_errors=True)
        print(f"{passed} of {total} drills")
    return int(passed < total)


if __name__ == "__main__":
    sys.exit(main())
