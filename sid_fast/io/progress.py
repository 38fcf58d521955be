"""Progress of long work: one live line on a terminal, a plain line now and then elsewhere.

Work is a stack of phases, and the innermost one is shown. A terminal shows it on a single line that
is redrawn; pipes, files, TERM=dumb, NO_COLOR and CI get plain lines at growing intervals, unless
other output keeps the reader informed. With --quiet, and on ranks other than 0, nothing is shown.
"""

import contextlib
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any, TypeVar

from tqdm import tqdm
from tqdm.utils import disp_len, disp_trim

from sid_fast.errors import printable
from sid_fast.io import streams
from sid_fast.io.terminal import ERASE_LINE, is_live

T = TypeVar("T")

REDRAW_SECONDS = 0.5
LONGEST_LINE = 10_000  # columns
FIRST_PAUSE, LONGEST_PAUSE = 5.0, 30.0  # seconds without output before a plain line; doubles


def fit(parts: Sequence[str], width: int) -> str:
    """Join as many of the leading parts as fit in a width; the first is cut if it must be."""
    text = disp_trim(parts[0], width)
    for part in parts[1:]:
        if disp_len(text) + 2 + disp_len(part) > width:
            break
        text += "  " + part
    return text


class Phase:
    """A stretch of work, of known size or not.

    Args:
        title: What is done.
        total: How much there is to do; None if unknown.
        unit: Of `total`.
        done: How much of it was done before.

    Attributes:
        details: Returns further parts of the line, in place of the rate.
        left: Remaining seconds and when they were estimated (time.monotonic), in place of an
            estimate from the mean rate.
    """

    def __init__(self, title: str, total: float | None = None, unit: str = "", done: float = 0):
        self.title, self.total, self.unit = printable(title), total, unit
        self.done = self.start = done
        self.partial = 0.0  # of the work that the next update() counts
        self.began = self.updated = time.monotonic()
        self.details: Callable[[], Sequence[str]] | None = None
        self.left: tuple[float, float] | None = None

    def update(self, n: float = 1) -> None:
        """Count n more as done."""
        self.done += n
        self.partial = 0.0
        self.updated = time.monotonic()

    def ahead(self, n: float) -> None:
        """Count a part of the work that the next update() will count."""
        self.partial += n
        self.updated = time.monotonic()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the block's time from the rate and from the estimate of the remaining time."""
        began = time.monotonic()
        yield
        pause = time.monotonic() - began
        self.began, self.updated = self.began + pause, self.updated + pause
        if self.left:
            self.left = self.left[0], self.left[1] + pause

    def parts(self) -> list[str]:
        """The parts of the line, most important first."""
        now = time.monotonic()
        elapsed = now - self.began
        if self.total is None:
            shown = [self.title, tqdm.format_interval(elapsed)]
            if self.done:
                shown.append(f"{_number(self.done)} {self.unit}")
            return shown + list(self.details() if self.details else ())
        worked, done = self.updated - self.began, self.done + self.partial
        rate = (done - self.start) / worked if worked else 0.0
        left = self.left or ((self.total - done) / rate if rate else 0.0, self.updated)
        eta = tqdm.format_interval(elapsed)  # until there is an estimate
        if rate or self.left:
            eta = "ETA " + tqdm.format_interval(max(left[0] - (now - left[1]), 0))
        percent = min(100 * done / self.total, 100) if self.total else 100
        whole = int(done) if isinstance(self.done, int) else done
        counts = f"{_number(whole)} of {_number(self.total)} {self.unit}"
        speed = [f"{_rate(rate)} {self.unit}/s"] if rate else []
        details = list(self.details()) if self.details else speed
        return [self.title, f"{percent:.0f} %", eta, counts, *details]


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


class _Display:
    """Shows the innermost of the open phases, from a thread of its own."""

    def __init__(self) -> None:
        self.phases: list[Phase] = []
        self.lock = threading.RLock()
        self.over: threading.Event | None = None
        self.bar: Any = None
        self.pause = FIRST_PAUSE
        self.spoken: set[Phase] = set()  # phases that printed a plain line
        self.announced = ""

    def open(self, phase: Phase) -> None:
        with self.lock:
            self.phases.append(phase)
            self.pause = FIRST_PAUSE
            if self.over is None:
                streams.last_output = time.monotonic()
                if is_live():
                    # show() fits the line to the window. At 0 columns tqdm would show nothing.
                    size = {"ncols": LONGEST_LINE, "nrows": 20}
                    self.bar = tqdm(bar_format="{desc}", leave=False, file=sys.stderr, **size)
                self.over = threading.Event()
                threading.Thread(target=self._watch, args=(self.over,), daemon=True).start()
            self.show()

    def close(self, phase: Phase, completed: bool) -> None:
        with self.lock:
            self.phases.remove(phase)
            self.pause = FIRST_PAUSE
            if phase in self.spoken:
                self.spoken.discard(phase)
                if completed:
                    took = tqdm.format_interval(time.monotonic() - phase.began)
                    streams.say(f"{phase.title}: done in {took}", sys.stderr)
            if self.phases:
                self.show()
                return
            if self.over:
                self.over.set()
            self.over, self.announced = None, ""
            if self.bar is not None:
                self.bar.close()
                self.bar = None

    def _watch(self, over: threading.Event) -> None:
        while not over.wait(min(REDRAW_SECONDS, FIRST_PAUSE)):
            with self.lock:
                if not over.is_set():
                    if text := self.announced:
                        self.announced = ""
                        streams.say(text, sys.stderr)
                    self.show()

    def show(self) -> None:
        """Redraw the live line, or print a plain one if nothing was printed for long."""
        phase = self.phases[-1]
        if self.bar is not None:
            # A new printer knows no earlier length, which it would pad to: after the window has
            # shrunk, the padding would wrap.
            self.bar.sp = self.bar.status_printer(sys.stderr)
            line = fit(phase.parts(), _width())
            self.bar.set_description_str(ERASE_LINE + line, refresh=True)
        elif time.monotonic() - max(streams.last_output, phase.began) >= self.pause:
            self.pause = min(2 * self.pause, LONGEST_PAUSE)
            self.spoken.add(phase)
            streams.say("  ".join(phase.parts()), sys.stderr)


def _width() -> int:
    try:
        columns = os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError):
        columns = 0
    columns = columns or shutil.get_terminal_size().columns  # 0: some terminals do not know
    return max(columns - 1, 1)  # the last column would wrap the cursor


_display = _Display()


@contextlib.contextmanager
def phase(
    title: str, total: float | None = None, unit: str = "", done: float = 0
) -> Iterator[Phase]:
    """Show a phase for the length of the block; see Phase."""
    opened = Phase(title, total, unit, done)
    if streams.quiet or os.environ.get("RANK", "0") != "0":
        yield opened
        return
    _display.open(opened)
    completed = False
    try:
        yield opened
        completed = True
    finally:
        _display.close(opened, completed)


def announce(text: str) -> None:
    """Print a line within a second, if a phase is shown. A signal handler may call it."""
    if _display.phases:
        _display.announced = text


def ahead(n: float) -> None:
    """Tell the innermost phase of this thread's command that n more of its units are under way."""
    if _display.phases:
        _display.phases[-1].ahead(n)


def track(items: Iterable[T], title: str, unit: str, total: int | None = None) -> Iterator[T]:
    """Yield the items, and show how many are done; total: default len(items), if it has one."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with phase(title, total, unit) as shown:
        for item in items:
            yield item
            shown.update()
