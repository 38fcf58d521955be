"""Every kernel at the published networks' shapes against its rivals.

    python -m benchmarks.kernels --kernel group_norm --seconds 120

On a GPU a call is timed as a CUDA graph with its data out of the cache: a figure is device time
and the launch of a graph, 2 to 5 µs, which counts in the smallest. Rivals: `eager`, the same
operation in plain PyTorch, channels-last like all tensors of a step; for norms also
`eager NCHW`, which PyTorch is faster at; `compile`, eager through torch.compile; SDPA's backends
for attention, with what it takes to read our qkv and to give its gradient back; `fused Adam`,
torch's, with clean-up, average and 16-bit copy around it in foreach calls; `apex`, its group norm
and its FusedAdam, where NVIDIA's is installed. `triton` and `cuda` are ours.
The floor is the counted bytes at the copy bandwidth, or FLOP at the matrix rate, that the same run
measures.
"""

import dataclasses
import functools
import importlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import measure
from benchmarks.record import PERCENTILES, RESULTS, Record, percentiles
from sid_fast import augment as warp
from sid_fast import cli
from sid_fast.config.types import check, option
from sid_fast.errors import UserError
from sid_fast.kernels import GroupNormOutput, _apex, _cuda, compile, dispatch
from sid_fast.kernels._triton import INTERPRETED
from sid_fast.methods.base import RandomStream
from sid_fast.models import EDMNetwork, NetworkConfig
from sid_fast.models.teachers import TEACHERS
from sid_fast.performance import process_group

# By module, whose names in the package are the functions.
adam_ema, attention, augment, dropout, group_norm, random, sid_loss = (
    importlib.import_module(f"sid_fast.kernels.{name}") for name in compile.MODULES
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FILL = 2**28  # bytes of the largest tensor of a batch that fills a GPU
MICRO_BATCH = {32: 256, 64: 64}  # images a round of the presets, by their resolution
REPEATS = 30


@dataclasses.dataclass
class Case:
    """An operation at a shape.

    forms: by provider, inputs -> outputs, timed forward and, where it is differentiable, backward;
    of adam_ema, inputs -> the function to be timed. nbytes, flop: of forward and of backward.
    """

    name: str
    shape: str
    dtype: str
    inputs: Callable[[], list[torch.Tensor]]
    forms: dict[str, Callable[..., Any]]
    nbytes: tuple[int, int]
    flop: tuple[int, int] = (0, 0)
    differentiable: bool = True


NCHW = "eager NCHW"  # the provider whose inputs are in that layout
LEAST = 3  # cases of a kernel on a CPU


@dataclasses.dataclass
class Options:
    kernel: str = option("", f"only this one of {', '.join(compile.MODULES)}")
    dtype: str = option("bf16", "fp32, bf16 or fp16, or several with commas between")
    batch: str = option("micro", "micro: a preset's micro-batch; fill: what fills a GPU")
    baselines: str = option("", "only these providers, with commas between, besides ours")
    seconds: float = option(1e6, "stop after so many; what costs most comes first", 0)
    device: str = option("auto", "auto, cpu or cuda")
    out: str | None = option(None, "the result file; default: benchmarks/results/kernels.json")
    append: bool = option(False, "keep the rows that the result file has")


def ours(operation: str) -> Iterator[str]:
    """Our implementations of an operation that can run here."""
    if torch.cuda.is_available() or INTERPRETED:
        yield "triton"
    if operation == "adam_ema" and _cuda.library() is not None:
        yield "cuda"


def forced(operation: str, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def run(*inputs):
        with dispatch.forced({operation: name}):
            return call(*inputs)

    return run


def against(operation: str, call: Callable[..., Any], plain: Callable[..., Any]) -> dict:
    """Ours, and plain PyTorch as it is and compiled."""
    found = {name: forced(operation, name, call) for name in ours(operation)}
    return found | {"eager": plain, "compile": lambda *inputs: _compiled(plain)(*inputs)}


@functools.lru_cache(maxsize=1)
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(lambda *inputs: function(*inputs), dynamic=False)


def images_of(fill: bool, resolution: int, image_bytes: int) -> int:
    """Images a batch; on a CPU one will do."""
    if not torch.cuda.is_available():
        return 1
    return max(1, FILL // image_bytes) if fill else MICRO_BATCH[resolution]


def channels_last(*shape: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(shape, device=device).to(dtype)
    return x.contiguous(memory_format=torch.channels_last).requires_grad_()


def group_norm_case(form: str, place: tuple[int, ...], dtype: str, fill: bool, device) -> Case:
    """A norm as it stands in a network; form and place as in group_norm.NORM_SHAPES."""
    *channels, side = place
    total, kind, parts = sum(channels), DTYPES[dtype], form.split()
    resolution = 64 if side == 64 or total % 192 == 0 else 32
    n = images_of(fill, resolution, total * side**2 * kind.itemsize)
    silu = form != "norm2"
    resample = next((p for p in parts if p in ("up", "down")), None)
    dropout = 0.1 if "norm1" in parts else 0.0
    makers: dict[str, tuple[int, ...]] = {"x": (n, channels[0], side, side)}
    if "skip" in parts:
        makers["skip"] = (n, channels[1], side, side)
    if parts[0] in ("sum", "norm2"):
        makers["residual"], makers["x_bias"] = makers["x"], (channels[0],)
    for name in {"add": ("add",), "scale_shift": ("add", "scale", "shift")}.get(parts[-1], ()):
        makers[name] = (n, total)
    names = (*makers, "weight", "bias")
    arriving = group_norm.kernel_arguments(form, backward=True)

    def inputs():
        found = []
        for shape in (*makers.values(), (total,), (total,)):
            if len(shape) == 4:
                found.append(channels_last(*shape, device=device, dtype=kind))
            else:
                of = torch.float32 if len(shape) == 1 else kind
                found.append(torch.randn(shape, device=device).to(of).requires_grad_())
        return found

    def call(function, *values):
        given = dict(zip(names, values, strict=True))
        x, weight, bias = (given.pop(name) for name in ("x", "weight", "bias"))
        around = {"silu": silu, "dropout": dropout, "resample": resample, **given}
        scale = 0.5**0.5 if "residual" in given else 1.0
        out = function(x, weight, bias, 32, 1e-6, x_scale=scale, **around)
        return [
            getattr(out, name) for name in GroupNormOutput._fields if f"{name}_grad" in arriving
        ]

    forms = against(
        "group_norm",
        functools.partial(call, group_norm.group_norm),
        functools.partial(call, group_norm.group_norm_eager),
    )
    forms[NCHW] = forms["eager"]
    if form in ("plain", "norm2") and _apex.installed() and device.type == "cuda":
        forms["apex"] = lambda x, *rest: [_apex.group_norm(x, rest[-2], rest[-1], 32, 1e-6, silu)]
    moved = [group_norm.bytes_moved(form, place, n, kind.itemsize, b) for b in (False, True)]
    shape = f"{form} {n}x{'+'.join(map(str, channels))}@{side}x{side}"
    return Case("group_norm", shape, dtype, inputs, forms, tuple(moved))


def group_norm_cases(dtypes, fill, device) -> Iterator[Case]:
    for dtype, form in itertools.product(dtypes, group_norm.NORM_SHAPES):
        for place in group_norm.NORM_SHAPES[form]:
            yield group_norm_case(form, place, dtype, fill, device)


BACKENDS = {
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def sdpa(qkv: torch.Tensor, heads: int) -> torch.Tensor:
    """kernels.attention by PyTorch's scaled_dot_product_attention."""
    n, c3, height, width = qkv.shape
    parts = qkv.permute(0, 2, 3, 1).reshape(n, height * width, 3, heads, c3 // 3 // heads)
    q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
    out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).reshape(n, height, width, c3 // 3).permute(0, 3, 1, 2)


def attention_cases(dtypes, fill, device) -> Iterator[Case]:
    # Heads, their size and the pixels' side: of ADM, then of DDPM++.
    published = ((6, 64, 32), (9, 64, 16), (1, 256, 16), (12, 64, 8), (1, 256, 8))
    for dtype, (heads, size, side) in itertools.product(dtypes, published):
        kind, pixels = DTYPES[dtype], side**2
        n = images_of(fill, 64 if size == 64 else 32, 3 * heads * size * pixels * kind.itemsize)

        def inputs(n=n, c=heads * size, side=side, kind=kind):
            return [channels_last(n, 3 * c, side, side, device=device, dtype=kind)]

        def call(function, qkv, heads=heads):
            return [function(qkv, heads)]

        def backend(chosen, qkv, heads=heads):
            with sdpa_kernel(chosen):
                return [sdpa(qkv, heads)]

        forms = against(
            "attention",
            functools.partial(call, attention.attention),
            functools.partial(call, attention.attention_eager),
        )
        if device.type == "cuda":
            forms |= {name: functools.partial(backend, b) for name, b in BACKENDS.items()}
        of = n, heads, size, pixels
        yield Case(
            "attention",
            f"{n}x{heads}x{size} N={pixels}",
            dtype,
            inputs,
            forms,
            tuple(attention.bytes_moved(*of, kind.itemsize, b) for b in (False, True)),
            tuple(attention.flop(*of, b) for b in (False, True)),
        )


def sid_loss_cases(dtypes, fill, device) -> Iterator[Case]:
    for dtype, side in itertools.product(dtypes, (64, 32)):
        kind = DTYPES[dtype]
        n = images_of(fill, side, 3 * side**2 * 4)

        def inputs(n=n, side=side, kind=kind):
            image = functools.partial(channels_last, n, 3, side, side, device=device)
            y, noise = image(dtype=torch.float32), image(dtype=torch.float32)
            raws = [image(dtype=kind).detach() for _ in range(2)]
            return [*raws, y.detach(), noise.detach(), torch.rand(n, device=device) + 0.5]

        def noised(module, r, f, y, noise, sigma):
            kept = torch.ones(len(y), dtype=torch.bool, device=y.device)
            return module(y, sigma, noise, kept, r.dtype, 0.5)

        def generator(module, r, f, y, noise, sigma):
            kept = torch.ones(len(y), dtype=torch.bool, device=y.device)
            return module(r, f, noise, y, sigma, kept, 1.2, 0.5)

        def fake(module, r, f, y, noise, sigma):
            kept = torch.ones(len(y), dtype=torch.bool, device=y.device)
            return module(f, noise, y, sigma, kept, 0.5)

        calls = {"noised": noised, "generator_loss": generator, "fake_score_loss": fake}
        for name, call in calls.items():
            forms = against(
                "sid_loss",
                functools.partial(call, getattr(sid_loss, f"_{name}")),
                functools.partial(call, getattr(sid_loss, f"{name}_eager")),
            )
            moved = sid_loss.bytes_moved(n * 3 * side**2, name, kind.itemsize)
            shape = f"{name} {n}x3@{side}x{side}"
            yield Case("sid_loss", shape, dtype, inputs, forms, (moved, 0), differentiable=False)


def augment_cases(dtypes, fill, device) -> Iterator[Case]:
    for side in (64, 32) if device.type == "cuda" else (8,):  # a minute each in the interpreter
        n = images_of(fill, side, 3 * side**2 * 4)

        def inputs(n=n, side=side):
            rng = RandomStream(torch.zeros(3, dtype=torch.int64, device=device), "fake", n)
            image = channels_last(n, 3, side, side, device=device, dtype=torch.float32)
            return [image.detach(), *warp.draw(rng, 0.12).values()]

        def call(function, image, *values):
            return function(image, dict(zip(augment.PARAMETERS, values, strict=True)))

        forms = against(
            "augment",
            functools.partial(call, augment.augment),
            functools.partial(call, augment.augment_eager),
        )
        shape = f"{n}x3@{side}x{side}"
        moved = augment.bytes_moved(n * 3 * side**2), 0
        flop = augment.flop(n, 3, side, side), 0
        yield Case("augment", shape, "fp32", inputs, forms, moved, flop, differentiable=False)


def random_cases(dtypes, fill, device) -> Iterator[Case]:
    """Normal numbers, as latents and noise take them."""
    for resolution in (32, 64):
        n = images_of(fill, resolution, 3 * resolution**2 * 4)
        shape = (n, 3, resolution, resolution)

        def inputs():
            return [torch.zeros(3, dtype=torch.int64, device=device)]

        def call(counter, shape=shape):
            return random.random(counter, 1, shape, "normal")

        def torchs(counter, shape=shape):
            return torch.randn(shape, device=counter.device)

        forms = {name: forced("random", name, call) for name in ours("random")}
        forms |= {"eager": forced("random", "eager", call), "torch.randn": torchs}
        moved = n * 3 * resolution**2 * 4, 0
        label = f"{n}x3x{resolution}x{resolution}"
        yield Case("random", label, "fp32", inputs, forms, moved, differentiable=False)


def dropout_cases(dtypes, fill, device) -> Iterator[Case]:
    """Dropout of its own, as eager norms take it."""
    for dtype, (channels, side) in itertools.product(dtypes, ((256, 32), (192, 64))):
        kind = DTYPES[dtype]
        n = images_of(fill, side, channels * side**2 * kind.itemsize)

        def inputs(shape=(n, channels, side, side), kind=kind):
            x = channels_last(*shape, device=device, dtype=kind)
            return [x, torch.tensor([1, 2, 0], device=device)]

        def call(x, seed):
            return dropout.dropout(x, 0.1, seed)

        forms = {name: forced("random", name, call) for name in ours("random")}
        forms["eager"] = forced("random", "eager", call)
        forms["F.dropout"] = lambda x, seed: torch.nn.functional.dropout(x, 0.1)
        nbytes = 2 * n * channels * side**2 * kind.itemsize
        label = f"{n}x{channels}x{side}x{side}"
        yield Case("dropout", label, dtype, inputs, forms, (nbytes, nbytes))


def fused_adam(params):
    options = {"fused": True, "capturable": params[0].is_cuda}
    return torch.optim.Adam(params, lr=1e-5, betas=(0.0, 0.999), **options)


def apex_adam(params):
    from apex.optimizers import FusedAdam  # NVIDIA's, where _apex has found it

    return FusedAdam(params, lr=1e-5, betas=(0.0, 0.999), adam_w_mode=False, capturable=True)


def skilled_update(adam, params, grads, squares, ema, compute_weights):
    """What a skilled user of PyTorch makes of an update, in as few launches as it allows."""
    optimizer = adam(params)

    def step():
        for grad in grads:
            torch.nan_to_num_(grad, nan=0.0, posinf=1e5, neginf=-1e5)
        optimizer.step()
        torch._foreach_lerp_(ema, params, 1e-3)
        if compute_weights:
            torch._foreach_copy_(compute_weights, params)

    return step


def adam_ema_cases(dtypes, fill, device) -> Iterator[Case]:
    names = {"imagenet64-cond": "ADM", "ffhq64": "DDPM++ 64x64", "cifar10-uncond": "DDPM++ 32x32"}
    for dtype, (teacher, label) in itertools.product(dtypes, names.items()):
        kind = DTYPES[dtype]
        config = TEACHERS[teacher].network
        if device.type == "cpu":  # a small one will do
            config = NetworkConfig("ddpmpp", 8, model_channels=16, channel_mult=(1,), num_blocks=1)
        with torch.device("meta"):
            shapes = [p.shape for p in EDMNetwork(config).parameters()]

        def inputs(shapes=tuple(shapes), kind=kind):
            def lists():
                return [torch.randn(shape, device=device) for shape in shapes]

            params, grads, ema = lists(), lists(), lists()
            compute_weights = [p.to(kind) for p in params] if kind != torch.float32 else []
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad
            return [params, grads, [g.square() for g in lists()], ema, compute_weights]

        def call(params, grads, squares, ema, compute_weights):
            step, enabled = _scalars(device)
            return lambda: adam_ema.adam_ema(
                params, grads, [], squares, ema, step=step, enabled=enabled, lr=1e-5, beta1=0.0,
                beta2=0.999, eps=1e-8, ema_beta=0.999, compute_weights=compute_weights,
            )  # fmt: skip

        forms: dict[str, Callable[..., Any]]
        forms = {name: functools.partial(_update, name, call) for name in ours("adam_ema")}
        forms["eager"] = functools.partial(_update, "eager", call)
        forms["fused Adam"] = functools.partial(skilled_update, fused_adam)
        if _apex.installed() and device.type == "cuda":
            forms["apex"] = functools.partial(skilled_update, apex_adam)
        numel = sum(shape.numel() for shape in shapes)
        moved = adam_ema.bytes_moved(numel, False, True, kind != torch.float32), 0
        shape = f"{label}, {numel / 1e6:.1f} M in {len(shapes)}"
        yield Case("adam_ema", shape, dtype, inputs, forms, moved, differentiable=False)


def _scalars(device):
    step = torch.zeros((), dtype=torch.float64, device=device)
    return step, torch.ones((), dtype=torch.bool, device=device)


def _update(name, call, *lists):
    return forced("adam_ema", name, call(*lists))


CASES = {
    "attention": attention_cases,
    "group_norm": group_norm_cases,
    "adam_ema": adam_ema_cases,
    "augment": augment_cases,
    "sid_loss": sid_loss_cases,
    "random": random_cases,
    "dropout": dropout_cases,
}


def prepared(case: Case, provider: str, device: torch.device) -> dict[str, Callable]:
    """By mode, a function that makes the call that is timed."""
    form = case.forms[provider]
    if case.name == "adam_ema":
        return {"forward": lambda: form(*case.inputs())}

    def laid_out():
        inputs = case.inputs()
        if provider != NCHW:
            return inputs
        return [v.detach().contiguous().requires_grad_(v.requires_grad) for v in inputs]

    def forward():
        inputs = laid_out()
        return lambda: form(*inputs)

    def backward():
        inputs = laid_out()
        outputs = form(*inputs)
        grads = [torch.randn_like(out) for out in outputs]
        return lambda: torch.autograd.grad(outputs, inputs, grads, retain_graph=True)

    return {"forward": forward} | ({"backward": backward} if case.differentiable else {})


def measured(
    case: Case, device: torch.device, ceilings: dict, baselines: set[str]
) -> Iterator[dict]:
    """The rows of a case: every provider in turns, forward and backward."""
    own = {"triton", "cuda"}
    providers = [p for p in case.forms if not baselines or p in own | baselines]
    for at, mode in enumerate(("forward", "backward")[: 1 + case.differentiable]):
        calls, failed = {}, {}
        for provider in providers:
            try:
                calls[provider] = measure.Cold(prepared(case, provider, device)[mode], device)
            except (
                Exception
            ) as error:  # a rival that has no kernel for a shape says so in many ways
                failed[provider] = measure.reason(error)
        rounds = 3 if device.type == "cuda" else 1
        times: dict[str, list[float]] = {provider: [] for provider in calls}
        for _ in range(rounds):
            for provider, call in calls.items():
                repeats = REPEATS // rounds if device.type == "cuda" else 3
                times[provider] += call.times(repeats)
        for provider in providers:
            keys = {
                "name": case.name, "shape": case.shape, "dtype": case.dtype,
                "provider": provider, "mode": mode,
            }  # fmt: skip
            if provider in failed:
                nothing = dict.fromkeys(("gb_s", "tflop_s", "floor_share"))
                yield {
                    **keys, "ms": dict.fromkeys(PERCENTILES), **nothing, "status": failed[provider],
                }  # fmt: skip
                continue
            ms = percentiles(times[provider])
            seconds = ms["p50"] / 1e3
            floor = max(
                case.nbytes[at] / (ceilings["copy"] * 1e12),
                case.flop[at] / (ceilings["fp32" if case.dtype == "fp32" else "bf16"] * 1e12),
            )
            yield {
                **keys,
                "ms": ms,
                "gb_s": case.nbytes[at] / seconds / 1e9,
                "tflop_s": case.flop[at] / seconds / 1e12,
                "floor_share": floor / seconds,
                "status": "ok",
            }


def cases(options: Options, device: torch.device) -> list[Case]:
    """What is asked for, the kernels in turns, the largest cases first; on a CPU only the least."""
    asked: list[tuple[str, str, Iterable[str]]] = [
        ("kernel", options.kernel, CASES),
        *(("dtype", value, DTYPES) for value in options.dtype.split(",")),
        ("batch", options.batch, ("micro", "fill")),
    ]
    for name, value, known in asked:
        if value not in known and (value or name != "kernel"):
            raise UserError(f"{name}={value!r} is unknown: choose from {', '.join(known)}")
    makers = [CASES[options.kernel]] if options.kernel else CASES.values()
    found = [
        sorted(make(options.dtype.split(","), options.batch == "fill", device), key=_cost)
        for make in makers
    ]
    if device.type == "cpu":  # where an interpreter takes minutes for the others
        found = [some[-LEAST:] for some in found]
    turns = itertools.zip_longest(*found)
    return [case for turn in turns for case in turn if case is not None]


def _cost(case: Case) -> float:
    return -max(sum(case.nbytes) / 4e12, sum(case.flop) / 8e14)


def run(options: Options, given: set[str]) -> None:
    check(options)
    device = process_group.pick_device(options.device)
    end = time.monotonic() + options.seconds
    baselines = {name.strip() for name in options.baselines.split(",") if name.strip()}
    chosen = cases(options, device)
    ceilings = measure.ceilings(device)
    record = Record(
        Path(options.out or RESULTS / "kernels.json"),
        "kernels",
        append=options.append,
        ceilings=ceilings,
    )
    print(
        f"{record.head['device']}: {', '.join(f'{k} {v:.3g}' for k, v in ceilings.items())} "
        "(products TFLOP/s, copy TB/s)"
    )
    print(f"{'':60} {'provider':14} {'mode':8} {'ms':>9} {'GB/s':>7} {'TFLOP/s':>8} {'floor':>6}")
    for done, case in enumerate(chosen):
        if time.monotonic() > end:
            print(f"out of time after {done} of {len(chosen)} shapes")
            break
        for row in measured(case, device, ceilings, baselines):
            record.add(**row)
            what = f"{row['name']} {row['shape']} {row['dtype']}"
            print(f"{what:60} {row['provider']:14} {row['mode']:8}", end=" ")
            if row["status"] == "ok":
                print(
                    f"{row['ms']['p50']:9.4f} {row['gb_s']:7.0f} {row['tflop_s']:8.1f} "
                    f"{row['floor_share']:6.1%}",
                    flush=True,
                )
            else:
                print(row["status"], flush=True)
    print(f"kept as {record.path} and .csv")


main = cli.command(Options, run, None, __doc__)

if __name__ == "__main__":
    cli.main(main, "benchmarks.kernels")
