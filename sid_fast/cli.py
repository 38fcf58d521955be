"""A command line from a dataclass: every field is an option, its preset the default."""

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
    """The presets of a command ("train" or "pretrain") by name; each is a TOML file of fields."""
    folder = resources.files("sid_fast.config") / "presets" / kind
    files = sorted(folder.iterdir(), key=lambda f: f.name)
    return {
        f.name.removesuffix(".toml"): loads(f.read_text("utf-8"))
        for f in files
        if f.name.endswith(".toml")
    }


class NumberList(click.ParamType):
    """Whole numbers separated by commas."""

    name = "n,n,…"

    def convert(self, value, param, ctx):
        if isinstance(value, list | tuple):
            return tuple(value)
        try:
            return tuple(int(v) for v in value.split(",") if v.strip())
        except ValueError:
            self.fail(f"{value!r} is not a list of whole numbers such as 1,2,2", param, ctx)


class NumberOr(click.ParamType):
    """A whole number, or one of a few words."""

    def __init__(self, words: tuple[str, ...]):
        self.words = words
        self.name = "|".join(("n", *words))

    def convert(self, value, param, ctx):
        if value in self.words or isinstance(value, int):
            return value
        try:
            return int(value)
        except ValueError:
            words = " or ".join(self.words)
            self.fail(f"{value!r} is neither a whole number nor {words}", param, ctx)


class Option(click.Option):
    """One that --help lists under a heading of its own."""

    def __init__(self, *args: Any, heading: str = "Options", **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.heading = heading


# In the order of --help.
HEADINGS = (
    "Preset", "Teacher and data", "Data", "Network", "Cluster", "Run", "Run and output", "Method",
    "Optimizer and average", "Batch and precision", "Evaluation during the run", "Machine",
    "Options", "Help",
)  # fmt: skip


class Command(click.Command):
    """A command whose --help lists its options under their headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
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


def _moved(name: str, place: str) -> click.Option:
    """An option of before: whoever gives it reads where it is now."""

    def callback(ctx: click.Context, param: click.Parameter, value: Any) -> None:
        if value:
            what = "a command of its own" if name == "plan" else f"an option of {place}"
            raise UserError(f"--{name} is {what} now: {place} --help")

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
    """A click command that fills dataclass `config` and calls run(config, given).

    given: the fields named on the command line. kind: which presets --preset offers. moved:
    options of before, and the command that has them now. subcommands: run in its place where one
    is named.
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
                help=f"a named set of defaults for all that follows: {known}",
            ),
        )

    params += [_moved(name, place) for name, place in moved.items()]

    def body(**values: Any) -> None:
        if click.get_current_context().invoked_subcommand:
            return
        source = click.get_current_context().get_parameter_source
        given = {n for n in values if source(n) == click.core.ParameterSource.COMMANDLINE}
        run(config(**values), given)

    common: dict[str, Any] = {
        "params": params,
        "callback": body,
        "help": help.replace("\n\npython", "\n\n\b\npython"),  # lines of their own
        "context_settings": {"max_content_width": 100, "help_option_names": ["-h", "--help"]},
    }
    if not subcommands:
        return Command(config.__name__, **common)
    return Group(config.__name__, commands=subcommands, invoke_without_command=True, **common)


def parse_seeds(text: str) -> list[int]:
    """[0, 1, 2, 7] from "0-2,7"; UserError for anything else."""
    seeds: list[int] = []
    for entry in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,19})(?:-(\d{1,19}))?\s*", entry)
        if not match:
            raise UserError(f"seeds={text!r}: {entry!r} is not a number or a range such as 0-63")
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < 2**63 or last - first >= 10**8:
            raise UserError(f"seeds={text!r}: {entry!r} runs backwards or too far")
        seeds.extend(range(first, last + 1))
    return seeds


# Options that belong to a machine rather than to a run.
MACHINE = {"resume", "device", "parallel", "shard_group", "timeout"}


def resume(config: Any, given: set[str]) -> Path | None:
    """The state to resume, if any; what was not given anew is then as in the run it is of."""
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
        raise UserError(f"{state} is of another command: resume it with python -m sid_fast.{other}")
    if config.preset and config.preset != saved["preset"]:
        raise UserError(f"{state} was written with preset={saved['preset']}, not {config.preset}")
    for name in {f.name for f in dataclasses.fields(config)} - given - MACHINE:
        if name in saved:
            value = saved[name]
            setattr(config, name, tuple(value) if isinstance(value, list) else value)
    config.out = config.out if "out" in given else str(state.parent)
    return state


def main(command: click.Command, module: str) -> None:
    """Run a command: bad input is one line on stderr and exit status 2, a failed run 1."""
    status: Any = 2  # what sys.exit takes
    message = ""
    usual = warnings.showwarning

    def show(message, category, *where, **more) -> None:
        if issubclass(category, Fallback):
            print(f"warning: {message}", file=sys.stderr, flush=True)
        else:
            usual(message, category, *where, **more)

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
    except OSError as error:  # a path too long, a file that has gone: the system's word on it
        message = f"{error.filename or module}: {error.strerror or error}"
    except (click.Abort, KeyboardInterrupt):
        message, status = "interrupted", 130
    except Exception:
        if not failure.unclean_exit:
            raise
        traceback.print_exc()
        status = 1
    finally:
        warnings.showwarning = usual
    if message:
        rank = os.environ.get("RANK", "0")
        prefix = "error: " if rank == "0" else f"error on process {rank}: "
        print(prefix + " ".join(message.split()), file=sys.stderr)
    if (
        failure.unclean_exit
    ):  # an end in good order would wait: for a device, or a thread that saves
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):  # its disk may be full
                stream.flush()
        os._exit(status or 0)
    sys.exit(status)
