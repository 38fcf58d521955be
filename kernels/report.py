"""What the compiled instructions of a kernel allow on a card, before there is one to measure.

ESTIMATES: nothing here was measured. `issue` is the time to issue all instructions if every
scheduler issues one each clock; `floor` is the bytes that must move at a card's copy bandwidth. A
kernel whose issue/floor is above 1 cannot reach its floor, and above about 0.85 will not; below
that it may, if latency is hidden. Attention does so much arithmetic per byte that tensor cores
bound it before either: compare its rows only with each other.
"""

import dataclasses
import importlib
import re

from sid_fast.kernels import sass

MULTIPROCESSORS = 132
ARCH = 90  # of every card below


@dataclasses.dataclass(frozen=True)
class Card:
    """Assumed of a card under load, not measured: clock in Hz, copy bandwidth in bytes a second."""

    clock: float
    bandwidth: float


CARDS = {"h100": Card(1.755e9, 3.0e12), "h200": Card(1.785e9, 4.3e12)}

# Parameters that adam_ema updates: those of the CIFAR-10 network.
PARAMETERS = 55_733_891


@dataclasses.dataclass
class Work:
    """One launch: its blocks, the elements it processes, the bytes that must move, loop trips."""

    blocks: int
    elements: int
    bytes: int
    trips: tuple[float, ...] = ()  # of an outermost loop, of loops within it, and so on


@dataclasses.dataclass
class Estimate:
    """A row of the report; registers and spills are those of a thread."""

    kernel: str
    configuration: str
    card: str
    images: int
    registers: int
    spills: int
    blocks_per_sm: int
    instructions_per_element: float  # of threads, idle ones too
    issue_us: float
    floor_us: float
    issue_over_floor: float


def estimate(
    kernel: str, configuration: str, launch: tuple, made, registers: int, spills: int,
    card: str, images: int,
) -> Estimate:  # fmt: skip
    """The row of one configuration; launch is (constants, warps), made what compiled returned."""
    constants, warps = launch
    work = WORK[kernel](configuration, constants, images)
    per_warp, _ = sass.count(sass.disassemble(made.asm["cubin"]), work.trips)
    instructions = per_warp * warps * work.blocks
    issue = instructions / (MULTIPROCESSORS * sass.SCHEDULERS) / CARDS[card].clock * 1e6
    floor = work.bytes / CARDS[card].bandwidth * 1e6
    return Estimate(
        kernel,
        configuration,
        card,
        images,
        registers,
        spills,
        sass.blocks_per_multiprocessor(registers, made.metadata.shared, warps),
        round(instructions * 32 / work.elements, 2),
        round(issue, 2),
        round(floor, 2),
        round(issue / floor, 3),
    )


def _module(name: str):
    return importlib.import_module(f"sid_fast.kernels.{name}")


def _itemsize(label: str) -> int:
    return 4 if "fp32" in label.split() else 2


def _group_norm(label: str, constants: dict, images: int) -> Work:
    # Masks are drawn and weights may be frozen: neither changes which activations move.
    found = re.fullmatch(
        r"(forward|backward) (.+?)(?: dropout| frozen)? ([\d+]+)@(\d+)x\d+ \w+", label
    )
    assert found, label
    way, form, sizes, side = found.groups()
    place = *map(int, sizes.split("+")), int(side)
    moved = _module("group_norm").bytes_moved(
        form, place, images, _itemsize(label), way == "backward"
    )
    pixels = constants["PIXELS"]
    groups, tile = constants["GROUPS_PER_BLOCK"], constants["BLOCK_HW"]
    return Work(
        -(-constants["GROUPS"] // groups) * images,
        constants["CHANNELS"] * pixels * images,
        moved,
        (-(-pixels // tile),),
    )


def _attention(label: str, constants: dict, images: int) -> Work:
    size, pixels = constants["SIZE"], constants["PIXELS"]
    heads, itemsize = images * constants["HEADS"], _itemsize(label)
    moved = _module("attention").bytes_moved(images, constants["HEADS"], size, pixels, itemsize)
    if label.startswith("backward"):  # four tensors read and two written, or five and one
        moved = heads * pixels * (6 * size * itemsize + 8)
    return Work(
        heads * -(-pixels // constants["BLOCK"]),
        heads * pixels * size,
        moved,
        (-(-pixels // constants["STEP"]),),
    )


def _adam_ema(_, constants: dict, __) -> Work:
    moved = _module("adam_ema").bytes_moved(
        PARAMETERS, constants["MOMENT"], constants["EMA"], constants["COMPUTE"] > 0
    )
    blocks = MULTIPROCESSORS * _module("adam_ema").BLOCKS_PER_SM
    return Work(blocks, PARAMETERS, moved, (PARAMETERS / constants["CHUNK"] / blocks,))


def _sid_loss(label: str, constants: dict, images: int) -> Work:
    elements = images * constants["SIZE"]
    moved = _module("sid_loss").bytes_moved(elements, label.split()[0], _itemsize(label))
    return Work(images, elements, moved, (-(-constants["SIZE"] // constants["BLOCK"]),))


def _augment(_, constants: dict, images: int) -> Work:
    rows, columns = (
        -(-2 * (constants[side] + 6) // constants["BLOCK"]) for side in ("HEIGHT", "WIDTH")
    )
    blocks = images * constants["CHANNELS"]
    elements = blocks * constants["HEIGHT"] * constants["WIDTH"]
    return Work(blocks, elements, _module("augment").bytes_moved(elements), (rows, columns, 7))


def _random(label: str, constants: dict, images: int) -> Work:
    elements = int(label.split()[1])
    blocks = images * -(-elements // (4 * constants["BLOCK"]))
    return Work(blocks, images * elements, images * elements * 4, ())


def _dropout(label: str, constants: dict, images: int) -> Work:
    size = constants["PIXELS"] * constants["CHANNELS"]
    moved = 2 * images * size * _itemsize(label)
    return Work(images * -(-size // constants["BLOCK"]), images * size, moved, ())


WORK = {
    "adam_ema": _adam_ema,
    "attention": _attention,
    "augment": _augment,
    "dropout": _dropout,
    "group_norm": _group_norm,
    "random": _random,
    "sid_loss": _sid_loss,
}
