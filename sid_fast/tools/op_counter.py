"""Count the FLOP, memory traffic and peak memory of operations without running them.

Everything runs on fake tensors, which have shapes and dtypes but no values, so networks of 300 M
parameters take seconds on any machine. An operation that depends on values (a host-device sync, a
boolean mask, a size computed from data) raises here; it would also break a CUDA graph.
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
from sid_fast.kernels.mp.scale import parts_of
from sid_fast.models import NetworkConfig
from sid_fast.models.families import build_network
from sid_fast.performance.mixed_precision import TYPES

Backends = str | Mapping[str, str]  # for all operations, or by operation
ALLOCATION = 512  # bytes; torch's CUDA allocator rounds sizes up to a multiple


@register_flop_formula(torch.ops.sid_fast.attention)
def _attention_flop(qkv_shape, heads, *args, out_shape=None, **kwargs) -> int:
    """Two matrix products, QKᵀ and weights times V, 2 FLOP per multiply-add."""
    n, c3, height, width = qkv_shape
    return 2 * 2 * n * (height * width) ** 2 * (c3 // 3)


@register_flop_formula(torch.ops.sid_fast.attention_backward)
def _attention_backward_flop(grad_shape, qkv_shape, *args, out_shape=None, **kwargs) -> int:
    """Twice the forward, as for any product; the kernel's recomputation is not counted."""
    return 2 * _attention_flop(qkv_shape, 0)


@register_flop_formula(torch.ops.aten.addmm_)
def _addmm_flop(self_shape, a_shape, b_shape, out_shape=None, **kwargs) -> int:
    """In-place accumulation of a matrix product."""
    return 2 * a_shape[0] * a_shape[1] * b_shape[1]


@dataclasses.dataclass(frozen=True)
class Op:
    """One operation on the device, assumed to read every input and write every output once.

    Attributes:
        name: of the torch operation.
        kind: convolution, linear, attention, group norm, update, resampling or pointwise.
        layer: the innermost module that it ran in; "" unless Count notes layers.
        flops: of convolutions and matrix products, 2 per multiply-add; else 0.
        nbytes: read and written.
        shape: of the first output.
        launches: kernels that it starts; see _launches.
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
    "weight_norm": "update",
    "weight_norm_backward": "update",
}


# Operations whose first argument is written without being read.
OVERWRITES = ("copy_", "zero_", "fill_", "_foreach_zero_", "_foreach_copy_")
IGNORED = (  # they start no kernel
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "_local_scalar_dense",
)


def _size(tensor: torch.Tensor) -> int:
    """Bytes of a tensor; broadcast dimensions count once."""
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(size for size, stride in strides if stride) * tensor.element_size()


def _tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


# A launch of a CUDA list operation takes at most LIST_TENSORS[number of lists] tensors and
# LIST_BLOCKS chunks of LIST_CHUNK elements (aten/src/ATen/native/cuda/MultiTensorApply.cuh).
LIST_TENSORS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
LIST_BLOCKS, LIST_CHUNK = 320, 65536


def _launches(name: str, args: tuple, made: list[torch.Tensor]) -> int:
    """Number of kernels that an operation starts on a GPU.

    One, with exceptions. The group norm's backward adds a sum over samples for x_bias and one for
    weight and bias, if their gradients are needed. That of scaled_silu adds a sum and a cast where
    several programs share an image. Attention's backward is two kernels. A `_foreach` operation
    starts one launch per full set of LIST_TENSORS tensors or LIST_BLOCKS chunks; if dtypes or
    layouts differ within a list (or between lists, except for copies), it falls back to one launch
    per tensor.
    """
    if name == "group_norm_backward":
        needed = args[-1]
        return 1 + needed[0] + needed[1]
    if name == "attention_backward":
        return 2
    if name == "scaled_silu_backward":
        y, needed = args[1], args[-1]
        return 3 if needed and parts_of(y) > 1 else 1
    if not name.startswith("_foreach_"):
        return 1
    lists = [value for value in args if isinstance(value, list | tuple)]
    lists += [made] if made else []
    dtypes = [{t.dtype for t in tensors} for tensors in lists]
    uniform = max(map(len, dtypes)) == 1 and (
        name == "_foreach_copy_" or len(set.union(*dtypes)) == 1
    )
    if not uniform or any(len(set(map(_layout, row))) > 1 for row in zip(*lists, strict=True)):
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
    """Sizes and strides, with strides of size-1 dimensions set to 0."""
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    return tuple((size, stride if size > 1 else 0) for size, stride in strides)


class Count(TorchDispatchMode):
    """Context that records operations and tracks the memory of live tensors.

    A tensor made in the context is of kind "activations" once autograd has saved it, "copies" if
    it is a weight cast to another dtype, else "workspace"; set_kind() changes that.

    Args:
        layers: note the module that each operation runs in.

    Attributes:
        ops: the operations, in order.
        live: bytes by kind of tensor, now.
        peak: bytes by kind of tensor when their sum was largest.
    """

    def __init__(self, layers: bool = False):
        super().__init__()
        self.ops: list[Op] = []
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._modules = ModuleTracker() if layers else None
        self._held: dict[int, tuple[weakref.ref, str]] = {}  # storages by address
        self._contexts = contextlib.ExitStack()

    def __enter__(self):
        if self._modules:
            self._contexts.enter_context(self._modules)
        hooks = torch.autograd.graph.saved_tensors_hooks(self._saved, lambda tensor: tensor)
        self._contexts.enter_context(hooks)
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._contexts.close()

    def set_kind(self, kind: str, *tensors: torch.Tensor) -> None:
        """Count these tensors as of this kind from here on."""
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
            self.set_kind("activations", tensor)
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
            self.set_kind("copies" if weight else "workspace", tensor)
        if (made or func._schema.is_mutable) and name not in IGNORED:
            self._note(name, func, args, kwargs, out, inputs, made)
        return out

    def _note(self, name, func, args, kwargs, out, inputs, made) -> None:
        written = [
            tensor
            for argument, value in zip(func._schema.arguments, args, strict=False)
            if argument.is_write and argument.name != "grads"  # written only where not finite
            for tensor in _tensors(value)
        ]
        read = inputs[len(written) :] if name in OVERWRITES else inputs
        if name == "mp_sum_backward":  # the result, its third argument, is read where it is clipped
            read = [tensor for tensor in inputs if tensor is not args[2]]
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
        return self  # tensors copied with their module keep the same mode


@contextlib.contextmanager
def fake(backends: Backends = "triton") -> Iterator[None]:
    """Make all tensors in the block fake, and count the kernels of `backends`.

    Args:
        backends: one backend, or a mapping from operations to backends, eager for those not in
            it. Random numbers are always counted as the Triton kernel draws them.
    """
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
    """Count the operations of one forward pass, with their layers.

    Args:
        config: of the network, which gets random weights and eval mode.
        precision: fp32, tf32, bf16 or fp16.
        backends: see fake.
        images: batch size.
    """
    with fake(backends), torch.no_grad():
        net = build_network(config).eval().requires_grad_(False)
        net.compute_in(TYPES[precision])
        x = torch.empty(images, config.channels, config.resolution, config.resolution)
        labels = torch.empty(images, config.label_dim) if config.label_dim else None
        with Count(layers=True) as count:
            net(x, torch.ones(images), labels)
    return count.ops
