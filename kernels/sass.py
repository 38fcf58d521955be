"""Count the instructions of compiled kernels: disassembly, loops and the likeliest path.

Counts are per warp. They give the time to issue a kernel's instructions, but say nothing about
latency, bank conflicts or caches.
"""

import dataclasses
import re
import subprocess
import tempfile
from functools import reduce
from pathlib import Path

from sid_fast.kernels._triton import triton

# Limits of one multiprocessor of compute capability 9.0 (CUDA C++ programming guide, "Compute
# Capabilities"). A warp's registers are allocated in units of 8 per thread.
REGISTERS = 65_536
SHARED_MEMORY = 228 * 1024
SHARED_RESERVED = 1024  # by the driver, per block
WARPS = 64
BLOCKS = 32
SCHEDULERS = 4

EXITS = ("EXIT", "RET")
_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]+\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_LABEL = re.compile(r"(\.L_x_\d+|\$[\w$.]+):")
_TARGET = re.compile(r"`\(([.\w$]+)\)")


@dataclasses.dataclass
class Instruction:
    """A machine instruction."""

    opcode: str  # with modifiers, such as "LDG.E.128"
    predicate: str | None  # such as "!P0"
    operands: str

    def bytes(self) -> int:
        """Return the bytes that a thread loads from or stores to global memory."""
        if self.opcode.split(".")[0] not in ("LDG", "STG"):
            return 0
        widths = {".128": 16, ".64": 8, ".U16": 2, ".S16": 2, ".U8": 1, ".S8": 1}
        return next((n for name, n in widths.items() if name in self.opcode), 4)


@dataclasses.dataclass
class Program:
    """A kernel's machine code and its control flow."""

    instructions: list[Instruction]
    successors: list[list[int]]  # of each instruction, as indices; empty after an exit


def disassemble(cubin: bytes) -> Program:
    """Disassemble a binary with a single kernel.

    Raises:
        RuntimeError: if Triton finds no nvdisasm.
        subprocess.CalledProcessError: if nvdisasm fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return parse(text)


def parse(text: str) -> Program:
    """Parse the output of `nvdisasm -c`."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if match := _LABEL.match(line):
            labels[match.group(1)] = len(code)
        elif match := _INSTRUCTION.match(line):
            predicate, opcode, operands = match.groups()
            always = predicate in ("PT", "UPT")
            code.append(Instruction(opcode, None if always else predicate, operands))
    return Program(code, [_successors(code, labels, i) for i in range(len(code))])


def _successors(code: list[Instruction], labels: dict[str, int], i: int) -> list[int]:
    """Return an instruction's successors; calls (slow paths of divisions, roots) are skipped."""
    base = code[i].opcode.split(".")[0]
    next_instruction = [i + 1] if i + 1 < len(code) else []
    if base in EXITS:
        return next_instruction if code[i].predicate else []
    target = _TARGET.search(code[i].operands)
    if base != "BRA" or not target:
        return next_instruction
    # "P0, UP1 ..." before the target is a second condition.
    conditional = code[i].predicate or not code[i].operands.startswith("`")
    return (next_instruction if conditional else []) + [labels[target.group(1)]]


def loops(program: Program) -> dict[int, set[int]]:
    """Return the natural loops, largest first: {first instruction: instructions of the body}."""
    order = _reverse_postorder(program)
    predecessors: dict[int, list[int]] = {i: [] for i in order}
    for i in order:
        for j in program.successors[i]:
            predecessors[j].append(i)
    bodies: dict[int, set[int]] = {}
    dominators = _dominators(order, predecessors)
    for tail in order:
        for head in program.successors[tail]:
            if head == tail or not _dominates(head, tail, dominators):
                continue
            body = bodies.setdefault(head, {head})
            stack = [tail]
            while stack:
                if (i := stack.pop()) not in body:
                    body.add(i)
                    stack += predecessors[i]
    return dict(sorted(bodies.items(), key=lambda loop: -len(loop[1])))


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


def _dominators(order: list[int], predecessors: dict[int, list[int]]) -> dict[int, int]:
    """Return each instruction's immediate dominator (Cooper, Harvey and Kennedy 2001)."""
    position = {i: k for k, i in enumerate(order)}
    immediate = {order[0]: order[0]}

    def intersect(a: int, b: int) -> int:
        while a != b:
            while position[a] > position[b]:
                a = immediate[a]
            while position[b] > position[a]:
                b = immediate[b]
        return a

    changed = True
    while changed:
        changed = False
        for i in order[1:]:
            new = reduce(intersect, [j for j in predecessors[i] if j in immediate])
            changed |= immediate.get(i) != new
            immediate[i] = new
    return immediate


def _dominates(head: int, tail: int, dominators: dict[int, int]) -> bool:
    while tail != head and dominators[tail] != tail:
        tail = dominators[tail]
    return tail == head


def count(program: Program, trips: tuple[float, ...]) -> tuple[float, float]:
    """Return the number of instructions that a warp issues and the bytes its threads store.

    At a branch, takes the path with the most loops, then the one that moves the most bytes in
    accesses of 8 bytes or more, then the shortest: the path of full tiles and finite values.

    Args:
        program: the kernel.
        trips: iterations of an outermost loop, of a loop inside it, and so on.

    Raises:
        ValueError: if loops are nested more deeply than `trips` is long.
    """
    weight = [1.0] * len(program.instructions)
    heads = loops(program)
    depth = [0] * len(weight)
    for body in heads.values():
        for i in body:
            if depth[i] == len(trips):
                raise ValueError(f"loops are nested more than {len(trips)} deep: give more trips")
            weight[i] *= trips[depth[i]]
            depth[i] += 1
    order = _reverse_postorder(program)
    position = {i: k for k, i in enumerate(order)}
    best: dict[int, tuple[float, float, float, float]] = {}
    for i in reversed(order):
        instruction = program.instructions[i]
        paths = [best[j] for j in program.successors[i] if position[j] > position[i] and j in best]
        if not paths:
            if instruction.opcode.split(".")[0] not in EXITS:
                continue  # all branches from here go back
            paths = [(0.0, 0.0, 0.0, 0.0)]
        loops_run, wide, issued, stored = max(paths)
        moved = instruction.bytes()
        best[i] = (
            loops_run + (i in heads),
            wide + weight[i] * moved * (moved >= 8),
            issued - weight[i],
            stored + weight[i] * moved * instruction.opcode.startswith("STG"),
        )
    _, _, issued, stored = best[0]
    return -issued, 32 * stored


def blocks_per_multiprocessor(registers: int, shared: int, warps: int) -> int:
    """Return how many blocks run at once, given registers per thread, shared bytes and warps."""
    per_warp = -(-registers // 8) * 8 * 32
    by_registers = REGISTERS // SCHEDULERS // per_warp * SCHEDULERS // warps
    by_shared = SHARED_MEMORY // (-(-(shared + SHARED_RESERVED) // 128) * 128)
    return min(by_registers, by_shared, WARPS // warps, BLOCKS)
