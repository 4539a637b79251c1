"""Where Optuna keeps a study: a journal in its folder, or a database by URL. Both bear being gone for a while.

A journal is appended under a lock that the kernel frees when its holder dies, however it dies, and every writer first
cuts off a last line that was left half-written. Nothing is ever unpickled from either.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._storage import JournalOperation
from optuna.trial import FrozenTrial

from amlp_ray.errors import StudyError
from amlp_ray.utils.locks import acquire_lock

DRIVERS = {
    "postgresql": "postgresql+psycopg",
    "mysql": "mysql+pymysql",
    "sqlite": "sqlite",
}  # pure or binary wheels
FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 5.0
# Logs of a trial that runs: scores of rungs and attributes. Were they lost in a power cut, its end would be too, so the
# next run takes it over and stores them again; a wait for the disk for each would hold up all other trials.
_TOLD_AGAIN = {
    JournalOperation.SET_TRIAL_INTERMEDIATE_VALUE,
    JournalOperation.SET_TRIAL_USER_ATTR,
    JournalOperation.SET_TRIAL_SYSTEM_ATTR,
}
TOKEN = "token"  # of a new trial: tells whether it was stored before the answer was lost


class Journal(JournalFileBackend):
    """Optuna's journal file, safe against writers that are killed or run out of disk in the middle of a line."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._path = path

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append one line per log, whole or not at all."""
        text = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode()
        with (
            self._held(),
            self._path.open("r+b", buffering=0) as file,
        ):  # a buffer would be written again on closing
            end = _end_of_last_line(file)
            file.truncate(end)  # the next line would be glued to half a line and spoil both
            file.seek(end)
            try:
                left = memoryview(text)
                while left:
                    left = left[file.write(left) :]
                if any(log["op_code"] not in _TOLD_AGAIN for log in logs):
                    os.fsync(file.fileno())
            except OSError:
                os.truncate(self._path, end)  # room for what is half-written comes back
                raise

    @contextmanager
    def _held(self) -> Iterator[None]:
        # Optuna's own lock is a link that outlives its holder: after a kill all writers wait for 30 s.
        with acquire_lock(self._path.with_name(f".{self._path.name}.lock"), wait_s=math.inf):
            yield


def _end_of_last_line(file: Any) -> int:
    end: int = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - 4096)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def _forward(name: str) -> Callable[..., Any]:
    def call(self: RetryingStorage, *args: Any, **named: Any) -> Any:
        return self._patiently(name, *args, **named)

    return call


_METHODS = [name for name in dir(BaseStorage) if not name.startswith("_")]
_Forwarding: Any = type("_Forwarding", (BaseStorage,), {name: _forward(name) for name in _METHODS})


class RetryingStorage(_Forwarding):
    """A storage that is asked again while it cannot be reached, for at most `patience` seconds.

    What failed may have been stored before its answer was lost. All writes but two may be repeated; a new trial carries
    a token that it is found again by, and a trial that was told twice stays as it was told first.
    """

    def __init__(
        self, inner: BaseStorage, patience: float, notify: Callable[[str], None] = lambda line: None
    ) -> None:
        self._inner, self._patience, self._notify = inner, patience, notify
        self._given_up = False  # then what is asked on the way out does not wait as long again

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """Return the id of a new trial, created once."""
        if template_trial is None:
            return int(self._patiently("create_new_trial", study_id))
        token = template_trial.system_attrs[TOKEN] = uuid.uuid4().hex

        def stored() -> int | None:
            trials = self._inner.get_all_trials(study_id, deepcopy=False)
            return next(
                (t._trial_id for t in reversed(trials) if t.system_attrs.get(TOKEN) == token), None
            )

        return int(self._patiently("create_new_trial", study_id, template_trial, unless=stored))

    def set_trial_state_values(self, trial_id: int, *args: Any, **named: Any) -> bool:
        """Tell the end of a trial."""
        tried = False

        def told() -> bool | None:
            nonlocal tried
            tried = True
            return None

        try:
            return bool(
                self._patiently("set_trial_state_values", trial_id, *args, unless=told, **named)
            )
        except UpdateFinishedTrialError:
            if not tried:
                raise
            return True

    def _patiently(
        self, name: str, *args: Any, unless: Callable[[], Any] = lambda: None, **named: Any
    ) -> Any:
        started, wait, gone = time.monotonic(), FIRST_WAIT_S, False
        tell = self._patience > LONGEST_WAIT_S and not self._given_up
        while True:
            try:
                done = unless() if gone else None
                answer = done if done is not None else getattr(self._inner, name)(*args, **named)
            except Exception as error:
                if not _may_pass(error):
                    raise
                if self._given_up or time.monotonic() - started > self._patience:
                    self._given_up = True
                    raise StudyError(
                        f"The study's storage cannot be reached for {self._patience:g} s "
                        f"({_kind(error)}); check it and run the study again: it goes on."
                    ) from None
                if tell and not gone:
                    self._notify(
                        f"the study's storage cannot be reached ({_kind(error)}); waiting, trials train on"
                    )
                gone = True
                time.sleep(wait)
                wait = min(2 * wait, LONGEST_WAIT_S)
                continue
            if tell and gone:
                self._notify("the study's storage is back")
            self._given_up = False
            return answer


def _may_pass(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return not isinstance(error, FileNotFoundError | PermissionError)
    if (
        "sqlalchemy" not in sys.modules
    ):  # no database, no error of one; the import takes a fifth of a second
        return False
    from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError

    if isinstance(error, StorageInternalError):  # Optuna's own, around what the database said
        return error.__cause__ is None or _may_pass(error.__cause__)
    passing = isinstance(error, OperationalError | InterfaceError)
    return passing or (isinstance(error, DBAPIError) and error.connection_invalidated)


def _kind(error: BaseException) -> str:
    """What went wrong, without the database's own words, which may hold its address and user."""
    cause = error.__cause__ or error
    return cause.strerror if isinstance(cause, OSError) and cause.strerror else type(cause).__name__


def open_journal(
    path: Path, patience: float = 0.0, notify: Callable[[str], None] = lambda line: None
) -> BaseStorage:
    return RetryingStorage(JournalStorage(Journal(path)), patience, notify)


def open_database(
    url: str, patience: float = 0.0, notify: Callable[[str], None] = lambda line: None
) -> BaseStorage:
    """Open the database that `storage` of a study names, filling in `${NAME}` from the environment.

    Raises:
        StudyError: a name is not set, the driver is not installed, or the database refuses us. No message holds a
            value from the environment.
    """
    scheme, _, rest = expanded(url).partition("://")
    kind, _, driver = scheme.partition("+")
    arguments = {"timeout": 30} if kind == "sqlite" else {"connect_timeout": 10}
    try:
        inner = optuna.storages.get_storage(
            optuna.storages.RDBStorage(
                f"{scheme if driver else DRIVERS[kind]}://{rest}",
                engine_kwargs={"pool_pre_ping": True, "connect_args": arguments},
            )
        )
    except ImportError as error:
        raise StudyError(
            f"Package {error.name!r} for {kind} is not installed; pip install 'amlp-ray[{kind}]'."
        ) from None
    except Exception as error:
        from sqlalchemy.exc import SQLAlchemyError

        if not _may_pass(error) and not isinstance(error, ValueError | SQLAlchemyError):
            raise
        raise StudyError(
            f"The database at {without_secrets(url)} cannot be opened ({_kind(error)}); check the address, that it runs, and the "
            f"user and password in the environment."
        ) from None
    return RetryingStorage(inner, patience, notify)


def expanded(url: str) -> str:
    """Put values of the environment in place of `${NAME}`; characters that a URL cannot hold are quoted."""
    from urllib.parse import quote

    def value(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise StudyError(
                f"storage names ${{{match[1]}}}, which is not set in the environment; set it."
            )
        return quote(os.environ[match[1]], safe="")

    return re.sub(r"\$\{(\w+)\}", value, url)


def without_secrets(url: str) -> str:
    """A URL for messages: without user, password and options.

    >>> without_secrets("postgresql://me:${PASSWORD}@db.example/studies?sslmode=require")
    'postgresql://db.example/studies'
    """
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.partition('?')[0].rpartition('@')[2]}"
