"""One writer per folder: two runs in one would spoil each other."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from amlp_ray.errors import CheckpointError

WAIT_S = 60.0  # processes of a run that was killed are gone within seconds


@contextmanager
def only_writer(folder: Path, *, wait_s: float = WAIT_S) -> Iterator[None]:
    """Hold the folder, which is made where it is missing, until no longer needed; a process that ends lets it go.

    Raises:
        CheckpointError: another process holds it for longer than `wait_s`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise CheckpointError(
                        f"{folder} is written by another process; let it end, or end it, and run again."
                    ) from None
                time.sleep(min(0.5, wait_s))
            except OSError as error:
                raise CheckpointError(
                    f"{folder} is on a file system without locks ({error.strerror}), so two runs could spoil each "
                    f"other; mount it with locks (Lustre: flock), or choose another folder."
                ) from None
        yield
