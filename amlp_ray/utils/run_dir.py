"""Claim a folder for one run: what the run is, and who may write."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from amlp_ray.errors import CheckpointError
from amlp_ray.utils.files import atomic_write
from amlp_ray.utils.json_files import JsonError, parse_json_mapping
from amlp_ray.utils.locks import acquire_lock

# Processes of a run that was killed are gone within seconds.
LOCK_WAIT_S = 60.0
# Errors of a file system that has no locks, in contrast to one that is full or read-only.
NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF})


class OtherRunError(Exception):
    """The folder holds another run; `changed` are the keys of its identity that differ."""

    def __init__(self, changed: Sequence[str]) -> None:
        super().__init__(", ".join(changed))
        self.changed = tuple(changed)


class RunDir:
    """A folder that holds one run, and a JSON file in it that says which.

    The identity of a run is what its result follows from: settings, data, weights. A second run
    with the same identity resumes in the folder, one with another identity is refused.
    """

    def __init__(
        self,
        path: Any,
        identity_file: str = "run.json",
        *,
        results: Sequence[str] | None = None,
        write: Callable[[Any, str], None] = atomic_write,
    ) -> None:
        """Describe the folder; nothing is read or written.

        Args:
            path: a `Path`, or a folder at a URI that reads like one.
            identity_file: name of the JSON file.
            results: glob patterns of files that are worth keeping. While none is there, another
                run may take the folder. None: the identity alone holds it.
            write: replaces the content of a file in one step.
        """
        self.path = path
        self.identity_file = identity_file
        self.results = results
        self._write = write

    def claim(self, identity: Mapping[str, Any]) -> bool:
        """Take the folder for a run.

        Returns:
            Whether the folder held the same run before.

        Raises:
            OtherRunError: it holds results of another run.
            OSError: the identity could not be written.
        """
        recorded = self.read_identity()
        if recorded is not None:
            changed = [key for key in identity if recorded.get(key) != identity[key]]
            if changed and self.has_results:
                raise OtherRunError(changed)
            if not changed:
                return True
        self._write(self.path / self.identity_file, json.dumps(identity, indent=1))
        return False

    def read_identity(self) -> dict[str, Any] | None:
        """Read which run holds the folder; None for none, {} for one with a damaged file."""
        file = self.path / self.identity_file
        if not file.is_file():
            return None
        try:
            return parse_json_mapping(file.read_bytes())
        except JsonError:
            return {}

    @property
    def has_results(self) -> bool:
        """Whether the folder holds something that another run must not replace."""
        if self.results is None:
            return True
        return any(any(self.path.glob(pattern)) for pattern in self.results)

    @contextmanager
    def lock(self, *, wait_s: float = LOCK_WAIT_S) -> Iterator[None]:
        """Keep other processes out of the folder, which is created if it is missing.

        Raises:
            CheckpointError: another process holds the folder for longer than `wait_s`, or the file
                system has no locks.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            lock = acquire_lock(self.path / "lock", wait_s=wait_s)
        except BlockingIOError:
            raise CheckpointError(
                f"{self.path} is written by another process; wait for it or stop it, and run again."
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            raise CheckpointError(
                f"{self.path} is on a file system without locks ({error.strerror}), so two "
                f"runs could spoil each other; mount it with locks (Lustre: flock), or choose "
                f"another folder."
            ) from None
        with lock:
            yield
