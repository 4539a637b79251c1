"""Open the Optuna storage of a study: a journal in its folder, or a database by URL.

Both are retried while they cannot be reached. A journal is appended under a lock that the kernel
frees when its holder dies, however it dies. Every writer first cuts off a last line that was left
half-written. Nothing is ever unpickled from either.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import optuna
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, JournalStorage
from optuna.trial import FrozenTrial

from amlp_ray.config.study import check_sqlite_url
from amlp_ray.errors import StudyError
from amlp_ray.study.storage.journal import Journal
from amlp_ray.study.storage.journal_lines import TOKEN
from amlp_ray.study.storage.optuna_internals import trial_id_of

# Each driver is a wheel, or part of Python.
DRIVERS = {"postgresql": "postgresql+psycopg", "mysql": "mysql+pymysql", "sqlite": "sqlite"}
# User attribute of a search that a changed space has made, from when it is the study's.
IS_VERSION = "is_version"
FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 5.0

logger = logging.getLogger(__name__)


def _forward(name: str) -> Callable[..., Any]:
    def call(self: RetryingStorage, *args: Any, **named: Any) -> Any:
        return self.retry(name, *args, **named)

    return call


_METHODS = [name for name in dir(BaseStorage) if not name.startswith("_")]
_ForwardingStorage: Any = type(
    "_ForwardingStorage", (BaseStorage,), {name: _forward(name) for name in _METHODS}
)


class RetryingStorage(_ForwardingStorage):
    """Storage that is retried while it cannot be reached.

    A call that failed may have been stored before its answer was lost. Most writes may be
    repeated. The exceptions are a new trial, which carries a token that it is found by, and the
    end of a trial, where the first of two counts.
    """

    def __init__(self, inner: BaseStorage, seconds: float, location: str = "") -> None:
        """Wrap a storage.

        Args:
            seconds: how long each call is retried.
            location: what messages call it, such as the path of its file.
        """
        self.inner = inner
        self._location = f" {location}" if location else ""
        self._seconds = seconds
        # A process that ends because of it does not wait as long again for each further call.
        self._has_given_up = False

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """Store a new trial exactly once and return its id."""
        if template_trial is None:
            return int(self.retry("create_new_trial", study_id))
        token = uuid.uuid4().hex
        template_trial.system_attrs[TOKEN] = token

        def find_stored() -> int | None:
            trials = self.inner.get_all_trials(study_id, deepcopy=False)
            for trial in reversed(trials):
                if trial.system_attrs.get(TOKEN) == token:
                    return trial_id_of(trial)
            return None

        trial_id = self.retry("create_new_trial", study_id, template_trial, recover=find_stored)
        return int(trial_id)

    def set_trial_state_values(self, trial_id: int, *args: Any, **named: Any) -> bool:
        """Store the state of a trial; its end is stored once.

        Raises:
            UpdateFinishedTrialError: the trial ended before.
        """
        was_repeated = False

        def note_repetition() -> None:
            nonlocal was_repeated
            was_repeated = True

        try:
            stored = self.retry(
                "set_trial_state_values", trial_id, *args, recover=note_repetition, **named
            )
            return bool(stored)
        except UpdateFinishedTrialError:
            if not was_repeated:
                raise
            return True

    def retry(
        self, name: str, *args: Any, recover: Callable[[], Any] = lambda: None, **named: Any
    ) -> Any:
        """Call a method of the storage until it can be reached.

        Args:
            name: of the method.
            args: of the method.
            recover: called before each repetition. What it returns is the answer, unless None.
            named: further arguments of the method.

        Raises:
            StudyError: it could not be reached for too long.
        """
        started = time.monotonic()
        pause = FIRST_PAUSE_S
        has_failed = False
        should_log = self._seconds > LONGEST_PAUSE_S and not self._has_given_up
        while True:
            try:
                answer = recover() if has_failed else None
                if answer is None:
                    answer = getattr(self.inner, name)(*args, **named)
            except Exception as error:
                if not _is_temporary(error):
                    raise
                if self._has_given_up or time.monotonic() - started > self._seconds:
                    self._has_given_up = True
                    raise StudyError(
                        f"The study's storage{self._location} cannot be reached for "
                        f"{self._seconds:g} s ({_error_kind(error)}); check it and run the study "
                        f"again, which resumes."
                    ) from None
                if should_log and not has_failed:
                    logger.warning(
                        "the study's storage%s cannot be reached (%s); retrying while trials train",
                        self._location,
                        _error_kind(error),
                    )
                has_failed = True
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)
                continue
            if should_log and has_failed:
                logger.info("the study's storage is back")
            self._has_given_up = False
            return answer


def _is_temporary(error: BaseException) -> bool:
    """Return whether an error may pass: the disk is full, or a server is restarted."""
    if isinstance(error, OSError):
        return not isinstance(error, FileNotFoundError | PermissionError)
    if "sqlalchemy" not in sys.modules:
        return False  # without a database; the import would take a fifth of a second
    from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError

    if isinstance(error, StorageInternalError):  # Optuna's, around the database's error
        return error.__cause__ is None or _is_temporary(error.__cause__)
    if isinstance(error, OperationalError | InterfaceError):
        return True
    return isinstance(error, DBAPIError) and error.connection_invalidated


def _error_kind(error: BaseException) -> str:
    """Name an error without the database's message, which may hold its address and user."""
    cause = error.__cause__ or error
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    return type(cause).__name__


def open_journal(path: Path, retry_seconds: float = 0.0) -> BaseStorage:
    """Open a journal file, which is created if it is missing.

    Args:
        retry_seconds: how long a call is retried, for example while the disk is full.
    """
    return RetryingStorage(JournalStorage(Journal(path)), retry_seconds, str(path))


def open_database(url: str, folder: Path, retry_seconds: float = 0.0) -> BaseStorage:
    """Open the database that `storage` of a study names.

    Args:
        url: of the database. `${NAME}` is replaced by the environment variable NAME.
        folder: of the study; relative SQLite files lie in it.
        retry_seconds: how long a call is retried while the server is gone.

    Raises:
        StudyError: a variable is not set, the driver is not installed, or the database refuses the
            connection. No message holds a value of the environment.
    """
    scheme, _, rest = expand_variables(url).partition("://")
    kind, _, driver = scheme.partition("+")
    arguments = {"timeout": 30} if kind == "sqlite" else {"connect_timeout": 10}
    if file := sqlite_file(url, folder):
        _, has_query, query = rest.partition("?")
        rest = f"/{quote(str(file))}{has_query}{query}"
    try:
        database = optuna.storages.RDBStorage(
            f"{scheme if driver else DRIVERS[kind]}://{rest}",
            engine_kwargs={"pool_pre_ping": True, "connect_args": arguments},
        )
        storage = optuna.storages.get_storage(database)
        return RetryingStorage(storage, retry_seconds, without_secrets(url))
    except ImportError as error:
        raise StudyError(
            f"Package {error.name!r} for {kind} is not installed; pip install 'amlp-ray[{kind}]'."
        ) from None
    except Exception as error:
        from sqlalchemy.exc import SQLAlchemyError

        if not _is_temporary(error) and not isinstance(error, ValueError | SQLAlchemyError):
            raise
        raise StudyError(
            f"The database at {without_secrets(url)} cannot be opened ({_error_kind(error)}); "
            f"check the address, that it runs, and the user and password in the environment."
        ) from None


def sqlite_file(url: str, folder: Path) -> Path | None:
    """Return the file of a SQLite database; None for a database on a server.

    Args:
        url: of the database.
        folder: of the study; a relative path begins there, `~` is the user's home.

    Raises:
        StudyError: a variable is not set, or the URL names no file with its value.
    """
    if not url.startswith("sqlite"):
        return None
    expanded = expand_variables(url)
    try:
        check_sqlite_url(expanded)
        path = unquote(expanded.partition("://")[2].partition("?")[0].removeprefix("/"))
        return folder.absolute() / Path(path).expanduser()
    except (ValueError, RuntimeError) as error:  # RuntimeError: there is no such user
        raise StudyError(f"storage {without_secrets(url)}: {error}.") from None


def expand_variables(url: str) -> str:
    """Replace `${NAME}` by the environment variable, quoted as a URL needs it.

    Raises:
        StudyError: the variable is not set.
    """

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if name not in os.environ:
            raise StudyError(
                f"storage names ${{{name}}}, which is not set in the environment; set it."
            )
        return quote(os.environ[name], safe="")

    return re.sub(r"\$\{(\w+)\}", value, url)


def without_secrets(url: str) -> str:
    """Shorten a URL for messages: without user, password and options.

    >>> without_secrets("postgresql://me:${PASSWORD}@db.example/studies?sslmode=require")
    'postgresql://db.example/studies'
    """
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.partition('?')[0].rpartition('@')[2]}"


def current_version(storage: BaseStorage, name: str) -> str | None:
    """Return the last version of a search that a changed space has made; None if there is none."""
    versions = {}
    for study in storage.get_all_studies():
        match = re.fullmatch(rf"{re.escape(name)}\.v(\d+)", study.study_name)
        if match and study.user_attrs.get(IS_VERSION):
            versions[int(match[1])] = study.study_name
    return versions[max(versions)] if versions else None
