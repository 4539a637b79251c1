"""Open a study's folder of plain files and its Optuna storage.

    <runs>/<name>/
      study.yaml         the study's config in full
      study.journal      three Optuna studies: `<name>` holds the search, `<name>.baselines` the
                         baselines, `<name>.confirm` the confirmation
      id                 ties the folder to its studies where these are in a database instead
      format             number of this layout
      change.lock        held by whoever changes the study, for a moment
      run.lock           held by whoever runs it
      environment.json   commit, versions, hardware, seeds and data of the first run
      environments.jsonl the same of every run
      events.log         a line per change of a trial's state
      trials/<number>/   config.yaml, metrics.jsonl, score.json, rungs/, checkpoint/,
                         encoder.safetensors, pictures/, trial.json (the trial as it is stored)
      baselines/<baseline>-<repeat>/  the same files
      confirm/<candidate>-<repeat>/   the same, finetune.json and test.json
      report.html

Paths in the store are relative, so a folder may be moved. No pickle is ever read.
Baselines have an Optuna study of their own. They have no searched parameters: inside the search
they would blind multivariate TPE, and could come out as its best trial.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TextIO

import optuna
from optuna.storages import BaseStorage

from amlp_ray.config import StudyConfig
from amlp_ray.config.base import build
from amlp_ray.config.yaml_file import read_yaml, write_yaml
from amlp_ray.errors import StudyError
from amlp_ray.study.storage.change_lock import WAIT_S, ChangeLock
from amlp_ray.study.storage.folder_id import check_format, read_id, write_id
from amlp_ray.study.storage.journal_lines import DAMAGED
from amlp_ray.study.storage.lease import Lease, here, read_lease
from amlp_ray.study.storage.optuna_storage import (
    current_version,
    open_database,
    open_journal,
    sqlite_file,
    without_secrets,
)
from amlp_ray.study.storage.request_store import RequestStore
from amlp_ray.study.storage.requests import clear_requests
from amlp_ray.study.storage.trial_files import (
    begun_folders,
    begun_trials,
    check_not_orphaned,
    has_ended,
)
from amlp_ray.study.storage.trial_record import (
    TrialRecord,
    confirm_path,
    trial_path,
    trial_records,
)
from amlp_ray.training.loggers.metrics_file import Metrics, read_rows
from amlp_ray.utils.files import atomic_write, local_path
from amlp_ray.utils.locks import acquire_lock, lock_owner

logger = logging.getLogger(__name__)

READ_RETRY_S = 10.0  # how long a command that only reads waits for a database
READER_S = 1.0  # within which a process that only looked at the lock has let go of it


class StudyStore(RequestStore):
    """Paths and storages of one study folder. Opening reads only what is asked for."""

    def __init__(self, folder: str | Path, name: str | None = None) -> None:
        """Name a folder, which need not exist yet, and its study; by default both have one name."""
        super().__init__()
        self.folder = local_path(folder)
        self.name = name or self.folder.name
        self._changes = ChangeLock(self.folder)
        self._folder_id: str | None = None
        self._opened: BaseStorage | None = None
        self._is_checked = False
        self._has_read_url = False
        self._database_url: str | None = None

    @classmethod
    def open(cls, folder: str | Path) -> StudyStore:
        """Open an existing study.

        Raises:
            StudyError: there is none, or its folder was written by another version.
        """
        store = cls(folder)
        if not (store.folder / "study.yaml").is_file():
            check_not_orphaned(store.folder)
            parent = store.folder.parent
            names = sorted(path.parent.name for path in parent.glob("*/study.yaml"))
            advice = "start one with `amlp-ray study run FILE.yaml`."
            if names:
                advice = f"studies there: {', '.join(names)}."
            raise StudyError(f"There is no study {store.name!r} in {parent}; {advice}")
        store.name = store.config().name
        store._folder_id = store.read_id()
        return store

    def config(self) -> StudyConfig:
        """Read study.yaml.

        Raises:
            StudyError: another version wrote the folder. ConfigError: the file has a mistake.
        """
        check_format(self.folder)
        path = self.folder / "study.yaml"
        return build(StudyConfig, read_yaml(path), str(path))

    @property
    def _url(self) -> str | None:
        """Return the database's URL; None for a journal or before there is a study.yaml."""
        if not self._has_read_url and (self.folder / "study.yaml").is_file():
            self._database_url = self.config().storage
            self._has_read_url = True
        return self._database_url

    # Folders

    def trial_folder(self, number: int) -> Path:
        """Return the folder of a trial of the search."""
        return self.folder / trial_path(number)

    def confirm_folder(self, candidate: str, repeat: int) -> Path:
        """Return the folder of one confirmation run."""
        return self.folder / confirm_path(candidate, repeat)

    def folder_of(self, trial: TrialRecord) -> Path:
        """Return the folder of a trial of any of the three studies, never one outside."""
        folder = self.folder / trial.folder
        if folder.resolve().is_relative_to(self.folder.resolve()):
            return folder
        return self.trial_folder(trial.number)

    # Optuna

    def reopen(self) -> None:
        """Forget what was read: the storage has been replaced."""
        self._opened = None
        self._is_checked = False
        self._ids.clear()

    def storage(self, *, retry_seconds: float | None = None) -> BaseStorage:
        """Return the storage of all three studies, opened once.

        Args:
            retry_seconds: how long to retry while it cannot be reached. Given by the process that
                runs the study, before anything else is read.
        """
        if self._opened is None or retry_seconds is not None:
            seconds = READ_RETRY_S if retry_seconds is None else retry_seconds
            if self._url:
                self._opened = open_database(self._url, self.folder, seconds)
            else:
                self._opened = open_journal(self.folder / "study.journal", seconds)
        return self._opened

    def search(self, *, create: bool = False) -> optuna.Study:
        """Return the Optuna study of the search; plain `optuna.load_study` opens the same.

        Raises:
            StudyError: there are trial folders that the storage does not know.
        """
        if not self._is_checked:
            self._check_complete()
            self._is_checked = True
        return self.stored_search(create=create)

    def stored_search(self, *, create: bool = False) -> optuna.Study:
        """Return what is stored of the search, also where trial folders show that it was more."""
        return self._study(self.search_name(), create)

    def baselines(self, *, create: bool = False) -> optuna.Study:
        """Return the Optuna study of the baselines."""
        return self._study(f"{self.name}.baselines", create)

    def confirmation(self, *, create: bool = False) -> optuna.Study:
        """Return the Optuna study of the confirmation."""
        return self._study(f"{self.name}.confirm", create)

    def search_name(self) -> str:
        """Return the name of the search's Optuna study.

        It is the study's own, or that of the version that a changed space has made of it.
        """
        version = self.folder / "search"
        return version.read_text().strip() if version.is_file() else self.name

    def _lost_version(self) -> str | None:
        """Return what the file `search` should say where it is missing."""
        if (self.folder / "search").is_file() or not self._has_storage():
            return None
        return current_version(self.storage(), self.name)

    def restore_version(self) -> str | None:
        """Write the file `search` where it was lost, and return what it says."""
        if version := self._lost_version():
            atomic_write(self.folder / "search", version)
        return version

    def _study(self, name: str, create: bool) -> optuna.Study:
        create_study = partial(optuna.create_study, study_name=name, direction="maximize")
        if not create and self._opened is None and not self._has_storage():
            return create_study()  # in memory: reading creates no file
        if create:
            with self.transaction():
                storage = self.storage()
                self._claim(storage)
                return create_study(storage=storage, load_if_exists=True)
        storage = self.storage()
        try:
            return optuna.load_study(study_name=name, storage=storage)
        except KeyError:
            names = [study.study_name for study in storage.get_all_studies()]
            if self.search_name() in names or not names or self._url:
                return create_study()
            raise StudyError(
                f"{self.folder} holds the study {names[0]!r}, not {self.name!r}; "
                f"set the name in its study.yaml back."
            ) from None

    def _has_storage(self) -> bool:
        """Return whether the file of the storage exists; a database on a server is taken to."""
        file = sqlite_file(self._url, self.folder) if self._url else self.folder / "study.journal"
        return file is None or file.is_file()

    def _claim(self, storage: BaseStorage) -> None:
        """Create the search, unless it is there; refuse that of another folder."""
        names = {study.study_name for study in storage.get_all_studies()}
        name = self.search_name()
        study = optuna.load_study(study_name=name, storage=storage) if name in names else None
        # A journal lies in its own folder. In a database the study may be another one's.
        owner = None if study is None or self._url else study.user_attrs.get("folder")
        folder_id = self.claim_id(owner)
        if study is None:
            directions = list(self.config().objectives.values())
            study = optuna.create_study(study_name=name, storage=storage, directions=directions)
            study.set_user_attr("folder", folder_id)
        elif study.user_attrs.get("folder", folder_id) != folder_id:
            raise StudyError(
                f"{self.storage_text} holds a study {self.name!r} of another folder than "
                f"{self.folder}; give this one another name, or use that folder."
            )

    @property
    def storage_text(self) -> str:
        """Name the storage in a message, without secrets."""
        return without_secrets(self._url) if self._url else str(self.folder / "study.journal")

    def read_id(self) -> str | None:
        """Read what ties the folder to its studies; None before the study begins."""
        return read_id(self.folder)

    def claim_id(self, owner: str | None = None) -> str:
        """Return what ties the folder to its studies; where it is missing it is written.

        Args:
            owner: what it was, where the study itself says so.
        """
        folder_id = self.read_id()
        if folder_id is None:
            folder_id = owner or uuid.uuid4().hex
            write_id(self.folder, folder_id)
        self._folder_id = folder_id
        return folder_id

    # Trial folders without their trials

    def unknown_folders(self) -> list[str]:
        """List the folders of runs that the storage does not know, relative to the study's."""
        numbers = begun_trials(self.folder)  # before the storage is read: trials begin there
        others = begun_folders(self.folder)
        n_stored = len(trial_records(self.stored_search()))
        records = [*trial_records(self.baselines()), *trial_records(self.confirmation())]
        stored = {str(record.folder) for record in records}
        unknown = [str(trial_path(number)) for number in numbers if number >= n_stored]
        return unknown + [path for path in others if path not in stored]

    def lost_ends(self) -> list[int]:
        """List the trials of the search that had ended, as their folders say, but have no end."""
        records = trial_records(self.stored_search())
        open_numbers = [r.number for r in records if not r.frozen.state.is_finished()]
        return [number for number in open_numbers if has_ended(self.trial_folder(number))]

    def _check_complete(self) -> None:
        check_not_orphaned(self.folder)
        for number in self.lost_ends():
            logger.warning(
                "%s has lost the end of trial %d; `amlp-ray study repair %s` restores it",
                self.storage_text,
                number,
                self.folder.name,
            )
        if version := self._lost_version():
            raise StudyError(
                f"{self.folder} has lost its file `search`, which names {version}; "
                f"`amlp-ray study repair {self.folder.name}` writes it."
            )
        if unknown := self.unknown_folders():
            noun = "1 run" if len(unknown) == 1 else f"{len(unknown)} runs"
            raise StudyError(
                f"{self.folder} holds the folders of {noun} that {self.storage_text} does not "
                f"know, such as {unknown[0]}; `amlp-ray study repair {self.folder.name}` restores "
                f"what was stored from these folders."
            )

    # Changes, of which each is whole or not there

    @contextmanager
    def transaction(
        self, new: StudyConfig | None = None, *, wait_s: float = WAIT_S
    ) -> Iterator[StudyConfig]:
        """Hold the study for one change. What the change follows from is read inside.

        Changes of other processes wait, and none is lost. May be entered again inside.

        Args:
            new: settings of a study that is begun if it is not there.
            wait_s: how long to wait for the changes of others.

        Yields:
            The settings as they are now.

        Raises:
            BusyStudyError: others change the study for longer than `wait_s`.
            StudyError: the study is not there any more, or its folder cannot be written.
        """
        if new is not None and self._folder_id is None:
            self.folder.mkdir(parents=True, exist_ok=True)
        with self._changes.hold(wait_s):
            study_file = self.folder / "study.yaml"
            folder_id = self.read_id()
            if self._folder_id is not None and folder_id not in (None, self._folder_id):
                raise StudyError(
                    f"Study {self.name!r} was deleted and begun anew meanwhile; open it again."
                )
            self._folder_id = folder_id
            if not study_file.is_file():
                check_not_orphaned(self.folder)
                if new is None:
                    raise StudyError(f"Study {self.name!r} was deleted meanwhile.")
                write_yaml(new, study_file)
            yield self.config()

    # One driver at a time, and requests to it

    @contextmanager
    def lock(self, *, counted: bool = True) -> Iterator[Lease]:
        """Hold the study for this process: a RUNNING trial found now belongs to a dead driver.

        Two locks are held. The kernel frees that of the folder when the process dies, however it
        dies. A lease in the storage covers machines that share a database and no folder.

        Args:
            counted: whether the time counts in `budget.hours`.

        Raises:
            StudyError: another process runs this study; the message names it.
        """
        with self.transaction():
            folder_lock = self.lock_folder()
            try:
                study = self.search(create=True)
                self._check_readable(study)
                clear_requests(study)
                lease = Lease(study, wait=self._url is not None, counted=counted)
            except BaseException:
                folder_lock.close()
                raise
        with folder_lock:
            try:
                yield lease
            finally:
                lease.release()

    def _check_readable(self, study: optuna.Study) -> None:
        """Refuse to run trials whose parameters cannot be read."""
        for trial in study.get_trials(deepcopy=False):
            if reason := trial.user_attrs.get(DAMAGED):
                raise StudyError(
                    f"Trial {trial.number} of study {self.name!r} is damaged ({reason}); "
                    f"`amlp-ray study repair {self.folder.name}` restores it from its folder."
                )

    def lock_folder(self) -> TextIO:
        """Take the lock of whoever runs the study; closing the file frees it."""
        path = self.folder / "run.lock"
        try:
            return acquire_lock(path, wait_s=READER_S, owner=here())
        except BlockingIOError:
            raise StudyError(
                f"Study {self.name!r} is already run by {lock_owner(path) or 'another process'}; "
                f"wait for it, or end it, before running the study again."
            ) from None

    def holder(self) -> str | None:
        """Return who runs this study now, such as `process 12 on host`; None for nobody."""
        return lock_owner(self.folder / "run.lock") or read_lease(self.stored_search())

    def is_run(self) -> bool:
        """Return whether a process runs this study now."""
        return self.holder() is not None


def read_metrics(folder: Path) -> list[Metrics]:
    """Read `metrics.jsonl` of a trial's folder, one dict per epoch."""
    return read_rows(folder / "metrics.jsonl")
