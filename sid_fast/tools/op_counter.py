"""What a step costs, counted without running it: FLOP, bytes through memory, and peak memory.

Everything runs on fake tensors, which have shapes and types but no values: the networks of 300 M
parameters take seconds, on any machine. Whatever would make a step depend on its numbers (a value
read by the host, a mask, a size taken from data) raises here, as it would break a CUDA graph.
"""

import contextlib
import dataclasses
import math
import warnings
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, register_flop_formula
from torch.utils.module_tracker import ModuleTracker

from sid_fast import kernels
from sid_fast.models import EDMNetwork, NetworkConfig
from sid_fast.performance.mixed_precision import TYPES

Backends = str | Mapping[str, str]  # one for all operations, or by operation
ALLOCATION = 512  # bytes that torch's allocator rounds to


@register_flop_formula(torch.ops.sid_fast.attention)
def _attention_flop(qkv_shape, heads, *args, out_shape=None, **kwargs) -> int:
    """Queries times keys and weights times values, 2 FLOP a multiply-add."""
    n, c3, height, width = qkv_shape
    return 2 * 2 * n * (height * width) ** 2 * (c3 // 3)


@register_flop_formula(torch.ops.sid_fast.attention_backward)
def _attention_backward_flop(grad_shape, qkv_shape, *args, out_shape=None, **kwargs) -> int:
    """Twice the forward, as of any product; what the kernel recomputes is not counted."""
    return 2 * _attention_flop(qkv_shape, 0)


@register_flop_formula(torch.ops.aten.addmm_)
def _addmm_flop(self_shape, a_shape, b_shape, out_shape=None, **kwargs) -> int:
    """A product added onto what is there."""
    return 2 * a_shape[0] * a_shape[1] * b_shape[1]


@dataclasses.dataclass(frozen=True)
class Op:
    """One operation on the device, as if it ran alone: every input read once, every output written.

    flops: of convolutions and matrix products, 2 a multiply-add; nbytes: read and written; layer:
    the innermost module it ran in, where that was asked for; shape: of its first output; launches:
    see _launches.
    """

    name: str
    kind: str
    layer: str
    flops: int
    nbytes: int
    shape: tuple[int, ...]
    launches: int = 1


KINDS = {
    "convolution": "convolution",
    "convolution_backward": "convolution",
    "mm": "linear",
    "addmm": "linear",
    "addmm_": "linear",
    "bmm": "attention",
    "baddbmm": "attention",
    "_softmax": "attention",
    "_softmax_backward_data": "attention",
    "attention": "attention",
    "_scaled_dot_product_flash_attention_for_cpu": "attention",
    "_scaled_dot_product_flash_attention_for_cpu_backward": "attention",
    "attention_backward": "attention",
    "native_group_norm": "group norm",
    "native_group_norm_backward": "group norm",
    "group_norm": "group norm",
    "group_norm_backward": "group norm",
    "adam_ema": "update",
}


# Operations whose first argument is written without being read.
OVERWRITES = ("copy_", "zero_", "fill_", "_foreach_zero_", "_foreach_copy_")
MAKES_NOTHING = ("empty", "empty_like", "empty_strided", "new_empty", "_local_scalar_dense")


def _size(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's own numbers; what is broadcast is there once."""
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(size for size, stride in strides if stride) * tensor.element_size()


def _tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


# A list operation on CUDA takes so many tensors a launch, by how many lists it walks, and so many
# chunks of them (aten/src/ATen/native/cuda/MultiTensorApply.cuh).
LIST_TENSORS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
LIST_BLOCKS, LIST_CHUNK = 320, 65536


def _launches(name: str, args: tuple, made: list[torch.Tensor]) -> int:
    """The kernels that an operation starts on a GPU.

    One, with three exceptions. The group norm's backward kernel is followed by a sum over samples
    for x_bias and one for weight and bias, where those are wanted; attention's backward is two
    kernels. A `_foreach` operation walks its lists in chunks of LIST_CHUNK numbers, LIST_TENSORS
    tensors and LIST_BLOCKS chunks a launch; where types or layouts differ inside a list (or, other
    than for copies, between lists) it falls back on one launch a tensor.
    """
    if name == "group_norm_backward":
        wanted = args[-1]
        return 1 + wanted[0] + wanted[1]
    if name == "attention_backward":
        return 2
    if not name.startswith("_foreach_"):
        return 1
    lists = [value for value in args if isinstance(value, list | tuple)]
    lists += [made] if made else []
    types = [{t.dtype for t in tensors} for tensors in lists]
    alike = max(map(len, types)) == 1 and (name == "_foreach_copy_" or len(set.union(*types)) == 1)
    if not alike or any(len(set(map(_layout, row))) > 1 for row in zip(*lists, strict=True)):
        return len(lists[0])
    launches = tensors = blocks = 0
    for tensor in lists[0]:
        tensors += 1
        for _ in range(0, tensor.numel(), LIST_CHUNK):
            if blocks == LIST_BLOCKS:
                launches, tensors, blocks = launches + 1, 1, 0
            blocks += 1
        if tensors == LIST_TENSORS[len(lists)]:
            launches, tensors, blocks = launches + 1, 0, 0
    return launches + (blocks > 0)


def _layout(tensor: torch.Tensor) -> tuple:
    """Sizes, and strides wherever they matter."""
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    return tuple((size, stride if size > 1 else 0) for size, stride in strides)


class Count(TorchDispatchMode):
    """Counts the operations in the block, and the memory of the tensors that are alive.

    layers: note in which module each operation runs.

    ops are the operations; live and peak are bytes by kind of tensor, now and when their sum was
    largest. A tensor made in the block is "activations" once autograd has saved it, "copies" if
    it is a weight in another type, else "workspace"; `call` gives it another kind.
    """

    def __init__(self, layers: bool = False):
        super().__init__()
        self.ops: list[Op] = []
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._modules = ModuleTracker() if layers else None
        self._held: dict[int, tuple[weakref.ref, str]] = {}  # storages by address
        self._within = contextlib.ExitStack()

    def __enter__(self):
        if self._modules:
            self._within.enter_context(self._modules)
        hooks = torch.autograd.graph.saved_tensors_hooks(self._saved, lambda tensor: tensor)
        self._within.enter_context(hooks)
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._within.close()

    def call(self, kind: str, *tensors: torch.Tensor) -> None:
        """From here on these tensors are of this kind."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            address, nbytes = storage._cdata, -(-storage.nbytes() // ALLOCATION) * ALLOCATION
            if address in self._held:
                self.live[self._held[address][1]] -= nbytes

            def free(_, address=address, nbytes=nbytes):
                self.live[self._held.pop(address)[1]] -= nbytes

            self._held[address] = weakref.ref(storage, free), kind
            self.live[kind] += nbytes
        if self.live.total() > self.peak.total():
            self.peak = Counter(self.live)

    def _kind(self, tensor: torch.Tensor) -> str | None:
        held = self._held.get(tensor.untyped_storage()._cdata)
        return held and held[1]

    def _saved(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._kind(tensor) == "workspace":
            self.call("activations", tensor)
        return tensor

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        inputs, outputs = _tensors((args, kwargs)), _tensors(out)
        known = {t.untyped_storage()._cdata for t in inputs}
        made = [t for t in outputs if t.untyped_storage()._cdata not in known]
        name = func._overloadpacket.__name__
        weight = name == "_to_copy" and self._kind(inputs[0]) not in TRANSIENT
        for tensor in made:
            self.call("copies" if weight else "workspace", tensor)
        if (made or func._schema.is_mutable) and name not in MAKES_NOTHING:
            self._note(name, func, args, kwargs, out, inputs, made)
        return out

    def _note(self, name, func, args, kwargs, out, inputs, made) -> None:
        written = [
            tensor
            for argument, value in zip(func._schema.arguments, args, strict=False)
            if argument.is_write and argument.name != "grads"  # written where not finite
            for tensor in _tensors(value)
        ]
        read = inputs[len(written) :] if name in OVERWRITES else inputs
        kind = KINDS.get(name, "pointwise")
        if kind == "convolution" and args[8 if name == "convolution" else 9] > 1:
            kind = "resampling"  # depthwise
        flop = flop_registry.get(func._overloadpacket)
        self.ops.append(
            Op(
                name,
                kind,
                max(self._modules.parents, key=len) if self._modules else "",
                int(flop(*args, **kwargs, out_val=out)) if flop else 0,
                sum(map(_size, read)) + sum(map(_size, written)) + sum(map(_size, made)),
                tuple(made[0].shape) if made else (),
                _launches(name, args, made),
            )
        )


TRANSIENT = (None, "workspace", "activations")


class _Fake(FakeTensorMode):
    def __deepcopy__(self, memo):
        return self  # tensors copied with their module stay in one mode


@contextlib.contextmanager
def fake(backends: Backends = "triton") -> Iterator[None]:
    """Tensors made in the block have no values.

    Args:
        backends: the backend to count, or one per operation; "default" for a GPU's defaults.
            Random numbers are always counted as the Triton kernel draws them.
    """
    if backends == "default":
        backends = kernels.dispatch.DEFAULTS["cuda"]
    if isinstance(backends, Mapping):
        backends = dict.fromkeys(kernels.dispatch.OPERATIONS, "eager") | dict(backends)
    forced = kernels.dispatch.forced
    with warnings.catch_warnings(), _Fake(), forced(backends), forced({"random": "triton"}):
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        yield


def forward(
    config: NetworkConfig,
    precision: str = "bf16",
    backends: Backends = "triton",
    images: int = 1,
) -> list[Op]:
    """The operations of a forward of so many images, with the layers they are in."""
    with fake(backends), torch.no_grad():
        net = EDMNetwork(config).eval().requires_grad_(False)
        net.compute_in(TYPES[precision])
        x = torch.empty(images, config.channels, config.resolution, config.resolution)
        labels = torch.empty(images, config.label_dim) if config.label_dim else None
        with Count(layers=True) as count:
            net(x, torch.ones(images), labels)
    return count.ops
