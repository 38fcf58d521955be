"""Estimate a kernel's time on a GPU from its compiled instructions, without running it.

ESTIMATES: nothing here was measured. `issue` is the time to issue all instructions if every
scheduler issues one per clock. `floor` is the time to move the bytes that must move, at the GPU's
copy bandwidth. With issue/floor above 1 a kernel cannot reach its floor, and above about 0.85 it
will not; below that it may, if latency is hidden. Attention does so much arithmetic per byte that
the tensor cores bound it before either: compare its rows only with each other.
"""

import dataclasses
import importlib
import math
import re

from sid_fast.kernels import sass

MULTIPROCESSORS = 132
ARCH = 90  # of every GPU below


@dataclasses.dataclass(frozen=True)
class GPU:
    """Assumed, not measured, of a GPU under load: clock in Hz, copy bandwidth in bytes/s."""

    clock: float
    bandwidth: float


GPUS = {"h100": GPU(1.755e9, 3.0e12), "h200": GPU(1.785e9, 4.3e12)}

# Parameters of the CIFAR-10 network, for the estimates of adam_ema.
PARAMETERS = 55_733_891
# Weights of EDM2 XS and the row length of a third of them, for those of weight_norm.
EDM2_WEIGHTS, EDM2_ROW = 124_700_000, 4608


@dataclasses.dataclass
class Work:
    """The work of one launch."""

    blocks: int
    elements: int  # processed
    bytes: int  # that must move
    trips: tuple[float, ...] = ()  # iterations of an outermost loop, of one inside it, and so on


@dataclasses.dataclass
class Estimate:
    """A row of the report; registers and spilled bytes are per thread."""

    kernel: str
    configuration: str
    card: str
    images: int
    registers: int
    spills: int
    blocks_per_sm: int
    instructions_per_element: float  # counting idle threads
    issue_us: float
    floor_us: float
    issue_over_floor: float


def estimate(
    kernel: str, configuration: str, launch: tuple, compiled, registers: int, spills: int,
    card: str, images: int,
) -> Estimate:  # fmt: skip
    """Estimate one configuration.

    Args:
        kernel: a key of WORK.
        configuration: its label.
        launch: (constants, warps).
        compiled: the result of compile.compiled.
        registers: per thread.
        spills: bytes per thread.
        card: a key of GPUS.
        images: batch size.
    """
    constants, warps = launch
    work = WORK[kernel](configuration, constants, images)
    per_warp, _ = sass.count(sass.disassemble(compiled.asm["cubin"]), work.trips)
    instructions = per_warp * warps * work.blocks
    issue = instructions / (MULTIPROCESSORS * sass.SCHEDULERS) / GPUS[card].clock * 1e6
    floor = work.bytes / GPUS[card].bandwidth * 1e6
    return Estimate(
        kernel,
        configuration,
        card,
        images,
        registers,
        spills,
        sass.blocks_per_multiprocessor(registers, compiled.metadata.shared, warps),
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
    # Neither dropout nor frozen weights change which activations move.
    match = re.fullmatch(
        r"(forward|backward) (.+?)(?: dropout| frozen)? ([\d+]+)@(\d+)x\d+ \w+", label
    )
    assert match, label
    direction, fusion, sizes, side = match.groups()
    shape = *map(int, sizes.split("+")), int(side)
    moved = _module("group_norm").bytes_moved(
        fusion, shape, images, _itemsize(label), direction == "backward"
    )
    pixels = constants["PIXELS"]
    groups, tile = constants["GROUPS_PER_BLOCK"], constants["BLOCK_HW"]
    return Work(
        -(-constants["GROUPS"] // groups) * images,
        constants["CHANNELS"] * pixels * images,
        moved,
        (-(-pixels // tile),),
    )


def _mp(label: str, constants: dict, images: int) -> Work:
    operation, direction, *_, size, dtype = label.split()
    channels, _, side = size.partition("@")
    shape = *map(int, channels.split("+")), int(side.partition("x")[0])
    backward = direction == "backward"
    module, itemsize = _module("mp"), 4 if dtype == "fp32" else 2
    moved = module.bytes_moved(operation, shape, images, itemsize, backward)
    elements = moved // module.TENSORS[operation][backward] // itemsize
    tile = {
        "pixel_norm": ("ROW", "BLOCK_ROWS"), "qkv_norm": ("ROW", "BLOCK_ROWS"),
        "scaled_silu": ("BLOCK_HW", "BLOCK_C"), "sum": ("BLOCK",),
        "cat_silu": ("BLOCK_ROWS", "BLOCK_C"),
    }[operation]  # fmt: skip
    trips = constants.get("TILES", 1)
    per_block = math.prod(constants[name] for name in tile) * trips
    return Work(-(-elements // per_block), elements, moved, (trips,))


def _attention(label: str, constants: dict, images: int) -> Work:
    size, pixels = constants["SIZE"], constants["PIXELS"]
    heads, itemsize = images * constants["HEADS"], _itemsize(label)
    moved = _module("attention").bytes_moved(images, constants["HEADS"], size, pixels, itemsize)
    if label.startswith("backward"):  # both kernels move six tensors: 5 + 1 (q) or 4 + 2 (kv)
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


def _sida_loss(label: str, constants: dict, images: int) -> Work:
    logits = images * constants["POSITIONS"]
    moved = _module("sida_loss").bytes_moved(logits, label.split()[0])
    blocks = -(-images // constants["GROUP"])
    return Work(blocks, logits, moved, (-(-constants["GROUP"] // constants["ROWS"]),))


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


def _weight_norm(label: str, constants: dict, _) -> Work:
    module = _module("weight_norm")
    kind = label.split()[1]
    itemsize = 0 if kind == "in" else _itemsize(label)
    moved = module.bytes_moved(EDM2_WEIGHTS, "forced" if kind == "in" else kind, itemsize)
    trips = (-(-EDM2_ROW // module.TILES[-1][1]),)
    return Work(EDM2_WEIGHTS // EDM2_ROW, EDM2_WEIGHTS, moved, trips)


WORK = {
    "adam_ema": _adam_ema,
    "attention": _attention,
    "augment": _augment,
    "dropout": _dropout,
    "group_norm": _group_norm,
    "mp": _mp,
    "random": _random,
    "sid_loss": _sid_loss,
    "sida_loss": _sida_loss,
    "weight_norm": _weight_norm,
}
