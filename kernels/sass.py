"""Instruction counts of compiled kernels: disassembly, loops and the likeliest path.

Counts are of one warp. They say how long a GPU needs to issue a kernel's instructions, and
nothing about latency, bank conflicts or caches.
"""

import dataclasses
import re
import subprocess
import tempfile
from functools import reduce
from pathlib import Path

from sid_fast.kernels._triton import triton

# Of one multiprocessor, compute capability 9.0 (CUDA C++ programming guide, "Compute Capabilities";
# registers are handed out to warps, 8 a thread at a time).
REGISTERS = 65_536
SHARED_MEMORY = 228 * 1024
SHARED_RESERVED = 1024  # by the driver, a block
WARPS = 64
BLOCKS = 32
SCHEDULERS = 4

EXITS = ("EXIT", "RET")
_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]+\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_LABEL = re.compile(r"(\.L_x_\d+|\$[\w$.]+):")
_TARGET = re.compile(r"`\(([.\w$]+)\)")


@dataclasses.dataclass
class Instruction:
    opcode: str  # with its modifiers: "LDG.E.128"
    predicate: str | None  # "!P0"
    operands: str

    def bytes(self) -> int:
        """Bytes a thread moves from or to global memory; 0 for any other instruction."""
        if self.opcode.split(".")[0] not in ("LDG", "STG"):
            return 0
        widths = {".128": 16, ".64": 8, ".U16": 2, ".S16": 2, ".U8": 1, ".S8": 1}
        return next((n for name, n in widths.items() if name in self.opcode), 4)


@dataclasses.dataclass
class Program:
    """A kernel's machine code, and where its branches lead."""

    instructions: list[Instruction]
    successors: list[list[int]]  # of every instruction; none after an exit


def disassemble(cubin: bytes) -> Program:
    """The machine code of the only kernel in a binary.

    Raises RuntimeError if Triton finds no nvdisasm, CalledProcessError if that fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return parse(text)


def parse(text: str) -> Program:
    """The program that nvdisasm -c printed."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if found := _LABEL.match(line):
            labels[found.group(1)] = len(code)
        elif found := _INSTRUCTION.match(line):
            predicate, opcode, operands = found.groups()
            always = predicate in ("PT", "UPT")
            code.append(Instruction(opcode, None if always else predicate, operands))
    return Program(code, [_successors(code, labels, i) for i in range(len(code))])


def _successors(code: list[Instruction], labels: dict[str, int], i: int) -> list[int]:
    """Calls count as the instruction after them: ptxas calls slow paths of divisions and roots."""
    base = code[i].opcode.split(".")[0]
    onward = [i + 1] if i + 1 < len(code) else []
    if base in EXITS:
        return onward if code[i].predicate else []
    target = _TARGET.search(code[i].operands)
    if base != "BRA" or not target:
        return onward
    # "P0, UP1 ..." before the target is a second condition.
    conditional = code[i].predicate or not code[i].operands.startswith("`")
    return (onward if conditional else []) + [labels[target.group(1)]]


def loops(program: Program) -> dict[int, set[int]]:
    """The first instruction and the body of every natural loop, outermost first."""
    order = _reverse_postorder(program)
    before: dict[int, list[int]] = {i: [] for i in order}
    for i in order:
        for j in program.successors[i]:
            before[j].append(i)
    found: dict[int, set[int]] = {}
    dominators = _dominators(order, before)
    for tail in order:
        for head in program.successors[tail]:
            if head == tail or not _dominates(head, tail, dominators):
                continue
            body = found.setdefault(head, {head})
            stack = [tail]
            while stack:
                if (i := stack.pop()) not in body:
                    body.add(i)
                    stack += before[i]
    return dict(sorted(found.items(), key=lambda loop: -len(loop[1])))


def _reverse_postorder(program: Program) -> list[int]:
    seen, out, stack = {0}, [], [(0, iter(program.successors[0]))]
    while stack:
        i, rest = stack[-1]
        j = next((j for j in rest if j not in seen), None)
        if j is None:
            out.append(i)
            stack.pop()
        else:
            seen.add(j)
            stack.append((j, iter(program.successors[j])))
    return out[::-1]


def _dominators(order: list[int], before: dict[int, list[int]]) -> dict[int, int]:
    """The immediate dominator of every instruction (Cooper, Harvey and Kennedy 2001)."""
    place = {i: k for k, i in enumerate(order)}
    closest = {order[0]: order[0]}

    def common(a: int, b: int) -> int:
        while a != b:
            while place[a] > place[b]:
                a = closest[a]
            while place[b] > place[a]:
                b = closest[b]
        return a

    changed = True
    while changed:
        changed = False
        for i in order[1:]:
            new = reduce(common, [j for j in before[i] if j in closest])
            changed |= closest.get(i) != new
            closest[i] = new
    return closest


def _dominates(head: int, tail: int, dominators: dict[int, int]) -> bool:
    while tail != head and dominators[tail] != tail:
        tail = dominators[tail]
    return tail == head


def count(program: Program, trips: tuple[float, ...]) -> tuple[float, float]:
    """Instructions that a warp issues, and bytes its threads store, each with its loops' trips.

    trips are those of an outermost loop, of a loop within one, and so on. Where control divides,
    the path is taken that runs the most loops, then the one that moves the most bytes by accesses
    of 8 bytes and more, then the shortest: the one for full tiles and finite values.

    Raises ValueError if loops are nested deeper than trips say.
    """
    weight = [1.0] * len(program.instructions)
    heads = loops(program)
    depth = [0] * len(weight)
    for body in heads.values():
        for i in body:
            if depth[i] == len(trips):
                raise ValueError(f"loops are nested deeper than the {len(trips)} that have trips")
            weight[i] *= trips[depth[i]]
            depth[i] += 1
    order = _reverse_postorder(program)
    place = {i: k for k, i in enumerate(order)}
    best: dict[int, tuple[float, float, float, float]] = {}
    for i in reversed(order):
        instruction = program.instructions[i]
        onward = [best[j] for j in program.successors[i] if place[j] > place[i] and j in best]
        if not onward:
            if instruction.opcode.split(".")[0] not in EXITS:
                continue  # only jumps back from here
            onward = [(0.0, 0.0, 0.0, 0.0)]
        ran, wide, issued, stored = max(onward)
        moved = instruction.bytes()
        best[i] = (
            ran + (i in heads),
            wide + weight[i] * moved * (moved >= 8),
            issued - weight[i],
            stored + weight[i] * moved * instruction.opcode.startswith("STG"),
        )
    _, _, issued, stored = best[0]
    return -issued, 32 * stored


def blocks_per_multiprocessor(registers: int, shared: int, warps: int) -> int:
    """How many blocks run at once, by registers a thread, bytes of shared memory and warps."""
    per_warp = -(-registers // 8) * 8 * 32
    by_registers = REGISTERS // SCHEDULERS // per_warp * SCHEDULERS // warps
    by_shared = SHARED_MEMORY // (-(-(shared + SHARED_RESERVED) // 128) * 128)
    return min(by_registers, by_shared, WARPS // warps, BLOCKS)
