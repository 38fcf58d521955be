"""Decode the PNGs of a data set into tensors, with DALI if installed, else with PIL."""

import contextlib
import os
import sys
from collections.abc import Generator, Iterator, Sequence

import numpy as np
import torch

from sid_fast.data.datasets import ImageDataset
from sid_fast.errors import UserError

BATCH = 1024  # images; keeps DALI's threads busy
THREADS = 8  # for decoding
READERS = ("auto", "dali", "plain")


def choose(reader: str = "auto") -> str:
    """Resolve --reader to "dali" or "plain"; auto is DALI if installed, else prints a hint."""
    if reader not in READERS:
        raise UserError(f"reader={reader!r} is unknown: choose from {', '.join(READERS)}")
    if reader == "plain":
        return reader
    try:
        import nvidia.dali  # noqa: F401
    except ImportError as error:
        how = "pip install nvidia-dali-cuda130 (or -cuda120)"
        if reader == "dali":
            raise UserError(f"reader=dali: DALI is not installed ({error}): {how}") from None
        print(f"reading PNGs without DALI, several times slower: {how}", file=sys.stderr)
        return "plain"
    return "dali"


def read(
    data: ImageDataset,
    indices: Sequence[int],
    device: torch.device,
    reader: str = "plain",
    batch: int = BATCH,
) -> Iterator[torch.Tensor]:
    """Yield the images at `indices`, in order, as uint8 [≤ batch, C, R, R] on the device.

    Both readers give the same bits.

    Args:
        data: the data set.
        indices: of the images.
        device: of the tensors.
        reader: "dali" or "plain", as choose() returns it.
        batch: images per batch with DALI; the plain reader uses 64.

    Raises:
        UserError: an image is damaged or differs in shape; the message names it.
    """
    batches = _dali(data, indices, device, batch) if reader == "dali" else _plain(data, indices)
    for images in batches:
        yield images.to(device)


def _plain(data: ImageDataset, indices: Sequence[int]) -> Iterator[torch.Tensor]:
    size = 64  # small, so that the progress bar moves
    for i in range(0, len(indices), size):
        yield torch.from_numpy(np.stack([data[k] for k in indices[i : i + size]]))


def _dali(
    data: ImageDataset, indices: Sequence[int], device: torch.device, batch: int
) -> Generator[torch.Tensor, None, None]:
    """Decode with DALI, on a GPU with its decoder there; tensors share DALI's memory."""
    from nvidia.dali import fn, pipeline_def, types

    gpu = device.type == "cuda"

    def files() -> Iterator[list[np.ndarray]]:
        for i in range(0, len(indices), batch):
            yield [data.encoded(k) for k in indices[i : i + batch]]

    @pipeline_def(
        batch_size=batch,
        num_threads=min(THREADS, os.cpu_count() or 1),
        device_id=device.index if gpu else None,
        exec_dynamic=True,  # outputs stay valid while referenced, so torch may keep them
    )
    def pipeline():
        png = fn.external_source(source=files(), dtype=types.UINT8, ndim=1, no_copy=True)
        return fn.decoders.image(
            png,
            device="mixed" if gpu else "cpu",
            output_type=types.GRAY if data.channels == 1 else types.RGB,
        )

    pipe, done = pipeline(), 0
    pipe.build()
    while done < len(indices):
        try:
            (images,) = pipe.run()
        except RuntimeError as error:
            raise _culprit(data, indices[done:], device, batch) from error
        done += len(images)
        yield torch.from_dlpack(images.as_tensor()).permute(0, 3, 1, 2)


def _culprit(
    data: ImageDataset, indices: Sequence[int], device: torch.device, batch: int
) -> UserError:
    """The error for the first image that does not decode: DALI names only the batch."""
    if batch == 1:
        return data.damaged(indices[0], "it does not decode")
    with contextlib.closing(_dali(data, indices, device, 1)) as single:
        try:
            for _ in single:
                pass
        except UserError as error:
            return error
    return UserError(f"{data.path} cannot be decoded by DALI: try --reader plain")
