"""List the commands: sid-fast, or python -m sid_fast; `sid-fast train …` runs one."""

import difflib
import runpy
import sys

from sid_fast.errors import one_line
from sid_fast.io import invocation, streams

TEXT = """sid_fast distils a pretrained EDM diffusion model into a one-step generator.

  python -m sid_fast.train      distil a teacher into a one-step generator
  python -m sid_fast.plan       estimate memory, time and cost of a run on a given cluster
  python -m sid_fast.tune       check and time implementations of the training step on this machine
  python -m sid_fast.generate   generate images
  python -m sid_fast.evaluate   compute FID, IS, KID, precision and recall
  python -m sid_fast.report     show runs on one HTML page: curves, images, speed, configuration
  python -m sid_fast.pretrain   train a teacher on your own images
  python -m sid_fast.ema        make an EMA of any width from the snapshots of a teacher's training
  python -m sid_fast.prepare    make a data set of a folder or zip of images
  python -m sid_fast.export     write a network for upstream's tools, ONNX Runtime or torch.export

Each command lists its options with --help. To try it on a CPU, in a few minutes:

  python -m sid_fast.train --preset fashion"""
LINES = (line.split() for line in TEXT.splitlines() if line.startswith("  python -m sid_fast."))
COMMANDS = tuple(dict.fromkeys(words[2].partition(".")[2] for words in LINES))


def main(arguments: list[str]) -> None:
    """Run the command that the first argument names; list the commands without one."""
    streams.make_safe()
    text = TEXT.replace("python -m sid_fast.", "sid-fast ") if invocation.script else TEXT
    if not arguments or arguments[0] in ("-h", "--help"):
        streams.say(text)
    elif arguments[0] in COMMANDS:
        module = f"sid_fast.{arguments[0]}"
        sys.argv = [module, *arguments[1:]]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        near = difflib.get_close_matches(arguments[0], COMMANDS, 1)
        known = ", ".join(COMMANDS)
        problem = one_line(f"error: {arguments[0]!r} is not a command")
        way = f"did you mean {near[0]}? All commands: {known}" if near else f"choose from {known}"
        streams.say(f"{problem}: {way}", sys.stderr)
        sys.exit(2)


def script() -> None:
    """The entry point of the installed command `sid-fast`."""
    invocation.script = True
    main(sys.argv[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
