"""A lease on a study, kept in its storage: who runs it, since when, and for how long in all.

The folder's lock tells processes of one machine apart. Machines that share only a database tell each other by a lease
that is renewed every few seconds and taken over when it has not been for a minute.
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
EXPIRES_S = (
    60.0  # of a driver that we cannot see: its machine may be gone, or its clock differ by seconds
)
SETTLE_S = 1.0  # two who take a free lease at once both wrote it by then; the later one has it


def here() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


class Lease:
    """Taken when it is made; `renew` tells whether it still stands.

    `seconds` is how long the study has been run, all runs together: what a budget of hours is measured by.
    """

    def __init__(self, study: optuna.Study, *, wait: bool, counted: bool = True) -> None:
        """Args: wait: whether other machines may take it at this moment, so that who wrote last must be seen.

        Raises:
            StudyError: naming the holder, where somebody else has it.
        """
        if holder := read_lease(study):
            raise StudyError(
                f"Study {study.study_name!r} is already run by {holder}; wait for it, or end it, before running the "
                f"study again. The lease of one that died passes after {EXPIRES_S:g} s."
            )
        self._study, self._id, self._counted = study, uuid.uuid4().hex, counted
        self._before = float((study.user_attrs.get("lease") or {}).get("seconds", 0.0))
        self._started = time.monotonic()
        self._write()
        if wait:
            time.sleep(SETTLE_S)
            if not self._stands():
                raise StudyError(
                    f"Study {study.study_name!r} was taken by {read_lease(study)} at this moment."
                )

    @property
    def seconds(self) -> float:
        return self._before + (time.monotonic() - self._started if self._counted else 0.0)

    def renew(self) -> bool:
        """Write that we live. False: somebody took the study over while we could not; nothing is written."""
        if not self._stands():
            return False
        self._write()
        return True

    def release(self) -> None:
        """Leave the study to whoever comes next, at once."""
        if self._stands():
            self._write(over=True)

    def _stands(self) -> bool:
        return (self._study.user_attrs.get("lease") or {}).get("id") == self._id

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
    """Who holds the lease of a study; None where nobody does, or the holder is dead."""
    lease: dict[str, Any] = study.user_attrs.get("lease") or {}
    if not lease or lease["over"] or abs(time.time() - lease["at"]) > EXPIRES_S:
        return None
    if lease["host"] == socket.gethostname() and (
        lease["pid"] == os.getpid() or not _lives(lease["pid"])
    ):
        return None
    return str(lease["holder"])


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
