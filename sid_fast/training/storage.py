"""Writes a state's shards and their digests; imported only when a state is written."""

from typing import Any

from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.futures import Future

from sid_fast.io.download import file_sha256


class DigestWriter(HuggingFaceStorageWriter):
    """Writes safetensors shards; each rank hashes its own in the thread that wrote them."""

    digests: dict[str, str]  # file name -> sha256, on rank 0 after the write

    def write_data(self, plan: Any, planner: Any) -> Future[list[Any]]:
        """Write this rank's shards and return (name, sha256) of each file."""
        written = super().write_data(plan, planner).wait()
        names = sorted({result.storage_data.relative_path for result in written})
        hashed: Future[list[Any]] = Future()
        hashed.set_result([(name, file_sha256(self.path / name)) for name in names])
        return hashed

    def finish(self, metadata: Any, results: list[list[Any]]) -> None:
        """Collect the digests of all ranks; called on rank 0."""
        self.digests = dict(pair for of_rank in results for pair in of_rank)
