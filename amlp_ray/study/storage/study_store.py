"""The study store: one folder of plain files, and an Optuna storage. No pickle is ever read from either.

    <runs>/<name>/
      study.yaml         as given, in full
      study.journal      three Optuna studies: `<name>`, the search; `<name>.baselines`, the baselines; `<name>.confirm`
      id                 ties the folder to its studies where these are in a database instead
      environment.json   commit, versions, hardware, seeds, data of the first run; environments.jsonl: of all
      events.log         a line per change of a trial's state
      trials/<number>/   config.yaml, metrics.jsonl, score.json, rungs/, checkpoint/, encoder.safetensors, pictures/
      baselines/<baseline>-<repeat>/           the same files
      confirm/<candidate>-<repeat>/  the same, finetune.json and test.json
      report.html

Paths in the store are relative: a folder may be moved. Baselines live in an Optuna study of their own: they have no searched
parameters, so inside the search they would blind multivariate TPE, and could come out as its best trial.
"""

from __future__ import annotations

import fcntl
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.storages import BaseStorage
from optuna.study import StudyDirection

from amlp_ray.config import Direction, StudyConfig
from amlp_ray.config.base import build
from amlp_ray.config.yaml_file import read_yaml
from amlp_ray.errors import StudyError
from amlp_ray.study.storage.lease import Lease, here, read_lease
from amlp_ray.study.storage.optuna_storage import open_database, open_journal, shown
from amlp_ray.training.loggers.metrics_file import Metrics, read_rows
from amlp_ray.utils.files import write_whole

Directions = Sequence[Direction | StudyDirection]
Request = Literal["pause", "stop", "cancel"]
LOOK_S = 10.0  # that a command which only looks waits for a database


class StudyStore:
    """Paths and storages of one study folder. Opening reads only what is asked for."""

    def __init__(self, folder: str | Path, name: str | None = None) -> None:
        """Args: name: of the study; none: that of the folder, which may have been renamed since."""
        self.folder = Path(folder).absolute()
        self.name = name or self.folder.name
        self._storage: BaseStorage | None = None
        self._held_url: tuple[str | None] | None = None

    @property
    def _url(self) -> str | None:
        """Of the database, where the study is not in a journal; not known before there is a study.yaml."""
        if self._held_url is None and (self.folder / "study.yaml").is_file():
            self._held_url = (self.config().storage,)
        return self._held_url[0] if self._held_url else None

    @classmethod
    def open(cls, folder: str | Path) -> StudyStore:
        """Open an existing study. Raises StudyError where there is none."""
        store = cls(folder)
        if not (store.folder / "study.yaml").is_file():
            parent = store.folder.parent
            there = sorted(p.parent.name for p in parent.glob("*/study.yaml"))
            raise StudyError(
                f"There is no study {store.name!r} in {parent}; "
                + (
                    f"studies there: {', '.join(there)}."
                    if there
                    else "start one with `amlp-ray study run FILE.yaml`."
                )
            )
        store.name = store.config().name
        return store

    def config(self) -> StudyConfig:
        path = self.folder / "study.yaml"
        return build(StudyConfig, read_yaml(path), str(path))

    def trial_folder(self, number: int) -> Path:
        return self.folder / "trials" / str(number)

    def arm_folder(self, baseline: str, repeat: int) -> Path:
        return self.folder / "baselines" / f"{baseline}-{repeat}"

    def confirm_folder(self, candidate: str, repeat: int) -> Path:
        return self.folder / "confirm" / f"{candidate}-{repeat}"

    # Optuna

    def storage(
        self, *, patience: float | None = None, notify: Callable[[str], None] = lambda line: None
    ) -> BaseStorage:
        """The storage of all three studies, opened once.

        Args:
            patience: seconds that it may be gone; given by the one who runs the study, before anything else is asked.
        """
        if self._storage is None or patience is not None:
            wait = LOOK_S if patience is None else patience
            if self._url:
                self._storage = open_database(self._url, wait, notify)
            else:
                self._storage = open_journal(self.folder / "study.journal", wait, notify)
        return self._storage

    def search(
        self, *, create: bool = False, directions: Directions = ("maximize",)
    ) -> optuna.Study:
        """Return the Optuna study of the search; plain `optuna.load_study` opens the same."""
        return self._study(self.search_name(), create, directions)

    def baselines(self, *, create: bool = False) -> optuna.Study:
        """Return the Optuna study of the baseline baselines; user attributes `baseline` and `repeat` name each trial."""
        return self._study(f"{self.name}.baselines", create)

    def confirmation(self, *, create: bool = False) -> optuna.Study:
        """Return the Optuna study of the confirmation; user attributes `candidate` and `repeat` name each trial."""
        return self._study(f"{self.name}.confirm", create)

    def search_name(self) -> str:
        """Name of the search's Optuna study: `<name>`, or of the version that a changed space has made of it."""
        versions = self.folder / "search"
        return versions.read_text().strip() if versions.is_file() else self.name

    def _study(
        self, name: str, create: bool, directions: Directions = ("maximize",)
    ) -> optuna.Study:
        journal = self.folder / "study.journal"
        if not create and self._storage is None and not journal.is_file() and not self._url:
            return optuna.create_study(
                study_name=name, directions=list(directions)
            )  # not begun; a look writes nothing
        storage = self.storage()
        if create:
            self._claim(storage)
            return optuna.create_study(
                study_name=name, storage=storage, directions=list(directions), load_if_exists=True
            )
        try:
            return optuna.load_study(study_name=name, storage=storage)
        except KeyError:
            there = [study.study_name for study in storage.get_all_studies()]
            if self.search_name() in there or not there or self._url:
                return optuna.create_study(study_name=name, directions=list(directions))
            raise StudyError(
                f"{self.folder} holds the study {there[0]!r}, not {self.name!r}; set the name in its study.yaml back."
            ) from None

    def _claim(self, storage: BaseStorage) -> None:
        """Refuse a database that holds a study of our name from another folder."""
        mark = self.folder / "id"
        if not mark.is_file():
            write_whole(mark, uuid.uuid4().hex)
        ours = mark.read_text()
        name = self.search_name()
        names = {study.study_name for study in storage.get_all_studies()}
        if name not in names:
            study = optuna.create_study(
                study_name=name,
                storage=storage,
                directions=list(self.config().objectives.values()),
            )
            study.set_user_attr("folder", ours)
            return
        theirs = optuna.load_study(study_name=name, storage=storage).user_attrs.get("folder", ours)
        if theirs != ours:
            raise StudyError(
                f"{shown(self._url) if self._url else self.folder} holds a study {self.name!r} of another folder than "
                f"{self.folder}; give this one another name, or use that folder."
            )

    # One driver at a time, and word for it

    @contextmanager
    def lock(self, *, counted: bool = True) -> Iterator[Lease]:
        """Hold the study for this process: one driver at a time, so a RUNNING trial found here belongs to a dead one.

        Two locks: one of the folder, which the kernel frees when the process dies, however it dies; and a lease in the
        storage, for machines that share a database and no folder.

        Args:
            counted: whether the time counts in `budget.hours`.

        Raises:
            StudyError: naming the holder, where another process runs this study.
        """
        with (self.folder / "run.lock").open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise StudyError(
                    f"Study {self.name!r} is already run by {file.read() or 'another process'}; "
                    f"wait for it, or end it, before running the study again."
                ) from None
            file.truncate(0)
            file.write(here())
            file.flush()
            study = self.search(create=True, directions=list(self.config().objectives.values()))
            lease = Lease(study, wait=self._url is not None, counted=counted)
            try:
                yield lease
            finally:
                lease.release()

    def holder(self) -> str | None:
        """Who runs this study at this moment, such as `process 12 on host`; None where nobody does."""
        lock = self.folder / "run.lock"
        if lock.is_file():
            with lock.open("r+") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return file.read() or "another process"
        return read_lease(self.search())

    def is_run(self) -> bool:
        return self.holder() is not None

    def request(self, verb: Request) -> None:
        """Leave word for the process that runs the study, wherever it is; it looks every second."""
        self.search().set_user_attr("request", {"verb": verb, "by": here(), "id": uuid.uuid4().hex})

    def requested(self) -> dict[str, Any] | None:
        """What was asked last of a running driver, as `verb`, `by`, `id` and, where it has answered, `answer`."""
        return self.search().user_attrs.get("request")


def read_metrics(folder: Path) -> list[Metrics]:
    """Read `metrics.jsonl` of a trial's folder, one dict per epoch."""
    return read_rows(folder / "metrics.jsonl")
