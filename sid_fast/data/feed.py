"""Real images or latents for training steps: each once an epoch, in an order of seed and step.

Sample i of rank r in a step has the global count n = step·batch + r·batch/ranks + i. It is image
π(n mod N) of N, where π is the permutation of (seed, epoch ⌊n/N⌋). An epoch is therefore the same
on any number of ranks, a batch may straddle two epochs, and resuming is bit-exact.

A data set that fits stays on the device, images as uint8 and latents as they are stored, and the
step gathers its samples there. A larger one is read ahead in a thread (images by DALI, or PIL
without it) and copied to the device batch by batch, from pinned memory.
"""

import collections
import contextlib
import math
import os
import queue
import threading
import weakref
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sid_fast.data import latents
from sid_fast.data.datasets import Dataset, content_digest
from sid_fast.data.readers import choose, read, read_batches
from sid_fast.errors import UserError
from sid_fast.io import progress
from sid_fast.io.digest import digest

RESIDENT_SHARE = 1 / 8  # of the free memory, which networks and activations share
PREFETCH = 4  # batches decoded ahead


def fits(data: Dataset, device: torch.device) -> bool:
    """Return whether the samples take at most RESIDENT_SHARE of the device's free memory.

    On a CPU the whole RAM counts, or the container's limit (cgroup v2).
    """
    if device.type == "cuda":
        room = torch.cuda.mem_get_info(device)[0]
    else:
        room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        with contextlib.suppress(OSError, ValueError):  # no cgroup v2, or "max"
            room = min(room, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return stored_bytes(data) <= RESIDENT_SHARE * room


def stored_bytes(data: Dataset) -> int:
    """Return the bytes of all samples, as a resident data set holds them."""
    return len(data) * math.prod(data.sample_shape) * data.dtype.itemsize


class EpochOrder:
    """The images of a rank's samples, as a pure function of (seed, step, rank, world_size)."""

    def __init__(self, images: int, batch_size: int, seed: int, rank: int, world_size: int):
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.samples = batch_size // world_size
        self.first = rank * self.samples
        self._permutations: dict[int, np.ndarray] = {}  # of the epochs in a batch, at most two

    def __call__(self, step: int) -> np.ndarray:
        """Return the image indices of a step, int64 [batch_size / world_size]."""
        start = step * self.batch_size + self.first  # a Python int: no overflow
        epoch, position = divmod(start, self.images)
        left = self.images - position
        indices = self._permutation(epoch)[position : position + self.samples]
        if left < self.samples:
            indices = np.concatenate([indices, self._permutation(epoch + 1)[: self.samples - left]])
        return indices

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._permutations:
            kept = {e: p for e, p in self._permutations.items() if e == epoch - 1}
            # NumPy keeps raw streams the same across releases, but not permutation() (NEP 19).
            raw = np.random.PCG64([self.seed, epoch]).random_raw(self.images)
            self._permutations = kept | {epoch: raw.argsort()}
        return self._permutations[epoch]


class _Prefetch:
    """Batches of consecutive steps, decoded ahead in a thread.

    The thread holds no reference to this object, so garbage collection ends the thread too.
    """

    def __init__(
        self, data: Dataset, order: EpochOrder, step: int, reader: str, device: torch.device
    ):
        self.step = step  # of the next batch
        self._queue: queue.Queue[tuple[np.ndarray, torch.Tensor] | BaseException]
        self._queue = queue.Queue(PREFETCH)
        self._stopped = threading.Event()
        batches = _decoded(data, order, step, reader)
        arguments = batches, self._queue, self._stopped, device
        self._thread = threading.Thread(target=_fill, args=arguments, name="feed", daemon=True)
        self._thread.start()
        self.close = weakref.finalize(self, _stop, self._thread, self._queue, self._stopped)

    def ready(self) -> bool:
        return not self._queue.empty()

    def next(self) -> tuple[np.ndarray, torch.Tensor]:
        """Return indices and images of the next step, or raise the thread's error."""
        found = self._queue.get()
        if isinstance(found, BaseException):
            raise found
        self.step += 1
        return found


def _decoded(
    data: Dataset, order: EpochOrder, step: int, reader: str
) -> Generator[tuple[np.ndarray, torch.Tensor], None, None]:
    """Yield indices and images of every step from `step` on."""
    asked: collections.deque[np.ndarray] = collections.deque()  # readers look ahead

    def batches() -> Iterator[list[int]]:
        now = step
        while True:
            indices = order(now)
            asked.append(indices)
            yield indices.tolist()
            now += 1

    images = read_batches(data, batches(), torch.device("cpu"), reader, order.samples)
    with contextlib.closing(images):
        for some in images:
            yield asked.popleft(), some


def _fill(
    batches: Generator, full: queue.Queue, stopped: threading.Event, device: torch.device
) -> None:
    """Decode and pin batches in the thread, until it is stopped or a batch fails."""
    with contextlib.closing(batches):
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)  # otherwise pinning opens a context on GPU 0
            for indices, images in batches:
                if device.type == "cuda":
                    pinned = torch.empty(images.shape, dtype=images.dtype, pin_memory=True)
                    images = pinned.copy_(images)
                full.put((indices, images))
                if stopped.is_set():
                    return
        except BaseException as error:
            full.put(error)


def _stop(thread: threading.Thread, full: queue.Queue, stopped: threading.Event) -> None:
    """End the thread. It puts at most one more batch, and the emptied queue has room for it."""
    stopped.set()
    with contextlib.suppress(queue.Empty):
        while True:
            full.get_nowait()
    if thread is not threading.current_thread():  # which may run the garbage collection
        thread.join()


class ImageFeed:
    """One rank's real images, step by step.

    load(step) stages a step's samples before the step, outside CUDA graphs. take() returns them
    inside the step; it reads only tensors that keep their addresses, so it can be captured.

    Args:
        dataset: The data set. A resident one is decoded here.
        batch_size: Images per step over all ranks, a multiple of world_size.
        seed: Sets the order; at least 0.
        device: Device of the images that take() returns.
        rank: This rank.
        world_size: Number of ranks that share each batch.
        resident: Whether the data set stays on the device. None: if it fits (see fits()).
        reader: As in readers.choose, except that auto is PIL for a small resident data set.

    Attributes:
        resident: Whether the data set stays on the device.
        normalization: Of latents; None for images.
        has_deviation: Whether latents are drawn from a mean and a deviation.
        text: How images are read, for people.
        waits: Number of steps for which the device was idle until their images were decoded. The
            first step after a start or a jump is not counted, since nothing was decoded ahead.

    Raises:
        UserError: The data set is smaller than the batch, or an image is damaged. load() raises
            the latter for a data set that is not resident.
    """

    normalization: latents.Normalization | None = None
    has_deviation = False

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        seed: int,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
        *,
        resident: bool | None = None,
        reader: str = "auto",
    ):
        if len(dataset) < batch_size:
            raise UserError(
                f"{dataset.path} has {len(dataset)} images, fewer than batch_size={batch_size}: "
                f"give more images, or --batch-size {len(dataset)} at most"
            )
        if batch_size % world_size:
            raise ValueError(f"batch_size={batch_size} does not divide by {world_size} ranks")
        self.dataset, self.device = dataset, device
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.order = EpochOrder(len(dataset), batch_size, seed, rank, world_size)
        self.resident = fits(dataset, device) if resident is None else resident
        if isinstance(dataset, latents.LatentDataset):
            self.normalization = latents.normalization(device)
            self.has_deviation = dataset.has_deviation
            self.reader, ahead = "plain", "read ahead"
        else:
            self.reader = choose(reader, len(dataset) if self.resident else None)
            ahead = f"decoded ahead by {'DALI' if self.reader == 'dali' else 'PIL'}"
        self.text = "on the device" if self.resident else ahead
        self.waits = 0
        self._step: int | None = None  # that is staged
        self._prefetch: _Prefetch | None = None

        # Read by take(): sample i of this rank is image `_indices[i]`, at `_images[_rows[i]]`.
        samples = self.order.samples
        labels = None if dataset.labels is None else torch.from_numpy(dataset.labels)
        self._labels = None if labels is None else labels.to(device)
        self._indices = torch.zeros(samples, dtype=torch.int64, device=device)
        if self.resident:
            self._images, self._rows = self._read_all(), self._indices
        else:
            self._images = torch.zeros((samples, *dataset.sample_shape), **self._stored())
            self._rows = torch.arange(samples, device=device)

    def fingerprint(self) -> dict[str, str | None]:
        """Return what must match for a checkpoint to be resumed: digests of files and labels."""
        labels = None if self._labels is None else digest([self._labels])
        return {"data": content_digest(self.dataset)[:16], "labels": labels}

    def load(self, step: int) -> None:
        """Stage this rank's samples of a step, in stream order: nothing waits for the device."""
        if step == self._step:
            return
        self._step = None
        if self.resident:
            indices = self.order(step)
        else:
            indices, images = self._next(step)
            self._images.copy_(images, non_blocking=True)
        staged = torch.from_numpy(indices)
        if self.device.type == "cuda":
            # A new tensor each step: torch reuses pinned memory only after it has been copied.
            staged = staged.pin_memory()
        self._indices.copy_(staged, non_blocking=True)
        self._step = step

    def take(self, counter: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return images and labels of n consecutive samples of the staged step.

        Args:
            counter: RandomStream.counter, int64 [3] on the device. Its last entry is the index of
                the first sample in the global batch.
            n: Number of samples.

        Returns:
            Images, uint8 [n, C, R, R], or latents as they are stored; and one-hot labels, float32
            [n, label_dim], or None if the data set has no labels.
        """
        samples = torch.arange(n, device=self.device) + (counter[2] - self.order.first)
        images = self._images.index_select(0, self._rows.index_select(0, samples))
        if self._labels is None:
            return images, None
        classes = self._labels.index_select(0, self._indices.index_select(0, samples))
        one_hot = torch.zeros(n, self.dataset.label_dim, device=self.device)
        return images, one_hot.scatter_(1, classes[:, None], 1.0)

    def close(self) -> None:
        """End the decoding thread, if any. load() starts another."""
        self._step = None
        if self._prefetch:
            self._prefetch.close()
            self._prefetch = None

    def _next(self, step: int) -> tuple[np.ndarray, torch.Tensor]:
        """Return indices and images of a step, decoded ahead if it follows the last one."""
        if self._prefetch is None or self._prefetch.step != step:
            self.close()
            self._prefetch = _Prefetch(self.dataset, self.order, step, self.reader, self.device)
            waited = False
        else:
            waited = not self._prefetch.ready()
        ended = None
        if waited and self.device.type == "cuda":
            ended = torch.cuda.Event()
            ended.record()  # after everything launched so far
        try:
            found = self._prefetch.next()
        except BaseException:
            self.close()
            raise
        # A wait costs no time while the device is still busy.
        self.waits += waited and (ended is None or ended.query())
        return found

    def _stored(self) -> dict[str, Any]:
        """The type and device of samples."""
        empty = torch.from_numpy(np.empty(0, self.dataset.dtype))
        return {"dtype": empty.dtype, "device": self.device}

    def _read_all(self) -> torch.Tensor:
        """Read all samples onto the device, [N, C, R, R]."""
        data, total = self.dataset, len(self.dataset)
        images = torch.empty((total, *data.sample_shape), **self._stored())
        done = 0
        with progress.phase(f"reading {data.path.name}", total, "images") as shown:
            for some in read(data, range(total), self.device, self.reader):
                images[done : done + len(some)] = some
                done += len(some)
                shown.update(len(some))
        return images


class BlankFeed(ImageFeed):
    """Black images without classes, for steps that only measure or try the machine.

    Args:
        batch_size: Images per step, on one rank.
        shape: Of an image, [C, R, R].
        label_dim: Number of classes.
        device: Device of the images.
    """

    def __init__(
        self, batch_size: int, shape: tuple[int, ...], label_dim: int, device: torch.device
    ):
        self.batch_size, self.rank, self.world_size = batch_size, 0, 1
        self.shape, self.label_dim = shape, label_dim
        self.device, self.waits = device, 0

    def fingerprint(self) -> dict[str, str | None]:
        """Return nothing: these steps are not resumed."""
        return {}

    def load(self, step: int) -> None:
        """Do nothing: there are no images to stage."""

    def take(self, counter: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return n black images and all-zero labels; see ImageFeed.take."""
        images = torch.zeros(n, *self.shape, dtype=torch.uint8, device=self.device)
        if not self.label_dim:
            return images, None
        return images, torch.zeros(n, self.label_dim, device=self.device)

    def close(self) -> None:
        """Do nothing."""
