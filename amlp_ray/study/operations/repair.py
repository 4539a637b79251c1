"""Rebuild the storage of a study from the folders of its runs, where it was lost or damaged.

What can still be read of the storage is kept. A journal is written anew, and the old one stays
beside it. Into a database, missing trials are added.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

from amlp_ray.config import ABLATIONS, StudyConfig
from amlp_ray.errors import ConfigError, StudyError
from amlp_ray.study.baselines import baseline_plan
from amlp_ray.study.confirmation.confirm import TEST_UNLOCKED, TRIAL_NAME, TestUnlock
from amlp_ray.study.operations.rebuild import Kind, Rebuilder, run_seconds
from amlp_ray.study.storage.journal import Journal
from amlp_ray.study.storage.journal_lines import DAMAGED
from amlp_ray.study.storage.lease import read_lease
from amlp_ray.study.storage.optuna_storage import IS_VERSION, open_journal
from amlp_ray.study.storage.study_store import StudyStore
from amlp_ray.study.storage.trial_files import begun_folders, begun_trials
from amlp_ray.study.storage.trial_record import TrialRecord, finite
from amlp_ray.utils.text import counted

NO_RECORD = "nothing is left of it but its number"


@dataclass
class Repair:
    """What a repair did."""

    kept: int = 0
    """How many trials and runs the storage had, and has as they were."""
    restored: list[str] = field(default_factory=list)
    """Runs that were restored from their folders, such as `trial 3`."""
    gone: list[int] = field(default_factory=list)
    """Numbers of the search of which neither a record nor a folder is left."""
    notes: list[str] = field(default_factory=list)
    """What cannot be known, a sentence each."""
    copy: str | None = None
    """Where the damaged journal is kept."""


@dataclass
class _Study:
    """An Optuna study as it is to be stored."""

    name: str
    directions: Sequence[optuna.study.StudyDirection]
    attributes: dict[str, Any]
    trials: list[FrozenTrial] = field(default_factory=list)


def repair(store: StudyStore) -> Repair:
    """Restore what a study's storage lost or cannot read, from the folders of its runs.

    Afterwards the study can be read, run and resumed. Trials that had ended are not run again.

    Raises:
        StudyError: somebody runs the study, or its database cannot be read.
        ConfigError: study.yaml has a mistake.
    """
    with store.transaction() as config, store.lock_folder():
        result = Repair()
        rebuilder = _Runs(store, config, result)
        studies = rebuilder.studies()
        if config.storage is not None:
            rebuilder.add_to_database(studies)
        elif result.restored or result.gone or rebuilder.has_problems:
            _replace_journal(store, [*rebuilder.earlier_searches(studies), *studies], result)
        store.reopen()
    return result


class _Runs:
    """Collects the runs of a study from its storage and its folders.

    Attributes:
        has_problems: whether the journal has lines that cannot be read.
    """

    def __init__(self, store: StudyStore, config: StudyConfig, result: Repair) -> None:
        self._store = store
        self._config = config
        self._result = result
        self._rebuilder = Rebuilder(config, store.folder)
        self._numbers = begun_trials(store.folder)
        self._folders = begun_folders(store.folder)
        self._stored: list[optuna.Study] = []
        self._is_suspicious = True  # whether folders are to be believed more than the storage
        self._params: dict[int, dict[str, Any]] = {}  # of the search, by number
        try:
            store.reopen()
            if version := store.restore_version():
                result.notes.append(f"the search is {version}, as the storage says")
            self.has_problems = _has_damaged_lines(store, config)
            self._stored = [store.stored_search(), store.baselines(), store.confirmation()]
        except StudyError as error:
            if config.storage is not None:
                raise
            self.has_problems = True
            result.notes.append(f"nothing could be read of the old journal: {error}")
            return
        self._is_suspicious = (
            self.has_problems or bool(store.unknown_folders()) or bool(store.lost_ends())
        )
        if holder := read_lease(self._stored[0]):
            raise StudyError(f"Study {store.name!r} is run by {holder}; end it before.")

    def studies(self) -> list[_Study]:
        """Return the three studies as they are to be stored."""
        search = self._study(0, self._store.search_name(), list(self._config.objectives.values()))
        stored = self._records(0)
        n_trials = max([len(stored), *(number + 1 for number in self._numbers)], default=0)
        for number in range(n_trials):
            stored_trial = stored[number] if number < len(stored) else None
            search.trials.append(self._trial(number, stored_trial))
        self._params = {index: trial.params for index, trial in enumerate(search.trials)}
        baselines = self._study(1, f"{self._store.name}.baselines", ["maximize"])
        baselines.trials = self._runs(1, "baselines/")
        confirm = self._study(2, f"{self._store.name}.confirm", ["maximize"])
        confirm.trials = self._runs(2, "confirm/")
        if not search.attributes:
            search.attributes = self._search_attributes()
        self._restore_unlock(confirm)
        has_confirmation = confirm.trials or confirm.attributes
        return [search, baselines, confirm] if has_confirmation else [search, baselines]

    def earlier_searches(self, studies: Sequence[_Study]) -> list[_Study]:
        """Return what the old journal holds beside these: searches before the space was changed."""
        names = {study.name for study in studies}
        stored = self._store.storage().get_all_studies() if self._stored else []
        earlier = []
        for frozen in stored:
            if frozen.study_name not in names:
                study = optuna.load_study(
                    study_name=frozen.study_name, storage=self._store.storage()
                )
                earlier.append(
                    _Study(
                        frozen.study_name,
                        study.directions,
                        dict(study.user_attrs),
                        study.get_trials(),
                    )
                )
        return earlier

    def add_to_database(self, studies: Sequence[_Study]) -> None:
        """Add the trials that a database lacks.

        Raises:
            StudyError: it has other ones by their numbers.
        """
        store = self._store
        self._adopt_id()
        for before, after in zip(self._records(0), studies[0].trials, strict=False):
            if not _is_same_trial(before, after) and before.state != TrialState.WAITING:
                raise StudyError(
                    f"{store.storage_text} has other parameters of trial {before.number} than its "
                    f"folder in {store.folder}; restore the database from a backup, or set another "
                    f"name or storage in study.yaml and repair again."
                )
        openers = (store.stored_search, store.baselines, store.confirmation)
        for index, study in enumerate(studies):
            n_stored = len(self._records(index))
            target = openers[index](create=True)
            for name, value in study.attributes.items():
                if name not in target.user_attrs:
                    target.set_user_attr(name, value)
            for trial in study.trials[n_stored:]:
                store.add_trial(target, trial)
            self._end_stored(target, study.trials[:n_stored])

    def _end_stored(self, study: optuna.Study, trials: Sequence[FrozenTrial]) -> None:
        """Store how trials ended that a database has as running, although their folders ended."""
        stored = study.get_trials(deepcopy=False)[: len(trials)]  # without those just added
        for number, (before, after) in enumerate(zip(stored, trials, strict=True)):
            if before.state.is_finished() or not after.state.is_finished():
                continue
            for epoch, score in after.intermediate_values.items():
                self._store.report(study, number, epoch, score)
            self._store.set_attrs(study, number, **after.user_attrs)
            self._store.finish(study, number, after.state, after.values)

    def _adopt_id(self) -> None:
        """Tie a folder that has lost its file `id` to the study of its name in the database.

        Raises:
            StudyError: its trials are other ones, so that it belongs to another folder.
        """
        owner = self._stored[0].user_attrs.get("folder")
        if self._store.read_id() is not None or owner is None:
            return
        records = self._records(0)
        for number in self._numbers:
            rebuilt = self._rebuilder.rebuild(
                self._store.trial_folder(number), "search", f"trial {number}"
            )
            if number >= len(records) or records[number].params != rebuilt.trial.params:
                raise StudyError(
                    f"{self._store.storage_text} holds a study {self._store.name!r} whose trials "
                    f"are not those of {self._store.folder}; set another name in its study.yaml."
                )
        self._store.claim_id(owner)

    def _study(self, index: int, name: str, directions: list[Any]) -> _Study:
        stored = self._stored[index] if self._stored else None
        attributes = {} if stored is None else dict(stored.user_attrs)
        if attributes.get("lease"):
            attributes["lease"] = {**attributes["lease"], "over": True}
        parsed = [optuna.study.StudyDirection[str(item).upper()] for item in directions]
        return _Study(name, parsed, attributes)

    def _records(self, index: int) -> list[FrozenTrial]:
        return self._stored[index].get_trials(deepcopy=True) if self._stored else []

    def _trial(self, number: int, known: FrozenTrial | None) -> FrozenTrial:
        """Return a trial of the search: as it is stored, from its folder, or a mark of its loss."""
        if number not in self._numbers:
            if known is not None and DAMAGED not in known.user_attrs:
                self._result.kept += 1
                return known
            self._result.gone.append(number)
            return create_trial(
                state=TrialState.FAIL, user_attrs={"reason": NO_RECORD, "gone": True}
            )
        folder = self._store.trial_folder(number)
        return self._restored(folder, "search", f"trial {number}", {}, known)

    def _runs(self, index: int, prefix: str) -> list[FrozenTrial]:
        """Return the runs of baselines or the confirmation: the stored ones, then others."""
        trials = []
        stored_folders = set()
        for stored_trial in self._records(index):
            path = str(TrialRecord.from_frozen(stored_trial).folder)
            if DAMAGED in stored_trial.user_attrs and path not in self._folders:
                continue
            stored_folders.add(path)
            trials.append(self._run(path, stored_trial) if path in self._folders else stored_trial)
            if path not in self._folders:
                self._result.kept += 1
        for path in self._folders:
            if path.startswith(prefix) and path not in stored_folders:
                trials.append(self._run(path, None))
        return trials

    def _run(self, path: str, known: FrozenTrial | None) -> FrozenTrial:
        kind, _, name = path.partition("/")
        candidate, _, repeat = name.rpartition("-")
        attributes: dict[str, Any] = {"repeat": int(repeat), "path": path}
        attributes["uses_ground_truth"] = self._uses_ground_truth(candidate)
        folder = self._store.folder / path
        if kind == "baselines":
            attributes["baseline"] = candidate
            return self._restored(folder, "baseline", f"baseline {name}", attributes, known)
        attributes["candidate"] = candidate
        match = TRIAL_NAME.fullmatch(candidate)
        if match and match[1] is None:
            attributes["params"] = self._params.get(int(match[3]), {})
        return self._restored(folder, "confirm", f"confirm {name}", attributes, known)

    def _restored(
        self,
        folder: Path,
        kind: Kind,
        label: str,
        attributes: dict[str, Any],
        known: FrozenTrial | None,
    ) -> FrozenTrial:
        """Return a stored run, unless its folder knows more."""
        stored = known if known is not None and DAMAGED not in known.user_attrs else None
        if stored is not None and stored.state.is_finished() and not self._is_suspicious:
            self._result.kept += 1
            return stored
        rebuilt = self._rebuilder.rebuild(folder, kind, label, attributes, stored)
        if stored is not None and _is_same_trial(stored, rebuilt.trial):
            if stored.state.is_finished():
                self._result.kept += 1
                return _completed(stored, rebuilt.trial) if self.has_problems else stored
            if not rebuilt.trial.state.is_finished():
                self._result.kept += 1
                return stored
        self._result.restored.append(label)
        for unknown in rebuilt.unknown:
            self._result.notes.append(f"{label}: its files do not say {unknown}")
        return rebuilt.trial

    def _uses_ground_truth(self, candidate: str) -> bool:
        match = TRIAL_NAME.fullmatch(candidate)
        name = candidate if match is None else match[1]
        if name is None:
            return False
        try:
            return baseline_plan(self._config, name).uses_ground_truth
        except ConfigError:
            return name in ABLATIONS and name == "oracle"

    def _search_attributes(self) -> dict[str, Any]:
        """Return what is known of a search whose own attributes are lost."""
        seconds = run_seconds(self._store.folder)
        self._result.notes.append(
            f"the hours of running are taken from events.log ({seconds / 3600:.2f}); trials that "
            f"waited, were imported or answered from the store are lost"
        )
        is_version = self._store.search_name() != self._store.name
        return {
            **({IS_VERSION: True} if is_version else {}),
            "folder": self._store.claim_id(),
            "budget": self._config.budget.model_dump(mode="json"),
            "lease": {
                "id": "repair",
                "holder": "",
                "host": "",
                "pid": 0,
                "at": 0.0,
                "seconds": seconds,
                "over": True,
            },
        }

    def _restore_unlock(self, confirm: _Study) -> None:
        """Remember that the test images were opened, if the runs were scored on them."""
        tests = sorted(self._store.folder.glob("confirm/*/test.json"))
        if not tests or TEST_UNLOCKED in confirm.attributes:
            return
        opened = min(path.stat().st_mtime for path in tests)
        runs = {path.parent.name: f"confirm/{path.parent.name}" for path in tests}
        candidates = list(dict.fromkeys(name.rpartition("-")[0] for name in runs))
        when = datetime.fromtimestamp(opened).astimezone().isoformat(timespec="seconds")
        unlock = TestUnlock(when=when, commit=None, candidates=candidates, runs=runs)
        confirm.attributes[TEST_UNLOCKED] = asdict(unlock)
        self._result.notes.append(
            f"the test images were opened by {when}, as the test.json of "
            f"{counted(len(tests), 'run')} says; nothing else is scored on them"
        )


def _has_damaged_lines(store: StudyStore, config: StudyConfig) -> bool:
    """Return whether lines of the journal cannot be read; a database has none."""
    path = store.folder / "study.journal"
    if config.storage is not None or not path.is_file():
        return False
    journal = Journal(path)
    journal.read_logs(0)
    return bool(journal.reader.problems or journal.reader.lost_trials)


def _is_same_trial(stored: FrozenTrial, rebuilt: FrozenTrial) -> bool:
    """Return whether a stored trial has the parameters and scores of its folder.

    Where a line that creates a trial is gone, the next trial has taken its number, or its scores.
    """
    if stored.state == TrialState.WAITING:
        return False
    if stored.state.is_finished() and rebuilt.state.is_finished():
        if stored.state != rebuilt.state:
            return False
        if stored.values and rebuilt.values and not _are_close(stored.values, rebuilt.values):
            return False
    if rebuilt.params and not _is_same(stored.params, rebuilt.params):
        return False
    common = stored.intermediate_values.keys() & rebuilt.intermediate_values.keys()
    stored_scores = [stored.intermediate_values[epoch] for epoch in sorted(common)]
    rebuilt_scores = [rebuilt.intermediate_values[epoch] for epoch in sorted(common)]
    return _are_close(stored_scores, rebuilt_scores)


def _is_same(params: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    if params.keys() != others.keys():
        return False
    for name, value in params.items():
        numbers = (finite(value), finite(others[name]))
        if value != others[name] and (None in numbers or not _are_close([value], [others[name]])):
            return False
    return True


def _are_close(values: Sequence[float], others: Sequence[float]) -> bool:
    if len(values) != len(others):
        return False
    return all(map(partial(math.isclose, rel_tol=1e-9), values, others))


def _completed(stored: FrozenTrial, rebuilt: FrozenTrial) -> FrozenTrial:
    """Return an ended trial with the rungs and costs that its damaged journal has lost."""
    stored.intermediate_values = {**rebuilt.intermediate_values, **stored.intermediate_values}
    if "stats" not in stored.user_attrs and "stats" in rebuilt.user_attrs:
        stored.user_attrs = {**stored.user_attrs, "stats": rebuilt.user_attrs["stats"]}
    return stored


def _replace_journal(store: StudyStore, studies: Sequence[_Study], result: Repair) -> None:
    """Write a new journal and put it in the place of the old one, which is kept."""
    journal = store.folder / "study.journal"
    new = store.folder / ".study.journal.repaired"
    new.unlink(missing_ok=True)
    storage = open_journal(new)
    for study in studies:
        created = optuna.create_study(
            study_name=study.name, storage=storage, directions=study.directions
        )
        for name, value in study.attributes.items():
            created.set_user_attr(name, value)
        study_id = storage.get_study_id_from_name(study.name)
        for trial in study.trials:
            storage.create_new_trial(study_id, trial)
    if journal.is_file() and journal.stat().st_size:
        stamp = datetime.now().strftime("%Y%m%dT%H%M%S")
        copy = journal.with_name(f"study.journal.damaged-{stamp}")
        shutil.copy2(journal, copy)
        result.copy = str(copy)
    new.replace(journal)
    new.with_name(f".{new.name}.lock").unlink(missing_ok=True)
