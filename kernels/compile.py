"""Compiles every Triton kernel ahead of time, for GPUs this machine need not have.

    python -m sid_fast.kernels.compile --arch sm_80,sm_90,sm_100

prints what each configuration takes on each architecture. The exit status is 1 if one spills
registers to memory or needs more shared memory than a block may have, 2 for a bad request.

    python -m sid_fast.kernels.compile --report --card h200

prints ESTIMATES for a card instead: instructions per element, and the time to issue them over the
time to move the bytes that must move. --check FILE compares the configurations named in FILE with
what it says, and exits with 1 where instructions per element are more than 5 % off or one spills;
with --write it updates FILE.
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

# Modules of this package that hold Triton kernels. Each has configurations(), which yields
# (label, kernel, {argument: type}, {argument: constant}, warps, stages) at real shapes; types are
# Triton's ("*bf16", "fp32", "i32"), ":16" after one telling that its value divides by 16.
# Pointers always do, as torch allocates them. Where launches differ by architecture it takes one.
MODULES = ("adam_ema", "attention", "augment", "dropout", "group_norm", "random", "sid_loss")

# Shared memory that one block may have, bytes (CUDA C++ programming guide, compute capabilities).
SHARED_LIMIT = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}


@dataclasses.dataclass
class Row:
    """One configuration on one architecture; memory in bytes, per thread or per block."""

    kernel: str
    configuration: str
    arch: str
    registers: int  # a thread
    spills: int  # a thread: stack frame and local memory
    shared: int  # a block
    binary: int

    def faults(self) -> list[str]:
        limit = SHARED_LIMIT[int(self.arch.removeprefix("sm_"))]
        return [f"spills {self.spills} bytes"] * (self.spills > 0) + [
            f"{self.shared} bytes of shared memory, {limit} is the most"
        ] * (self.shared > limit)


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack and local memory of the only kernel in a binary."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        tool = triton.knobs.nvidia.cuobjdump.path
        command = [tool, "--dump-resource-usage", str(path)]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (found,) = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report)
    registers, stack, local = map(int, found)
    return registers, stack + local


# A module, a label, and (kernel, signature, constants, num_warps, num_stages).
Selected = tuple[str, str, tuple[Any, dict[str, str], dict[str, Any], int, int]]


def compiled(kernel, signature: dict, constants: dict, warps: int, stages: int, arch: int):
    """What triton.compile makes of a kernel for one architecture; needs no GPU."""
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
    """(module, label, configuration) of all, or of `wanted`: "MODULE" or "MODULE TEXT"."""
    wanted, _, part = wanted.partition(" ")
    for module in [wanted] if wanted else MODULES:
        configurations = importlib.import_module(f"sid_fast.kernels.{module}").configurations
        by_arch = inspect.signature(configurations).parameters
        for label, *rest in configurations(arch) if by_arch else configurations():
            if part in label:
                kernel, signature, constants, warps, stages = rest
                yield module, label, (kernel, signature, constants, warps, stages)


def rows(archs: list[int], wanted: str = "") -> Iterator[Row]:
    """Compiles what is selected for every architecture."""
    for arch in archs:
        for module, label, configuration in selected(arch, wanted):
            made = compiled(*configuration, arch)
            registers, spills = resources(made.asm["cubin"])
            shared, size = made.metadata.shared, len(made.asm["cubin"])
            yield Row(module, label, f"sm_{arch}", registers, spills, shared, size)


def estimates(
    configurations: Iterable[Selected], card: str, images: int
) -> Iterator[report.Estimate]:
    """Compiles configurations, as `selected` gives them, for a card and estimates each."""
    for module, label, configuration in configurations:
        made = compiled(*configuration, report.ARCH)
        registers, spills = resources(made.asm["cubin"])
        _, _, constants, warps, _ = configuration
        yield report.estimate(
            module, label, (constants, warps), made, registers, spills, card, images
        )


def deviations(found: list[report.Estimate], expected: list[dict]) -> list[str]:
    """A line for each configuration that spills or takes over 5 % more or less instructions."""
    out = []
    for row, before in zip(found, expected, strict=True):
        name = f"{row.kernel} {row.configuration}"
        if row.spills:
            out.append(f"{name}: spills {row.spills} bytes")
        now, then = row.instructions_per_element, before["instructions_per_element"]
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
                f"{triton.__version__}; --write makes it anew"
            )
        here = {(module, label): (module, label, rest) for module, label, rest in configurations}
        if missing := [name for name in names if name not in here]:
            parser.error(f"--check {options.check}: no configuration is {' '.join(missing[0])}")
        configurations = [here[name] for name in names]

    print(f"ESTIMATES for {options.card}, {options.images} images; nothing here is measured")
    print(
        f"{'kernel':12} {'configuration':40} registers spills blocks/SM instr/element "
        f"issue us floor us issue/floor"
    )
    found = []
    for row in estimates(configurations, options.card, options.images):
        found.append(row)
        print(
            f"{row.kernel:12} {row.configuration:40} {row.registers:9} {row.spills:6} "
            f"{row.blocks_per_sm:9} {row.instructions_per_element:13.1f} {row.issue_us:8.1f} "
            f"{row.floor_us:8.1f} {row.issue_over_floor:11.2f}",
            flush=True,
        )
    if not found:
        parser.error(f"--kernel {options.kernel}: no configuration is called so")
    plain = [dataclasses.asdict(row) for row in found]
    if options.json:
        options.json.write_text(json.dumps(plain, indent=1))
    if options.write:
        kept = ("kernel", "configuration", "registers", "instructions_per_element")
        table = {
            "triton": triton.__version__,
            "rows": [{name: row[name] for name in kept} for row in plain],
        }
        options.check.write_text(json.dumps(table, indent=1) + "\n")
        return 0
    wrong = deviations(found, expected) if expected else []
    for line in wrong:
        print(line, file=sys.stderr)
    return int(bool(wrong) or any(row.spills for row in found))


def main(arguments: list[str] | None = None) -> int:
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
        help="only this module, or 'MODULE TEXT': those of its configurations with TEXT in them",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there too")
    parser.add_argument("--report", action="store_true", help="estimates for a card")
    parser.add_argument("--card", choices=list(report.CARDS), default="h100")
    parser.add_argument("--images", type=int, default=64, metavar="N", help="default 64")
    parser.add_argument("--check", type=Path, metavar="FILE", help="of the report's estimates")
    parser.add_argument("--write", action="store_true", help="update the FILE of --check")
    options = parser.parse_args(arguments)
    if (options.report or options.check) and options.arch:
        parser.error(f"--arch {options.arch}: --report is for the architecture of --card")
    if options.json and not options.json.parent.is_dir():
        parser.error(f"--json {options.json}: there is no folder {options.json.parent}")
    if options.images < 1:
        parser.error(f"--images {options.images}: must be at least 1")
    if options.write and not options.check:
        parser.error("--write: updates the FILE of --check, which is not given")
    archs = (options.arch or "sm_80,sm_90,sm_100").split(",")
    if unknown := set(archs) - {f"sm_{arch}" for arch in SHARED_LIMIT}:
        known = ", ".join(f"sm_{arch}" for arch in SHARED_LIMIT)
        parser.error(f"--arch {unknown.pop()}: choose from {known}")
    if options.kernel and options.kernel.split()[0] not in MODULES:
        parser.error(f"--kernel {options.kernel}: choose from {', '.join(MODULES)}")
    if INTERPRETED:
        parser.error("TRITON_INTERPRET is set, under which Triton does not compile: unset it")

    if options.report or options.check:
        try:
            return _report(options, parser)
        except RuntimeError as error:  # Triton's for a tool that is not there
            if "Cannot find" not in str(error):
                raise
            parser.error(f"--report: {error}; Triton brings it in triton/backends/nvidia/bin")

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
        parser.error(f"--kernel {options.kernel}: no configuration is called so")
    if options.json:
        options.json.write_text(json.dumps([dataclasses.asdict(row) for row in table], indent=1))
    faulty = sum(bool(row.faults()) for row in table)
    print(f"{len(table)} compiled with Triton {triton.__version__}, {faulty} with a fault")
    return int(faulty > 0)


if __name__ == "__main__":
    sys.exit(main())
