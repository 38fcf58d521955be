"""Count each block's passes over feature maps, with the eager and the Triton backend.

    python -m benchmarks.analysis.passes > benchmarks/PASSES.md
    python -m benchmarks.analysis.passes --launches > benchmarks/LAUNCHES.md

A pass is an operation, convolutions included, that reads or writes a feature map; its bytes are
those of the feature maps. Runs on fake tensors, in seconds. --launches counts the kernel launches
of a micro-batch by kind.
"""

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterator

import click
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sid_fast import cli
from sid_fast.config.types import Precision
from sid_fast.kernels import dispatch
from sid_fast.models import EDM2Config, EDMNetwork, NetworkConfig
from sid_fast.models.edm_unet.fused import DeferredResidual
from sid_fast.models.edm_unet.unet import Block
from sid_fast.models.families import build_network
from sid_fast.models.teachers import TEACHERS
from sid_fast.tools import estimator, op_counter
from sid_fast.tools.op_counter import Backends
from sid_fast.train import TrainConfig

BATCH = 61  # a prime that divides no weight's size, which tells activations from weights

# Operations that move no data.
FREE = {
    "alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand", "new_empty",
    "new_empty_strided", "permute", "select", "slice", "split", "split_with_sizes", "t",
    "transpose", "unsqueeze", "view", "_unsafe_view", "_reshape_alias",
}  # fmt: skip
# Compute; every other ATen operation on a feature map is an idle pass: copy, cast, pointwise.
WORK = {
    "convolution", "convolution_backward", "mm", "addmm", "addmm_", "bmm", "_softmax",
    "_softmax_backward_data", "native_group_norm", "native_group_norm_backward",
}  # fmt: skip


@dataclasses.dataclass
class Pass:
    """One operation on a feature map."""

    name: str  # "aten::convolution"
    bytes: int
    backward: bool

    @property
    def idle(self) -> bool:
        """Whether it is neither convolution, matrix product, attention nor group norm."""
        library, _, name = self.name.partition("::")
        return library == "aten" and name not in WORK


class Passes(TorchDispatchMode):
    """Records every operation on a tensor of BATCH samples with more than `image` elements each.

    Per-sample vectors, such as embeddings, are not feature maps.
    """

    def __init__(self, image: int):
        super().__init__()
        self.image, self.backward = image, False
        self.passes: list[Pass] = []

    def is_feature_map(self, t: object) -> bool:
        """Whether the operand is a feature map."""
        if not isinstance(t, torch.Tensor):
            return False
        vectors = t.dim() == 2 and BATCH in t.shape
        return t.numel() % BATCH == 0 and t.numel() > self.image * BATCH and not vectors

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Run an operation and record it."""
        out = function(*args, **(kwargs or {}))
        name = function.name().partition(".")[0]
        inputs = [t for t in tree_leaves((args, kwargs)) if self.is_feature_map(t)]
        outputs = [t for t in tree_leaves(out) if self.is_feature_map(t)]
        outputs = [t for t in outputs if not any(t is i for i in inputs)]
        library, _, short = name.partition("::")
        if (inputs or outputs) and library != "prim" and short not in FREE:
            moved = sum(t.numel() * t.element_size() for t in inputs + outputs)
            self.passes.append(Pass(name, moved, self.backward))
        return out


def of_network(config: NetworkConfig, backend: str, dtype: torch.dtype) -> list[Pass]:
    """Count the passes of a network, forward and backward to parameters and image."""
    with FakeTensorMode(), dispatch.forced(backend):
        net = build_network(config).train()
        net.compute_in(dtype)
        x = torch.empty(BATCH, config.channels, *[config.resolution] * 2, requires_grad=True)
        with Passes(x[0].numel()) as mode:
            out = net(x, torch.ones(BATCH))
            mode.backward = True
            out.sum().backward()
        return mode.passes


# One block of each type: description -> network and name of the block.
CIFAR10 = NetworkConfig("ddpmpp", resolution=32, augment_dim=9, dropout=0.13)
IMAGENET64 = NetworkConfig(
    "adm", resolution=64, label_dim=1000, model_channels=192, channel_mult=(1, 2, 3, 4),
    num_blocks=3, attention_resolutions=(32, 16, 8), dropout=0.1,
)  # fmt: skip
EDM2_XS, EDM2_M = EDM2Config.of_size("xs"), EDM2Config.of_size("m")
BLOCKS = {
    "DDPM++ encoder, same width": (CIFAR10, "enc.32x32_block1"),
    "DDPM++ encoder, wider (1x1 skip)": (CIFAR10, "enc.32x32_block0"),
    "DDPM++ encoder, attention": (CIFAR10, "enc.16x16_block1"),
    "DDPM++ down": (CIFAR10, "enc.16x16_down"),
    "DDPM++ up": (CIFAR10, "dec.32x32_up"),
    "DDPM++ decoder (cat, 1x1 skip)": (CIFAR10, "dec.32x32_block1"),
    "DDPM++ decoder, attention": (CIFAR10, "dec.16x16_block4"),
    "ADM encoder, attention": (IMAGENET64, "enc.32x32_block1"),
    "ADM down": (IMAGENET64, "enc.32x32_down"),
    "ADM up": (IMAGENET64, "dec.64x64_up"),
    "ADM decoder (cat, 1x1 skip), attention": (IMAGENET64, "dec.32x32_block1"),
    "EDM2 XS encoder, same width": (EDM2_XS, "enc.32x32_block1"),
    "EDM2 XS encoder, wider (1x1 skip)": (EDM2_XS, "enc.32x32_block0"),
    "EDM2 XS encoder, attention": (EDM2_XS, "enc.16x16_block1"),
    "EDM2 XS down": (EDM2_XS, "enc.32x32_down"),
    "EDM2 XS up": (EDM2_XS, "dec.32x32_up"),
    "EDM2 XS decoder (cat, 1x1 skip)": (EDM2_XS, "dec.32x32_block1"),
    "EDM2 XS decoder, attention": (EDM2_XS, "dec.16x16_block1"),
    "EDM2 M encoder, same width": (EDM2_M, "enc.32x32_block1"),
    "EDM2 M decoder (cat, 1x1 skip)": (EDM2_M, "dec.32x32_block1"),
}


def input_size(name: str, block: Block) -> int:
    """Return the height and width of a block's input."""
    side = int(name.split(".")[1].split("x")[0])
    return {"down": side * 2, "up": side // 2}.get(block.conv0.resample or "", side)


def of_block(config: NetworkConfig, name: str, backend: str, dtype: torch.dtype) -> list[Pass]:
    """Count the passes of one block in training, forward and backward.

    An encoder block's output has two consumers: the next block and the decoder's skip connection.
    """
    if isinstance(config, EDM2Config):
        return of_edm2_block(config, name, backend, dtype)
    fused = backend != "eager"
    with FakeTensorMode(), dispatch.forced(backend):
        net = EDMNetwork(config).train()
        block = net.model.get_submodule(name)
        assert isinstance(block, Block)
        side = input_size(name, block)
        encoder = name.startswith("enc.")

        def features(channels: int) -> torch.Tensor:
            x = torch.empty(BATCH, channels, side, side, dtype=dtype, requires_grad=True)
            return x.to(memory_format=torch.channels_last) if fused else x

        # A decoder block reads the concatenation of x and a skip tensor.
        right = 0
        if not encoder and "_block" in name:
            right = block.fan_in - block.conv0.weight.shape[0]
        x, residual = features(block.fan_in - right), features(block.fan_in - right)
        skip = features(right) if right else None
        bias = torch.empty(x.shape[1], requires_grad=True)
        embedding = torch.empty(BATCH, config.model_channels * 4, dtype=dtype)
        with Passes(config.channels * config.resolution**2) as mode:
            if fused:
                summed, h_for_skip = block(
                    DeferredResidual(x, residual, bias, block.skip_scale), embedding, skip
                )
                ends = [summed.x, summed.residual] + [h_for_skip] * encoder
            else:
                whole = x if skip is None else torch.cat([x, skip], dim=1)
                out = block(whole, embedding)
                ends = [out.view_as(out), out.view_as(out)] if encoder else [out]
            grads = [torch.empty_like(end) for end in ends]
            mode.backward = True
            wanted = [x, *([residual] if fused else []), *([] if skip is None else [skip])]
            torch.autograd.grad(ends, [*wanted, *block.parameters()], grads, allow_unused=True)
        return mode.passes


def of_edm2_block(config: EDM2Config, name: str, backend: str, dtype: torch.dtype) -> list[Pass]:
    """Count the passes of an EDM2 block as of_block does."""
    with FakeTensorMode(), dispatch.forced(backend):
        net = build_network(config).train()
        net.compute_in(dtype)
        block = net.backbone.get_submodule(name)
        side = int(name.split(".")[1].split("x")[0])
        side = {"down": side * 2, "up": side // 2}.get(block.resample or "", side)
        encoder, fan_out = name.startswith("enc."), block.conv_res1.weight.shape[0]
        right = block.fan_in - fan_out if not encoder and "_block" in name else 0

        def features(channels: int) -> torch.Tensor:
            x = torch.empty(BATCH, channels, side, side, dtype=dtype, requires_grad=True)
            return x.to(memory_format=torch.channels_last)

        x, skip = features(block.fan_in - right), features(right) if right else None
        embedding = torch.empty(BATCH, config.embedding_channels, dtype=dtype)
        with Passes(config.channels * config.resolution**2) as mode:
            ends = block(x, embedding, skip)[: 1 + encoder]
            grads = [torch.empty_like(end) for end in ends]
            mode.backward = True
            wanted = [x, *([] if skip is None else [skip]), *block.parameters()]
            torch.autograd.grad(ends, wanted, grads)
        return mode.passes


def row(passes: list[Pass]) -> str:
    """Format passes and MiB per image, forward and backward, as table cells."""
    cells = []
    for backward in (False, True):
        some = [p for p in passes if p.backward == backward]
        cells += [f"{len(some)} ({sum(p.idle for p in some)})"]
        cells += [f"{sum(p.bytes for p in some) / BATCH / 2**20:.2f}"]
    return " | ".join(cells)


def lines() -> Iterator[str]:
    """Yield the lines of PASSES.md."""
    yield "# Passes over feature maps, by block"
    yield ""
    yield (
        "Estimates, counted on fake tensors by `python -m benchmarks.analysis.passes`: operations "
        "that read or write a feature map and the MiB per image that they move, for a block in "
        "training. In brackets: those that are neither convolution, matrix product, attention nor "
        "group norm. The residual sum at the end of a block counts where it is computed; in "
        "sid_fast that is the next block's first norm. PyTorch's group norm counts as one pass, "
        "although it reads its input twice. The one such pass in ADM's backward sums partial "
        "gradients of qkv's bias."
    )
    yield ""
    yield "| block | backend | forward | MiB | backward | MiB |"
    yield "|---|---|---|---|---|---|"
    backends = {
        "eager, float32": ("eager", torch.float32),
        "eager, bfloat16": ("eager", torch.bfloat16),
        "triton, bfloat16": ("triton", torch.bfloat16),
    }
    for title, block in BLOCKS.items():
        for name, backend in backends.items():
            yield f"| {title} | {name} | {row(of_block(*block, *backend))} |"
    networks = {
        "CIFAR-10": CIFAR10, "ImageNet 64": IMAGENET64, "EDM2 XS": EDM2_XS, "EDM2 M": EDM2_M
    }  # fmt: skip
    for title, config in networks.items():
        for name, backend in backends.items():
            yield f"| whole network, {title} | {name} | {row(of_network(config, *backend))} |"


PRESETS = ("cifar10-uncond", "cifar10-uncond-sida", "ffhq64", "imagenet64-cond")


def of_micro_batch(
    preset: str, backends: Backends, precision: Precision = "bf16"
) -> estimator.Step:
    """Count both phases of a preset, one micro-batch of BATCH images each."""
    settings = TrainConfig(**cli.presets("train")[preset]).settings()
    settings = dataclasses.replace(settings, precision=precision)
    (step,) = estimator.steps(network_of(preset), settings, [BATCH], backends)
    return step


def network_of(preset: str) -> NetworkConfig:
    """Return the configuration of a preset's published teacher."""
    return TEACHERS[cli.presets("train")[preset]["teacher"]].network


def launches(step: estimator.Step, image: int) -> dict[str, tuple[int, int]]:
    """Count kernel launches of a step and the bytes they move, by kind.

    Pointwise operations and reductions count as "feature maps" if their result has more than
    `image` elements per sample, else as "small"; small ones are also listed by operation.
    """
    counts: dict[str, list[int]] = {}
    for op in step.ops:
        kind = op.kind
        if kind == "pointwise":
            large = op.shape[:1] == (BATCH,) and math.prod(op.shape) > image * BATCH
            kind = "pointwise, feature maps" if large else "pointwise, small"
        names = [kind] if kind != "pointwise, small" else [kind, f"- {op.name}"]
        for name in names:
            row = counts.setdefault(name, [0, 0])
            row[0] += op.launches
            row[1] += op.nbytes
    return {name: (count, nbytes) for name, (count, nbytes) in counts.items()}


def launch_lines() -> Iterator[str]:
    """Yield the lines of LAUNCHES.md."""
    yield "# Kernel launches of one micro-batch"
    yield ""
    yield (
        "Estimates, counted on fake tensors by `python -m benchmarks.analysis.passes --launches`: "
        f"fake-score and generator phase, one micro-batch of {BATCH} images each, in bfloat16. An "
        "operation counts as one launch, except: group norm backward also sums each parameter "
        "gradient over samples, attention backward is two kernels, and foreach operations are "
        "split as in MultiTensorApply.cuh. The eager update counts as one launch of "
        "about 80. "
        "`default` is what a GPU runs without --kernels."
    )
    yield ""
    yield "| preset | backend | kind | launches | MiB |"
    yield "|---|---|---|---|---|"
    for preset in PRESETS:
        network = network_of(preset)
        choices: dict[str, Backends] = {
            "triton": "triton", "default": dispatch.DEFAULTS["cuda"], "eager": "eager"
        }  # fmt: skip
        for backend, backends in choices.items():
            step = of_micro_batch(preset, backends)
            rows = launches(step, network.channels * network.resolution**2)
            kinds = Counter({k: v[0] for k, v in rows.items() if not k.startswith("- ")})
            total = sum(kinds.values()), sum(op.nbytes for op in step.ops)
            rows |= {"all": total}
            few = {k for k, v in rows.items() if k.startswith("- ") and v[0] < 20}
            rows["- others"] = sum(rows[k][0] for k in few), sum(rows[k][1] for k in few)
            for kind, (count, nbytes) in sorted(rows.items(), key=lambda kv: -kv[1][0]):
                if kind not in few:
                    yield f"| {preset} | {backend} | {kind} | {count:,} | {nbytes / 2**20:,.1f} |"
            peak = ", ".join(f"{k} {v / 2**20:,.0f}" for k, v in step.peak.items())
            yield f"| {preset} | {backend} | peak memory: {peak} | | {_mib(step)} |"


def network_ops(config: NetworkConfig, backends: Backends) -> dict[str, list[op_counter.Op]]:
    """Count forward, and backward to parameters and image, of BATCH images in bfloat16."""
    with op_counter.fake(backends):
        net = build_network(config).train()
        net.compute_in(torch.bfloat16)
        x = torch.empty(BATCH, config.channels, *[config.resolution] * 2, requires_grad=True)
        labels = torch.empty(BATCH, config.label_dim) if config.label_dim else None
        with op_counter.Count() as count:
            out = net(x, torch.ones(BATCH), labels)
            forward = len(count.ops)
            out.sum().backward()
    return {"forward": count.ops[:forward], "backward": count.ops[forward:]}


def network_lines() -> Iterator[str]:
    """Yield the table of forward and backward passes of EDM2 networks."""
    yield ""
    yield "## One pass of an EDM2 network"
    yield ""
    yield (
        f"{BATCH} images, bfloat16, in training; backward to the parameters and the image. "
        '"small" are operations on weights and embeddings.'
    )
    yield ""
    yield (
        "| network | backend | direction | launches | convolution, linear, attention "
        "| feature maps | small | GiB |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for title, config in {"EDM2 XS": EDM2_XS, "EDM2 M": EDM2_M}.items():
        for backend in ("triton", "eager"):
            for direction, ops in network_ops(config, backend).items():
                counts = Counter[str]()
                for op in ops:
                    large = op.shape[:1] == (BATCH,) and math.prod(op.shape[1:]) > 4096
                    kind = "maps" if large else "small"
                    counts[kind if op.kind in ("pointwise", "resampling") else "work"] += (
                        op.launches
                    )
                total, nbytes = counts.total(), sum(op.nbytes for op in ops)
                cells = (f"{counts[kind]:,}" for kind in ("work", "maps", "small"))
                yield (
                    f"| {title} | {backend} | {direction} | {total:,} | {' | '.join(cells)} "
                    f"| {nbytes / 2**30:,.1f} |"
                )


def _mib(step: estimator.Step) -> str:
    return f"{step.peak.total() / 2**20:,.0f}"


@click.command(help=__doc__)
@click.option("--launches", "count_launches", is_flag=True, help="Count kernel launches instead.")
def main(count_launches: bool) -> None:
    """Run the command."""
    both = itertools.chain(launch_lines(), network_lines())
    for line in both if count_launches else lines():
        print(line, flush=True)


if __name__ == "__main__":
    cli.main(main, "benchmarks.analysis.passes")
