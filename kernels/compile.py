"""Compiles every Triton kernel ahead of time, for GPUs this machine need not have.

    python -m sid_fast.kernels.compile --arch sm_80,sm_90,sm_100

prints what each configuration takes on each architecture. The exit status is 1 if one spills
registers to memory or needs more shared memory than a block may have, 2 for a bad request.
"""

import argparse
import dataclasses
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sid_fast.kernels._triton import INTERPRETED, triton

# Modules of this package that hold Triton kernels. Each has configurations(), which yields
# (label, kernel, {argument: type}, {argument: constant}, warps, stages) at real shapes; types are
# Triton's ("*bf16", "fp32", "i32"), ":16" after one telling that its value divides by 16.
# Pointers always do, as torch allocates them.
MODULES = ("adam_ema", "attention", "augment", "group_norm", "sid_loss")

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


def rows(archs: list[int], wanted: str = "") -> Iterator[Row]:
    """Compiles everything, or `wanted`: a module, and after a space a part of the labels."""
    wanted, _, part = wanted.partition(" ")
    for module in [wanted] if wanted else MODULES:
        kernels = importlib.import_module(f"sid_fast.kernels.{module}")
        for label, *configuration in kernels.configurations():
            for arch in archs if part in label else ():
                made = compiled(*configuration, arch)
                registers, spills = resources(made.asm["cubin"])
                shared, size = made.metadata.shared, len(made.asm["cubin"])
                yield Row(module, label, f"sm_{arch}", registers, spills, shared, size)


def main(arguments: list[str] | None = None) -> int:
    about, _, details = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m sid_fast.kernels.compile",
        description=about,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--arch", default="sm_80,sm_90,sm_100", metavar="LIST")
    parser.add_argument(
        "--kernel",
        default="",
        metavar="NAME",
        help="only this module, or 'MODULE TEXT': those of its configurations with TEXT in them",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there too")
    options = parser.parse_args(arguments)
    archs = options.arch.split(",")
    if unknown := set(archs) - {f"sm_{arch}" for arch in SHARED_LIMIT}:
        known = ", ".join(f"sm_{arch}" for arch in SHARED_LIMIT)
        parser.error(f"--arch {unknown.pop()}: choose from {known}")
    if options.kernel and options.kernel.split()[0] not in MODULES:
        parser.error(f"--kernel {options.kernel}: choose from {', '.join(MODULES)}")
    if INTERPRETED:
        parser.error("TRITON_INTERPRET is set, under which Triton does not compile: unset it")

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
