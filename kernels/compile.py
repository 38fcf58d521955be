"""Compile the Triton kernels ahead of time; this needs no GPU.

    python -m sid_fast.kernels.compile --arch sm_80,sm_90,sm_100

prints the registers, spills, shared memory and binary size of each configuration on each
architecture. The exit status is 1 if a configuration spills registers to memory or exceeds the
shared memory limit of a block, and 2 for invalid arguments.

    python -m sid_fast.kernels.compile --report --card h200

prints ESTIMATES for a GPU instead: instructions per element, and the time to issue them relative
to the time to move the bytes that must move. --check FILE compares the configurations listed in
FILE with the counts recorded there; the exit status is 1 if a configuration spills or its
instructions per element differ by more than 5 %. --check FILE --write updates FILE.
"""

import argparse
import dataclasses
import importlib
import inspect
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sid_fast.kernels import report
from sid_fast.kernels._triton import INTERPRETED, triton

# Modules of this package with Triton kernels. Each has configurations(), which yields
# (label, kernel, {argument: type}, {argument: constant}, warps, stages) for the shapes of training
# runs. Types are Triton's ("*bf16", "fp32", "i32"); a suffix ":16" promises that the value is a
# multiple of 16, which pointers from torch always are. configurations() takes an architecture if
# launches depend on it.
MODULES = (
    "adam_ema", "attention", "augment", "dropout", "group_norm", "mp", "random", "sid_loss",
    "sida_loss", "weight_norm",
)  # fmt: skip

# Maximum shared memory per block, in bytes (CUDA C++ programming guide, "Compute Capabilities").
SHARED_LIMIT = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}


@dataclasses.dataclass
class Row:
    """Resources of one configuration on one architecture; memory in bytes."""

    kernel: str
    configuration: str
    arch: str
    registers: int  # per thread
    spills: int  # per thread: stack frame and local memory
    shared: int  # per block
    binary: int  # size of the cubin

    def faults(self) -> list[str]:
        """Describe spills and excessive shared memory."""
        limit = SHARED_LIMIT[int(self.arch.removeprefix("sm_"))]
        return [f"spills {self.spills} bytes"] * (self.spills > 0) + [
            f"{self.shared} bytes of shared memory exceed the limit of {limit}"
        ] * (self.shared > limit)


def resources(cubin: bytes) -> tuple[int, int]:
    """Return registers and spilled bytes per thread of a binary with a single kernel."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        tool = triton.knobs.nvidia.cuobjdump.path
        command = [tool, "--dump-resource-usage", str(path)]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (usage,) = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report)
    registers, stack, local = map(int, usage)
    return registers, stack + local


# (module, label, (kernel, signature, constants, num_warps, num_stages))
Selected = tuple[str, str, tuple[Any, dict[str, str], dict[str, Any], int, int]]


def compiled(kernel, signature: dict, constants: dict, warps: int, stages: int, arch: int):
    """Compile a kernel for one architecture and return Triton's CompiledKernel; needs no GPU."""
    types = {name: kind.removesuffix(":16") for name, kind in signature.items()}
    types |= dict.fromkeys(constants, "constexpr")
    divisible = [name for name, kind in signature.items() if kind[0] == "*" or kind[-3:] == ":16"]
    source = triton.compiler.ASTSource(
        fn=kernel,
        signature={name: types[name] for name in kernel.arg_names},
        constexprs=constants,
        attrs={(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in divisible},
    )
    target = triton.backends.compiler.GPUTarget("cuda", arch, 32)
    return triton.compile(source, target, {"num_warps": warps, "num_stages": stages})


def selected(arch: int, wanted: str = "") -> Iterator[Selected]:
    """Yield configurations: all, those of `wanted`="MODULE", or, with "MODULE TEXT", by label."""
    wanted, _, text = wanted.partition(" ")
    for module in [wanted] if wanted else MODULES:
        configurations = importlib.import_module(f"sid_fast.kernels.{module}").configurations
        by_arch = inspect.signature(configurations).parameters
        for label, *rest in configurations(arch) if by_arch else configurations():
            if text in label:
                kernel, signature, constants, warps, stages = rest
                yield module, label, (kernel, signature, constants, warps, stages)


def rows(archs: list[int], wanted: str = "") -> Iterator[Row]:
    """Compile the selected configurations for each architecture."""
    for arch in archs:
        for module, label, configuration in selected(arch, wanted):
            binary = compiled(*configuration, arch)
            registers, spills = resources(binary.asm["cubin"])
            shared, size = binary.metadata.shared, len(binary.asm["cubin"])
            yield Row(module, label, f"sm_{arch}", registers, spills, shared, size)


def estimates(
    configurations: Iterable[Selected], card: str, images: int
) -> Iterator[report.Estimate]:
    """Compile configurations from `selected` and estimate each on a GPU of report.GPUS."""
    for module, label, configuration in configurations:
        binary = compiled(*configuration, report.ARCH)
        registers, spills = resources(binary.asm["cubin"])
        _, _, constants, warps, _ = configuration
        yield report.estimate(
            module, label, (constants, warps), binary, registers, spills, card, images
        )


def deviations(rows: list[report.Estimate], expected: list[dict]) -> list[str]:
    """Describe each row that spills or whose instruction count is off by more than 5 %."""
    out = []
    for row, recorded in zip(rows, expected, strict=True):
        name = f"{row.kernel} {row.configuration}"
        if row.spills:
            out.append(f"{name}: spills {row.spills} bytes")
        now, then = row.instructions_per_element, recorded["instructions_per_element"]
        if abs(now - then) > 0.05 * then:
            out.append(f"{name}: {now} instructions per element, {then} in the table")
    return out


def _report(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    expected = None
    configurations: Iterable[Selected] = selected(report.ARCH, options.kernel)
    if options.check:
        try:
            table = json.loads(options.check.read_text())
            expected = table["rows"]
            names = [(row["kernel"], row["configuration"]) for row in expected]
            if not options.write:
                sum(row["instructions_per_element"] for row in expected)
        except (OSError, ValueError, TypeError, KeyError) as error:
            parser.error(f"--check {options.check}: not a table of estimates: {error!r}")
        if table.get("triton") != triton.__version__ and not options.write:
            parser.error(
                f"--check {options.check}: made by Triton {table.get('triton')}, not "
                f"{triton.__version__}; --write updates it"
            )
        by_name = {(module, label): (module, label, rest) for module, label, rest in configurations}
        if missing := [name for name in names if name not in by_name]:
            parser.error(
                f"--check {options.check}: unknown configuration {' '.join(missing[0])!r}: "
                "remove it from the file, or correct its name"
            )
        configurations = [by_name[name] for name in names]

    print(f"ESTIMATES for {options.card}, {options.images} images; nothing here is measured")
    print(
        f"{'kernel':12} {'configuration':40} registers spills blocks/SM instr/element "
        f"issue us floor us issue/floor"
    )
    rows = []
    for row in estimates(configurations, options.card, options.images):
        rows.append(row)
        print(
            f"{row.kernel:12} {row.configuration:40} {row.registers:9} {row.spills:6} "
            f"{row.blocks_per_sm:9} {row.instructions_per_element:13.1f} {row.issue_us:8.1f} "
            f"{row.floor_us:8.1f} {row.issue_over_floor:11.2f}",
            flush=True,
        )
    if not rows:
        parser.error(f"--kernel {options.kernel}: no configuration matches")
    dicts = [dataclasses.asdict(row) for row in rows]
    if options.json:
        options.json.write_text(json.dumps(dicts, indent=1))
    if options.write:
        columns = ("kernel", "configuration", "registers", "instructions_per_element")
        table = {
            "triton": triton.__version__,
            "rows": [{name: row[name] for name in columns} for row in dicts],
        }
        options.check.write_text(json.dumps(table, indent=1) + "\n")
        return 0
    problems = deviations(rows, expected) if expected else []
    for line in problems:
        print(line, file=sys.stderr)
    return int(bool(problems) or any(row.spills for row in rows))


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    about, _, details = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m sid_fast.kernels.compile",
        description=about,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--arch", metavar="LIST", help="default sm_80,sm_90,sm_100")
    parser.add_argument(
        "--kernel",
        default="",
        metavar="NAME",
        help="only this module, or, with 'MODULE TEXT', only its configurations containing TEXT",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table to FILE")
    parser.add_argument("--report", action="store_true", help="print estimates for a GPU")
    parser.add_argument(
        "--card", choices=list(report.GPUS), default="h100", help="the GPU; default h100"
    )
    parser.add_argument(
        "--images", type=int, default=64, metavar="N", help="batch size of estimates; default 64"
    )
    parser.add_argument(
        "--check", type=Path, metavar="FILE", help="compare estimates with those recorded in FILE"
    )
    parser.add_argument("--write", action="store_true", help="update the FILE of --check")
    options = parser.parse_args(arguments)
    if (options.report or options.check) and options.arch:
        parser.error(f"--arch {options.arch}: --report and --check use the architecture of --card")
    if options.json and not options.json.parent.is_dir():
        parser.error(f"--json {options.json}: there is no folder {options.json.parent}")
    if options.images < 1:
        parser.error(f"--images {options.images}: must be at least 1")
    if options.write and not options.check:
        parser.error("--write needs --check FILE, the file to update")
    archs = (options.arch or "sm_80,sm_90,sm_100").split(",")
    if unknown := set(archs) - {f"sm_{arch}" for arch in SHARED_LIMIT}:
        known = ", ".join(f"sm_{arch}" for arch in SHARED_LIMIT)
        parser.error(f"--arch {unknown.pop()}: choose from {known}")
    if options.kernel and options.kernel.split()[0] not in MODULES:
        parser.error(f"--kernel {options.kernel}: choose from {', '.join(MODULES)}")
    if INTERPRETED:
        parser.error("TRITON_INTERPRET is set, so Triton interprets instead of compiling: unset it")

    if options.report or options.check:
        try:
            return _report(options, parser)
        except RuntimeError as error:  # what Triton raises if it lacks a tool
            if "Cannot find" not in str(error):
                raise
            parser.error(f"--report: {error}; Triton ships it in triton/backends/nvidia/bin")

    print(f"{'kernel':12} {'configuration':36} arch   registers spills  shared  binary")
    table = []
    for row in rows([int(arch.removeprefix("sm_")) for arch in archs], options.kernel):
        table.append(row)
        print(
            f"{row.kernel:12} {row.configuration:36} {row.arch:6} {row.registers:9} "
            f"{row.spills:6} {row.shared:7} {row.binary:7}  {', '.join(row.faults())}".rstrip(),
            flush=True,
        )
    if not table:
        parser.error(f"--kernel {options.kernel}: no configuration matches")
    if options.json:
        options.json.write_text(json.dumps([dataclasses.asdict(row) for row in table], indent=1))
    faulty = sum(bool(row.faults()) for row in table)
    print(f"{len(table)} configurations compiled by Triton {triton.__version__}, {faulty} faulty")
    return int(faulty > 0)


if __name__ == "__main__":
    sys.exit(main())
