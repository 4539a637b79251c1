"""Write checkpoints atomically beside the training, and verify them when they are read.

`checkpoint/epoch-7.3f9c2a….pt`: the name ends with a digest of the content, so a file that was cut
short or changed is recognized. Reading one never runs code.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import threading
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from amlp_ray.errors import CheckpointError
from amlp_ray.utils.event_log import EventLog
from amlp_ray.utils.retry import RetryPolicy

logger = logging.getLogger(__name__)

FOLDER = "checkpoint"
NAME = re.compile(r"epoch-(\d+)\.([0-9a-f]{16})\.pt")
State = dict[str, Any]


def checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints of the run in `folder`, newest first, damaged ones included."""
    paths = (folder / FOLDER).glob("epoch-*.pt")
    named = [path for path in paths if NAME.fullmatch(path.name)]
    return sorted(named, key=epoch_of, reverse=True)


def epoch_of(path: Path) -> int:
    """Return the epoch that a checkpoint was written after, by its name."""
    return int(NAME.sub(r"\1", path.name))


def latest(folder: Path, events: EventLog | None = None) -> tuple[State, Path] | None:
    """Read the newest undamaged checkpoint of the run in `folder`, and record damaged ones.

    Returns:
        The state and its file; None if there is no checkpoint at all.

    Raises:
        CheckpointError: there are checkpoints, but all are damaged.
    """
    paths = checkpoints(folder)
    for path in paths:
        if is_intact(path):
            return read_checkpoint(path), path
        message = f"{path} is damaged and skipped; the checkpoint before it is used, if any."
        if events is None:
            logger.warning(message)
        else:
            events.record("damaged checkpoint", message)
    if paths:
        names = ", ".join(path.name for path in paths)
        raise CheckpointError(
            f"All checkpoints in {paths[0].parent} are damaged ({names}); delete the folder to "
            f"start again."
        )
    return None


def read_checkpoint(path: Path) -> State:
    """Read a checkpoint.

    Raises:
        CheckpointError: it holds anything but tensors and plain values.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}); give the folder of a "
            f"run of amlp-ray, or delete {path.parent} to start from the first epoch."
        ) from None


def is_intact(path: Path) -> bool:
    """Return whether the content of a checkpoint has the digest of its name."""
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return False
    return path.name.endswith(f".{digest[:16]}.pt")


def write_checkpoint(folder: Path, state: State, epoch: int, *, keep: int = 1) -> Path:
    """Write a checkpoint now, and delete all but the `keep` newest.

    On a full disk, the older checkpoints stay and nothing else is left.

    Raises:
        OSError: it could not be written.
    """
    # The run's folder is not created: if it is unreachable, a new one would hide its return.
    place = folder / FOLDER
    place.mkdir(exist_ok=True)
    partial = place / f"epoch-{epoch}.partial"
    try:
        with partial.open("wb") as file:
            hashed = _HashedFile(file)
            torch.save(state, cast(BinaryIO, hashed))
            file.flush()
            os.fsync(file.fileno())
        path = partial.rename(place / f"epoch-{epoch}.{hashed.digest.hexdigest()[:16]}.pt")
    except BaseException as error:
        partial.unlink(missing_ok=True)  # a full disk needs the room
        # torch wraps the error of a write.
        cause = error if isinstance(error, OSError) else error.__cause__ or error.__context__
        if isinstance(error, RuntimeError) and isinstance(cause, OSError):
            raise cause from None
        raise
    others = [other for other in checkpoints(folder) if other != path]
    for old in others[keep - 1 :]:
        old.unlink(missing_ok=True)
    return path


class _HashedFile:
    """A file that computes the digest of what is written, so that it need not be read again."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.digest = hashlib.sha256()
        self.flush = file.flush

    def write(self, content: bytes) -> int:
        self.digest.update(content)
        return self.file.write(content)


class CheckpointManager:
    """Writes a run's checkpoints in a thread, one at a time, while training continues.

    At the end of the next epoch, training waits for a disk that is full or unreachable. So a kill
    costs the epochs after the last checkpoint, of which at most one was finished.
    """

    def __init__(self, folder: Path, retries: RetryPolicy, *, keep: int = 2) -> None:
        """Set up the checkpoints of the run in `folder`, of which the `keep` latest stay."""
        self.folder = folder
        self.retries = retries
        self.keep = keep
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, state: State, epoch: int) -> None:
        """Copy `state` and begin to write it, once the previous write has ended.

        Raises:
            StorageError: the previous checkpoint could not be written.
        """
        self.wait()
        # A daemon: a process that ends does not wait for a disk. A kill leaves no half checkpoint.
        self._thread = threading.Thread(
            target=self._write, args=(_copy(state), epoch), name="amlp-checkpoint", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Return once everything saved is written. Raises StorageError if it could not be."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error = self._error
        self._error = None
        if error is not None:
            raise error

    def close(self) -> None:
        """Stop a write that is being retried, and wait for its thread."""
        self.retries.cancel()
        if self._thread is not None:
            self._thread.join()

    def _write(self, state: State, epoch: int) -> None:
        try:
            self.retries.run(
                lambda: write_checkpoint(self.folder, state, epoch, keep=self.keep),
                f"the checkpoint of epoch {epoch}",
            )
        except BaseException as error:  # raised by `wait`
            self._error = error


def _copy(value: Any) -> Any:
    """Copy a nested state to the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copy(item) for item in value)
    return value
