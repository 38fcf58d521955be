"""Where a run's curves go besides log.jsonl and TensorBoard: Weights & Biases."""

import importlib.util
import os
import re
import secrets
import shlex
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from sid_fast.errors import UserError, one_line
from sid_fast.io import progress, streams
from sid_fast.io.atomic import atomic_path

PROJECT = "sid_fast"  # unless WANDB_PROJECT is set
CONNECT_SECONDS = 60
FINISH_SECONDS = 60.0  # for the last upload; a run never waits longer for it
ID_FILE = "wandb-id.txt"


class Sink(Protocol):
    """Takes the records of a run. It never raises: a sink that fails does not end the run."""

    def write(self, images: int, values: Mapping[str, float]) -> None:
        """Take the values at a number of images seen."""

    def close(self) -> None:
        """Take no more."""


def require(name: str) -> None:
    """Raise UserError if the sink that --log-to names is not installed."""
    if name == "wandb" and importlib.util.find_spec("wandb") is None:
        raise UserError(
            "log_to=wandb needs Weights & Biases: pip install wandb, or leave out --log-to"
        )


def open_sinks(name: str, folder: Path, config: Mapping[str, Any]) -> list[Sink]:
    """Open what --log-to names besides TensorBoard, which is always written."""
    return [Wandb(folder, config)] if name == "wandb" else []


class Wandb:
    """A Weights & Biases run, one for each run folder; resuming continues it.

    A failure is a warning, after which nothing more is sent.

    Args:
        folder: The run folder: W&B's files go there, and the run has its name.
        config: The entries of config.json.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]):
        self.run: Any = None
        try:
            with progress.phase("connecting to Weights & Biases"):
                self.run = self._open(folder, config)
            if getattr(self.run, "offline", False):  # asked for its URL, it warns
                files = shlex.quote(str(Path(self.run.dir).parent))
                streams.note(f"Weights & Biases is offline; later: wandb sync {files}", sys.stdout)
            elif url := getattr(self.run, "url", None):
                streams.note(f"Weights & Biases: {url}", sys.stdout)
        except Exception as error:  # another's program, and the network
            self._failed(error)

    def _open(self, folder: Path, config: Mapping[str, Any]) -> Any:
        import wandb

        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", folder.name),
            dir=str(folder),
            id=_run_id(folder),
            resume="allow",
            config=dict(config),
            # Its output would tear the progress line, and a question would stop the run.
            settings=wandb.Settings(
                silent=True,
                console="off",
                init_timeout=CONNECT_SECONDS,
                login_timeout=CONNECT_SECONDS,
            ),
        )
        # A resumed run logs some steps again, which W&B's own step counter would refuse.
        run.define_metric("images")
        run.define_metric("*", step_metric="images")
        return run

    def _failed(self, error: BaseException) -> None:
        self.run = None
        reason = str(error) or type(error).__name__
        text = f"warning: Weights & Biases failed ({reason}): curves go to TensorBoard alone"
        streams.say(one_line(text), sys.stderr)

    def write(self, images: int, values: Mapping[str, float]) -> None:
        """Send a record."""
        if self.run is None:
            return
        try:
            self.run.log({"images": images, **values})
        except Exception as error:
            self._failed(error)

    def close(self) -> None:
        """Upload what is left, for FINISH_SECONDS at most."""
        if self.run is None:
            return
        errors: list[BaseException] = []

        def finish() -> None:
            try:
                self.run.finish()
            except Exception as error:
                errors.append(error)

        thread = threading.Thread(target=finish, daemon=True)
        with progress.phase("finishing Weights & Biases"):
            thread.start()
            thread.join(FINISH_SECONDS)
        if thread.is_alive():
            errors.append(TimeoutError(f"no end of the upload in {FINISH_SECONDS:g} s"))
        if errors:
            self._failed(errors[0])


def _run_id(folder: Path) -> str:
    """W&B's id of the run in a folder, made at its first start."""
    path = folder / ID_FILE
    if path.exists():
        known = path.read_text("utf-8", "replace")[:100].strip()
        if re.fullmatch("[0-9a-f]{16}", known):
            return known
    made = secrets.token_hex(8)
    with atomic_path(path) as temporary:
        temporary.write_text(f"{made}\n", "utf-8")
    return made
