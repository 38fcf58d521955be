"""Published teachers by name, from teachers.toml."""

import dataclasses
from importlib import resources

from sid_fast.config.toml import loads
from sid_fast.models.edm_unet.config import NetworkConfig


@dataclasses.dataclass(frozen=True)
class Teacher:
    """url: where it is published; sha256: of the file, None where no digest is known; network:

    what the file holds, known without downloading it.
    """

    url: str
    network: NetworkConfig
    sha256: str | None = None

    @property
    def source(self) -> str:
        """As io.download.fetch takes it."""
        return f"{self.url}#sha256={self.sha256}" if self.sha256 else self.url


def _read() -> dict[str, Teacher]:
    text = (resources.files("sid_fast.models") / "teachers.toml").read_text("utf-8")
    return {
        name: Teacher(**values | {"network": NetworkConfig.from_dict(values["network"])})
        for name, values in loads(text).items()
    }


TEACHERS = _read()
