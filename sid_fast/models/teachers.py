"""Published teachers by name, from teachers.toml."""

import dataclasses
from importlib import resources

from sid_fast.config.toml import loads
from sid_fast.models import NetworkConfig
from sid_fast.models.families import read_config


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A published teacher.

    Attributes:
        url: Where the file is published.
        network: The configuration of the network in the file.
        sha256: Digest of the file; None if unknown.
    """

    url: str
    network: NetworkConfig
    sha256: str | None = None

    @property
    def source(self) -> str:
        """The URL and digest, in the form that io.download.fetch takes."""
        return f"{self.url}#sha256={self.sha256}" if self.sha256 else self.url


def _read() -> dict[str, Teacher]:
    text = (resources.files("sid_fast.models") / "teachers.toml").read_text("utf-8")
    return {
        name: Teacher(**values | {"network": read_config(values["network"])})
        for name, values in loads(text).items()
    }


TEACHERS = _read()
