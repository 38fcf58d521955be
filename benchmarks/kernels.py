"""Time every kernel at the networks' shapes, against PyTorch and other libraries.

    python -m benchmarks.kernels --kernel group_norm --seconds 120

On a GPU each call is timed as a CUDA graph with a cold L2 cache: device time plus 2 to 5 µs for
launching the graph, which matters for the smallest. Providers:

- `triton`, `cuda`: sid_fast's kernels.
- `eager`: the same operation in PyTorch, channels-last like all tensors of a step.
- `eager NCHW`: for norms, the layout in which PyTorch is faster.
- `compile`: eager through torch.compile.
- `sdpa …`: PyTorch's attention backends, including the cost of reading the fused qkv layout and of
  returning its gradient.
- `fused Adam`: torch.optim.Adam(fused=True), with gradient clean-up, EMA and 16-bit copy as
  foreach calls.
- `apex`: NVIDIA's group norm and FusedAdam, where installed.

`floor_share` is the lower bound of the time over the time: counted bytes at the copy bandwidth, or
FLOP at the matrix rate, both measured in the same run.
"""

import dataclasses
import functools
import importlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import timing
from benchmarks.results import RESULTS, Results, times
from sid_fast import augment as augmentation
from sid_fast import cli
from sid_fast.config.types import check, option
from sid_fast.errors import RunFailed, UserError
from sid_fast.kernels import GroupNormOutput, _apex, _cuda, compile, dispatch
from sid_fast.kernels._triton import INTERPRETED
from sid_fast.methods.base import RandomStream
from sid_fast.models import EDM2Config, EDM2Network, EDMNetwork, NetworkConfig
from sid_fast.models.teachers import TEACHERS
from sid_fast.performance import process_group

# The modules; the package exports functions of the same names.
MODULES = {name: importlib.import_module(f"sid_fast.kernels.{name}") for name in compile.MODULES}
adam_ema, attention, augment, dropout, group_norm = (
    MODULES[name] for name in ("adam_ema", "attention", "augment", "dropout", "group_norm")
)
mp, random, sid_loss, weight_norm = (
    MODULES[name] for name in ("mp", "random", "sid_loss", "weight_norm")
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FILL = 2**28  # bytes of the largest tensor with --batch fill
MICRO_BATCH = {32: 256, 64: 64}  # of the presets, by resolution
REPEATS = 30


@dataclasses.dataclass
class Case:
    """One operation at one shape.

    Attributes:
        inputs: makes the tensors.
        providers: by name, a function inputs -> outputs; for adam_ema and weight_norm, inputs ->
            the function to time.
        nbytes: bytes that (forward, backward) must move.
        flop: FLOP of (forward, backward).
        differentiable: whether backward is timed too.
    """

    name: str
    shape: str
    dtype: str
    inputs: Callable[[], list[torch.Tensor]]
    providers: dict[str, Callable[..., Any]]
    nbytes: tuple[int, int]
    flop: tuple[int, int] = (0, 0)
    differentiable: bool = True


NCHW = "eager NCHW"  # the provider that gets contiguous inputs
CPU_CASES = 3  # per kernel on a CPU: the smallest


@dataclasses.dataclass
class Options:
    """Options of the command."""

    kernel: str = option("", f"one of {', '.join(compile.MODULES)}; default: all")
    dtype: str = option("bf16", "fp32, bf16 or fp16, or a comma-separated list")
    batch: str = option("micro", "micro: a preset's micro-batch; fill: tensors that fill a GPU")
    baselines: str = option("", "comma-separated providers beside triton and cuda; default: all")
    seconds: float = option(
        1e6, "start no new shape after this many seconds; the largest come first", 0
    )
    device: str = option("auto", "auto, cpu or cuda")
    compile_only: bool = option(False, "run each Triton kernel once to fill Triton's cache")
    part: int = option(0, "run only the cases PART, PART + PARTS, PART + 2 PARTS …", 0)
    parts: int = option(1, "see --part", 1)
    out: str | None = option(
        None, "result file to append to; default: benchmarks/results/kernels.jsonl"
    )


def own_backends(operation: str) -> Iterator[str]:
    """Yield sid_fast's backends of an operation that can run here, without eager."""
    if torch.cuda.is_available() or INTERPRETED:
        yield "triton"
    if operation == "adam_ema" and _cuda.library() is not None:
        yield "cuda"


def with_backend(operation: str, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """Bind a call to one backend of an operation."""

    def run(*inputs):
        with dispatch.forced({operation: name}):
            return call(*inputs)

    return run


def with_pytorch(operation: str, call: Callable[..., Any], eager: Callable[..., Any]) -> dict:
    """Collect sid_fast's own backends, eager PyTorch and eager through torch.compile."""
    own = {name: with_backend(operation, name, call) for name in own_backends(operation)}
    return own | {"eager": eager, "compile": lambda *inputs: _compiled(eager)(*inputs)}


@functools.lru_cache(maxsize=1)
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(lambda *inputs: function(*inputs), dynamic=False)


def batch_size(fill: bool, resolution: int, image_bytes: int) -> int:
    """Return the number of images; one on a CPU."""
    if not torch.cuda.is_available():
        return 1
    return max(1, FILL // image_bytes) if fill else MICRO_BATCH[resolution]


def channels_last(*shape: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Draw a channels-last normal tensor that requires a gradient."""
    x = torch.randn(shape, device=device).to(dtype)
    return x.contiguous(memory_format=torch.channels_last).requires_grad_()


def group_norm_case(variant: str, place: tuple[int, ...], dtype: str, fill: bool, device) -> Case:
    """Make the case of a norm in a network; variant and place as in group_norm.NORM_SHAPES."""
    *channels, side = place
    total, kind, parts = sum(channels), DTYPES[dtype], variant.split()
    resolution = 64 if side == 64 or total % 192 == 0 else 32
    n = batch_size(fill, resolution, total * side**2 * kind.itemsize)
    silu = variant != "norm2"
    resample = next((p for p in parts if p in ("up", "down")), None)
    dropout = 0.1 if "norm1" in parts else 0.0
    shapes: dict[str, tuple[int, ...]] = {"x": (n, channels[0], side, side)}
    if "skip" in parts:
        shapes["skip"] = (n, channels[1], side, side)
    if parts[0] in ("sum", "norm2"):
        shapes["residual"], shapes["x_bias"] = shapes["x"], (channels[0],)
    for name in {"add": ("add",), "scale_shift": ("add", "scale", "shift")}.get(parts[-1], ()):
        shapes[name] = (n, total)
    names = (*shapes, "weight", "bias")
    upstream_grads = group_norm.kernel_arguments(variant, backward=True)

    def inputs():
        tensors = []
        for shape in (*shapes.values(), (total,), (total,)):
            if len(shape) == 4:
                tensors.append(channels_last(*shape, device=device, dtype=kind))
            else:
                dtype = torch.float32 if len(shape) == 1 else kind
                tensors.append(torch.randn(shape, device=device).to(dtype).requires_grad_())
        return tensors

    def call(function, *values):
        given = dict(zip(names, values, strict=True))
        x, weight, bias = (given.pop(name) for name in ("x", "weight", "bias"))
        options = {"silu": silu, "dropout": dropout, "resample": resample, **given}
        scale = 0.5**0.5 if "residual" in given else 1.0
        out = function(x, weight, bias, 32, 1e-6, x_scale=scale, **options)
        return [
            getattr(out, name)
            for name in GroupNormOutput._fields
            if f"{name}_grad" in upstream_grads
        ]

    providers = with_pytorch(
        "group_norm",
        functools.partial(call, group_norm.group_norm),
        functools.partial(call, group_norm.group_norm_eager),
    )
    providers[NCHW] = providers["eager"]
    if variant in ("plain", "norm2") and _apex.installed() and device.type == "cuda":
        providers["apex"] = lambda x, *rest: [
            _apex.group_norm(x, rest[-2], rest[-1], 32, 1e-6, silu)
        ]
    nbytes = [group_norm.bytes_moved(variant, place, n, kind.itemsize, b) for b in (False, True)]
    shape = f"{variant} {n}x{'+'.join(map(str, channels))}@{side}x{side}"
    return Case("group_norm", shape, dtype, inputs, providers, tuple(nbytes))


def group_norm_cases(dtypes, fill, device) -> Iterator[Case]:
    """Yield every norm of the networks."""
    for dtype, variant in itertools.product(dtypes, group_norm.NORM_SHAPES):
        for place in group_norm.NORM_SHAPES[variant]:
            yield group_norm_case(variant, place, dtype, fill, device)


def mp_cases(dtypes, fill, device) -> Iterator[Case]:
    """Yield the element-wise chains of EDM2's blocks."""
    calls: dict[str, tuple[Callable, Callable]] = {
        "pixel_norm": (mp.pixel_norm, mp.pixel_norm_eager),
        "qkv_norm": (_qkv_norm(mp.pixel_norm), _qkv_norm(mp.pixel_norm_eager)),
        "scaled_silu": (mp.scaled_silu, mp.scaled_silu_eager),
        "sum": (_mp_sum(mp.mp_sum), _mp_sum(mp.mp_sum_eager)),
        "cat_silu": (mp.mp_cat_silu, _mp_cat_silu_eager),
    }
    for dtype, operation in itertools.product(dtypes, mp.SHAPES):
        for place in mp.SHAPES[operation]:
            *channels, side = place
            kind, total = DTYPES[dtype], sum(channels)
            n = batch_size(fill, 64, total * side**2 * kind.itemsize)
            shapes: list[tuple[int, ...]] = [(n, c, side, side) for c in channels]
            second = {"scaled_silu": (n, total), "sum": shapes[0]}.get(operation)
            shapes += [second] if second else []

            def inputs(shapes=tuple(shapes), kind=kind):
                return [
                    channels_last(*shape, device=device, dtype=kind)
                    if len(shape) == 4
                    else torch.randn(shape, device=device).to(kind).requires_grad_()
                    for shape in shapes
                ]

            def call(function, *values):
                out = function(*values)
                outs = [out] if isinstance(out, torch.Tensor) else out
                return [value for value in outs if value is not None]

            ours, eager = (functools.partial(call, function) for function in calls[operation])
            nbytes = [mp.bytes_moved(operation, place, n, kind.itemsize, b) for b in (False, True)]
            shape = f"{operation} {n}x{'+'.join(map(str, channels))}@{side}x{side}"
            providers = with_pytorch("mp", ours, eager)
            yield Case("mp", shape, dtype, inputs, providers, tuple(nbytes))


def _qkv_norm(norm: Callable) -> Callable:
    return lambda x: norm(x, x.shape[1] // 64, False)


def _mp_sum(function: Callable) -> Callable:
    """Clip as at the end of a block, for two consumers."""

    def run(a, b):
        out = function(a, b, 0.3, 256.0)
        return (out, out.view_as(out)) if isinstance(out, torch.Tensor) else out

    return run


def _mp_cat_silu_eager(x, skip=None):
    """Return the aliases too, whose gradients PyTorch adds by itself."""
    return mp.mp_cat_silu_eager(x, skip), x, skip


BACKENDS = {
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def sdpa(qkv: torch.Tensor, heads: int) -> torch.Tensor:
    """Compute kernels.attention with PyTorch's scaled_dot_product_attention."""
    n, c3, height, width = qkv.shape
    parts = qkv.permute(0, 2, 3, 1).reshape(n, height * width, 3, heads, c3 // 3 // heads)
    q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
    out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).reshape(n, height, width, c3 // 3).permute(0, 3, 1, 2)


def attention_cases(dtypes, fill, device) -> Iterator[Case]:
    """Yield every attention layer of the networks."""
    # (heads, head size, height and width): ADM, DDPM++, ADM, ADM, DDPM++
    layers = ((6, 64, 32), (9, 64, 16), (1, 256, 16), (12, 64, 8), (1, 256, 8))
    for dtype, (heads, size, side) in itertools.product(dtypes, layers):
        kind, pixels = DTYPES[dtype], side**2
        n = batch_size(fill, 64 if size == 64 else 32, 3 * heads * size * pixels * kind.itemsize)

        def inputs(n=n, c=heads * size, side=side, kind=kind):
            return [channels_last(n, 3 * c, side, side, device=device, dtype=kind)]

        def call(function, qkv, heads=heads):
            return [function(qkv, heads)]

        def sdpa_backend(backend, qkv, heads=heads):
            with sdpa_kernel(backend):
                return [sdpa(qkv, heads)]

        providers = with_pytorch(
            "attention",
            functools.partial(call, attention.attention),
            functools.partial(call, attention.attention_eager),
        )
        if device.type == "cuda":
            providers |= {name: functools.partial(sdpa_backend, b) for name, b in BACKENDS.items()}
        dims = n, heads, size, pixels
        yield Case(
            "attention",
            f"{n}x{heads}x{size} N={pixels}",
            dtype,
            inputs,
            providers,
            tuple(attention.bytes_moved(*dims, kind.itemsize, b) for b in (False, True)),
            tuple(attention.flop(*dims, b) for b in (False, True)),
        )


def sid_loss_cases(dtypes, fill, device) -> Iterator[Case]:
    """Yield both losses and the noising of images."""
    for dtype, side in itertools.product(dtypes, (64, 32)):
        kind = DTYPES[dtype]
        n = batch_size(fill, side, 3 * side**2 * 4)

        def inputs(n=n, side=side, kind=kind):
            image = functools.partial(channels_last, n, 3, side, side, device=device)
            y, noise = image(dtype=torch.float32), image(dtype=torch.float32)
            raws = [image(dtype=kind).detach() for _ in range(2)]
            return [*raws, y.detach(), noise.detach(), torch.rand(n, device=device) + 0.5]

        def noised(module, r, f, y, noise, sigma):
            valid = torch.ones(len(y), dtype=torch.bool, device=y.device)
            return module(y, sigma, noise, valid, r.dtype, 0.5)

        def generator(module, r, f, y, noise, sigma):
            valid = torch.ones(len(y), dtype=torch.bool, device=y.device)
            return module(r, f, noise, y, sigma, valid, 1.2, 0.5)

        def fake(module, r, f, y, noise, sigma):
            valid = torch.ones(len(y), dtype=torch.bool, device=y.device)
            return module(f, noise, y, sigma, valid, 0.5)

        calls = {"noised": noised, "generator_loss": generator, "fake_score_loss": fake}
        for name, call in calls.items():
            providers = with_pytorch(
                "sid_loss",
                functools.partial(call, getattr(sid_loss, f"_{name}")),
                functools.partial(call, getattr(sid_loss, f"{name}_eager")),
            )
            nbytes = sid_loss.bytes_moved(n * 3 * side**2, name, kind.itemsize)
            shape = f"{name} {n}x3@{side}x{side}"
            yield Case(
                "sid_loss", shape, dtype, inputs, providers, (nbytes, 0), differentiable=False
            )


def augment_cases(dtypes, fill, device) -> Iterator[Case]:
    """Yield the augmentation of images; a tiny one for the interpreter."""
    for side in (64, 32) if device.type == "cuda" else (8,):
        n = batch_size(fill, side, 3 * side**2 * 4)

        def inputs(n=n, side=side):
            rng = RandomStream(torch.zeros(3, dtype=torch.int64, device=device), "fake", n)
            image = channels_last(n, 3, side, side, device=device, dtype=torch.float32)
            return [image.detach(), *augmentation.draw(rng, 0.12).values()]

        def call(function, image, *values):
            return function(image, dict(zip(augment.PARAMETERS, values, strict=True)))

        providers = with_pytorch(
            "augment",
            functools.partial(call, augment.augment),
            functools.partial(call, augment.augment_eager),
        )
        shape = f"{n}x3@{side}x{side}"
        nbytes = augment.bytes_moved(n * 3 * side**2), 0
        flop = augment.flop(n, 3, side, side), 0
        yield Case("augment", shape, "fp32", inputs, providers, nbytes, flop, differentiable=False)


def random_cases(dtypes, fill, device) -> Iterator[Case]:
    """Yield normal random numbers of the size of latents and noise."""
    for resolution in (32, 64):
        n = batch_size(fill, resolution, 3 * resolution**2 * 4)
        shape = (n, 3, resolution, resolution)

        def inputs():
            return [torch.zeros(3, dtype=torch.int64, device=device)]

        def call(counter, shape=shape):
            return random.random(counter, 1, shape, "normal")

        def torch_randn(counter, shape=shape):
            return torch.randn(shape, device=counter.device)

        providers = {name: with_backend("random", name, call) for name in own_backends("random")}
        providers |= {"eager": with_backend("random", "eager", call), "torch.randn": torch_randn}
        nbytes = n * 3 * resolution**2 * 4, 0
        label = f"{n}x3x{resolution}x{resolution}"
        yield Case("random", label, "fp32", inputs, providers, nbytes, differentiable=False)


def dropout_cases(dtypes, fill, device) -> Iterator[Case]:
    """Yield dropout by itself, as it follows an eager norm."""
    for dtype, (channels, side) in itertools.product(dtypes, ((256, 32), (192, 64))):
        kind = DTYPES[dtype]
        n = batch_size(fill, side, channels * side**2 * kind.itemsize)

        def inputs(shape=(n, channels, side, side), kind=kind):
            x = channels_last(*shape, device=device, dtype=kind)
            return [x, torch.tensor([1, 2, 0], device=device)]

        def call(x, seed):
            return dropout.dropout(x, 0.1, seed)

        providers = {name: with_backend("random", name, call) for name in own_backends("random")}
        providers["eager"] = with_backend("random", "eager", call)
        providers["F.dropout"] = lambda x, seed: torch.nn.functional.dropout(x, 0.1)
        nbytes = 2 * n * channels * side**2 * kind.itemsize
        label = f"{n}x{channels}x{side}x{side}"
        yield Case("dropout", label, dtype, inputs, providers, (nbytes, nbytes))


def fused_adam(params):
    """Make PyTorch's fused Adam."""
    options = {"fused": True, "capturable": params[0].is_cuda}
    return torch.optim.Adam(params, lr=1e-5, betas=(0.0, 0.999), **options)


def apex_adam(params):
    """Make apex's FusedAdam."""
    from apex.optimizers import FusedAdam

    return FusedAdam(params, lr=1e-5, betas=(0.0, 0.999), adam_w_mode=False, capturable=True)


def foreach_update(adam, params, grads, squares, ema, compute_weights):
    """Make a whole update of PyTorch calls, with as few launches as they allow."""
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
    """Yield the optimiser step of whole networks."""
    names = {"imagenet64-cond": "ADM", "ffhq64": "DDPM++ 64x64", "cifar10-uncond": "DDPM++ 32x32"}
    for dtype, (teacher, label) in itertools.product(dtypes, names.items()):
        kind = DTYPES[dtype]
        config = TEACHERS[teacher].network
        if device.type == "cpu":
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

        providers: dict[str, Callable[..., Any]]
        providers = {
            name: functools.partial(_update, name, call) for name in own_backends("adam_ema")
        }
        providers["eager"] = functools.partial(_update, "eager", call)
        providers["fused Adam"] = functools.partial(foreach_update, fused_adam)
        if _apex.installed() and device.type == "cuda":
            providers["apex"] = functools.partial(foreach_update, apex_adam)
        numel = sum(shape.numel() for shape in shapes)
        nbytes = adam_ema.bytes_moved(numel, False, True, kind != torch.float32), 0
        shape = f"{label}, {numel / 1e6:.1f} M in {len(shapes)}"
        yield Case("adam_ema", shape, dtype, inputs, providers, nbytes, differentiable=False)


def _scalars(device):
    step = torch.zeros((), dtype=torch.float64, device=device)
    return step, torch.ones((), dtype=torch.bool, device=device)


def _update(name, call, *lists):
    return with_backend("adam_ema", name, call(*lists))


def weight_norm_cases(dtypes, fill, device) -> Iterator[Case]:
    """Yield the normalisation of all weights of EDM2 networks, and its gradient."""
    kinds = "forward", "forced", "backward"
    for dtype, size, kernel in itertools.product(dtypes, ("m", "xs"), kinds):
        kind = DTYPES[dtype]
        config = EDM2Config.of_size(size)
        if device.type == "cpu":
            config = EDM2Config(resolution=8, model_channels=64, channel_mult=(1,), num_blocks=1)
        with torch.device("meta"):
            shapes = [p.shape for p in EDM2Network(config).parameters() if p.dim() > 1]

        def inputs(shapes=tuple(shapes), kind=kind, kernel=kernel):
            weights = [torch.randn(shape, device=device) for shape in shapes]
            others = torch.float32 if kernel == "backward" else kind
            return [weights, [torch.randn_like(w, dtype=others) for w in weights]]

        def call(weights, others, kernel=kernel):
            if kernel == "backward":
                return lambda: weight_norm.weight_norm_backward(weights, others)
            force = torch.ones((), dtype=torch.bool, device=device) if kernel == "forced" else None
            return lambda: weight_norm.weight_norm(weights, others, force)

        def provider(name, weights, others, call=call):
            return with_backend("weight_norm", name, call(weights, others))

        providers: dict[str, Callable] = {
            name: functools.partial(provider, name)
            for name in (*own_backends("weight_norm"), "eager")
        }
        numel = sum(shape.numel() for shape in shapes)
        shape = f"{kernel} EDM2 {size.upper()}, {numel / 1e6:.1f} M in {len(shapes)}"
        nbytes = weight_norm.bytes_moved(numel, kernel, kind.itemsize), 0
        yield Case("weight_norm", shape, dtype, inputs, providers, nbytes, differentiable=False)


CASES = {
    "attention": attention_cases,
    "group_norm": group_norm_cases,
    "adam_ema": adam_ema_cases,
    "augment": augment_cases,
    "sid_loss": sid_loss_cases,
    "random": random_cases,
    "dropout": dropout_cases,
    "weight_norm": weight_norm_cases,
    "mp": mp_cases,
}


def make_calls(case: Case, provider: str, device: torch.device) -> dict[str, Callable]:
    """Return, by mode, a function that makes the call to time."""
    function = case.providers[provider]
    if case.name in ("adam_ema", "weight_norm"):
        return {"forward": lambda: function(*case.inputs())}

    def laid_out():
        inputs = case.inputs()
        if provider != NCHW:
            return inputs
        return [v.detach().contiguous().requires_grad_(v.requires_grad) for v in inputs]

    def forward():
        inputs = laid_out()
        return lambda: function(*inputs)

    def backward():
        inputs = laid_out()
        outputs = function(*inputs)
        grads = [torch.randn_like(out) for out in outputs]
        return lambda: torch.autograd.grad(outputs, inputs, grads, retain_graph=True)

    return {"forward": forward} | ({"backward": backward} if case.differentiable else {})


def measure(case: Case, device: torch.device, rates: dict, baselines: set[str]) -> Iterator[dict]:
    """Yield the rows of a case: forward and backward of every provider, interleaved."""
    wanted = [p for p in case.providers if not baselines or p in {"triton", "cuda"} | baselines]
    rounds, repeats = (3, REPEATS // 3) if device.type == "cuda" else (1, 3)
    for i, mode in enumerate(("forward", "backward")[: 1 + case.differentiable]):
        timers, failed = {}, {}
        for provider in wanted:
            try:
                make = make_calls(case, provider, device)[mode]
                timers[provider] = timing.ColdCacheTimer(make, device)
            except Exception as error:  # libraries reject an unsupported shape in many ways
                failed[provider] = timing.failure_reason(error)
        ms: dict[str, list[float]] = {provider: [] for provider in timers}
        for _ in range(rounds):
            for provider, timer in timers.items():
                ms[provider] += timer.times(repeats)
        floor = max(
            case.nbytes[i] / (rates["copy"] * 1e12),
            case.flop[i] / (rates["fp32" if case.dtype == "fp32" else "bf16"] * 1e12),
        )
        for provider in wanted:
            row: dict[str, Any] = {
                "name": case.name, "shape": case.shape, "dtype": case.dtype,
                "provider": provider, "mode": mode,
            }  # fmt: skip
            if provider in failed:
                yield row | {"status": failed[provider]}
                continue
            row |= times(ms[provider])
            seconds = row["ms_p50"] / 1e3
            yield row | {
                "gb_s": case.nbytes[i] / seconds / 1e9,
                "tflop_s": case.flop[i] / seconds / 1e12,
                "floor_share": floor / seconds,
                "status": "ok",
            }


def compile_kernels(cases: list[Case], device: torch.device) -> None:
    """Run the Triton kernels of the cases once. Raises RunFailed, naming those that failed."""
    failed = []
    for case in cases:
        if "triton" not in case.providers:
            continue
        try:
            for make in make_calls(case, "triton", device).values():
                make()()
            timing.synchronize(device)
            if device.type == "cuda":  # other processes compile and check at the same time
                torch.cuda.empty_cache()
        except Exception as error:  # go on with the others
            reason = timing.failure_reason(error)
            failed.append(f"{case.name} {case.shape} {case.dtype}: {reason}")
    if failed:
        raise RunFailed("; ".join(failed))


def cases(options: Options, device: torch.device) -> list[Case]:
    """Return the cases, kernels alternating, largest first; the smallest ones on a CPU."""
    choices: list[tuple[str, str, Iterable[str]]] = [
        ("kernel", options.kernel, CASES),
        *(("dtype", value, DTYPES) for value in options.dtype.split(",")),
        ("batch", options.batch, ("micro", "fill")),
    ]
    for name, value, known in choices:
        if value not in known and (value or name != "kernel"):
            raise UserError(f"{name}={value!r} is unknown: choose from {', '.join(known)}")
    makers = [CASES[options.kernel]] if options.kernel else CASES.values()
    by_kernel = [
        sorted(make(options.dtype.split(","), options.batch == "fill", device), key=_cost)
        for make in makers
    ]
    if device.type == "cpu":  # the interpreter would take minutes for the others
        by_kernel = [some[-CPU_CASES:] for some in by_kernel]
    alternating = itertools.zip_longest(*by_kernel)
    found = [case for some in alternating for case in some if case is not None]
    return found[options.part :: options.parts]


def _cost(case: Case) -> float:
    return -max(sum(case.nbytes) / 4e12, sum(case.flop) / 8e14)


def run(options: Options, given: set[str]) -> None:
    """Run the command."""
    check(options)
    device = process_group.pick_device(options.device)
    end = time.monotonic() + options.seconds
    baselines = {name.strip() for name in options.baselines.split(",") if name.strip()}
    chosen = cases(options, device)
    if options.compile_only:
        compile_kernels(chosen, device)
        return
    rates = timing.peak_rates(device)
    path = options.out or RESULTS / "kernels.jsonl"
    results = Results(path, "kernels", **timing.rate_columns(rates))
    print(results.columns["device"], *(f"{name} {rate:.3g}" for name, rate in rates.items()))
    print(f"{'':60} {'provider':14} {'mode':8} {'ms':>9} {'GB/s':>7} {'TFLOP/s':>8} {'floor':>6}")
    for done, case in enumerate(chosen):
        if time.monotonic() > end:
            print(f"out of time after {done} of {len(chosen)} shapes")
            break
        for row in measure(case, device, rates, baselines):
            results.add(row)
            print(line(row), flush=True)
    print(f"results: {results.path}")


def line(row: dict) -> str:
    """Format a row for the terminal."""
    case = f"{row['name']} {row['shape']} {row['dtype']}"
    head = f"{case:60} {row['provider']:14} {row['mode']:8}"
    if row["status"] != "ok":
        return f"{head} {row['status']}"
    return (
        f"{head} {row['ms_p50']:9.4f} {row['gb_s']:7.0f} {row['tflop_s']:8.1f} "
        f"{row['floor_share']:6.1%}"
    )


main = cli.command(Options, run, None, __doc__)

if __name__ == "__main__":
    cli.main(main, "benchmarks.kernels")
