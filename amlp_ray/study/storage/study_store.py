"""Open a study's folder of plain files and its Optuna storage.

    <runs>/<name>/
      study.yaml         the study's config in full
      study.journal      three Optuna studies: `<name>` holds the search, `<name>.baselines` the
                         baselines, `<name>.confirm` the confirmation
      id                 ties the folder to its studies where these are in a database instead
      format             number of this layout
      environment.json   commit, versions, hardware, seeds and data of the first run
      environments.jsonl the same of every run
      events.log         a line per change of a trial's state
      trials/<number>/   config.yaml, metrics.jsonl, score.json, rungs/, checkpoint/,
                         encoder.safetensors, pictures/
      baselines/<baseline>-<repeat>/  the same files
      confirm/<candidate>-<repeat>/   the same, finetune.json and test.json
      report.html

Paths in the store are relative, so a folder may be moved. No pickle is ever read.
Baselines have an Optuna study of their own. They have no searched parameters: inside the search
they would blind multivariate TPE, and could come out as its best trial.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, Unpack

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from amlp_ray.config import StudyConfig
from amlp_ray.config.base import build
from amlp_ray.config.yaml_file import read_yaml
from amlp_ray.errors import StudyError
from amlp_ray.study.storage.lease import Lease, here, read_lease
from amlp_ray.study.storage.optuna_storage import open_database, open_journal, without_secrets
from amlp_ray.study.storage.trial_record import (
    TrialAttributes,
    TrialRecord,
    confirm_path,
    finite,
    trial_path,
)
from amlp_ray.training.loggers.metrics_file import Metrics, read_rows
from amlp_ray.utils.files import atomic_write, local_path
from amlp_ray.utils.locks import acquire_lock, lock_owner

Request = Literal["pause", "stop", "cancel"]
READ_RETRY_S = 10.0  # how long a command that only reads waits for a database
READER_S = 1.0  # within which a process that only looked at the lock has let go of it
FORMAT = 1  # of the study folder; raised when an older one can no longer be read


class StudyStore:
    """Paths and storages of one study folder. Opening reads only what is asked for."""

    def __init__(self, folder: str | Path, name: str | None = None) -> None:
        """Name a folder, which need not exist yet, and its study; by default both have one name."""
        self.folder = local_path(folder)
        self.name = name or self.folder.name
        self._opened: BaseStorage | None = None
        self._ids: dict[tuple[str, int], int] = {}
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
            parent = store.folder.parent
            names = sorted(path.parent.name for path in parent.glob("*/study.yaml"))
            advice = "start one with `amlp-ray study run FILE.yaml`."
            if names:
                advice = f"studies there: {', '.join(names)}."
            raise StudyError(f"There is no study {store.name!r} in {parent}; {advice}")
        store.name = store.config().name
        return store

    def config(self) -> StudyConfig:
        """Read study.yaml.

        Raises:
            StudyError: another version wrote the folder. ConfigError: the file has a mistake.
        """
        self._check_format()
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

    def storage(self, *, retry_seconds: float | None = None) -> BaseStorage:
        """Return the storage of all three studies, opened once.

        Args:
            retry_seconds: how long to retry while it cannot be reached. Given by the process that
                runs the study, before anything else is read.
        """
        if self._opened is None or retry_seconds is not None:
            seconds = READ_RETRY_S if retry_seconds is None else retry_seconds
            if self._url:
                self._opened = open_database(self._url, seconds)
            else:
                self._opened = open_journal(self.folder / "study.journal", seconds)
        return self._opened

    def search(self, *, create: bool = False) -> optuna.Study:
        """Return the Optuna study of the search; plain `optuna.load_study` opens the same."""
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

    def _study(self, name: str, create: bool) -> optuna.Study:
        journal = self.folder / "study.journal"
        create_study = partial(optuna.create_study, study_name=name, direction="maximize")
        if not create and self._opened is None and not journal.is_file() and not self._url:
            return create_study()  # in memory: reading creates no file
        storage = self.storage()
        if create:
            self._claim(storage)
            return create_study(storage=storage, load_if_exists=True)
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

    def _claim(self, storage: BaseStorage) -> None:
        """Create the search, unless it is there; refuse that of another folder."""
        id_file = self.folder / "id"
        if not id_file.is_file():
            atomic_write(self.folder / "format", str(FORMAT))
            atomic_write(id_file, uuid.uuid4().hex)
        folder_id = id_file.read_text()
        name = self.search_name()
        names = {study.study_name for study in storage.get_all_studies()}
        if name not in names:
            directions = list(self.config().objectives.values())
            study = optuna.create_study(study_name=name, storage=storage, directions=directions)
            study.set_user_attr("folder", folder_id)
            return
        study = optuna.load_study(study_name=name, storage=storage)
        if study.user_attrs.get("folder", folder_id) != folder_id:
            raise StudyError(
                f"{without_secrets(self._url) if self._url else self.folder} holds a study "
                f"{self.name!r} of another folder than {self.folder}; give this one another name, "
                f"or use that folder."
            )

    def _check_format(self) -> None:
        """Refuse a study that was begun by a version whose folders look otherwise."""
        if not (self.folder / "id").is_file():
            return
        file = self.folder / "format"
        stored_format = file.read_text().strip() if file.is_file() else "0"
        if stored_format != str(FORMAT):
            raise StudyError(
                f"{self.folder} has study format {stored_format}, and this version of amlp-ray "
                f"reads format {FORMAT}; use the version that began the study, or begin a new one."
            )

    # Trials: the one place that knows how Optuna stores them

    def add_trial(self, study: optuna.Study, trial: FrozenTrial) -> TrialRecord:
        """Store a new trial of `optuna.trial.create_trial` and return it with its number."""
        storage = self.storage()
        study_id = storage.get_study_id_from_name(study.study_name)
        trial_id = storage.create_new_trial(study_id, trial)
        stored = storage.get_trial(trial_id)
        self._ids[study.study_name, stored.number] = trial_id
        return TrialRecord.from_frozen(stored)

    def trial(self, study: optuna.Study, number: int) -> TrialRecord:
        """Read one trial as it is stored now."""
        return TrialRecord.from_frozen(self.storage().get_trial(self._id_of(study, number)))

    def report(self, study: optuna.Study, number: int, epoch: int, value: float | None) -> bool:
        """Store the score of a rung, unless it is missing, not finite or stored already.

        Returns:
            Whether it was stored.
        """
        score = finite(value)
        trial_id = self._id_of(study, number)
        if score is None or epoch in self.storage().get_trial(trial_id).intermediate_values:
            return False
        self.storage().set_trial_intermediate_value(trial_id, epoch, score)
        return True

    def finish(
        self,
        study: optuna.Study,
        number: int,
        state: TrialState,
        values: Sequence[float] | None = None,
    ) -> None:
        """Store that a trial ended as COMPLETE, PRUNED or FAIL, and its values by objective."""
        self.storage().set_trial_state_values(self._id_of(study, number), state, values)

    def start_enqueued(
        self,
        study: optuna.Study,
        number: int,
        params: Mapping[str, Any],
        distributions: Mapping[str, BaseDistribution],
    ) -> TrialRecord:
        """Store the parameters of a waiting trial, and that it runs now."""
        self.set_params(study, number, params, distributions)
        self.storage().set_trial_state_values(self._id_of(study, number), TrialState.RUNNING)
        return self.trial(study, number)

    def set_params(
        self,
        study: optuna.Study,
        number: int,
        params: Mapping[str, Any],
        distributions: Mapping[str, BaseDistribution],
    ) -> None:
        """Store the parameters of a waiting trial."""
        trial_id = self._id_of(study, number)
        for name, distribution in distributions.items():
            internal = distribution.to_internal_repr(params[name])
            self.storage().set_trial_param(trial_id, name, internal, distribution)

    def set_attrs(
        self, study: optuna.Study, number: int, **attributes: Unpack[TrialAttributes]
    ) -> None:
        """Store user attributes of a trial."""
        trial_id = self._id_of(study, number)
        for name, value in attributes.items():
            self.storage().set_trial_user_attr(trial_id, name, value)

    def set_constraints(self, study: optuna.Study, number: int, excess: Sequence[float]) -> None:
        """Store by how much a trial exceeds each limit, where Optuna's dashboard reads it."""
        trial_id = self._id_of(study, number)
        self.storage().set_trial_system_attr(trial_id, "constraints", list(excess))

    def _id_of(self, study: optuna.Study, number: int) -> int:
        key = study.study_name, number
        if key not in self._ids:
            storage = self.storage()
            study_id = storage.get_study_id_from_name(study.study_name)
            self._ids[key] = storage.get_trial_id_from_study_id_trial_number(study_id, number)
        return self._ids[key]

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
        path = self.folder / "run.lock"
        try:
            folder_lock = acquire_lock(path, wait_s=READER_S, owner=here())
        except BlockingIOError:
            raise StudyError(
                f"Study {self.name!r} is already run by {lock_owner(path) or 'another process'}; "
                f"wait for it, or end it, before running the study again."
            ) from None
        with folder_lock:
            study = self.search(create=True)
            lease = Lease(study, wait=self._url is not None, counted=counted)
            try:
                yield lease
            finally:
                lease.release()

    def holder(self) -> str | None:
        """Return who runs this study now, such as `process 12 on host`; None for nobody."""
        return lock_owner(self.folder / "run.lock") or read_lease(self.search())

    def is_run(self) -> bool:
        """Return whether a process runs this study now."""
        return self.holder() is not None

    def request(self, verb: Request) -> None:
        """Ask the process that runs the study, wherever it is; it polls every second."""
        request = {"verb": verb, "by": here(), "id": uuid.uuid4().hex}
        self.search().set_user_attr("request", request)

    def last_request(self) -> dict[str, Any] | None:
        """Return the last request as `verb`, `by`, `id` and, once the driver has it, `answer`."""
        return self.search().user_attrs.get("request")


def read_metrics(folder: Path) -> list[Metrics]:
    """Read `metrics.jsonl` of a trial's folder, one dict per epoch."""
    return read_rows(folder / "metrics.jsonl")
