"""Hold a lease on a study in its storage: who runs it, since when, and for how long in all.

The folder's lock covers processes of one machine. Machines that share only a database see each
other's lease, which is renewed every few seconds and is free when it has not been for a minute.
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from typing import Any

import optuna

from amlp_ray.errors import StudyError

RENEW_S = 10.0
# The machine of a driver may be gone, or its clock differ by seconds.
EXPIRES_S = 60.0
# Two processes that take a free lease at once have both written it by then; the later one has it.
SETTLE_S = 1.0
_FIELDS: dict[str, type | tuple[type, ...]] = {
    "id": str,
    "holder": str,
    "host": str,
    "pid": int,
    "at": (int, float),
    "seconds": (int, float),
    "over": bool,
}


def here() -> str:
    """Return the name of this process, such as `process 12 on host`."""
    return f"process {os.getpid()} on {socket.gethostname()}"


class Lease:
    """A lease that is taken when it is made."""

    def __init__(self, study: optuna.Study, *, wait: bool, counted: bool = True) -> None:
        """Take the lease.

        Args:
            study: the Optuna study of the search.
            wait: whether other machines may take it at this moment, so that the last write counts.
            counted: whether the time until its release counts in `budget.hours`.

        Raises:
            StudyError: another process has it; the message names it.
        """
        if holder := read_lease(study):
            raise StudyError(
                f"Study {study.study_name!r} is already run by {holder}; wait for it, or end it, "
                f"before running the study again. The lease of a process that died expires after "
                f"{EXPIRES_S:g} s."
            )
        self._study = study
        self._id = uuid.uuid4().hex
        self._counted = counted
        self._seconds_before = lease_seconds(study)
        self._started = time.monotonic()
        self._write()
        if wait:
            time.sleep(SETTLE_S)
            if not self._is_valid():
                raise StudyError(
                    f"Study {study.study_name!r} was taken by {read_lease(study)} at this moment."
                )

    @property
    def seconds(self) -> float:
        """Return for how long the study has been run, all runs together."""
        if not self._counted:
            return self._seconds_before
        return self._seconds_before + time.monotonic() - self._started

    def renew(self) -> bool:
        """Write that this process lives; return False if another one took the study over."""
        if not self._is_valid():
            return False
        self._write()
        return True

    def release(self) -> None:
        """Free the study at once."""
        if self._is_valid():
            self._write(over=True)

    def _is_valid(self) -> bool:
        return _stored(self._study).get("id") == self._id

    def _write(self, *, over: bool = False) -> None:
        lease = {
            "id": self._id,
            "holder": here(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "at": time.time(),
            "seconds": round(self.seconds, 1),
            "over": over,
        }
        self._study.set_user_attr("lease", lease)


def read_lease(study: optuna.Study) -> str | None:
    """Return who holds the lease of a study; None if nobody does, or the holder is dead."""
    lease = _stored(study)
    if not lease or lease["over"] or abs(time.time() - lease["at"]) > EXPIRES_S:
        return None
    is_here = lease["host"] == socket.gethostname()
    if is_here and (lease["pid"] == os.getpid() or not _is_alive(lease["pid"])):
        return None
    return str(lease["holder"])


def lease_seconds(study: optuna.Study) -> float:
    """Return for how long a study has been run, all runs together, as it was last stored."""
    return float(_stored(study).get("seconds", 0.0))


def _stored(study: optuna.Study) -> dict[str, Any]:
    """Return the lease as it is stored; empty if there is none, or one that nobody wrote so."""
    lease: Any = study.user_attrs.get("lease")
    if not isinstance(lease, dict):
        return {}
    is_sound = all(isinstance(lease.get(name), kind) for name, kind in _FIELDS.items())
    return lease if is_sound else {}


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return True
