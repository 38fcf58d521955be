"""Command lines made from dataclasses: each field is an option, a preset replaces its default."""

import dataclasses
import difflib
import inspect
import itertools
import logging
import os
import re
import signal
import sys
import threading
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
from sid_fast.config.types import START_OPTIONS, members
from sid_fast.errors import (
    Fallback,
    RunFailed,
    UserError,
    allocation_request,
    is_out_of_memory,
    one_line,
)
from sid_fast.io import invocation, streams
from sid_fast.io.download import is_cached
from sid_fast.performance import failure, process_group
from sid_fast.training.checkpoint import PATTERN, find_restarted_run, find_state, hold_state


def presets(kind: str) -> dict[str, dict[str, Any]]:
    """Read the presets of a command ("train" or "pretrain"): name -> {field: value}."""
    folder = resources.files("sid_fast.config") / "presets" / kind
    files = sorted(folder.iterdir(), key=lambda f: f.name.removesuffix(".toml"))
    return {
        f.name.removesuffix(".toml"): loads(f.read_text("utf-8"))
        for f in files
        if f.name.endswith(".toml")
    }


def changed_options(config: Any, kind: str) -> dict[str, Any]:
    """Return the preset's value, else the default, of each option that has another value.

    Args:
        config: the command's dataclass, with a field `preset`.
        kind: "train" or "pretrain", as for `presets`.
    """
    values = presets(kind).get(config.preset or "", {})
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    original = type(config)(**values, preset=config.preset)
    names = (f.name for f in dataclasses.fields(config))
    return {n: getattr(original, n) for n in names if getattr(original, n) != getattr(config, n)}


class NumberList(click.ParamType):
    """Numbers of a type, int or float, separated by commas."""

    def __init__(self, kind: type):
        self.kind = kind
        self.name = "n,n,…" if kind is int else "x,x,…"

    def convert(self, value, param, ctx):
        """Parse "1,2,2" into (1, 2, 2)."""
        if isinstance(value, list | tuple):
            return tuple(value)
        try:
            return tuple(self.kind(v) for v in value.split(",") if v.strip())
        except ValueError:
            like = "integers such as 1,2,2" if self.kind is int else "numbers such as 0.05,0.1"
            self.fail(f"{value!r} is not a list of {like}", param, ctx)


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
    "SiDA", "EDM2 teachers", "Optimizer and EMA", "Batch and precision",
    "Evaluation during the run", "Machine", "Options", "Help",
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
    kind: Any = kinds[0]
    if typing.get_origin(kind) is tuple:
        kind = NumberList(typing.get_args(kind)[0])
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


def _is_hidden(param: click.Parameter) -> bool:
    return isinstance(param, click.Option) and param.hidden


def _choose_preset(kind: str):
    def callback(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
        if value is not None:
            known = presets(kind)
            if value not in known:
                near = difflib.get_close_matches(value, known, 1)
                way = f"did you mean {near[0]}? All presets:" if near else "choose from"
                raise UserError(f"preset {value!r} is unknown: {way} {', '.join(known)}")
            ctx.default_map = known[value]
        return value

    return callback


def _set_quiet(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    streams.quiet = value


def command(
    config: type,
    run: Callable[[Any, set[str]], None],
    kind: str | None,
    help: str,
    moved: Mapping[str, str] = types.MappingProxyType({}),
    positional: str | None = None,
    **subcommands: click.Command,
) -> click.Command:
    """Make a click command that fills dataclass `config` and calls run(config, given).

    Args:
        config: the dataclass whose fields are the options.
        run: called with the filled dataclass and the names of the fields that the command line set.
        kind: folder of the presets that --preset offers, "train" or "pretrain"; None: no presets.
        help: text above the options in --help.
        moved: former options and the module of the command that has each of them now.
        positional: the field, a tuple of strings, that takes the arguments without an option.
        subcommands: commands that run instead of this one when named.
    """
    if invocation.script:
        help = help.replace("python -m sid_fast.", "sid-fast ")
    hints = typing.get_type_hints(config)
    fields = {f.name: f for f in dataclasses.fields(config)}
    names = dict.fromkeys(n for c in config.__mro__ for n in inspect.get_annotations(c))
    params: list[click.Parameter] = [
        _option(fields[n], hints[n])
        for n in names
        if not (kind and n == "preset") and n != positional
    ]
    if positional:
        metavar = f"{positional.removesuffix('s').upper()}…"
        params.append(click.Argument([positional], nargs=-1, metavar=metavar))
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
    params.append(
        Option(
            ["-q", "--quiet"],
            heading="Help",
            is_flag=True,
            expose_value=False,
            callback=_set_quiet,
            help="print errors, warnings and the final result alone",
        )
    )

    def body(**values: Any) -> None:
        context = click.get_current_context()
        source = context.get_parameter_source
        given = {n for n in values if source(n) == click.core.ParameterSource.COMMANDLINE}
        for name in values:
            if name in given and not str(values[name]).strip():  # an empty list means none
                raise UserError(
                    f"{flag(name)} is empty, perhaps an unset shell variable: give it a value, or "
                    "leave it out"
                )
        if context.invoked_subcommand:
            if given:
                raise UserError(
                    f"{flag(min(given))} has no effect on {context.invoked_subcommand}: give the "
                    f"options of {context.invoked_subcommand} after its name"
                )
            return
        process_group.launch()  # refuses a broken environment before any work
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


def flag(name: str) -> str:
    """Return the option of a field: "batch_size" gives "--batch-size"."""
    return "--" + name.strip("_").replace("_", "-")


def refuse_idle(config: Any, given: set[str], met: Any, needs: str, *names: str) -> None:
    """Raise UserError if an option is given that has no effect.

    Args:
        config: the command's dataclass.
        given: names of the fields that the command line set.
        met: whether the options have an effect.
        needs: what they need for it, such as another option.
        names: fields of the options; one that is False or None counts as not given.
    """
    for name in names:
        value = getattr(config, name, None)
        if not met and name in given and value is not False and value is not None:
            raise UserError(
                f"{flag(name)} has no effect without {needs}: add that, or leave out {flag(name)}"
            )


def refuse_idle_detector_options(config: Any, given: set[str]) -> None:
    """Raise UserError if --trust or --batch does nothing for the --detector (see refuse_idle)."""
    file = config.detector not in ("inception", "pixels")
    refuse_idle(config, given, file, "--detector FILE", "trust")
    network = config.detector != "pixels"
    refuse_idle(config, given, network, "a --detector other than pixels", "batch")


def refuse_idle_run_options(config: Any, given: set[str]) -> None:
    """Raise UserError if an option of a training run has no effect (see refuse_idle)."""
    evaluation = ("eval_images", "detector", "ref", "trust", "teacher_steps")
    refuse_idle(config, given, config.eval_every, "--eval-every", *evaluation)
    refuse_idle_detector_options(config, given)
    hsdp = process_group.launch().world_size > 1 and config.parallel in ("auto", "hsdp")
    refuse_idle(config, given, hsdp, "several processes and --parallel hsdp", "shard_group")


def parse_seeds(text: str) -> list[int]:
    """Parse a seed list: "0-2,7" gives [0, 1, 2, 7]; see seed_ranges."""
    return list(itertools.chain(*seed_ranges(text)))


def seed_ranges(text: str) -> list[range]:
    """Parse a seed list without listing the seeds: "0-2,7" gives [range(0, 3), range(7, 8)].

    Raises:
        UserError: the text is anything else, or has more than 10^8 seeds.
    """
    ranges: list[range] = []
    for entry in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,19})(?:-(\d{1,19}))?\s*", entry)
        if not match:
            raise UserError(f"seeds={text!r}: {entry!r} is not a seed or a range such as 0-63")
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < 2**63 or last - first >= 10**8:
            raise UserError(
                f"seeds={text!r}: {entry!r} is a descending range, too long, or above 2^63 - 1"
            )
        ranges.append(range(first, last + 1))
    if sum(map(len, ranges)) > 10**8:
        raise UserError(f"seeds={text!r} are more than 10^8: split them over several calls")
    return ranges


# A resumed run takes these from its own command line, never from the checkpoint. A checkpoint must
# not grant permission to run programs: --trust.
NOT_RESUMED = START_OPTIONS | {
    "resume", "device", "parallel", "shard_group", "timeout", "trust", "tune", "tune_minutes",
}  # fmt: skip


def resume(config: Any, given: set[str]) -> Path | None:
    """Find the checkpoint to resume and fill `config` from it; None for a new run.

    Options that the command line does not set take the saved run's values, except NOT_RESUMED.
    A run that torchrun restarted resumes its own newest checkpoint.

    Args:
        config: the command's dataclass; modified in place.
        given: names of the fields that the command line set.

    Raises:
        UserError: there is no such checkpoint, or another command or preset wrote it, or an option
            in it is invalid or a URL that was never downloaded here.
    """
    if folder := find_restarted_run(config.out):
        config.out = str(folder)
        if any(folder.glob(PATTERN)):
            config.resume = str(folder)
    if not config.resume:
        return None
    kind = type(config).__name__
    state, header = hold_state(lambda: find_state(config.resume, config.out, kind))
    saved = header["options"]
    if header["kind"] != kind:
        other = header["kind"].removesuffix("Config").lower()
        raise UserError(f"{state} was written by another command: python -m sid_fast.{other}")
    if config.preset and config.preset != saved.get("preset"):
        was = saved.get("preset")
        raise UserError(
            f"{state} was written with preset={was}, not {config.preset}: leave out --preset, or "
            "start a new run"
        )
    hints = typing.get_type_hints(type(config))
    for name in {f.name for f in dataclasses.fields(config)} - given - NOT_RESUMED:
        if name in saved:
            value = tuple(saved[name]) if isinstance(saved[name], list) else saved[name]
            if not _is_of(hints[name], value):
                raise UserError(
                    f"{state} has an invalid value of {name}: give --{name.replace('_', '-')}, or "
                    "resume from another state"
                )
            if isinstance(value, str) and "://" in value and not is_cached(value):
                option = f"--{name.replace('_', '-')}"
                raise UserError(
                    f"{state} has {name}={value}, which was never downloaded here: give {option} "
                    f"{value} if you trust the address, or another {option}"
                )
            setattr(config, name, value)
    config.out = config.out if "out" in given else str(state.parent)
    return state


CPU_ALLOCATION_FAILED = "DefaultCPUAllocator: "  # of torch's RuntimeError
OUT_OF_MEMORY = (
    "out of memory on the CPU: use a smaller batch, fewer images or a smaller network, or a "
    "machine with more memory"
)
GPU_OUT_OF_MEMORY = (
    "use a smaller --batch or --micro-batch, end other programs on the GPU, or take a larger one"
)


def without_traceback(record: logging.LogRecord) -> bool:
    """Reject log records with a traceback: PyTorch raises the same error, and we report that."""
    return not record.exc_info


def _is_of(hint: Any, value: Any) -> bool:
    """Whether a value from a file has the type of a dataclass field."""
    if value is None:
        return type(None) in typing.get_args(hint)
    choices, kinds = members(hint)
    for kind in kinds:
        if typing.get_origin(kind) is tuple:
            numbers = (int, float) if float in typing.get_args(kind) else (int,)
            if isinstance(value, tuple) and all(type(v) in numbers for v in value):
                return True
        elif type(value) is kind or (kind is float and type(value) is int):
            return True
    return isinstance(value, str) and value in choices


def main(command: click.Command, module: str) -> None:
    """Run a command and exit: status 2 and one line on stderr for bad input, 1 for a failed run.

    Output that cannot be written is lost, and never ends the command; see streams.make_safe.
    """
    status: Any = 2  # for sys.exit
    program = invocation.program(module.removeprefix("sid_fast."))
    message = ""
    streams.make_safe()
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # see sid_fast/__init__.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if logging.lastResort:
        logging.lastResort.addFilter(without_traceback)
    default_showwarning, default_excepthook = warnings.showwarning, threading.excepthook

    def show(message, category, *where, **more) -> None:
        if issubclass(category, Fallback):
            streams.say(f"warning: {one_line(message)}", sys.stderr)
        else:
            default_showwarning(message, category, *where, **more)

    def thread_failed(failed) -> None:
        # TensorBoard's writer thread: its next call raises the error again, and Log reports that.
        if not isinstance(failed.exc_value, OSError):
            default_excepthook(failed)

    warnings.showwarning, threading.excepthook = show, thread_failed
    try:
        status = command.main(prog_name=program, standalone_mode=False)
    except SystemExit as stopped:
        status = stopped.code
    except UserError as error:
        message = str(error)
    except RunFailed as error:
        message, status = str(error), 1
    except click.ClickException as error:
        if isinstance(error, click.NoSuchOption) and error.ctx:
            hidden = {o for p in error.ctx.command.params if _is_hidden(p) for o in p.opts}
            near = [o for o in error.possibilities or () if o not in hidden]
            error = click.NoSuchOption(error.option_name, possibilities=near, ctx=error.ctx)
        message = f"{error.format_message()} ({program} --help lists the options)"
    except OSError as error:  # such as a path that is too long or a file that disappeared
        message = f"{error.filename or module}: {error.strerror or error}"
    except MemoryError:
        message = OUT_OF_MEMORY
    except (click.Abort, KeyboardInterrupt):
        message, status = "interrupted", 130
    except Exception as error:
        if CPU_ALLOCATION_FAILED in str(error):
            message = OUT_OF_MEMORY
        elif is_out_of_memory(error) and not failure.unclean_exit:
            message, status = f"{allocation_request(error)}: {GPU_OUT_OF_MEMORY}", 1
        elif not failure.unclean_exit:
            raise
        else:
            traceback.print_exc()
            status = 1
    finally:
        streams.quiet = False
        warnings.showwarning, threading.excepthook = default_showwarning, default_excepthook
    if message:
        rank = os.environ.get("RANK", "0")
        prefix = f"error on process {rank}: " if rank.strip("0").isdecimal() else "error: "
        streams.say(prefix + one_line(message), sys.stderr)
    elif lost := streams.lost_output():
        streams.say(f"warning: some output was lost: {lost}", sys.stderr)
    if failure.unclean_exit:  # a normal exit would wait for the device or for a checkpoint thread
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status or 0)
    sys.exit(status)
