"""Checkpoints of a run: written beside the training, whole or not at all, and verified when they are read.

`checkpoint/epoch-7.3f9c2a….pt`: the name ends with a digest of the content, so a file that was cut short, or changed on
its disk or on its way, is told from a whole one. The last few are kept: where the newest is damaged, the one before is
taken. A checkpoint holds tensors and plain values and is loaded with `weights_only`: reading one never runs code.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from amlp_ray.errors import CheckpointError
from amlp_ray.utils.retry import RetryPolicy

NAME = re.compile(r"epoch-(\d+)\.([0-9a-f]{16})\.pt")
State = dict[str, Any]


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of the run in `folder`, the newest first, whole or not."""
    found = [
        path for path in (folder / "checkpoint").glob("epoch-*.pt") if NAME.fullmatch(path.name)
    ]
    return sorted(found, key=epoch_of, reverse=True)


def epoch_of(path: Path) -> int:
    """The epoch that a checkpoint was written after, by its name."""
    match = NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def latest(
    folder: Path, damaged: Callable[[str], None] = lambda text: None
) -> tuple[State, Path] | None:
    """Read the newest whole checkpoint of the run in `folder`; None where there is none at all.

    Args:
        damaged: told of each newer one that is not whole, in a sentence.

    Raises:
        CheckpointError: there are checkpoints, but none is whole.
    """
    found = checkpoints(folder)
    for path in found:
        if is_whole(path):
            return read_checkpoint(path), path
        damaged(f"{path} is damaged and left out; the one before it is taken, if any.")
    if found:
        names = ", ".join(path.name for path in found)
        raise CheckpointError(
            f"{found[0].parent} holds no whole checkpoint ({names}); delete it to start again."
        )
    return None


def read_checkpoint(path: Path) -> State:
    """Read a checkpoint that is whole. Raises CheckpointError where it holds anything but tensors and plain values."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}); give the folder of a run of amlp-ray, "
            f"or delete {path.parent} to start from the first epoch."
        ) from None


def is_whole(path: Path) -> bool:
    """Whether the content of a checkpoint has the digest of its name."""
    match = NAME.fullmatch(path.name)
    try:
        with path.open("rb") as file:
            return (
                match is not None
                and hashlib.file_digest(file, "sha256").hexdigest()[:16] == match[2]
            )
    except OSError:
        return False


def write_checkpoint(folder: Path, state: State, epoch: int, *, keep: int = 1) -> Path:
    """Write a checkpoint now, and drop all but the `keep` newest. A full disk leaves the older ones and nothing else.

    Raises:
        OSError: it could not be written.
    """
    place = folder / "checkpoint"
    place.mkdir(
        exist_ok=True
    )  # and not the run's folder: one that is away would be in its own way when it comes back
    partial = place / f"epoch-{epoch}.partial"
    try:
        with partial.open("wb") as file:
            hashed = _Hashed(file)
            torch.save(state, cast(BinaryIO, hashed))
            file.flush()
            os.fsync(file.fileno())
        path = partial.rename(place / f"epoch-{epoch}.{hashed.digest.hexdigest()[:16]}.pt")
    except BaseException as error:
        partial.unlink(missing_ok=True)  # a full disk needs the room
        # torch wraps what a write raises.
        cause = error if isinstance(error, OSError) else error.__cause__ or error.__context__
        if isinstance(error, RuntimeError) and isinstance(cause, OSError):
            raise cause from None
        raise
    for old in [other for other in checkpoints(folder) if other != path][keep - 1 :]:
        old.unlink(missing_ok=True)
    return path


class _Hashed:
    """A file that computes the digest of what is written to it, which spares reading it again."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()
        self.flush = file.flush

    def write(self, content: bytes) -> int:
        self.digest.update(content)
        return self.file.write(content)


class CheckpointManager:
    """Writes a run's checkpoints in a thread, one at a time, while training goes on.

    Training does not run away from a disk that is full or away: at the end of the next epoch it waits, so that a kill
    never costs more than the epochs after the last checkpoint, of which one at most was ended.
    """

    def __init__(self, folder: Path, patience: RetryPolicy, *, keep: int = 2) -> None:
        """For the run in `folder`, of which the `keep` latest are kept."""
        self.folder, self.patience, self.keep = folder, patience, keep
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(self, state: State, epoch: int) -> None:
        """Copy `state` as it is now and begin to write it; the last write has ended before.

        Raises:
            StorageError: the last one could not be written.
        """
        self.wait()
        # A daemon, so that a process that ends does not wait for a disk; `write_checkpoint` leaves nothing half done.
        self._thread = threading.Thread(
            target=self._write, args=(_copied(state), epoch), name="amlp-checkpoint", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Return when everything that was saved is on its disk. Raises StorageError where it could not be written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def close(self) -> None:
        """End what still writes: a run that failed is begun again, maybe in this process, and must find nobody."""
        self.patience.cancel()
        if self._thread is not None:
            self._thread.join()

    def _write(self, state: State, epoch: int) -> None:
        try:
            self.patience.run(
                lambda: write_checkpoint(self.folder, state, epoch, keep=self.keep),
                f"the checkpoint of epoch {epoch}",
            )
        except BaseException as error:  # handed on by `wait`
            self._failure = error


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(item) for item in value)
    return value
