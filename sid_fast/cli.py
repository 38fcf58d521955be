"""Command lines made from dataclasses: each field is an option, a preset replaces its default."""

import contextlib
import dataclasses
import inspect
import os
import re
import sys
import traceback
import types
import typing
import warnings
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import click

from sid_fast.config.toml import loads
from sid_fast.config.types import members
from sid_fast.errors import Fallback, RunFailed, UserError
from sid_fast.performance import failure
from sid_fast.training.checkpoint import PATTERN, find_restarted_run, find_state, read_header


def presets(kind: str) -> dict[str, dict[str, Any]]:
    """Read the presets of a command ("train" or "pretrain"): name -> {field: value}."""
    folder = resources.files("sid_fast.config") / "presets" / kind
    files = sorted(folder.iterdir(), key=lambda f: f.name)
    return {
        f.name.removesuffix(".toml"): loads(f.read_text("utf-8"))
        for f in files
        if f.name.endswith(".toml")
    }


class NumberList(click.ParamType):
    """Integers separated by commas."""

    name = "n,n,…"

    def convert(self, value, param, ctx):
        """Parse "1,2,2" into (1, 2, 2)."""
        if isinstance(value, list | tuple):
            return tuple(value)
        try:
            return tuple(int(v) for v in value.split(",") if v.strip())
        except ValueError:
            self.fail(f"{value!r} is not a list of integers such as 1,2,2", param, ctx)


class NumberOr(click.ParamType):
    """An integer or one of a few words."""

    def __init__(self, words: tuple[str, ...]):
        self.words = words
        self.name = "|".join(("n", *words))

    def convert(self, value, param, ctx):
        """Return one of the words unchanged, anything else as an integer."""
        if value in self.words or isinstance(value, int):
            return value
        try:
            return int(value)
        except ValueError:
            words = " or ".join(self.words)
            self.fail(f"{value!r} is neither an integer nor {words}", param, ctx)


class Option(click.Option):
    """An option that --help lists under the given heading."""

    def __init__(self, *args: Any, heading: str = "Options", **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.heading = heading


# Sections of --help, in this order.
HEADINGS = (
    "Preset", "Teacher and data", "Data", "Network", "Cluster", "Run", "Run and output", "Method",
    "SiDA", "Optimizer and EMA", "Batch and precision", "Evaluation during the run", "Machine",
    "Options", "Help",
)  # fmt: skip


class Command(click.Command):
    """A command whose --help groups its options by heading."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a section for each heading, in the order of HEADINGS."""
        rows: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            if record := param.get_help_record(ctx):
                rows.setdefault(getattr(param, "heading", "Help"), []).append(record)
        for heading, records in sorted(rows.items(), key=lambda row: HEADINGS.index(row[0])):
            with formatter.section(heading):
                formatter.write_dl(records)
        if isinstance(self, click.Group):
            self.format_commands(ctx, formatter)


class Group(Command, click.Group):
    """A command with subcommands."""


def _option(f: dataclasses.Field, hint: Any) -> click.Option:
    name = f.name.strip("_").replace("_", "-")
    common: dict[str, Any] = {
        "help": f.metadata["help"],
        "default": f.default,
        "show_default": True,
    }
    common["heading"] = f.metadata["heading"]
    choices, kinds = members(hint)
    if kinds == (bool,):
        return Option([f"--{name}/--no-{name}", f.name], **common)
    names = [n for n in (f.metadata["short"], f"--{name}", f.name) if n]
    if choices:
        choice = NumberOr(choices) if kinds else click.Choice(choices)
        return Option(names, type=choice, **common)
    kind: Any = NumberList() if typing.get_origin(kinds[0]) is tuple else kinds[0]
    metavar = {int: "N", float: "X", str: "TEXT"}.get(kind)
    return Option(names, type=kind, metavar=metavar, **common)


def _moved_option(name: str, module: str) -> click.Option:
    """A hidden option that fails and names the command, `module`, that it moved to."""

    def callback(ctx: click.Context, param: click.Parameter, value: Any) -> None:
        if value:
            what = "a command of its own:" if name == "plan" else "an option of"
            raise UserError(f"--{name} is now {what} python -m {module} (--help lists its options)")

    return click.Option(
        [f"--{name}"], hidden=True, expose_value=False, callback=callback, is_flag=name == "plan"
    )


def _choose_preset(kind: str):
    def callback(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
        if value is not None:
            known = presets(kind)
            if value not in known:
                raise UserError(f"preset {value!r} is unknown: choose from {', '.join(known)}")
            ctx.default_map = known[value]
        return value

    return callback


def command(
    config: type,
    run: Callable[[Any, set[str]], None],
    kind: str | None,
    help: str,
    moved: Mapping[str, str] = types.MappingProxyType({}),
    **subcommands: click.Command,
) -> click.Command:
    """Make a click command that fills dataclass `config` and calls run(config, given).

    Args:
        config: the dataclass whose fields are the options.
        run: called with the filled dataclass and the names of the fields that the command line set.
        kind: folder of the presets that --preset offers, "train" or "pretrain"; None: no presets.
        help: text above the options in --help.
        moved: former options and the module of the command that has each of them now.
        subcommands: commands that run instead of this one when named.
    """
    hints = typing.get_type_hints(config)
    fields = {f.name: f for f in dataclasses.fields(config)}
    names = dict.fromkeys(n for c in config.__mro__ for n in inspect.get_annotations(c))
    params: list[click.Parameter] = [
        _option(fields[n], hints[n]) for n in names if not (kind and n == "preset")
    ]
    if kind:
        known = ", ".join(presets(kind))
        params.insert(
            0,
            Option(
                ["--preset"],
                heading="Preset",
                is_eager=True,
                callback=_choose_preset(kind),
                metavar="NAME",
                help=f"a named set of defaults, which other options override: {known}",
            ),
        )

    params += [_moved_option(name, module) for name, module in moved.items()]

    def body(**values: Any) -> None:
        if click.get_current_context().invoked_subcommand:
            return
        source = click.get_current_context().get_parameter_source
        given = {n for n in values if source(n) == click.core.ParameterSource.COMMANDLINE}
        run(config(**values), given)

    common: dict[str, Any] = {
        "params": params,
        "callback": body,
        "help": help.replace("\n\npython", "\n\n\b\npython"),  # click keeps these line breaks
        "context_settings": {"max_content_width": 100, "help_option_names": ["-h", "--help"]},
    }
    if not subcommands:
        return Command(config.__name__, **common)
    return Group(config.__name__, commands=subcommands, invoke_without_command=True, **common)


def parse_seeds(text: str) -> list[int]:
    """Parse a seed list: "0-2,7" gives [0, 1, 2, 7]; UserError for anything else."""
    seeds: list[int] = []
    for entry in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,19})(?:-(\d{1,19}))?\s*", entry)
        if not match:
            raise UserError(f"seeds={text!r}: {entry!r} is not a seed or a range such as 0-63")
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < 2**63 or last - first >= 10**8:
            raise UserError(
                f"seeds={text!r}: {entry!r} is a descending range, too long, or above 2^63 - 1"
            )
        seeds.extend(range(first, last + 1))
    return seeds


# A resumed run takes these from its own command line, never from the checkpoint.
NOT_RESUMED = {
    "resume", "device", "parallel", "shard_group", "timeout", "tune", "tune_minutes",
}  # fmt: skip


def resume(config: Any, given: set[str]) -> Path | None:
    """Find the checkpoint to resume and fill `config` from it; None for a new run.

    Options that the command line does not set take the saved run's values, except NOT_RESUMED.
    A run that torchrun restarted resumes its own newest checkpoint.

    Args:
        config: the command's dataclass; modified in place.
        given: names of the fields that the command line set.

    Raises:
        UserError: there is no such checkpoint, or another command or preset wrote it.
    """
    if folder := find_restarted_run(config.out):
        config.out = str(folder)
        if any(folder.glob(PATTERN)):
            config.resume = str(folder)
    if not config.resume:
        return None
    kind = type(config).__name__
    state = find_state(config.resume, config.out, kind)
    header = read_header(state)
    saved = header["options"]
    if header["kind"] != kind:
        other = header["kind"].removesuffix("Config").lower()
        raise UserError(f"{state} was written by another command: python -m sid_fast.{other}")
    if config.preset and config.preset != saved["preset"]:
        raise UserError(f"{state} was written with preset={saved['preset']}, not {config.preset}")
    for name in {f.name for f in dataclasses.fields(config)} - given - NOT_RESUMED:
        if name in saved:
            value = saved[name]
            setattr(config, name, tuple(value) if isinstance(value, list) else value)
    config.out = config.out if "out" in given else str(state.parent)
    return state


def main(command: click.Command, module: str) -> None:
    """Run a command and exit: status 2 and one line on stderr for bad input, 1 for a failed run."""
    status: Any = 2  # for sys.exit
    message = ""
    default_showwarning = warnings.showwarning

    def show(message, category, *where, **more) -> None:
        if issubclass(category, Fallback):
            print(f"warning: {message}", file=sys.stderr, flush=True)
        else:
            default_showwarning(message, category, *where, **more)

    warnings.showwarning = show
    try:
        status = command.main(prog_name=f"python -m {module}", standalone_mode=False)
    except SystemExit as stopped:
        status = stopped.code
    except UserError as error:
        message = str(error)
    except RunFailed as error:
        message, status = str(error), 1
    except click.ClickException as error:
        message = f"{error.format_message()} (python -m {module} --help lists the options)"
    except OSError as error:  # such as a path that is too long or a file that disappeared
        message = f"{error.filename or module}: {error.strerror or error}"
    except (click.Abort, KeyboardInterrupt):
        message, status = "interrupted", 130
    except Exception:
        if not failure.unclean_exit:
            raise
        traceback.print_exc()
        status = 1
    finally:
        warnings.showwarning = default_showwarning
    if message:
        rank = os.environ.get("RANK", "0")
        prefix = "error: " if rank == "0" else f"error on process {rank}: "
        print(prefix + " ".join(message.split()), file=sys.stderr)
    if failure.unclean_exit:  # a normal exit would wait for the device or for a checkpoint thread
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):  # the disk may be full
                stream.flush()
        os._exit(status or 0)
    sys.exit(status)
