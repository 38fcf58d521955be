"""What the terminal can show. Imports nothing slow: commands call it before PyTorch is loaded."""

import os
import re
import sys

ERASE_LINE = "\x1b[2K"

_announced = False


def is_live() -> bool:
    """Whether stderr is a terminal that can redraw a line, and nothing asks for plain output."""
    env = os.environ
    ci = env.get("CI", "").lower() not in ("", "0", "false")
    plain = env.get("TERM", "") in ("", "dumb") or env.get("NO_COLOR") or ci
    return sys.stderr is not None and sys.stderr.isatty() and not plain


def replaces_lines() -> bool:
    """Whether the live line makes progress lines on stdout superfluous: both are one terminal."""
    return is_live() and sys.stdout.isatty()


def announce_loading() -> None:
    """Say on a live terminal that the command is being loaded, until `loaded` erases it."""
    global _announced
    start = sys.orig_argv
    module = start[start.index("-m") + 1 :][:1] if "-m" in start else ["sid_fast"]
    command = module and re.fullmatch(r"sid_fast(\.[a-z]+)?", module[0])
    quiet = {"-q", "--quiet"} & set(sys.argv)
    if is_live() and command and not quiet and os.environ.get("RANK", "0") == "0":
        print("loading PyTorch …", end="", file=sys.stderr, flush=True)
        _announced = True


def loaded() -> None:
    """Erase what `announce_loading` said."""
    global _announced
    if _announced:
        print(f"\r{ERASE_LINE}", end="", file=sys.stderr, flush=True)
        _announced = False
