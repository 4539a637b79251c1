"""The study store: one folder with an Optuna journal and plain files. No pickle is ever read from it.

    <runs>/<name>/
      study.yaml         as given, in full
      study.journal      Optuna journal of two Optuna studies: `<name>`, the search, and `<name>.arms`, the baselines
      environment.json   commit, versions, hardware, seeds, dataset fingerprint
      trials/<number>/   settings.yaml, metrics.jsonl, score.json, checkpoint/, encoder.safetensors, pictures/
      arms/<arm>-<repeat>/   the same files
      report.html

Arms live in an Optuna study of their own: they have no searched parameters, so inside the search they would blind
multivariate TPE, whose space is the intersection of all trials, and could come out as its best trial.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from amlp_ray.config import StudySettings
from amlp_ray.errors import StudyError
from amlp_ray.settings import build, read_yaml
from amlp_ray.training.metrics import Metrics, read_rows

optuna.logging.set_verbosity(optuna.logging.WARNING)  # a line per state change is ours to print


class StudyStore:
    """Paths and storages of one study folder. Opening reads only what is asked for."""

    def __init__(self, folder: str | Path, name: str | None = None) -> None:
        """Args: name: of the study; none: that of the folder, which may have been renamed since."""
        self.folder = Path(folder).absolute()
        self.name = name or self.folder.name

    @classmethod
    def open(cls, folder: str | Path) -> StudyStore:
        """Open an existing study. Raises StudyError where there is none."""
        store = cls(folder)
        if not (store.folder / "study.yaml").is_file():
            parent = store.folder.parent
            there = sorted(p.parent.name for p in parent.glob("*/study.yaml"))
            raise StudyError(
                f"There is no study {store.name!r} in {parent}; "
                + (f"studies there: {', '.join(there)}." if there else "start one with `amlp-ray study run FILE.yaml`.")
            )
        store.name = store.settings().name
        return store

    def settings(self) -> StudySettings:
        path = self.folder / "study.yaml"
        return build(StudySettings, read_yaml(path), str(path))

    def trial_folder(self, number: int) -> Path:
        return self.folder / "trials" / str(number)

    def arm_folder(self, arm: str, repeat: int) -> Path:
        return self.folder / "arms" / f"{arm}-{repeat}"

    def storage(self) -> JournalStorage:
        return JournalStorage(JournalFileBackend(str(self.folder / "study.journal")))

    def search(self, storage: JournalStorage | None = None, *, create: bool = False) -> optuna.Study:
        """Return the Optuna study of the search; plain `optuna.load_study` opens the same."""
        return self._study(self.name, storage, create)

    def arms(self, storage: JournalStorage | None = None, *, create: bool = False) -> optuna.Study:
        """Return the Optuna study of the baseline arms; user attributes `arm` and `repeat` name each trial."""
        return self._study(f"{self.name}.arms", storage, create)

    def _study(self, name: str, storage: JournalStorage | None, create: bool) -> optuna.Study:
        storage = storage or self.storage()
        if create:
            return optuna.create_study(study_name=name, storage=storage, direction="maximize", load_if_exists=True)
        try:
            return optuna.load_study(study_name=name, storage=storage)  # a look writes nothing
        except KeyError:
            there = [study.study_name for study in storage.get_all_studies()]
            if self.name in there or not there:  # not begun: empty, and in memory only
                return optuna.create_study(study_name=name, direction="maximize")
            raise StudyError(
                f"{self.folder} holds the study {there[0]!r}, not {self.name!r}; set the name in its study.yaml back."
            ) from None

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the study for this process: one driver at a time, so a RUNNING trial found here belongs to a dead one.

        The kernel frees the lock when the process dies, however it dies.

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
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            self._mend_journal()
            yield

    def is_run(self) -> bool:
        """Whether a process runs this study at this moment."""
        with (self.folder / "run.lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False

    def _mend_journal(self) -> None:
        """Cut a last line that a full disk or a power loss left half-written: the next one would be glued to it."""
        journal = self.folder / "study.journal"
        if journal.is_file():
            whole = journal.read_bytes()
            if whole and not whole.endswith(b"\n"):
                os.truncate(journal, whole.rfind(b"\n") + 1)


def read_metrics(folder: Path) -> list[Metrics]:
    """Read `metrics.jsonl` of a trial's folder, one dict per epoch."""
    return read_rows(folder / "metrics.jsonl")
