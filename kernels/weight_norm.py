"""Weight normalisation of a whole network, and its gradient, in one launch each.

EDM2 (arXiv 2312.02696) normalises every weight wherever it is used. Here it happens once an update:
`weight_norm` writes normalised copies that the network computes with, so that a forward launches
nothing for it. Gradients with respect to the copies are accumulated over micro-batches and
averaged over ranks; `weight_norm_backward` then turns them into gradients with respect to the
weights. That map is linear as long as the weights do not change, so once an update suffices.

The kernels iterate over a pointer table with one line for each tile of rows of each weight. A row
is what makes one output channel. Sums and results are two passes over a tile; the second one finds
it in the cache.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from sid_fast.kernels._operator import operator
from sid_fast.kernels._tensor_lists import Layout, layout, memory_order
from sid_fast.kernels._triton import tl, triton
from sid_fast.kernels.dispatch import choose

EPS = 1e-4
# Columns of a line: 0 address of the tile in its weight; 1 in its copy or gradient; 2 rows in the
# tile; 3 elements of a row; 4 index in TILES, or ANY; 5 whether the copy is float32.
COLUMNS = 6
# Rows and row elements of the tiles that the kernels name in this order; the last also takes longer
# rows, chunk by chunk. Rows start at multiples of 16 bytes, and copies have the launch's 16-bit
# dtype, if it has one.
TILES = ((8, 512), (2, 2048), (1, 4096))
ANY = len(TILES)  # one row at any address
COPY_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@torch.no_grad()
def weight_norm(
    weights: list[torch.Tensor], copies: list[torch.Tensor], force: torch.Tensor | None = None
) -> None:
    """Write w/(ε + rms(w))/√n to each weight's copy, with rms over the n elements of a row.

    Args:
        weights: float32 [rows, …] of at least two dimensions, contiguous or channels-last; a row
            is one output channel.
        copies: the tensors to write, in the order, shapes and strides of the weights: float32, or
            one 16-bit dtype, or both; empty for none.
        force: bool scalar tensor; True first replaces the weights by w/(ε + rms(w)) (forced weight
            normalisation). The copies then are those of the new weights, to the bit.

    Raises:
        ValueError: if a kernel cannot iterate over the tensors: a weight's rows are not contiguous,
            strides differ from its copy's, or a dtype is unsupported.
    """
    _weight_norm(weights, copies, force)


@torch.no_grad()
def weight_norm_backward(weights: list[torch.Tensor], grads: list[torch.Tensor]) -> None:
    """Turn gradients with respect to the copies into those with respect to the weights, in place.

    A row of zeros gets the gradient of its scale at 0: 1/(ε·√n).

    Args:
        weights: those that the copies were made from; see weight_norm, also for errors.
        grads: float32 gradients, in the order, shapes and strides of the weights.
    """
    _weight_norm_backward(weights, grads)


def _run_weight_norm(
    weights: list[torch.Tensor], copies: list[torch.Tensor], force: torch.Tensor | None
) -> None:
    device = weights[0].device
    if choose("weight_norm", device) == "eager":
        return weight_norm_eager(weights, copies, force)
    table = _table(weights, copies)
    compute_dtype = max((COPY_DTYPES[t.dtype] for t in copies), default=0)
    with torch.cuda.device_of(table):
        _weight_norm_kernel[(len(table),)](
            table, force, EPS, force is not None, bool(copies), compute_dtype, COLUMNS, num_warps=8
        )
    return None


def _run_weight_norm_backward(weights: list[torch.Tensor], grads: list[torch.Tensor]) -> None:
    device = weights[0].device
    if choose("weight_norm", device) == "eager":
        return weight_norm_backward_eager(weights, grads)
    table = _table(weights, grads)
    with torch.cuda.device_of(table):
        _weight_norm_backward_kernel[(len(table),)](table, EPS, COLUMNS, num_warps=8)
    return None


def _weight_norm_like(*_) -> None:
    return None


_weight_norm = operator(
    "weight_norm", _run_weight_norm, _weight_norm_like, mutates_args=("weights", "copies")
)
_weight_norm_backward = operator(
    "weight_norm_backward", _run_weight_norm_backward, _weight_norm_like, mutates_args=("grads",)
)


def weight_norm_eager(weights, copies, force=None) -> None:
    """Apply `weight_norm` in plain PyTorch, in float32 or float64."""
    if force is not None:
        for w in weights:
            w.copy_(torch.where(force, w / (_rms(w) + EPS), w))
    for w, copy in zip(weights, copies, strict=False):
        copy.copy_(w / ((_rms(w) + EPS) * math.sqrt(w[0].numel())))


def weight_norm_backward_eager(weights, grads) -> None:
    """Apply `weight_norm_backward` in plain PyTorch, in float32 or float64."""
    for w, grad in zip(weights, grads, strict=True):
        n, rms = w[0].numel(), _rms(w)
        norm = rms + EPS
        projection = (w * grad).sum(_row_dims(w), keepdim=True) / (norm * rms * n)
        grad.sub_(w * projection.masked_fill(rms == 0, 0)).div_(norm * math.sqrt(n))


def _row_dims(w: torch.Tensor) -> tuple[int, ...]:
    return tuple(range(1, w.dim()))


def _rms(w: torch.Tensor) -> torch.Tensor:
    """Return the root mean square of every row, [rows, 1, …]."""
    norm = torch.linalg.vector_norm(w, dim=_row_dims(w), keepdim=True)
    return norm / math.sqrt(w[0].numel())


def bytes_moved(numel: int, kernel: str, itemsize: int = 4) -> int:
    """Return the bytes that a launch over numel weights must read and write at least.

    Assumes that the later passes over a tile hit the cache.

    Args:
        numel: of all weights.
        kernel: "forward", "forced" or "backward".
        itemsize: bytes per element of a copy.
    """
    return numel * {"forward": 4 + itemsize, "forced": 8 + itemsize, "backward": 12}[kernel]


# Tables are never freed: a captured CUDA graph may read them.
_tables: dict[Layout, torch.Tensor] = {}


def _table(weights: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the pointer table of weights and their copies or gradients, on their device."""
    key = layout(list(weights), list(others))
    table = _tables.get(key)
    if table is None:
        if len({t.dtype for t in others} - {torch.float32}) > 1:
            raise ValueError("weight_norm: copies mix bfloat16 and float16: use one of them")
        widest = max((COPY_DTYPES.get(t.dtype, 0) for t in others), default=0)
        pairs = list(zip(weights, others, strict=True)) if others else [(w, None) for w in weights]
        # The longest rows first: a GPU starts programs in order, and short ones fill its end best.
        pairs.sort(key=lambda pair: -pair[0][0].numel())
        rows = [_rows(w, other, widest) for w, other in pairs]
        table = _tables[key] = torch.cat(rows).to(weights[0].device)
    return table


def _rows(w: torch.Tensor, other: torch.Tensor | None, compute_dtype: int) -> torch.Tensor:
    """Return a weight's lines; compute_dtype: COPY_DTYPES of the launch."""
    n = w[0].numel()
    order = memory_order(w, "weight_norm")
    if w.dtype != torch.float32 or (len(w) > 1 and w.stride(0) != n):
        raise ValueError(
            f"weight_norm: a {w.dtype} weight {tuple(w.shape)} with strides {w.stride()}: use "
            "float32, contiguous or channels-last"
        )
    addresses = [w.data_ptr(), 0]
    wide = False
    if other is not None:
        if other.dtype not in COPY_DTYPES or memory_order(other, "weight_norm") != order:
            raise ValueError(
                f"weight_norm: a {other.dtype} tensor with strides {other.stride()} for a weight "
                f"{tuple(w.shape)} with strides {w.stride()}: use float32, bfloat16 or float16 and "
                "equal strides"
            )
        addresses[1], wide = other.data_ptr(), other.dtype == torch.float32
    kind = ANY
    fits = other is None or COPY_DTYPES[other.dtype] == compute_dtype
    if fits and n % 8 == 0 and not any(address % 16 for address in addresses):
        kind = next((i for i, (_, size) in enumerate(TILES) if n <= size), len(TILES) - 1)
    per_tile = TILES[kind][0] if kind < ANY else 1
    starts = torch.arange(0, len(w), per_tile)
    rows = torch.empty(len(starts), COLUMNS, dtype=torch.int64)
    for column, t in enumerate((w, other)):
        size = 0 if t is None else n * t.element_size()
        rows[:, column] = addresses[column] + starts * size
    rows[:, 2] = (len(w) - starts).clamp(max=per_tile)
    rows[:, 3], rows[:, 4], rows[:, 5] = n, kind, wide
    return rows


@triton.jit
def _base(line, column: tl.constexpr, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """Return the pointer in a column; ALIGNED allows 16-byte accesses."""
    pointer = tl.load(line + column).to(tl.pointer_type(dtype))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def _sizes(line, ALIGNED: tl.constexpr):
    """Return the number of rows and of the elements of a row."""
    n = tl.load(line + 3).to(tl.int32)
    return tl.load(line + 2).to(tl.int32), tl.multiple_of(n, 8) if ALIGNED else n


@triton.jit
def _chunk(rows, n, start, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return offsets of the elements from `start` of every row, [ROWS, COLS], and their mask."""
    row = tl.arange(0, ROWS)[:, None]
    columns = start + tl.arange(0, COLS)[None, :]
    return row * n + columns, (row < rows) & (columns < n)


@triton.jit
def _row_rms(squares, n):
    return tl.sqrt(tl.sum(squares, axis=1, keep_dims=True) / n)


@triton.jit
def _store_copy(line, offsets, value, inside, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    tl.store(_base(line, 1, dtype, ALIGNED) + offsets, value.to(dtype), mask=inside)


@triton.jit
def _normalize_tile(
    line, forced, EPS: tl.constexpr, FORCE: tl.constexpr, COPY: tl.constexpr,
    COMPUTE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    rows, n = _sizes(line, ALIGNED)
    weights = _base(line, 0, tl.float32, ALIGNED)
    squares = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, n, COLS):
        offsets, inside = _chunk(rows, n, start, ROWS, COLS)
        w = tl.load(weights + offsets, mask=inside, other=0.0)
        squares += w * w
    if FORCE:
        factor = tl.where(forced, 1 / (EPS + _row_rms(squares, n)), 1.0)
        squares = tl.zeros([ROWS, COLS], tl.float32)
        # The sum over the rounded new weights, not its value on paper: the copies are then a
        # function of the stored weights, and a resumed run makes the same ones.
        for start in range(0, n, COLS):
            offsets, inside = _chunk(rows, n, start, ROWS, COLS)
            w = tl.load(weights + offsets, mask=inside, other=0.0) * factor
            squares += w * w
    scale = 1 / ((EPS + _row_rms(squares, n)) * tl.sqrt(n.to(tl.float32)))
    # Backwards: the chunks read last are the likeliest to be in the cache.
    last = (n - 1) // COLS * COLS
    for back in range(0, n, COLS):
        offsets, inside = _chunk(rows, n, last - back, ROWS, COLS)
        w = tl.load(weights + offsets, mask=inside, other=0.0)
        if FORCE:
            w *= factor
            if forced:
                tl.store(weights + offsets, w, mask=inside)
        if COPY:
            dtype: tl.constexpr = (
                tl.float32 if COMPUTE == 0 else tl.bfloat16 if COMPUTE == 1 else tl.float16
            )
            if ALIGNED or COMPUTE == 0:
                _store_copy(line, offsets, w * scale, inside, dtype, ALIGNED)
            elif tl.load(line + 5) != 0:
                _store_copy(line, offsets, w * scale, inside, tl.float32, False)
            else:
                _store_copy(line, offsets, w * scale, inside, dtype, False)


@triton.jit
def _weight_norm_kernel(
    table, force, EPS: tl.constexpr, FORCE: tl.constexpr, COPY: tl.constexpr,
    COMPUTE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    forced = tl.load(force) if FORCE else False
    line = table + tl.program_id(0) * COLUMNS
    kind = tl.load(line + 4)
    if kind == 0:
        _normalize_tile(line, forced, EPS, FORCE, COPY, COMPUTE, 8, 512, True)
    elif kind == 1:
        _normalize_tile(line, forced, EPS, FORCE, COPY, COMPUTE, 2, 2048, True)
    elif kind == 2:
        _normalize_tile(line, forced, EPS, FORCE, COPY, COMPUTE, 1, 4096, True)
    else:
        _normalize_tile(line, forced, EPS, FORCE, COPY, COMPUTE, 1, 1024, False)


@triton.jit
def _differentiate_tile(
    line, EPS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, ALIGNED: tl.constexpr
):
    rows, n = _sizes(line, ALIGNED)
    weights = _base(line, 0, tl.float32, ALIGNED)
    grads = _base(line, 1, tl.float32, ALIGNED)
    squares = tl.zeros([ROWS, COLS], tl.float32)
    products = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, n, COLS):
        offsets, inside = _chunk(rows, n, start, ROWS, COLS)
        w = tl.load(weights + offsets, mask=inside, other=0.0)
        g = tl.load(grads + offsets, mask=inside, other=0.0)
        squares += w * w
        products += w * g
    rms = _row_rms(squares, n)
    norm = EPS + rms
    # y = w·s with s = 1/((ε + rms)·√n), and ∂s/∂w = −s·w/((ε + rms)·rms·n).
    scale = 1 / (norm * tl.sqrt(n.to(tl.float32)))
    products = tl.sum(products, axis=1, keep_dims=True)  # 0 if the rms is
    projection = products / (norm * tl.where(rms == 0, 1.0, rms) * n)
    last = (n - 1) // COLS * COLS
    for back in range(0, n, COLS):
        offsets, inside = _chunk(rows, n, last - back, ROWS, COLS)
        w = tl.load(weights + offsets, mask=inside, other=0.0)
        g = tl.load(grads + offsets, mask=inside, other=0.0)
        tl.store(grads + offsets, (g - w * projection) * scale, mask=inside)


@triton.jit
def _weight_norm_backward_kernel(table, EPS: tl.constexpr, COLUMNS: tl.constexpr):
    line = table + tl.program_id(0) * COLUMNS
    kind = tl.load(line + 4)
    if kind == 0:
        _differentiate_tile(line, EPS, 8, 512, True)
    elif kind == 1:
        _differentiate_tile(line, EPS, 2, 2048, True)
    elif kind == 2:
        _differentiate_tile(line, EPS, 1, 4096, True)
    else:
        _differentiate_tile(line, EPS, 1, 1024, False)


def configurations() -> Iterator[tuple]:
    """Yield (label, kernel, signature, constants, warps, stages); see kernels.compile."""
    signature = {"table": "*i64"}
    for compute, name in enumerate(("fp32", "bf16", "fp16")):
        for force in (False, True):
            constants: dict[str, Any] = {} if force else {"force": None}
            constants |= dict(EPS=EPS, FORCE=force, COPY=True, COMPUTE=compute, COLUMNS=COLUMNS)
            pointer = {"force": "*i1"} if force else {}
            label = f"weight_norm {'forced' if force else 'forward'} {name}"
            yield label, _weight_norm_kernel, signature | pointer, constants, 8, 1
    constants = dict(EPS=EPS, FORCE=True, COPY=False, COMPUTE=0, COLUMNS=COLUMNS)
    yield "weight_norm in place", _weight_norm_kernel, signature | {"force": "*i1"}, constants, 8, 1
    constants = dict(EPS=EPS, COLUMNS=COLUMNS)
    yield "weight_norm backward", _weight_norm_backward_kernel, signature, constants, 8, 1
