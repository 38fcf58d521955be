"""How this process was started, and the command lines that it suggests to type next."""

import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from sid_fast.io import streams

script = False  # started by the installed `sid-fast`
_imported = time.monotonic()


def program(command: str) -> str:
    """How a command, such as "train", is called the way this one was."""
    return f"sid-fast {command}" if script else f"python -m sid_fast.{command}"


def command_line(command: str, *arguments: object) -> str:
    """A command line that a shell takes; None and paths are arguments too, quoted where needed."""
    start = program(command)
    if not script:
        start = f"{python()} -m sid_fast.{command}"
    return " ".join([start, *(shlex.quote(str(a)) for a in arguments)])


def python() -> str:
    """The shortest name of this Python: `python` if the shell finds it there."""
    here = Path(sys.executable)
    name = shutil.which("python")
    if not sys.executable or (name and Path(name).parent == here.parent):
        return "python"
    return shlex.quote(os.path.relpath(here) if here.is_relative_to(Path.cwd()) else str(here))


def suggest(*commands: str) -> None:
    """Print the commands that continue from here, unless --quiet."""
    if len(commands) == 1:
        streams.note(f"next: {commands[0]}", sys.stdout)
    elif commands:
        streams.note("\n  ".join(["next:", *commands]), sys.stdout)


def report(headline: str, made: Sequence[object]) -> None:
    """Print the end of a command: a line, and the files and folders that it made."""
    streams.say("\n  ".join([headline, *map(str, made)]))


def started() -> float:
    """When this process was started, on the clock of time.monotonic().

    Of a process that torchrun started: when torchrun was, since its restarts share one job's time.
    """
    pid = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else os.getpid()
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2]
        since_boot = int(after_name.split()[19]) / os.sysconf("SC_CLK_TCK")
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot
    except (OSError, ValueError, IndexError, AttributeError):  # not Linux
        age = 0.0
    return min(_imported, time.monotonic() - age)
