"""Read the samples of a data set into tensors; PNGs with DALI if installed, else with PIL."""

import collections
import contextlib
import os
from collections.abc import Generator, Iterable, Iterator, Sequence

import numpy as np
import torch

from sid_fast.data.datasets import Dataset, ImageDataset
from sid_fast.errors import UserError
from sid_fast.io import streams

BATCH = 1024  # images; DALI's threads want many at a time
PLAIN_BATCH = 64  # small, so that a progress bar moves
THREADS = 8  # that decode
READERS = ("auto", "dali", "plain")
INSTALL_DALI = "pip install nvidia-dali-cuda130 (or -cuda120)"
FEW = 10_000  # images that PIL decodes in about the time DALI takes to start


def choose(reader: str = "auto", images: int | None = None) -> str:
    """Resolve --reader to "dali" or "plain".

    auto: DALI if it is installed and there are many images; rank 0 prints a hint if it is not.

    Args:
        reader: One of READERS.
        images: How many images will be read; None: many.

    Raises:
        UserError: The reader is unknown, or DALI is not installed.
    """
    check_reader(reader)
    if reader == "plain" or (reader == "auto" and images is not None and images <= FEW):
        return "plain"
    if _missing_dali() is None:
        return "dali"
    if os.environ.get("RANK", "0") == "0":
        streams.note(f"note: reading PNGs without DALI, several times slower: {INSTALL_DALI}")
    return "plain"


def check_reader(reader: str) -> str:
    """Return the reader; UserError if it is unknown, or DALI and not installed."""
    if reader not in READERS:
        raise UserError(f"reader={reader!r} is unknown: choose from {', '.join(READERS)}")
    if reader == "dali" and (error := _missing_dali()):
        raise UserError(f"reader=dali: DALI is not installed ({error}): {INSTALL_DALI}")
    return reader


def _missing_dali() -> ImportError | None:
    try:
        import nvidia.dali  # noqa: F401
    except ImportError as error:
        return error
    return None


def read(
    data: Dataset,
    indices: Sequence[int],
    device: torch.device,
    reader: str = "plain",
    batch: int = BATCH,
) -> Iterator[torch.Tensor]:
    """Yield the samples at `indices`, in order, [≤ batch, C, R, R] on the device.

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
    size = batch if reader == "dali" else PLAIN_BATCH
    batches = (indices[i : i + size] for i in range(0, len(indices), size))
    for images in read_batches(data, batches, device, reader, size):
        yield images.to(device)


def read_batches(
    data: Dataset,
    batches: Iterable[Sequence[int]],
    device: torch.device,
    reader: str,
    size: int,
) -> Generator[torch.Tensor, None, None]:
    """Yield one tensor per batch of at most `size` indices, [len, C, R, R].

    `batches` may be infinite. DALI decodes on the device, the plain reader on the host. Raises
    UserError as `read` does.
    """
    if reader == "dali":
        assert isinstance(data, ImageDataset)
        return _dali(data, batches, device, size)
    return _plain(data, batches)


def _plain(data: Dataset, batches: Iterable[Sequence[int]]) -> Generator[torch.Tensor, None, None]:
    for batch in batches:
        yield torch.from_numpy(np.stack([data[k] for k in batch]))


def _dali(
    data: ImageDataset, batches: Iterable[Sequence[int]], device: torch.device, size: int
) -> Generator[torch.Tensor, None, None]:
    """Decode with DALI, on a GPU with its decoder there; tensors share DALI's memory."""
    from nvidia.dali import fn, pipeline_def, types

    gpu = device.type == "cuda"
    pending: collections.deque[Sequence[int]] = collections.deque()  # DALI reads ahead

    def files() -> Iterator[list[np.ndarray]]:
        for batch in batches:
            pending.append(batch)
            yield [data.encoded(k) for k in batch]

    @pipeline_def(
        batch_size=size,
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

    pipe = pipeline()
    pipe.build()
    while True:
        try:
            (images,) = pipe.run()
        except StopIteration:
            return
        except RuntimeError as error:
            unread = [k for batch in pending for k in batch]
            raise _culprit(data, unread, device, size) from error
        pending.popleft()
        yield torch.from_dlpack(images.as_tensor()).permute(0, 3, 1, 2)


def _culprit(
    data: ImageDataset, unread: Sequence[int], device: torch.device, size: int
) -> UserError:
    """The error for the first image that does not decode; DALI names a batch only."""
    if size == 1:
        return data.damaged(unread[0], "it does not decode")
    with contextlib.closing(_dali(data, [[k] for k in unread], device, 1)) as single:
        try:
            for _ in single:
                pass
        except UserError as error:
            return error
    return UserError(f"{data.path} cannot be decoded by DALI: try --reader plain")
