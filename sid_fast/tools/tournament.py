"""Candidates challenge the best one so far: first proven right, then timed, in child processes."""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from sid_fast.config.types import micro_batches
from sid_fast.io import progress
from sid_fast.tools import candidates, timing, verdicts
from sid_fast.tools.candidates import Candidate, Change
from sid_fast.tools.estimator import GIB
from sid_fast.tools.isolation import OUT_OF_MEMORY, Child, Failed, lacks_room
from sid_fast.tools.proof import Job
from sid_fast.tools.trial import Trial, Turn

LIMIT = 180.0  # seconds a child may take for one answer; it compiles
COMPILE_LIMIT = 900.0
PREPARING = 10.0  # seconds a candidate may take besides compiling, which the budget does not count
TURNS = 3, 9  # at least and at most
ROOM = 0.85  # of a GPU's memory: evaluation and buckets of gradients need some
LEAK = 2**16  # bytes a step, lost in every turn

SIDE_BY_SIDE = 4  # proofs of single operations
NOT_TRIED = "not tried: the budget is spent"

Say = Callable[[str], None]


@dataclasses.dataclass
class Row:
    """The result of a candidate. ms: of a step of `images`; won: it became the best so far."""

    name: str
    candidate: Candidate
    wrong: str = ""
    ms: float | None = None
    low: float | None = None
    high: float | None = None
    images: int | None = None
    gib: float | None = None
    won: bool = False

    @property
    def img_s(self) -> float | None:
        """Images per second."""
        return self.images / self.ms * 1e3 if self.images and self.ms else None

    def __str__(self) -> str:
        if self.ms is None or self.img_s is None:
            return f"{self.name:34} {self.wrong}"
        figures = f"{self.ms:9.2f} ms  {self.img_s:9.1f} img/s  {self.gib:6.2f} GiB"
        return f"{self.name:34} {self.wrong or 'right':16} {figures}{'  <' * self.won}"

    def to_json(self) -> dict[str, Any]:
        """As from_json takes it."""
        return dataclasses.asdict(self) | {"img_s": self.img_s}

    @classmethod
    def from_json(cls, values: Any) -> "Row":
        """ValueError for what is no row."""
        try:
            row = cls(**{f.name: values[f.name] for f in dataclasses.fields(cls)})
        except (TypeError, KeyError) as error:
            raise ValueError(f"no row: {error}") from error
        texts = isinstance(row.name, str) and isinstance(row.wrong, str)
        figures = (row.ms, row.low, row.high, row.images, row.gib)
        if not (texts and isinstance(row.won, bool) and all(map(_is_figure, figures))):
            raise ValueError("no row: it has values of wrong types")
        row.candidate = candidates.from_json(row.candidate)
        return row


def _is_figure(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and 0 <= value < math.inf)


class Runner:
    """A candidate in a child, and its row."""

    def __init__(self, job: Job, row: Row):
        self.job, self.row, self.child = job, row, Child(Trial, job, row.candidate)
        self.turns: list[Turn] = []
        self.limit = COMPILE_LIMIT if row.candidate.compile else LIMIT

    def wrong(self) -> str:
        """What is wrong with it, or ""."""
        return self.child.call("wrong", limit=self.limit)

    def prepare(self) -> None:
        """Warm up before the timed turns."""
        self.row.images = self.child.call("prepare", limit=self.limit)

    def renew(self) -> None:
        """Replace the child with a fresh one."""
        self.child.close()
        self.child, self.turns = Child(Trial, self.job, self.row.candidate), []

    def restart(self) -> None:
        """Replace the child and warm up."""
        self.renew()
        self.prepare()

    def turn(self) -> None:
        """Time some steps."""
        self.turns.append(self.child.call("turn", limit=LIMIT))

    def times(self, normalised: bool = False) -> list[float]:
        """Milliseconds per image of each turn; normalised: over the reference kernel's time."""
        assert self.row.images
        return [t.ms / self.row.images / (t.reference_ms if normalised else 1) for t in self.turns]

    def note(self) -> None:
        """Write the figures into the row."""
        low, middle, high = timing.spread([t.ms for t in self.turns])
        self.row.low, self.row.ms, self.row.high = low, middle, high
        self.row.gib = max(t.peak for t in self.turns) / GIB

    def leak(self) -> str:
        """How much memory is lost from turn to turn, in words; "" if none is."""
        pairs = itertools.pairwise(self.turns)
        grown = [(after.in_use - before.in_use) / after.steps for before, after in pairs]
        return f"leaks {min(grown) / 2**20:.1f} MiB a step" if min(grown) > LEAK else ""


class Tournament:
    """Let candidates challenge the best one so far, one after the other.

    seconds: the budget, without compilation. memory: of the device, bytes. say: takes each line of
    the table. The last row that won is the best candidate.
    """

    def __init__(self, job: Job, seconds: float, memory: float, say: Say):
        self.job, self.say, self.memory = job, say, memory
        self.device = torch.device(job.device)
        self.left = seconds
        self.rows: list[Row] = []

    def run(self, shortlist: Callable[..., list[Change]] = candidates.shortlist) -> list[Row]:
        """Try all candidates; their rows."""
        proven = self._operations()
        base = self._base()
        if base is None:
            return self.rows
        self.champion = base
        try:
            changes = shortlist(self.job, base.row.candidate, proven)
            full = False
            for i, (name, change) in enumerate(changes):
                if full and "micro_batch" in change:
                    continue
                row = self._challenge(name, change, self.left / (len(changes) - i))
                full |= bool(row and row.wrong and "micro_batch" in change)
        except Failed as failed:  # of the best so far, which had run
            self.champion.row.wrong, self.champion.row.won = str(failed), False
            self.say(f"{self.champion.row.name}: {failed}")
        finally:
            self.champion.child.close()
        return self.rows

    def _add(self, row: Row) -> None:
        self.rows.append(row)
        self.say(str(row))

    def _eager(self) -> Candidate:
        operations = candidates.open_operations(self.job.kernels, self.device)
        return Candidate(
            dict.fromkeys(operations, "eager"), channels_last=self.device.type == "cuda",
            cuda_graph=self.job.cuda_graph, compile=self.job.compile,
        )  # fmt: skip

    def _base(self) -> Runner | None:
        """The safest candidate; with an open micro-batch, the largest of at most 64 that fits."""
        cuda, base = self.device.type == "cuda", self._eager()
        sizes: list[int | None] = [None]
        if cuda and "micro_batch" not in self.job.pinned:
            whole = micro_batches(self.job.settings, self.job.ranks)
            sizes = [n for n in whole if n <= 64] or [whole[-1]]
        for size in sizes:
            row = Row("eager", base.changed(micro_batch=size))
            runner = Runner(self.job, row)
            try:
                with progress.phase(f"tuning: {row.name}"):
                    runner.prepare()
                    self._turns([runner])
                runner.note()
                row.won = True
            except Failed as failed:
                row.wrong = str(failed)
            self._add(row)
            if row.wrong != OUT_OF_MEMORY:
                return runner if row.won else None
        return None

    def _operations(self) -> list[tuple[str, str]]:
        """Operations and backends that are right alone, in float32."""
        found = list(candidates.operations(self.job))
        eager = self._eager().changed(cuda_graph=False, compile=False)
        names = [candidates.name_of(op, b, self.job.device) for op, b in found]
        rows = [
            Row(f"{name} alone", eager.changed(kernels={op: b}))
            for name, (op, b) in zip(names, found, strict=True)
        ]
        together = max(min(verdicts.cores() // 2, SIDE_BY_SIDE), 1)  # they compile
        with progress.phase("tuning: checking", len(rows), "operations") as shown:
            for start in range(0, len(rows), together):
                self._alone(rows[start : start + together])
                shown.update(len(rows[start : start + together]))
        for row in rows:
            if lacks_room(row.wrong):  # beside the others
                self._alone([row])
            if row.wrong:
                self._add(row)
        return [each for each, row in zip(found, rows, strict=True) if not row.wrong]

    def _alone(self, rows: list[Row]) -> None:
        """Write into each row what is wrong with its operation."""
        runners = [Runner(self.job, row) for row in rows]
        for runner in runners:
            runner.child.ask("wrong_alone", limit=LIMIT)
        for runner in runners:
            try:
                runner.row.wrong = runner.child.answer()
            except Failed as failed:
                runner.row.wrong = str(failed)
            runner.child.close()

    def _challenge(self, name: str, change: Mapping[str, Any], seconds: float) -> Row | None:
        """Try the best so far with a change, and without graphs where it is wrong with them."""
        before = self.champion.row.candidate
        candidate = before.changed(**change)
        eager_norm = all(before.kernels.get(op) in (None, "eager") for op in candidates.FUSED)
        if candidate == before or (name == "channels-first" and not eager_norm):
            return None  # the kernels are channels-last
        row = self._duel(Row(name, candidate), seconds)
        if row.wrong not in ("", NOT_TRIED) and candidate.cuda_graph and before.cuda_graph:
            without = dataclasses.replace(candidate, cuda_graph=False)
            row = self._duel(Row(f"{name}, no graphs", without), seconds)
        return row

    def _duel(self, row: Row, seconds: float) -> Row:
        """Prove a candidate and time it against the best so far; the faster one is the best."""
        if self.left <= 0:
            row.wrong = NOT_TRIED
            self._add(row)
            return row
        with progress.phase(f"tuning: {row.name}") as shown:
            shown.details = lambda: [f"{max(self.left, 0):.0f} s of the budget left"]
            self._compete(row, seconds)
        return row

    def _compete(self, row: Row, seconds: float) -> None:
        """Let the candidate of a row challenge the best one."""
        champion, challenger, alone = self.champion, Runner(self.job, row), False
        try:
            try:
                if self._ready(challenger):
                    self._turns([champion, challenger], seconds)
            except Failed as failed:
                if not lacks_room(str(failed)):
                    raise
                # No room for both: one after the other, the reference kernel between their turns.
                alone = True
                champion.child.close()
                challenger.renew()
                if self._ready(challenger):
                    self._turns([challenger])
                    challenger.child.close()
                    champion.restart()
                    self._turns([champion])
            if not row.wrong:
                row.won = self._wins(challenger, alone)
        except Failed as failed:
            row.wrong = str(failed)
        self._add(row)
        loser, self.champion = (champion, challenger) if row.won else (challenger, champion)
        loser.child.close()
        if self.champion.child.closed:
            self.champion.restart()

    def _ready(self, challenger: Runner) -> bool:
        """Whether it is right; then it has warmed up, too."""
        began = time.monotonic()
        challenger.row.wrong = challenger.wrong()
        if not challenger.row.wrong:
            challenger.prepare()
        self.left -= min(time.monotonic() - began, PREPARING)
        return not challenger.row.wrong

    def _turns(self, runners: list[Runner], seconds: float = 0.0) -> None:
        began = time.monotonic()
        for runner in runners:
            runner.turns = []
        for n in range(TURNS[1]):
            if n >= TURNS[0] and time.monotonic() > began + seconds:
                break
            for runner in runners:
                runner.turn()
        self.left -= time.monotonic() - began

    def _wins(self, challenger: Runner, alone: bool) -> bool:
        """Whether it beats the champion beyond both spreads, leaks nothing and leaves room.

        Default backends win unless the champion beats them beyond the spreads: otherwise a run that
        was tuned on a noisy machine would give them up for nothing.
        """
        challenger.note()
        row = challenger.row
        assert row.gib is not None
        row.wrong = challenger.leak()
        if self.memory and row.gib * GIB > ROOM * self.memory:
            row.wrong = f"needs {row.gib:.1f} of {self.memory / GIB:.1f} GiB: no room beside it"
        fast, _, slow = timing.spread(challenger.times(alone))
        champion_fast, _, champion_slow = timing.spread(self.champion.times(alone))
        champion = self.champion.row.candidate
        if candidates.restores_defaults(champion, row.candidate, self.job.device):
            return not row.wrong and fast <= champion_slow
        return not row.wrong and slow < champion_fast


def best(rows: list[Row]) -> Row | None:
    """Return the last row that won, or None."""
    return next((row for row in reversed(rows) if row.won), None)
