"""Gradient clean-up, Adam, EMA and 16-bit weight copies of all parameters, in one launch.

The kernels iterate over a pointer table with one row for each chunk of CHUNK elements of each
parameter. Hundreds of tensors of any size are thus updated by one launch. Its programs, as many as
run on the device at once, do equal work: each takes every n-th row, n being the number of programs.
"""

from collections.abc import Iterator, Sequence

import torch

from sid_fast.kernels import _cuda
from sid_fast.kernels._operator import operator
from sid_fast.kernels._tensor_lists import Layout, layout, memory_order
from sid_fast.kernels._triton import tl, triton
from sid_fast.kernels.dispatch import choose

CHUNK = 1024
# Columns of a row: 0-4 addresses of the chunk in params, grads, exp_avg, exp_avg_sq and ema; 5 the
# address of the compute weight's first element (addresses are 0 for absent tensors); 6 elements in
# the chunk; 7 the chunk's offset in its tensor; 8 input channels, 9 kernel taps of a channels-last
# compute weight (1 tap: in the parameter's order); 10 whether the chunk is full and every address
# is aligned to 16 bytes.
COLUMNS = 11
BLOCKS_PER_SM = 3
COMPUTE_DTYPES = {torch.bfloat16: 1, torch.float16: 2}


@torch.no_grad()
def adam_ema(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    exp_avg: list[torch.Tensor],
    exp_avg_sq: list[torch.Tensor],
    ema: list[torch.Tensor],
    *,
    step: torch.Tensor,
    enabled: torch.Tensor,
    lr: float | torch.Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    ema_beta: float | torch.Tensor = 0.0,
    compute_weights: list[torch.Tensor | None] | None = None,
    clip: float | None = None,
    clipped: torch.Tensor | None = None,
) -> torch.Tensor:
    """Apply Adam (arXiv 1412.6980, algorithm 1) to cleaned gradients, then ema ← p + β(ema − p).

    All tensors in the lists are updated in place. Gradients are cleaned first, as upstream does:
    NaN → 0, ±inf → ±1e5; then their values are clipped, if asked. Scalars that are tensors need no
    host synchronisation, and a CUDA graph can replay the update with new values.

    Args:
        params: the parameters, float32; the other lists are in the same order, float32 unless
            stated otherwise.
        grads: their gradients.
        exp_avg: first moments; empty if β1 = 0, when the first moment is the gradient.
        exp_avg_sq: second moments.
        ema: exponential moving averages; empty for none.
        step: number of updates so far, float64 scalar tensor; incremented in place.
        enabled: bool scalar tensor; if False, only the gradients are cleaned, and everything else
            stays bit-identical.
        lr: learning rate, a number or a float64 scalar tensor.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the denominator.
        ema_beta: decay of the EMA, a number or a float64 scalar tensor (1 − β needs the precision).
        compute_weights: 16-bit copies of the parameters, all bfloat16 or all float16, each in its
            parameter's memory order or channels-last; None for a parameter without a copy.
        clip: largest absolute value of a gradient; None for no limit.
        clipped: int64 scalar tensor that the number of clipped gradient values is written to.

    Returns:
        The number of non-finite gradient values, an int64 scalar tensor.

    Raises:
        ValueError: if a kernel cannot iterate over the tensors: a parameter has gaps, or strides
            other than its gradient's or its states', or a dtype is unsupported.
    """

    def scalar(value: float | torch.Tensor) -> torch.Tensor:
        if isinstance(value, torch.Tensor):
            return value.to(torch.float64)
        return torch.full((), value, dtype=torch.float64, device=step.device)

    counts = _adam_ema(
        params, grads, exp_avg, exp_avg_sq, ema, compute_weights or [],
        step, enabled, scalar(lr), beta1, beta2, eps, scalar(ema_beta), clip or 0.0,
    )  # fmt: skip
    if clipped is not None:
        clipped.copy_(counts[1])
    return counts[0]


def _run_adam_ema(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    exp_avg: list[torch.Tensor],
    exp_avg_sq: list[torch.Tensor],
    ema: list[torch.Tensor],
    compute_weights: list[torch.Tensor | None],
    step: torch.Tensor,
    enabled: torch.Tensor,
    lr: torch.Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    ema_beta: torch.Tensor,
    clip: float,
) -> torch.Tensor:
    """int64 [2]: how many gradient values were not finite, and clipped. clip 0: none are."""
    lists = params, grads, exp_avg, exp_avg_sq, ema, compute_weights
    backend = choose("adam_ema", step.device)
    if backend == "eager":
        return adam_ema_eager(*lists, step, enabled, lr, beta1, beta2, eps, ema_beta, clip)

    table = _table(*lists)
    step += enabled
    counts = torch.zeros(2, dtype=torch.int64, device=step.device)
    compute_dtype = next((COMPUTE_DTYPES[t.dtype] for t in compute_weights if t is not None), 0)
    programs = min(len(table), _resident_programs(step.device))
    if backend == "triton":
        with torch.cuda.device_of(step):
            _adam_ema_kernel[(programs,)](
                table, step, enabled, lr, ema_beta, counts, len(table), beta1, beta2, eps,
                bool(exp_avg), bool(ema), compute_dtype, clip, CHUNK, COLUMNS, num_warps=8,
            )  # fmt: skip
        return counts

    library = _cuda.library()
    assert library is not None  # otherwise `choose` would not return "cuda"
    pointers = [t.data_ptr() for t in (table, step, enabled, lr, ema_beta, counts)]
    arguments = *pointers, len(table), beta1, beta2, eps, clip, compute_dtype
    if step.is_cuda:
        with torch.cuda.device(step.device):
            stream = torch.cuda.current_stream().cuda_stream
            if status := library.sid_fast_adam_ema_cuda(*arguments, programs, stream):
                raise RuntimeError(
                    f"adam_ema: the CUDA kernel failed to launch: cudaError {status}"
                )
    else:
        library.sid_fast_adam_ema_host(*arguments)
    return counts


def _resident_programs(device: torch.device) -> int:
    """Return how many programs of 8 warps, at up to 80 registers per thread, run at once."""
    if device.type != "cuda":
        return BLOCKS_PER_SM  # the interpreter runs them sequentially
    return BLOCKS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count


def _adam_ema_like(params, grads, exp_avg, exp_avg_sq, ema, compute_weights, step, *_):
    return step.new_empty(2, dtype=torch.int64)


_MUTATED = ("params", "grads", "exp_avg", "exp_avg_sq", "ema", "compute_weights", "step")
_adam_ema = operator("adam_ema", _run_adam_ema, _adam_ema_like, mutates_args=_MUTATED)


def adam_ema_eager(
    params,
    grads,
    exp_avg,
    exp_avg_sq,
    ema,
    compute_weights,
    step,
    enabled,
    lr,
    beta1,
    beta2,
    eps,
    ema_beta,
    clip=0.0,
) -> torch.Tensor:
    """Apply `adam_ema` in plain PyTorch, in float32 or float64; lr and ema_beta are tensors.

    Walks whole lists: a few dozen launches, whatever the number of tensors.
    """
    flat = torch.cat([_flat(g) for g in grads])
    nonfinite = (flat - flat).count_nonzero()  # NaN where a value is not finite, else 0
    flat.nan_to_num_(nan=0.0, posinf=1e5, neginf=-1e5)
    clipped = torch.zeros_like(nonfinite)
    if clip:
        clipped = (flat.abs() > clip).count_nonzero()
        flat.clamp_(-clip, clip)
    pieces = flat.split([g.numel() for g in grads])
    torch._foreach_copy_([_flat(g) for g in grads], pieces)

    # 0-dim tensors in the lists' dtype: `_foreach` on CUDA launches a kernel per tensor otherwise.
    dtype = params[0].dtype
    step += enabled
    first = grads
    if exp_avg:
        first = torch._foreach_lerp(exp_avg, grads, 1 - beta1)
        lr = lr / (1 - beta1**step)
    squares = torch._foreach_mul(exp_avg_sq, beta2)
    torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
    change = torch._foreach_sqrt(squares)
    _write(enabled, exp_avg_sq, squares)
    torch._foreach_div_(change, (1 - beta2**step).sqrt().to(dtype))
    torch._foreach_add_(change, eps)
    change = torch._foreach_div(first, change)
    if exp_avg:
        _write(enabled, exp_avg, first)
    torch._foreach_mul_(change, (-lr).to(dtype))
    moved = torch._foreach_add(params, change)
    if ema:
        distance = torch._foreach_sub(moved, ema)
        torch._foreach_mul_(distance, (1 - ema_beta).to(dtype))
        _write(enabled, ema, torch._foreach_add(ema, distance))
    if copied := [i for i, t in enumerate(compute_weights) if t is not None]:
        targets = [compute_weights[i] for i in copied]
        rounded = [torch.empty_like(t) for t in targets]
        torch._foreach_copy_(rounded, [moved[i] for i in copied])
        _write(enabled, targets, rounded)
    _write(enabled, params, moved)
    return torch.stack([nonfinite, clipped])


BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _write(
    enabled: torch.Tensor, tensors: Sequence[torch.Tensor], values: Sequence[torch.Tensor]
) -> None:
    """Overwrite tensors with values where enabled; values are spent.

    There is no list form of `where`; integer arithmetic selects without touching NaN or -0.
    """
    bits = BITS[tensors[0].element_size()]
    old, new = ([t.view(bits) for t in each] for each in (tensors, values))
    torch._foreach_mul_(new, enabled.to(bits))
    torch._foreach_mul_(old, (~enabled).to(bits))
    torch._foreach_add_(old, new)


def _flat(t: torch.Tensor) -> torch.Tensor:
    """Flatten t in memory order; a view if t is dense."""
    return t.permute(sorted(range(t.dim()), key=lambda d: -t.stride()[d])).reshape(-1)


def bytes_moved(numel: int, moment: bool, ema: bool, compute_weights: bool) -> int:
    """Return the bytes that an update of numel parameters reads and writes; gradients are read."""
    return numel * (4 + 8 + 8 + 8 * moment + 8 * ema + 2 * compute_weights)


def flop(numel: int, moment: bool, ema: bool) -> int:
    """Return the FLOP of an update of numel parameters: 4 for g² and its mean, 6 for the step."""
    return numel * (10 + 3 * moment + 3 * ema)


# Tables are never freed: a captured CUDA graph may read them.
_tables: dict[Layout, torch.Tensor] = {}


def _table(params, grads, exp_avg, exp_avg_sq, ema, compute_weights) -> torch.Tensor:
    """Return the pointer table of these tensors, int64 [rows, COLUMNS], on their device."""
    companions = [grads, exp_avg, exp_avg_sq, ema]
    key = layout(params, *companions, compute_weights)
    table = _tables.get(key)
    if table is None:
        if len({t.dtype for t in compute_weights if t is not None}) > 1:
            raise ValueError(
                "adam_ema: compute_weights mixes bfloat16 and float16: use one of them"
            )
        rows = [
            _rows(
                p, [tensors[i] if tensors else None for tensors in (*companions, compute_weights)]
            )
            for i, p in enumerate(params)
        ]
        table = _tables[key] = torch.cat(rows).to(params[0].device)
    return table


def _rows(p: torch.Tensor, others: list[torch.Tensor | None]) -> torch.Tensor:
    """Return a parameter's rows; others: its grad, exp_avg, exp_avg_sq, ema, compute weight."""
    *companions, weight = others
    tensors = [p, *companions]
    for t in tensors:
        if t is not None and (t.dtype != torch.float32 or _order(t) != _order(p)):
            raise ValueError(
                f"adam_ema: {t.dtype} tensor with strides {t.stride()} for a parameter "
                f"{tuple(p.shape)} with strides {p.stride()}: use float32 and equal strides"
            )
    inner, taps = 1, 1
    if weight is not None:
        if weight.dtype not in COMPUTE_DTYPES:
            raise ValueError(
                f"adam_ema: compute_weights are {weight.dtype}: use bfloat16 or float16"
            )
        if _order(weight) != _order(p):
            channels_last = p.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last)
            if not (channels_last and p.is_contiguous() and weight.shape == p.shape):
                raise ValueError(
                    f"adam_ema: compute weight with strides {weight.stride()} for a parameter with "
                    f"strides {p.stride()}: use the same strides or channels-last"
                )
            inner, taps = p.shape[1], p.shape[2] * p.shape[3]

    if p.numel() >= 2**31:
        raise ValueError(f"adam_ema: a parameter has {p.numel()} elements: at most 2³¹ − 1 fit")
    starts = torch.arange(0, p.numel(), CHUNK)
    rows = torch.zeros(len(starts), COLUMNS, dtype=torch.int64)
    aligned = True
    for column, t in enumerate(tensors):
        if t is not None:
            rows[:, column] = t.data_ptr() + starts * t.element_size()
            aligned &= t.data_ptr() % 16 == 0
    if weight is not None:
        rows[:, 5] = weight.data_ptr()
        aligned &= weight.data_ptr() % 16 == 0
    rows[:, 6] = (p.numel() - starts).clamp(max=CHUNK)
    rows[:, 7] = starts
    rows[:, 8], rows[:, 9] = inner, taps
    rows[:, 10] = (rows[:, 6] == CHUNK) & aligned
    return rows


def _order(t: torch.Tensor) -> list[tuple[int, int]]:
    return memory_order(t, "adam_ema")


@triton.jit
def _coefficients(step, lr, ema_beta, BETA1: tl.constexpr, BETA2: tl.constexpr):
    """Return lr/(1 − β1ᵗ), √(1 − β2ᵗ) and 1 − ema_beta, differences computed in float64."""
    t = tl.load(step)
    step_size = tl.load(lr)
    if BETA1 > 0:
        step_size = step_size / (1 - tl.exp(t * tl.log(tl.full((), BETA1, tl.float64))))
    correction2 = 1 - tl.exp(t * tl.log(tl.full((), BETA2, tl.float64)))
    ema_weight = 1 - tl.load(ema_beta)
    return step_size.to(tl.float32), tl.sqrt(correction2.to(tl.float32)), ema_weight.to(tl.float32)


@triton.jit
def _element_pointers(row, column: tl.constexpr, offsets, FULL: tl.constexpr):
    """Return pointers to the chunk's elements of one tensor; FULL allows 16-byte accesses."""
    pointers = tl.load(row + column).to(tl.pointer_type(tl.float32)) + offsets
    return tl.multiple_of(pointers, [16]) if FULL else pointers


@triton.jit
def _chunk(
    row, counts, is_enabled, step_size, correction2_sqrt, ema_weight,
    BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr, MOMENT: tl.constexpr,
    EMA: tl.constexpr, COMPUTE: tl.constexpr, CLIP: tl.constexpr, CHUNK: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    offsets = tl.arange(0, CHUNK)
    count = tl.load(row + 6).to(tl.int32)
    inside = offsets < (CHUNK if FULL else count)
    grads = _element_pointers(row, 1, offsets, FULL)
    params = _element_pointers(row, 0, offsets, FULL)
    squares = _element_pointers(row, 3, offsets, FULL)
    g = tl.load(grads, mask=inside, other=0.0)
    # Load everything before the reduction below, which waits for the gradient: one round trip to
    # memory per chunk instead of two. The loads are wasted if not enabled, which is rare.
    p = tl.load(params, mask=inside)
    v = tl.load(squares, mask=inside)
    if MOMENT:
        moments = _element_pointers(row, 2, offsets, FULL)
        moment = tl.load(moments, mask=inside)
    if EMA:
        averages = _element_pointers(row, 4, offsets, FULL)
        average = tl.load(averages, mask=inside)
    finite = tl.abs(g) < float("inf")
    g = tl.where(finite, g, tl.where(g > 0, 1e5, tl.where(g < 0, -1e5, 0.0)))
    bad = CHUNK - tl.sum(finite.to(tl.int32))
    changed = finite == 0
    changes = bad
    if CLIP > 0:
        over = tl.abs(g) > CLIP
        g = tl.minimum(tl.maximum(g, -CLIP), CLIP)
        clipped = tl.sum(over.to(tl.int32))
        changed |= over
        changes += clipped
    if changes > 0:  # write only gradients that changed
        tl.store(grads, g, mask=inside & changed)
        tl.atomic_add(counts, bad.to(tl.int64), sem="relaxed")
        if CLIP > 0:
            tl.atomic_add(counts + 1, clipped.to(tl.int64), sem="relaxed")

    if is_enabled:
        first = g
        if MOMENT:
            first = moment * BETA1 + g * (1 - BETA1)
            tl.store(moments, first, mask=inside)
        v = v * BETA2 + g * g * (1 - BETA2)
        p -= step_size * (first / (tl.sqrt(v) / correction2_sqrt + EPS))
        tl.store(squares, v, mask=inside)
        tl.store(params, p, mask=inside)
        if EMA:
            tl.store(averages, average + (p - average) * ema_weight, mask=inside)
        if COMPUTE != 0:
            dtype: tl.constexpr = tl.bfloat16 if COMPUTE == 1 else tl.float16
            start = tl.load(row + 7).to(tl.int32)
            address = tl.load(row + 5)
            copy = address.to(tl.pointer_type(dtype))
            taps = tl.load(row + 9).to(tl.int32)
            if address == 0:  # no compute weight
                pass
            elif taps == 1:
                copies = copy + start + offsets
                copies = tl.multiple_of(copies, [16]) if FULL else copies
                tl.store(copies, p.to(dtype), mask=inside)
            else:  # [out, in, tap] to [out, tap, in]
                inner = tl.load(row + 8).to(tl.int32)
                at = start + offsets
                channel = at // taps
                outer = channel // inner
                at = (outer * taps + at % taps) * inner + channel % inner
                tl.store(copy + at, p.to(dtype), mask=inside)


@triton.jit
def _adam_ema_kernel(
    table, step, enabled, lr, ema_beta, counts, rows,
    BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr, MOMENT: tl.constexpr,
    EMA: tl.constexpr, COMPUTE: tl.constexpr, CLIP: tl.constexpr, CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    is_enabled = tl.load(enabled)
    step_size, correction2_sqrt, ema_weight = _coefficients(step, lr, ema_beta, BETA1, BETA2)
    for r in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = table + r * COLUMNS
        if tl.load(row + 10) != 0:
            _chunk(
                row, counts, is_enabled, step_size, correction2_sqrt, ema_weight,
                BETA1, BETA2, EPS, MOMENT, EMA, COMPUTE, CLIP, CHUNK, True,
            )  # fmt: skip
        else:
            _chunk(
                row, counts, is_enabled, step_size, correction2_sqrt, ema_weight,
                BETA1, BETA2, EPS, MOMENT, EMA, COMPUTE, CLIP, CHUNK, False,
            )  # fmt: skip


def configurations() -> Iterator[tuple]:
    """Yield (label, kernel, signature, constants, warps, stages); see kernels.compile."""
    signature = {
        "table": "*i64", "step": "*fp64", "enabled": "*i1", "lr": "*fp64", "ema_beta": "*fp64",
        "counts": "*i64", "rows": "i32",
    }  # fmt: skip
    updates = [(beta1, ema, 0.0) for beta1 in (0.0, 0.9) for ema in (False, True)]
    for beta1, ema, clip in [*updates, (0.0, False, 1.0)]:
        for compute in (0, 1, 2):
            constants = dict(
                BETA1=beta1, BETA2=0.999, EPS=1e-8, MOMENT=beta1 > 0, EMA=ema, COMPUTE=compute,
                CLIP=clip, CHUNK=CHUNK, COLUMNS=COLUMNS,
            )  # fmt: skip
            label = f"adam_ema beta1={beta1} ema={ema:d} compute={compute}{' clip' * (clip > 0)}"
            yield label, _adam_ema_kernel, signature, constants, 8, 1
