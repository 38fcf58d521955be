"""What the kernels over lists of tensors share: the keys of their pointer tables."""

import dataclasses
from operator import attrgetter

import torch


@dataclasses.dataclass(frozen=True)
class Layout:
    """Everything a pointer table depends on, as the cache key: equal layouts have equal tables.

    Compares memory, not tensor objects: an object may get new storage, two objects may share
    storage, and a new object may reuse the id of a freed one. The hash covers only the addresses,
    because hashing 2,000 shapes and strides would take longer than everything else.
    """

    addresses: tuple[int, ...]
    shapes: tuple[torch.Size, ...]
    strides: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    lengths: tuple[int, ...]  # of the lists
    absent: tuple[int, ...]  # indices of None in the last list
    device: torch.device

    def __hash__(self) -> int:
        return hash(self.addresses)


def layout(*lists: list[torch.Tensor | None]) -> Layout:
    """Return the layout of lists of tensors; only the last may contain None."""
    tensors = [t for tensors in lists for t in tensors if t is not None]
    return Layout(
        tuple(map(torch.Tensor.data_ptr, tensors)),
        tuple(map(attrgetter("shape"), tensors)),
        tuple(map(torch.Tensor.stride, tensors)),
        tuple(map(attrgetter("dtype"), tensors)),
        tuple(map(len, lists)),
        tuple(i for i, t in enumerate(lists[-1]) if t is None),
        tensors[0].device,
    )


def memory_order(t: torch.Tensor, operation: str) -> list[tuple[int, int]]:
    """Return the sizes and strides that define the memory order.

    Raises:
        ValueError: if t has gaps; the message names the operation.
    """
    order = [(size, stride) for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1]
    if 1 + sum((size - 1) * stride for size, stride in order) != t.numel():
        raise ValueError(
            f"{operation}: a tensor {tuple(t.shape)} with strides {t.stride()} has gaps"
        )
    return order
